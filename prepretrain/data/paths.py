"""Which files a source reads: a folder, a glob, braces or a list of these, in a fixed order."""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


def find_files(path: str | list[str], ending: str, what: str) -> list[Path]:
    """The files, sorted within each folder, glob and number of a range; all that are named must be
    there.

    A path is a folder (its files of this ending), a file, a glob, in which ** stands for any
    folders, or holds braces ({00000..00004}, {a,b}); or there is a list of such. Raises ValueError,
    also for a folder that holds several splits.
    """
    paths = [path] if isinstance(path, str) else path
    found = [file for one in paths for file in _of_one(one, ending, what)]
    if len(set(found)) != len(found):
        seen: set[Path] = set()
        twice = next(file for file in found if file in seen or seen.add(file))
        raise ValueError(f"{path}: names {twice} twice.")
    for file in found:
        if not file.is_file():
            kind = "a folder" if file.is_dir() else "no file"
            raise ValueError(f"{file}: is {kind}, not a {what}.")
    if not found:
        raise ValueError(f"{path}: there is no {what} here.")
    return found


def _of_one(path: str, ending: str, what: str) -> list[Path]:
    if "://" in path:
        raise ValueError(f"{path}: is read from local disks only. Copy it here.")
    if os.path.isdir(path):
        return _in_folder(path, ending, what)
    return [file for one in _unfolded(path) for file in _matching(one, what)]


def _in_folder(path: str, ending: str, what: str) -> list[Path]:
    names = sorted(name for name in os.listdir(path) if name.endswith(ending) and name[0] != ".")
    if not names:
        below = next(glob.iglob(f"{glob.escape(path)}/**/*{ending}", recursive=True), None)
        hint = f" There are some below it: path: {path}/**/*{ending}" if below else ""
        raise ValueError(f"{path}: there is no {what} here.{hint}")
    splits = defaultdict(list)
    for name in names:
        words = re.split(r"[-_. ]", name.lower())
        splits[next((_SPLITS[word] for word in words if word in _SPLITS), None)].append(name)
    if len(splits.keys() - {None}) > 1:
        held = "; ".join(f"{split or 'other'}: {files[0]}, …" for split, files in splits.items())
        raise ValueError(
            f"{path}: holds several splits ({held}), which would become one. Name the files of one, as "
            f"in path: {path}/train-*{ending}"
        )
    return [Path(path, name) for name in names]


def _unfolded(path: str) -> Iterator[str]:
    """The paths that the braces of one stand for."""
    braces = None if os.path.lexists(path) else _BRACES.search(path)
    if not braces:
        yield path
        return
    low, high, words = braces.groups()
    if words is None and int(low) > int(high):
        raise ValueError(f"{path}: the range {braces[0]} is empty.")
    if words is None:
        inner = [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    else:
        inner = words.split(",")
    for middle in inner:
        yield from _unfolded(path[: braces.start()] + middle + path[braces.end() :])


def _matching(path: str, what: str) -> list[Path]:
    if os.path.lexists(path):
        return [Path(path)]
    solid = Path(path)
    while not solid.is_dir():
        solid = solid.parent
    rest = str(Path(path).relative_to(solid))
    if not glob.has_magic(rest):
        raise ValueError(f"{path}: there is no such {what}.")
    pattern = os.path.join(glob.escape(str(solid)), rest)  # brackets of a folder's name are none
    return sorted(map(Path, glob.glob(pattern, recursive=True)))
