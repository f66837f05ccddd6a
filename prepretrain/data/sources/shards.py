"""Tar shards in img2dataset's (webdataset's) layout, read at random through an index of our own."""

import errno
import glob
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from prepretrain.data.sources.base import Source, fingerprint_of, stamp_of
from prepretrain.data.tar_index import IMAGES, MEMBERS, Index, read_head
from prepretrain.data.transforms import BadImage

MAX_MEMBER = 64_000_000  # not from the paper: bytes of one member, checked before it is read

_OPEN = 256  # shards held open at once; more are closed and opened again


class Shards(Source):
    """Shards by folder, glob or brace pattern ({00000..00004}.tar), in the order of their names.

    A sample is a run of members with one key: the path up to the last dot, so that a.b.jpg and
    a.c.jpg are two images (webdataset would merge them under a). Members of other types than jpg
    jpeg png webp txt json cls are never read. `hashtags`, `text`, `captions` and `label` say where
    those are: a member ("txt") or a value of the json member ("json.hashtags"; a list, or a string
    separated by spaces or commas; "json.captions": a list, or a string that is one). Missing
    hashtags and captions are [], a missing text is "", a missing label is absent.
    """

    def __init__(
        self,
        *,
        path: str,
        hashtags: str = "json.hashtags",
        text: str = "txt",
        captions: str = "json.captions",
        label: str = "cls",
    ):
        self.places = {"label": label, "hashtags": hashtags, "text": text, "captions": captions}
        for option, place in self.places.items():
            if place not in MEMBERS and not place.startswith("json."):
                raise ValueError(
                    f"source.{option}: {place!r} is no place in a sample. There are: "
                    "txt, cls, json.<name>."
                )
        self.paths = find_shards(path)
        heads = [read_head(shard) for shard in self.paths]
        self.groups = [head["samples"] for head in heads]
        self.fingerprint = fingerprint_of(head["digest"] for head in heads)
        self.stamp = stamp_of(map(os.stat, self.paths))
        self._starts = np.cumsum(self.groups) - self.groups
        self._length = sum(self.groups)
        self._opened: OrderedDict[int, _Shard] = OrderedDict()
        self.fields = ("image", *self._present({f for head in heads for f in head["fields"]}))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        shard, row = self._find(index)
        key = shard.index.key(row)
        try:
            return self._sample(key, shard, row)
        except BadImage as error:
            raise BadImage(error.cause, error.detail, key) from error

    def key(self, index: int) -> str:
        shard, row = self._find(index)
        return shard.index.key(row)

    def label(self, index: int) -> int:
        return self._value(index, "label")

    def hashtags(self, index: int) -> list[str]:
        return self._value(index, "hashtags")

    def texts(self, index: int) -> dict:
        return self._some(index, tuple(f for f in ("text", "captions") if f in self.fields))

    def _some(self, index: int, fields: tuple[str, ...]) -> dict:
        shard, row = self._find(index)
        try:
            return self._values(shard, row, fields)
        except BadImage as error:
            raise BadImage(error.cause, error.detail, shard.index.key(row)) from error

    def _value(self, index: int, field: str):
        shard, row = self._find(index)
        values = self._some(index, (field,))
        if field not in values:
            raise BadImage(f"no {field}", f"in {shard.path}", shard.index.key(row))
        return values[field]

    def _find(self, index: int) -> tuple["_Shard", int]:
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} of {self._length}")
        number = int(self._starts.searchsorted(index, side="right")) - 1
        return self._shard(number), int(index - self._starts[number])

    def _sample(self, key: str, shard: "_Shard", row: int) -> dict:
        image = next((field for field in IMAGES if shard.index.has(row, field)), None)
        if image is None:
            raise BadImage("no image", f"{shard.path} has no jpg, png or webp under this key")
        return {
            "key": key,
            "image": shard.read(row, image),
            **self._values(shard, row, self.fields[1:]),
        }

    def _values(self, shard: "_Shard", row: int, wanted: tuple[str, ...]) -> dict:
        places = {field: self.places[field] for field in wanted}
        members = {place.partition(".")[0] for place in places.values()}
        read = {m: shard.read(row, m) for m in members if shard.index.has(row, m)}
        details = _json(read.get("json"))
        values = {}
        for field, place in places.items():
            member, _, name = place.partition(".")
            found = details.get(name) if name else read.get(member)
            value = _CONVERT[field](found)
            if value is not None:
                values[field] = value
        return values

    def _present(self, members: set[str]) -> Iterator[str]:
        """The fields that there are; of values in json, those among the first samples."""
        for field, place in self.places.items():
            member, _, name = place.partition(".")
            if member in members and (not name or name in self._first_names()):
                yield field

    def _first_names(self) -> set[str]:
        names: set[str] = set()
        for number in np.flatnonzero(self.groups)[:2]:
            shard = self._shard(int(number))
            for row in range(min(100, self.groups[number])):
                if shard.index.has(row, "json"):
                    with suppress(BadImage):  # counted when the image itself is read
                        names |= _json(shard.read(row, "json")).keys()
        return names

    def _shard(self, number: int) -> "_Shard":
        if number in self._opened:
            self._opened.move_to_end(number)
        else:
            self._opened[number] = _Shard(self.paths[number])
            if len(self._opened) > _OPEN:
                self._opened.popitem(last=False)[1].close()
        return self._opened[number]


def _json(data: bytes | None) -> dict:
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except ValueError as error:
        raise BadImage("bad metadata", f"json: {error}") from error
    if not isinstance(value, dict):
        raise BadImage("bad metadata", f"json: a {type(value).__name__}, not a mapping")
    return value


def _tags(found: object) -> list[str]:
    if found is None:
        return []
    if isinstance(found, bytes):
        found = _text(found)
    if isinstance(found, str):
        return found.replace(",", " ").split()
    if not isinstance(found, list) or not all(isinstance(tag, str) for tag in found):
        raise BadImage("bad metadata", f"hashtags: {str(found)[:80]!r} is no list of texts")
    return found


def _text(found: object) -> str:
    if not isinstance(found, bytes):
        if isinstance(found, (list, dict)):
            raise BadImage("bad metadata", f"text: {str(found)[:80]!r} is no text")
        return "" if found is None else str(found)
    try:
        return found.decode()
    except UnicodeDecodeError as error:
        raise BadImage("bad metadata", f"text: {error}") from error


def _captions(found: object) -> list[str]:
    if isinstance(found, list) and all(isinstance(caption, str) for caption in found):
        return found
    if isinstance(found, list):
        raise BadImage("bad metadata", f"captions: {str(found)[:80]!r} is no list of texts")
    return [_text(found)] if found else []


def _label(found: object) -> int | None:
    try:
        return None if found is None else int(found)
    except (ValueError, TypeError) as error:
        raise BadImage("bad metadata", f"label: {str(found)[:80]!r} is no number") from error


_CONVERT = {"hashtags": _tags, "text": _text, "captions": _captions, "label": _label}


def find_shards(path: str) -> list[Path]:
    """The shards of a folder, a glob or a brace pattern, sorted; all of a range must be there."""
    if "://" in path:
        raise ValueError(f"{path}: shards are read from local disks. Copy them here.")
    if os.path.isdir(path):
        found = sorted(Path(path).glob("*.tar"))
    else:
        found = [p for part in _ranges(path) for p in _matching(part)]
    if not found:
        raise ValueError(f"{path}: there is no .tar shard here.")
    return found


def _ranges(path: str) -> Iterator[str]:
    pattern = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if not pattern:
        yield path
        return
    low, high = pattern.groups()
    if int(low) > int(high):
        raise ValueError(f"{path}: the range {pattern[0]} is empty.")
    for number in range(int(low), int(high) + 1):
        middle = str(number).zfill(len(low))
        yield from _ranges(path[: pattern.start()] + middle + path[pattern.end() :])


def _matching(path: str) -> list[Path]:
    if glob.has_magic(path):
        return sorted(map(Path, glob.glob(path)))
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such shard.")
    return [Path(path)]


class _Shard:
    """One open shard and its index; `pread` keeps no position, so forked workers may share it."""

    def __init__(self, path: Path):
        self.path, self.index = path, Index(path)
        self._file = os.open(path, os.O_RDONLY)

    def read(self, row: int, field: str) -> bytes:
        offset, size = self.index.span(row, field)
        if size > MAX_MEMBER:
            raise BadImage("too large", f"{field}: {size} bytes, the limit is {MAX_MEMBER}")
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise OSError(
                errno.ESTALE,
                f"{self.path}: {len(data)} of {size} bytes at offset {offset}: the file "
                "was cut since it was opened.",
            )
        return data

    def close(self) -> None:
        os.close(self._file)
