"""The hashtags of many images as numbers, counted and looked up by whole columns at once."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prepretrain.data.io import values
from prepretrain.data.shards.columns import parsed
from prepretrain.data.tags.spelling import canonical, caption_words
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.data.transforms import BadImage


@dataclass(frozen=True)
class Tags:
    """Which of a group's images has which tags: image rows[i] has the tag names[ids[i]], each pair
    once."""

    names: list[str]  # canonical spellings, each once
    rows: np.ndarray
    ids: np.ndarray
    images: int
    bad: list[BadImage] = field(default_factory=list)  # whose tags cannot be read
    said: str = ""  # what is wrong with the file beside the shard

    def counts(self) -> dict[str, int]:
        """In how many images each tag is."""
        counts = np.bincount(self.ids, minlength=len(self.names))
        return dict(zip(self.names, counts.tolist()))

    def named(self, names: Mapping[str, str | None]) -> "Tags":
        """The same images with other tags: that which `names` has for each; None leaves it out."""
        numbers: dict[str, int] = {}
        new = [names[name] for name in self.names]
        ids = np.array(
            [-1 if name is None else numbers.setdefault(name, len(numbers)) for name in new], int
        )[self.ids]
        order = np.argsort(self.rows, kind="stable")
        order = order[ids[order] >= 0]
        rows, ids = _once(self.rows[order], ids[order], len(numbers))
        return replace(self, names=list(numbers), rows=rows, ids=ids)

    def rarest(self, vocabulary: Vocabulary) -> np.ndarray:
        """int32 [images]: the vocabulary's id of each image's rarest tag, -1 without a known one."""
        known = np.array([vocabulary.id(name) for name in self.names], int)
        counts = np.append(vocabulary.counts, 0)[known]  # -1, a tag that is not known, is the last
        # the rarest first, of two the one that the vocabulary has first, unknown ones last
        order = np.lexsort((known, counts, known < 0))
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        best = np.full(self.images, len(order), np.int64)
        np.minimum.at(best, self.rows, places[self.ids])
        return np.append(known[order], -1)[best].astype(np.int32)

    def save(self, file: Path) -> None:
        """Keeps what `rarest` needs, in as few bytes as the numbers allow."""
        rows = self.rows.astype(np.min_scalar_type(self.images))
        ids = self.ids.astype(np.min_scalar_type(len(self.names)))
        with open(file, "wb") as stream:
            np.savez(stream, rows=rows, ids=ids, images=self.images, names=_blob(self.names))

    @classmethod
    def load(cls, file: Path) -> "Tags":
        """Reads what `save` kept."""
        with np.load(file, allow_pickle=False) as kept:
            names = json.loads(kept["names"].tobytes())
            return cls(names, kept["rows"], kept["ids"], int(kept["images"]))


def _blob(names: list[str]) -> np.ndarray:
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


def of_lists(lists: Iterable[list[str]], bad: list[BadImage]) -> Tags:
    """The tags of images that were read one by one."""
    numbers: dict[str, int] = {}
    rows, ids, images = [], [], 0
    for row, tags in enumerate(lists):
        images = row + 1
        for tag in sorted({canonical(tag) for tag in tags} - {""}):
            rows.append(row)
            ids.append(numbers.setdefault(tag, len(numbers)))
    return Tags(list(numbers), np.array(rows, np.int64), np.array(ids, np.int64), images, bad)


def of_column(column: pa.Array, of: Literal["hashtags", "captions"]) -> Tags:
    """The tags of a column of texts or of lists of texts, as data/io/values.py reads one of them;
    each different text is looked at once."""
    convert: Callable[[str], list[str]] = values.hashtags
    if of == "hashtags" and pa.types.is_string(column.type):
        column = column if (lists := _lists(column)) is None else lists
    if pa.types.is_list(column.type):
        rows = pc.list_parent_indices(column).to_numpy()
        texts, convert = pc.list_flatten(column), lambda text: values.hashtags([text])
    else:
        rows, texts = np.arange(len(column)), column
    if of == "captions":
        convert = lambda text: caption_words(values.text(text))
    encoded = texts.dictionary_encode()
    there = encoded.indices.is_valid().to_numpy(zero_copy_only=False)
    which = encoded.indices.fill_null(0).to_numpy()
    numbers: dict[str, int] = {}
    found, sizes = [], []
    for text in encoded.dictionary.to_pylist():
        tags = {canonical(tag) for tag in convert(text)} - {""}
        found += [numbers.setdefault(tag, len(numbers)) for tag in tags]
        sizes.append(len(tags))
    rows, places = _repeated(rows[there], which[there], np.array(sizes, np.int64))
    rows, ids = _once(rows, np.array(found, np.int64)[places], len(numbers))
    return Tags(list(numbers), rows, ids, len(column))


def _lists(column: pa.Array) -> pa.Array | None:
    """The lists that the texts of a column are as JSON; None unless all are."""
    encoded = column.dictionary_encode()
    texts = [text.strip() for text in encoded.dictionary.cast(pa.binary()).to_pylist()]
    if not texts or not all(text[:1] == b"[" and text[-1:] == b"]" for text in texts):
        return None
    lists = parsed([b'{"": %s}' % text for text in texts], "", pa.list_(pa.string()))
    return None if lists is None else lists.take(encoded.indices)


def _repeated(rows: np.ndarray, which: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
    """The rows, each once for each tag of its text, and the places of those tags in the list of all."""
    if (sizes == 1).all():  # as nearly always
        return rows, which
    starts, counts = np.cumsum(sizes) - sizes, sizes[which]
    firsts = np.cumsum(counts) - counts
    within = np.arange(counts.sum()) - np.repeat(firsts, counts)
    return np.repeat(rows, counts), np.repeat(starts[which], counts) + within


def _once(rows: np.ndarray, ids: np.ndarray, tags: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows, which rise, and ids, each pair once; by the ids."""
    # a stable sort of 16 bits takes an eighth of the time of one of the pairs as numbers
    order = np.argsort(ids.astype(np.min_scalar_type(max(0, tags - 1))), kind="stable")
    rows, ids = rows[order], ids[order]
    differs = np.ones(len(rows), bool)
    differs[1:] = (rows[1:] != rows[:-1]) | (ids[1:] != ids[:-1])
    return rows[differs], ids[differs]
