"""Reads back small files of the project's own, which may be damaged or somebody else's, and writes
files whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where fetched files lie: PREPRETRAIN_CACHE, else ~/.cache/prepretrain."""
    return Path(os.environ.get("PREPRETRAIN_CACHE") or "~/.cache/prepretrain").expanduser()


def offline() -> bool:
    """Whether PREPRETRAIN_OFFLINE forbids the network."""
    return os.environ.get("PREPRETRAIN_OFFLINE", "0") not in ("", "0")


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file that holds a value of a type.

    Raises OSError where it cannot be read, and ValueError, with the file's name, for anything else.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # torn, not UTF-8, or brackets without end
        raise ValueError(f"{path}: is damaged: not readable as JSON: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{path}: is damaged: it holds {_shown(found)} and no {kind.__name__}.")
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Writes a value as JSON, durably, and whole or not at all; long ones are faster without indent."""
    with draft(path) as place:
        place.write_text(json.dumps(value, indent=indent) + "\n")


@contextlib.contextmanager
def draft(path: Path) -> Iterator[Path]:
    """Gives an empty file beside `path`, which takes its name, durably, once the block has ended
    well, and is removed otherwise.

    Its name cannot be guessed, and nothing that was there is opened: two processes may write at
    once, and nobody who may write to the folder can lay a link that leads the writer elsewhere.
    """
    place = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    os.close(create(place))
    try:
        yield place
        handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(place, path)
    finally:
        place.unlink(missing_ok=True)


def create(path: Path) -> int:
    """Opens a file for writing that was not there, not even as a link. Raises FileExistsError."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
