"""Tar shards in img2dataset's (webdataset's) layout, read at random through an index of our own."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from prepretrain.data.io import names, values
from prepretrain.data.io.paths import find_shards
from prepretrain.data.io.remote import Remote, Unreachable
from prepretrain.data.sampling.keep import read_weights
from prepretrain.data.shards import img2dataset, opened
from prepretrain.data.shards.cache import NoSpace
from prepretrain.data.shards.columns import read_column
from prepretrain.data.shards.files import ReadAhead, beside, open_index, read_members, stamp
from prepretrain.data.shards.indexing import read_heads
from prepretrain.data.shards.opened import FarShard, OpenShard, OpenShards
from prepretrain.data.shards.tar_index import FILMS, MEMBERS
from prepretrain.data.sources.base import Source, fingerprint_of
from prepretrain.data.subset import evenly
from prepretrain.data.tags.hashtags import Tags, of_column
from prepretrain.data.transforms import BadImage
from prepretrain.data.video.container import require
from prepretrain.data.video.handles import Video

_LOOK = (16, 400)  # shards, and samples in all, that are looked at for what json members hold
_LOOK_FOR = (100, 10_000)  # and where the options name something that these have not


class Shards(Source):
    """Shards by folder, glob, brace pattern ({00000..00004}.tar) or a list, in the order of their names.

    A sample is a run of members with one key: the path up to the last dot, so that a.b.jpg and
    a.c.jpg are two images (webdataset would merge them under a). Members of other types than images
    (names.IMAGES), videos (tar_index.FILMS), txt, json and cls are never read. A video stays in its
    shard: the sample holds a handle. `hashtags`, `text`, `captions` and `label` say
    where those are: a member ("txt") or a value of the json member ("json.hashtags"; see
    data/io/values.py for what it may be). Missing hashtags and captions are [], a missing text is
    "", a missing label is absent. What is named here must be there; the defaults are fields where a look
    at some samples, spread over all shards, finds them. `keep`: a folder of weights
    (data/sampling/keep.py).
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
        self.paths = find_shards(path)
        try:
            heads = read_heads(self.paths)
            self._describe(heads)
            members = {field for head in heads for field in head["fields"]}
            self.fields = (*_pictures(members), *self._present(members))
        except (Unreachable, NoSpace) as error:
            raise ValueError(str(error)) from None
        if keep is not None:
            self.weights = read_weights(Path(keep), self.paths, self.groups)

    def _describe(self, heads: list[dict]) -> None:
        """Takes over what the heads of all indexes say."""
        self.left_out = sum((Counter(head["left_out"]) for head in heads), Counter())
        names.say_left_out(self._where(), self.left_out)
        self.groups = [head["samples"] for head in heads]
        self.fingerprint = fingerprint_of(head["digest"] for head in heads)
        self.stamp = stamp(self.paths)
        self._starts = np.cumsum(self.groups) - self.groups
        self._length = sum(self.groups)
        self._opened = OpenShards(self.paths)
        self.open_at_once, self.cached = self._opened.most, self._opened.cached
        self.reads_ahead, self._ahead = bool(self.cached), ReadAhead()

    def _where(self) -> str:
        return f"{self.paths[0]}, …" if self.paths[1:] else str(self.paths[0])

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

    def tags_of_group(self, group: int, of: Literal["hashtags", "captions"] = "hashtags") -> Tags:
        """See Source.tags_of_group: from img2dataset's Parquet file where it agrees with the shard, else in one
        pass over the members, else one by one."""
        fields = [f for f in ("captions", "text") if f in self.fields] if of == "captions" else [of]
        if len(fields) > 1:  # an image's text counts where it has no captions
            return super().tags_of_group(group, of)
        column, said = self.column(group, fields[0])
        tags = super().tags_of_group(group, of) if column is None else of_column(column, of)
        return replace(tags, said=said)

    def column(self, group: int, field: str) -> tuple[pa.Array | None, str]:
        """(a field of all samples of a shard, what is wrong with the file beside it): texts or lists of
        texts as they are written; None where only reading them one by one will do."""
        said = ""
        try:
            if (column := self._column_beside(group, field)) is not None:
                return column, ""
        except (img2dataset.Disagrees, BadImage) as error:
            said = str(error)
        shard = self._opened[group]
        return read_column(shard.path, shard.index, self.places[field], opened.MAX_MEMBER), said

    def _column_beside(self, group: int, field: str) -> pa.Array | None:
        """The same from img2dataset's Parquet file, for which a shard in a store is not fetched."""
        shard, place, convert = self.paths[group], self.places[field], values.CONVERT[field]
        with beside(shard, f"{shard.stem}.parquet") as file:
            if file is None:
                return None
            far = isinstance(shard, Remote) and group not in self._opened

            def read(rows: Sequence[int]) -> list[Any]:
                member = place.partition(".")[0]
                shown = FarShard(shard, rows, member) if far else self._opened[group]
                return [self._values(shown, row, (field,))[field] for row in rows]

            index = open_index(shard) if far else self._opened[group].index
            return img2dataset.column(file, index, place, read, convert)

    def texts(self, index: int) -> dict:
        return self._some(index, tuple(f for f in ("text", "captions") if f in self.fields))

    def _some(self, index: int, fields: tuple[str, ...]) -> dict:
        return self._values(*self._find(index), fields)

    def _value(self, index: int, field: str):
        shard, row = self._find(index)
        found = self._some(index, (field,))
        if field not in found:
            raise BadImage(f"no {field}", f"in {shard.place}", shard.index.key(row))
        return found[field]

    def _find(self, index: int) -> tuple[OpenShard, int]:
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} of {self._length}")
        number = int(self._starts.searchsorted(index, side="right")) - 1
        return self._shard(number), int(index - self._starts[number])

    def _sample(self, key: str, shard: OpenShard, row: int) -> dict:
        sample = {"key": key}
        if "image" in self.fields:
            sample["image"] = shard.read(row, _first(shard, row, names.IMAGES, "image"))
        if "video" in self.fields:
            span = shard.index.span(row, _first(shard, row, FILMS, "video"))
            sample["video"] = Video(shard.path, span=span, key=key, held=shard)
        written = tuple(field for field in self.fields if field in self.places)
        return sample | self._converted(shard, row, written)

    def _values(self, shard: OpenShard | FarShard, row: int, wanted: tuple[str, ...]) -> dict:
        try:
            return self._converted(shard, row, wanted)
        except BadImage as error:
            raise BadImage(error.cause, error.detail, shard.index.key(row)) from error

    def _converted(self, shard: OpenShard | FarShard, row: int, wanted: tuple[str, ...]) -> dict:
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

    def _present(self, members: set[str]) -> Iterator[str]:
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
                    f"{self._where()}: there is no {self.places[field]} (source.{field}). There are: "
                    f"{', '.join(there[:20]) or 'none'}."
                )

    def _names(self, wanted: set[str], shards: int, samples: int) -> set[str]:
        """The names in json members, looked for in some samples of some shards, spread evenly, until
        all that are wanted have been seen."""
        seen: set[str] = set()
        filled = np.flatnonzero(self.groups)
        chosen = filled[evenly(len(filled), shards)].tolist()
        for number in chosen:
            rows = evenly(self.groups[number], -(-samples // len(chosen)))
            for content in [] if wanted <= seen else self._jsons(number, rows):
                with suppress(BadImage):  # counted when the image itself is read
                    seen |= values.mapping(content).keys()
                if wanted <= seen:
                    break
        return seen

    def _jsons(self, number: int, rows: list[int]) -> Iterator[bytes]:
        """The json members of some samples of a shard."""
        if isinstance(place := self.paths[number], Remote):
            yield from read_members(place, rows, "json").values()
            return
        shard = self._shard(number)
        for row in rows:
            if shard.index.has(row, "json"):
                with suppress(BadImage):
                    yield shard.read(row, "json")

    def _shard(self, number: int) -> OpenShard:
        return self._opened[number]

    def keep_open(self, shards: int) -> None:
        self._opened.keep(shards)

    def read_ahead(self, indexes: np.ndarray) -> None:
        """See Source.read_ahead."""
        numbers = np.unique(self._starts.searchsorted(indexes, side="right") - 1)
        places = [self.paths[number] for number in numbers.tolist()]
        if far := [place for place in places if isinstance(place, Remote)]:
            self._ahead.ask(far)


def _pictures(members: set[str]) -> tuple[str, ...]:
    """The fields that shards with these members have of "image" and "video"."""
    if members.isdisjoint(FILMS):
        return ("image",)
    if not members.isdisjoint(names.IMAGES):
        return ("image", "video")
    require()
    return ("video",)


def _first(shard: OpenShard, row: int, endings: tuple[str, ...], what: str) -> str:
    """The first of these members that a sample has."""
    ending = next((ending for ending in endings if shard.index.has(row, ending)), None)
    if ending is None:
        some = ", ".join(endings[:3])
        raise BadImage(f"no {what}", f"{shard.place} has no {some}, … under this key")
    return ending
