"""Images in folders: one folder a class, or one folder of unlabelled images."""

import os
from collections.abc import Iterator
from typing import Literal

from prepretrain.data.sources.base import Files

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Folder(Files):
    """`<path>/<class>/**/*.jpg`, labelled by class; or `<path>/*.jpg`, without labels.

    classes  the folders that are read, in label order; or how many folders there must be
    labels   "name": a label is the place of the folder's name among the sorted ones; "number":
             the folders are called 0, 1, 2, …, which are the labels
    border   pixels that are cut off each side of every image
    """

    def __init__(
        self,
        *,
        path: str,
        classes: list[str] | int | None = None,
        labels: Literal["name", "number"] = "name",
        border: int = 0,
    ):
        if border < 0:
            raise ValueError(f"source.border: {border} is no number of pixels.")
        if not os.path.isdir(path):
            raise ValueError(f"{path}: is no folder.")
        folders, loose = _scan(path)
        if isinstance(classes, list):
            _check_named(path, classes, labels, folders)
            folders = classes
        elif classes is not None and len(folders) != classes:
            raise ValueError(
                f"{path}: expected {classes:,} folders, one a class, and found "
                f"{_found(path, folders, loose)} (datasets/README.md says how it should lie)."
            )
        else:
            folders = _numbered(path, folders, labels)
        names, numbers = loose, None
        if folders:
            found = [sorted(_images_below(path, folder)) for folder in folders]
            names = [name for images in found for name in images]
            numbers = [label for label, images in enumerate(found) for _ in images]
            self.classes = folders
        super().__init__(path, names, numbers, border=border)


def _scan(path: str) -> tuple[list[str], list[str]]:
    """The folders and the images that lie directly in a folder, both sorted."""
    folders = sorted(e.name for e in os.scandir(path) if e.is_dir() and e.name[0] != ".")
    loose = sorted(e.name for e in os.scandir(path) if e.is_file() and _is_image(e.name))
    if loose and folders:
        raise ValueError(
            f"{path}: holds folders ({folders[0]}, …) and images ({loose[0]}, …). "
            "A labelled set has one folder a class, an unlabelled set none."
        )
    return folders, loose


def _check_named(path: str, classes: list[str], labels: str, folders: list[str]) -> None:
    if labels == "number":
        raise ValueError(
            "source.labels: number orders the folders, and so does the list source.classes. "
            "Leave one of them out."
        )
    if absent := sorted(set(classes) - set(folders)):
        raise ValueError(
            f"{path}: there is no folder for the classes {', '.join(absent)}. "
            f"There are: {', '.join(folders) or 'none'}."
        )


def _numbered(path: str, folders: list[str], labels: str) -> list[str]:
    """The folders in label order.

    By name, "10" comes before "2": numbers in that order would give nearly every image the label
    of another class, and a trained model an accuracy of chance.
    """
    numeric = all(name.isdecimal() for name in folders)
    if labels == "name":
        if numeric and sorted(folders, key=int) != folders:
            raise ValueError(
                f"{path}: the folders are numbers, and sorted by name '10' comes before '2'. If the "
                "number is the label, set source.labels: number; else list source.classes in label "
                "order."
            )
        return folders
    if not folders or not numeric or sorted(map(int, folders)) != list(range(len(folders))):
        right = {str(number) for number in range(len(folders))}
        odd = next((name for name in folders if name not in right), "no folder")
        raise ValueError(
            f"{path}: source.labels: number expects folders called 0, 1, 2, … without a gap, and "
            f"there is {odd}. Folders with other names want source.labels: name."
        )
    return sorted(folders, key=int)


def _found(path: str, folders: list[str], loose: list[str]) -> str:
    """What lies in a folder, in words."""
    if folders:
        return f"{len(folders):,} ({', '.join(folders[:3])}{', …' if len(folders) > 3 else ''})"
    if loose:
        return f"none, but {len(loose):,} images that lie flat ({loose[0]}, …)"
    others = sorted(e.name for e in os.scandir(path))
    return f"none, but {len(others):,} other files ({others[0]}, …)" if others else "nothing"


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _images_below(path: str, folder: str) -> Iterator[str]:
    for at, _, names in os.walk(os.path.join(path, folder)):
        inside = os.path.relpath(at, path)
        yield from (os.path.join(inside, name) for name in names if _is_image(name))
