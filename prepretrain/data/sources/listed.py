"""Images that a list file names, as many data sets give their splits and subsets."""

import json
import os
import re
from pathlib import Path

from prepretrain.data.sources.base import Files, check_names, fingerprint_of

_LABELLED = re.compile(r"(.+?)\s+(\d+)")
_JSON = ("images", "annotations", "categories")


class Listed(Files):
    """The images that a list names, in its order; their paths start at the folder `path`.

    listing  a text file with an image a line, "path label", or "path" alone, whose label is the
             place of its first folder among the sorted folders of `path`; or a .json file like
             iNaturalist's, with images, annotations (one an image) and categories, whose label is
             the place of the category's id among the sorted ids
    suffix   what the list leaves out at the end of each path, such as .jpg
    """

    def __init__(self, *, path: str, listing: str, suffix: str = ""):
        if not os.path.isdir(path):
            raise ValueError(f"{path}: is no folder; looked at {os.path.abspath(path)}.")
        if not os.path.isfile(listing):
            raise ValueError(f"{listing}: is no file.")
        read = _read_json if listing.endswith(".json") else _read_text
        names, labels, self.classes = read(listing, path)
        names = [name.lstrip("/") + suffix for name in names]
        check_names(names, path, listing)
        super().__init__(path, names, labels)
        self.fingerprint = fingerprint_of([self.fingerprint, *labels])

    @classmethod
    def class_names(cls, *, path: str, listing: str, **_: object) -> list[str] | None:
        """See Source.class_names; a .json file is not read for them."""
        if listing.endswith(".json"):
            return None
        with open(listing, errors="surrogateescape") as file:
            first = next((line.strip() for line in file if line.strip()), "")
        return None if _LABELLED.fullmatch(first) else _folders(path)


def _folders(path: str) -> list[str]:
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and e.name[0] != ".")


def _read_text(listing: str, path: str) -> tuple[list[str], list[int], list[str] | None]:
    written = Path(listing).read_text(errors="surrogateescape")  # names need not be UTF-8
    lines = [line.strip() for line in written.removeprefix("\ufeff").splitlines()]
    lines = [line for line in lines if line]
    matches = [_LABELLED.fullmatch(line) for line in lines]
    if lines and all(matches):
        return [match[1] for match in matches], [_label(match, listing) for match in matches], None
    if any(matches):
        odd = lines[matches.index(None)]
        raise ValueError(
            f"{listing}: '{odd}' has no label, and other lines have one, as in 'cat/1.jpg 0'."
        )
    classes = _folders(path)
    places = {name: label for label, name in enumerate(classes)}
    labels = [places.get(line.lstrip("/").partition("/")[0]) for line in lines]
    if None in labels:
        raise ValueError(
            f"{listing}: '{lines[labels.index(None)]}' names no folder of {path}, where there are "
            f"{len(classes)}: {', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}."
        )
    return lines, labels, classes


def _label(line: re.Match, listing: str) -> int:
    if len(line[2]) > 9:
        raise ValueError(f"{listing}: '{line[0][:200]}' has a label past 999,999,999.")
    return int(line[2])


def _read_json(listing: str, _: str) -> tuple[list[str], list[int], list[str] | None]:
    try:
        content = json.loads(Path(listing).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{listing}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or any(key not in content for key in _JSON):
        raise ValueError(
            f"{listing}: is no mapping with {', '.join(_JSON)}, as iNaturalist's files are."
        )
    try:
        return _labelled(content, listing)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{listing}: is not as iNaturalist's files are: {type(error).__name__}: {error}"
        ) from error


def _labelled(content: dict, listing: str) -> tuple[list[str], list[int], list[str]]:
    categories = sorted(content["categories"], key=lambda one: one["id"])
    places = {one["id"]: label for label, one in enumerate(categories)}
    labels: dict[int, int] = {}
    for one in content["annotations"]:
        image = one["image_id"]
        if image in labels:
            raise ValueError(
                f"{listing}: image {image} has several annotations, and a label is one."
            )
        if one["category_id"] not in places:
            raise ValueError(
                f"{listing}: image {image} is of category {one['category_id']}, which is not among "
                f"its {len(places)} categories."
            )
        labels[image] = places[one["category_id"]]
    if bare := [one["file_name"] for one in content["images"] if one["id"] not in labels]:
        raise ValueError(f"{listing}: {len(bare)} images have no annotation: {bare[0]}, …")
    images = content["images"]
    names = [str(one.get("name", one["id"])) for one in categories]
    return [str(one["file_name"]) for one in images], [labels[one["id"]] for one in images], names
