"""What labels stand for where they are not one class each: groups of another card's, or several
right answers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prepretrain.files import read_json

# "ILSVRC2012_val_00000293.JPEG", and with its class as on the Hugging Face hub. What has no
# extension is no file's name: keys of shards count in the order in which they were packed.
_NUMBER = re.compile(r"(\d+)(_n\d{8})?\.\w+$")


@dataclass(frozen=True)
class Groups:
    """Label i stands for the classes[i] of the card `of`; each class is in one group at most."""

    of: str
    classes: list[list[int]]


def read_groups(given: object, where: str) -> Groups:
    """A card's {of: name, classes: [6, 11, [409, 530]]}; raises ValueError."""
    if not isinstance(given, dict) or given.keys() != {"of", "classes"}:
        raise ValueError(
            f"{where}: must be a mapping with of and classes, such as "
            "{of: imagenet1k, classes: [6, 11, [409, 530]]}."
        )
    rows = given["classes"]
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{where}.classes: {rows!r} is not a list of numbers, in label order.")
    rows = [row if isinstance(row, list) else [row] for row in rows]
    seen: dict[int, int] = {}
    for label, row in enumerate(rows):
        if not row or not _are_classes(row):
            raise ValueError(
                f"{where}.classes[{label}]: {row!r}: is no number of a class (0, 1, …), and no "
                "list of some."
            )
        for index in row:
            if index in seen:
                raise ValueError(
                    f"{where}.classes: class {index} is in group {seen[index]} and in group "
                    f"{label}, which nothing could tell apart."
                )
            seen[index] = label
    return Groups(str(given["of"]), rows)


def answers(path: Path, keys: Iterable[str]) -> list[list[int]]:
    """The right classes of the images of these keys, from a JSON list with a list for each image.

    The file has the order of the images' numbers, which end their files' names and start at 1; a
    source by class folders has another. Raises ValueError for a key without such a number, one
    that the file does not reach, and one that comes twice.
    """
    rows = read_json(path, list)
    if not all(isinstance(r, list) and _are_classes(r) for r in rows):
        raise ValueError(f"{path}: is no list that holds a list of class numbers for each image.")
    found: dict[int, str] = {}
    for key in keys:
        number = _number(key, len(rows), path)
        if number in found:
            raise ValueError(f"'{found[number]}' and '{key}' have the same number, {number}.")
        found[number] = key
    return [rows[number - 1] for number in found]


def _number(key: str, count: int, path: Path) -> int:
    found = _NUMBER.search(key)
    if not found:
        raise ValueError(
            f"'{key}' is no file name with a number at its end, as in ILSVRC2012_val_00000001.JPEG, "
            f"so it is unknown which answer of {path} is its own."
        )
    if not 1 <= int(found[1]) <= count:
        raise ValueError(f"'{key}' has number {int(found[1])}, and {path} holds 1 to {count}.")
    return int(found[1])


def _are_classes(row: list) -> bool:
    return all(type(index) is int and index >= 0 for index in row)
