"""Which files a source reads: a folder, a glob, braces or a list of these, in a fixed order."""

import glob
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prepretrain.data.io import remote

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_SHARDS = (".tar", ".tar shard")
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


def find_shards(path: str | list[str]) -> list[Path | remote.Remote]:
    """What `find_files` finds of tar shards, also of URLs (s3://bucket/web/*.tar), in the same order.

    A web server cannot list what it has: each file is named there, by braces. Raises ValueError.
    """
    paths = [path] if isinstance(path, str) else path
    if not any(remote.is_remote(one) for one in paths):
        return [*find_files(path, *_SHARDS)]
    found: list[Path | remote.Remote] = []
    for one in paths:
        found += _of_url(one) if remote.is_remote(one) else find_files(one, *_SHARDS)
    if twice := [file for file, count in Counter(found).items() if count > 1]:
        raise ValueError(f"{twice[0]}: is named twice.")
    return found


def _local(path: str) -> str:
    """The path of a file:// URL, which is no URL to anything else."""
    return unquote(urlsplit(path).path) if path.startswith("file://") else path


def _of_url(url: str) -> list[remote.Remote]:
    ending, what = _SHARDS
    try:
        urls = [*_unfolded(url)]
        lists = remote.can_list(url)
        if not lists and (folders := [one for one in urls if not _is_file(one, ending)]):
            raise ValueError(
                f"{remote.shown(folders[0])}: a web server does not say which files it has. Name each "
                f"{what} by braces, as in https://host/folder/{{00000..00127}}{ending}."
            )
        if not lists or all(_is_file(one, ending) and not glob.has_magic(one) for one in urls):
            return remote.named(urls)
        return [file for one in urls for file in _in_store(one)]
    except remote.Unreachable as error:
        raise ValueError(str(error)) from None


def _in_store(url: str) -> list[remote.Remote]:
    """The files of a folder or a glob of a store."""
    ending, what = _SHARDS
    if not glob.has_magic(url):
        files = {file.name: file for file in remote.listed(url.rstrip("/"))}
        return [files[name] for name in _of_folder(remote.shown(url), [*files], ending, what)]
    if not (found := remote.matching(url)):
        raise ValueError(f"{remote.shown(url)}: there is no {what} here.")
    return found


def _is_file(url: str, ending: str) -> bool:
    path = url.partition("?")[0]  # which begins a query on the web, and a pattern in a store
    return path.endswith(ending) and "*" not in path


def _of_one(path: str, ending: str, what: str) -> list[Path]:
    path = _local(path)
    if "://" in path:
        raise ValueError(f"{remote.shown(path)}: is read from local disks only. Copy it here.")
    if os.path.isdir(path):
        return _in_folder(path, ending, what)
    return [file for one in _unfolded(path) for file in _matching(one, what)]


def _in_folder(path: str, ending: str, what: str) -> list[Path]:
    inside = os.listdir(path)
    if not any(name.endswith(ending) for name in inside):
        below = next(glob.iglob(f"{glob.escape(path)}/**/*{ending}", recursive=True), None)
        hint = f" There are some below it: path: {path}/**/*{ending}" if below else ""
        raise ValueError(f"{path}: there is no {what} here.{hint}")
    return [Path(path, name) for name in _of_folder(path, inside, ending, what)]


def _of_folder(path: str, inside: list[str], ending: str, what: str) -> list[str]:
    """Those names in a folder that are read, in order; an error where they are of several splits."""
    names = sorted(name for name in inside if name.endswith(ending) and name[0] != ".")
    if not names:
        raise ValueError(f"{path}: there is no {what} here.")
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
    return names


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
