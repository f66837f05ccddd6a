"""Which images of an evaluation have near-copies in the data that a model was trained on, as stage
`leaks` of that data's curation has found them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prepretrain.data.sources.base import Source, fingerprint_of
from prepretrain.files import read_json, write_json


@dataclass(frozen=True)
class Leaked:
    """What was found of an evaluation set."""

    fingerprint: str  # of the set
    images: int
    leaked: list[int]  # the numbers of those images that have near-copies
    unreadable: list[str]  # the keys of those that could not be decoded, and so not be looked for


def write(folder: Path, data: str, sets: dict[str, Leaked]) -> None:
    """Writes what was found in a curation's folder of `data` ("card:split"), by "card:split" of the sets."""
    found = {address: asdict(found) for address, found in sets.items()}
    write_json(_file(folder), {"data": data, "sets": found})


def read(folder: Path, address: str, source: Source) -> Tensor:
    """bool [n]: which images of a set have near-copies.

    Raises ValueError where they were not looked for, or not in this set as it is now: no leak that
    is known of is then no sign that there is none.
    """
    content = content_of(folder)
    if address not in content["sets"]:
        raise ValueError(
            f"{_file(folder)}: near-copies of {', '.join(content['sets'])} were looked for, not of {address}. "
            "Add it to stage leaks' `against`, and run the recipe again."
        )
    try:
        found = Leaked(**content["sets"][address])
    except TypeError as error:
        raise ValueError(f"{_file(folder)}: is damaged: {error}.") from error
    if found.fingerprint != source.fingerprint or found.images != len(source):
        raise ValueError(
            f"{_file(folder)}: is of {address} with {found.images} images and fingerprint {found.fingerprint}; "
            f"it has {len(source)} and {source.fingerprint} now. Run the recipe again with --again."
        )
    mask = torch.zeros(found.images, dtype=torch.bool)
    mask[found.leaked] = True
    return mask


def state(folder: Path) -> list[str]:
    """Of which data it is, and a digest of what was found: a certificate holds as long as they do."""
    content = content_of(folder)
    return [content["data"], fingerprint_of([content["sets"]])]


def content_of(folder: Path) -> dict[str, Any]:
    """What was written. Raises ValueError where it is missing or damaged."""
    file = _file(folder)
    if not file.exists():
        raise ValueError(
            f"leaks={folder}: there is no {file.name} in {file.parent}. Curate the training data with "
            "stage leaks first."
        )
    content = read_json(file)
    if not isinstance(content.get("data"), str) or not isinstance(content.get("sets"), dict):
        raise ValueError(f"{file}: is damaged: it needs `data` and `sets`. Run its stage again.")
    return content


def _file(folder: Path) -> Path:
    return folder / "leaks" / "found.json"
