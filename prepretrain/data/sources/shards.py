"""Tar shards in img2dataset's (webdataset's) layout, read at random through an index of our own."""

import errno
import os
import resource
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from prepretrain.data import names, values
from prepretrain.data.keep import read_weights
from prepretrain.data.paths import find_files
from prepretrain.data.sources.base import Source, fingerprint_of, stamp_of
from prepretrain.data.subset import evenly
from prepretrain.data.tar_index import MEMBERS, Index, read_head
from prepretrain.data.transforms import BadImage
from prepretrain.distributed import heartbeat

MAX_MEMBER = 64_000_000  # not from the paper: bytes of one member, checked before it is read

_MAPPINGS = Path("/proc/sys/vm/max_map_count")  # Linux's
_LOOK = (16, 400)  # shards, and samples in all, that are looked at for what json members hold
_LOOK_FOR = (100, 10_000)  # and where the options name something that these have not


class Shards(Source):
    """Shards by folder, glob, brace pattern ({00000..00004}.tar) or a list, in the order of their names.

    A sample is a run of members with one key: the path up to the last dot, so that a.b.jpg and
    a.c.jpg are two images (webdataset would merge them under a). Members of other types than images
    (names.IMAGES), txt, json and cls are never read. `hashtags`, `text`, `captions` and `label` say
    where those are: a member ("txt") or a value of the json member ("json.hashtags"; see
    data/values.py for what it may be). Missing hashtags and captions are [], a missing text is "", a
    missing label is absent. What is named here must be there; the defaults are fields where a look
    at some samples, spread over all shards, finds them. `keep`: a folder of weights (data/keep.py).
    """

    def __init__(
        self,
        *,
        path: str | list[str],
        hashtags: str = "json.hashtags",
        text: str = "txt",
        captions: str = "json.captions",
        label: str = "cls",
        keep: str | None = None,
    ):
        self.places = {"label": label, "hashtags": hashtags, "text": text, "captions": captions}
        for option, place in self.places.items():
            if place not in MEMBERS and not place.startswith("json."):
                raise ValueError(
                    f"source.{option}: {place!r} is no place in a sample. There are: "
                    "txt, cls, json.<name>."
                )
        self.paths = find_files(path, ".tar", ".tar shard")
        heads = []
        for (
            shard
        ) in self.paths:  # half a million take minutes, longer where indexes are to be built
            heartbeat.beat(f"opening {shard}")
            heads.append(read_head(shard))
        self.left_out = sum((Counter(head["left_out"]) for head in heads), Counter())
        names.say_left_out(path, self.left_out)
        self.groups = [head["samples"] for head in heads]
        self.fingerprint = fingerprint_of(head["digest"] for head in heads)
        self.stamp = stamp_of(map(os.stat, self.paths))
        self._starts = np.cumsum(self.groups) - self.groups
        self._length = sum(self.groups)
        if keep is not None:
            self.weights = read_weights(Path(keep), self.paths, self.groups)
        self._opened: OrderedDict[int, _Shard] = OrderedDict()
        self.open_at_once = _most_open(len(self.paths))
        self.fields = ("image", *self._present({f for head in heads for f in head["fields"]}, path))

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
        found = self._some(index, (field,))
        if field not in found:
            raise BadImage(f"no {field}", f"in {shard.path}", shard.index.key(row))
        return found[field]

    def _find(self, index: int) -> tuple["_Shard", int]:
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} of {self._length}")
        number = int(self._starts.searchsorted(index, side="right")) - 1
        return self._shard(number), int(index - self._starts[number])

    def _sample(self, key: str, shard: "_Shard", row: int) -> dict:
        image = next((field for field in names.IMAGES if shard.index.has(row, field)), None)
        if image is None:
            raise BadImage("no image", f"{shard.path} has no jpg, png, webp, … under this key")
        return {
            "key": key,
            "image": shard.read(row, image),
            **self._values(shard, row, self.fields[1:]),
        }

    def _values(self, shard: "_Shard", row: int, wanted: tuple[str, ...]) -> dict:
        places = {field: self.places[field] for field in wanted}
        members = {place.partition(".")[0] for place in places.values()}
        read = {m: shard.read(row, m) for m in members if shard.index.has(row, m)}
        details = values.mapping(read.get("json"))
        found = {}
        for field, place in places.items():
            member, _, name = place.partition(".")
            value = details.get(name) if name else read.get(member)
            value = values.CONVERT[field](value)
            if value is not None:
                found[field] = value
        return found

    def _present(self, members: set[str], path: str | list[str]) -> Iterator[str]:
        """The fields that there are; an error for one that is named in the options and is not."""
        defaults = type(self).__init__.__kwdefaults__
        places = {field: place.partition(".")[::2] for field, place in self.places.items()}
        asked = {f for f, place in self.places.items() if place != defaults[f]}
        wanted = {field: name for field, (_, name) in places.items() if name}
        seen = self._names(set(wanted.values()), *_LOOK)
        if missing := {name for f, name in wanted.items() if f in asked} - seen:
            seen |= self._names(missing, *_LOOK_FOR)
        for field, (member, name) in places.items():
            if member in members and (not name or name in seen):
                yield field
            elif field in asked:
                there = [f"json.{name}" for name in sorted(seen)] if name else sorted(members)
                raise ValueError(
                    f"{path}: there is no {self.places[field]} (source.{field}). There are: "
                    f"{', '.join(there[:20]) or 'none'}."
                )

    def _names(self, wanted: set[str], shards: int, samples: int) -> set[str]:
        """The names in json members, looked for in some samples of some shards, spread evenly, until
        all that are wanted have been seen."""
        seen: set[str] = set()
        filled = np.flatnonzero(self.groups)
        chosen = filled[evenly(len(filled), shards)].tolist()
        for number in chosen:
            for row in evenly(self.groups[number], -(-samples // len(chosen))):
                if wanted <= seen:
                    return seen
                shard = self._shard(number)
                if shard.index.has(row, "json"):
                    with suppress(BadImage):  # counted when the image itself is read
                        seen |= values.mapping(shard.read(row, "json")).keys()
        return seen

    def _shard(self, number: int) -> "_Shard":
        if number in self._opened:
            self._opened.move_to_end(number)
        else:
            self._opened[number] = _Shard(self.paths[number])
            if len(self._opened) > self.open_at_once:
                self._opened.popitem(last=False)[1].close()
        return self._opened[number]


def _most_open(shards: int) -> int:
    """How many of so many shards are held open at once; others are closed and opened again, which
    takes ten times as long as reading an image.

    An open shard takes two files and a mapping, and a source takes a quarter of what its process may
    have. Where that is too few, the process's limit of files is raised as far as it may be.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    files, highest = (sys.maxsize if n == resource.RLIM_INFINITY else n for n in limits)
    if files < 8 * shards:
        files = min(8 * shards, highest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, limits[1]))
    mappings = int(_MAPPINGS.read_text()) if _MAPPINGS.exists() else sys.maxsize
    return max(1, min(shards, files // 8, mappings // 4))


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
