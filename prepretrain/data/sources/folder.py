"""Images in folders: one folder a class, or one folder of unlabelled images."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from prepretrain.data.io.names import is_image, left_out, say_left_out
from prepretrain.data.sources.base import Files


class Folder(Files):
    """`<path>/<class>/**/*.jpg`, labelled by class; or `<path>/*.jpg`, without labels.

    classes  the folders that are read, in label order; or how many folders there must be
    labels   "name": a label is the place of the folder's name among the sorted ones; "number":
             the folders are called 0, 1, 2, …, which are the labels
    border   pixels that are cut off each side of every image

    Links are followed. What other programs leave behind (__MACOSX, hidden files and folders) is not
    read.
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
        folders, loose, self.left_out = _scan(path)
        if not isinstance(classes, list) and classes not in (None, len(folders)):
            raise ValueError(
                f"{path}: expected {classes:,} folders, one a class, and found "
                f"{_found(path, folders, loose)} (datasets/README.md says how it should lie)."
            )
        folders = _in_label_order(path, folders, classes, labels)
        names, numbers = loose, None
        if folders:
            found = [sorted(_images_below(path, folder, self.left_out)) for folder in folders]
            empty = [folder for folder, images in zip(folders, found) if not images]
            if empty and labels == "name" and classes is None:
                raise ValueError(
                    f"{path}: no image is in {', '.join(empty[:5])}{', …' if empty[5:] else ''}, so it is "
                    f"unsure whether that is a class, and labels go by the sorted names. Remove it, or "
                    f"list the classes in source.classes."
                )
            names = [name for images in found for name in images]
            numbers = [label for label, images in enumerate(found) for _ in images]
            self.classes = folders
        say_left_out(path, self.left_out)
        super().__init__(path, names, numbers, border=border)

    @classmethod
    def class_names(
        cls, *, path: str, classes: list[str] | int | None = None, labels: str = "name", **_: object
    ) -> list[str] | None:
        """See Source.class_names."""
        return _in_label_order(path, _scan(path)[0], classes, labels) or None


def _scan(path: str) -> tuple[list[str], list[str], Counter[str]]:
    """The folders and the images that lie directly in a folder, both sorted, and what is left out."""
    if not os.path.isdir(path):
        raise ValueError(f"{path}: is no folder; looked at {os.path.abspath(path)}.")
    folders, loose, others = _listed(path)
    if loose and folders:
        raise ValueError(
            f"{path}: holds folders ({folders[0]}, …) and images ({loose[0]}, …). "
            "A labelled set has one folder a class, an unlabelled set none."
        )
    if folders and os.path.isfile(os.path.join(path, f"{folders[0]}_stats.json")):
        raise ValueError(
            f"{path}: {folders[0]}, … are parts that img2dataset wrote (output_format=files), not "
            f"classes. Write output_format=webdataset, and read it with source: shards."
        )
    return folders, loose, others


def _listed(path: str) -> tuple[list[str], list[str], Counter[str]]:
    """The names of the folders and of the images in a folder, sorted, and the counts of files that may
    be taken for images and are not read. Raises ValueError for an image that is no file."""
    folders, images, others = [], [], Counter()
    try:
        entries = list(os.scandir(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}.") from error
    for entry in entries:
        if reason := left_out(entry.name):
            others[reason] += 1
        elif entry.name.startswith("."):
            continue
        elif entry.is_dir():
            folders.append(entry.name)
        elif is_image(entry.name):
            if not entry.is_file():
                kind = "a link to nothing" if entry.is_symlink() else "no file"
                raise ValueError(f"{entry.path}: is {kind}. Remove it, or restore the image.")
            images.append(entry.name)
    return sorted(folders), sorted(images), others


def _in_label_order(
    path: str, folders: list[str], classes: list[str] | int | None, labels: str
) -> list[str]:
    if isinstance(classes, list):
        _check_named(path, classes, labels, folders)
        return classes
    return _numbered(path, folders, labels)


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


def _images_below(path: str, folder: str, others: Counter[str]) -> Iterator[str]:
    """The images of a folder and those below it, each folder once, wherever links lead; `others`
    counts what is left out."""
    waiting, seen = [folder], set()
    while waiting:
        inside = waiting.pop()
        stat = os.stat(os.path.join(path, inside))
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders, images, left = _listed(os.path.join(path, inside))
        others.update(left)
        yield from (os.path.join(inside, name) for name in images)
        waiting += [os.path.join(inside, name) for name in reversed(folders)]
