"""The hashtags of many images as numbers, counted and looked up by whole columns at once."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prepretrain.data import values
from prepretrain.data.transforms import BadImage
from prepretrain.data.vocabulary import Vocabulary, canonical


@dataclass(frozen=True)
class Tags:
    """Which of a group's images has which tags: image rows[i] has the tag names[ids[i]], each pair
    once, in the order of the images. `bad`: images whose tags cannot be read; `said`: what is wrong
    with a file beside the shard."""

    names: list[str]  # canonical spellings, each once
    rows: np.ndarray
    ids: np.ndarray
    images: int
    bad: list[BadImage] = field(default_factory=list)
    said: str = ""

    def counts(self) -> dict[str, int]:
        """In how many images each tag is."""
        counts = np.bincount(self.ids, minlength=len(self.names))
        return dict(zip(self.names, counts.tolist()))

    def rarest(self, vocabulary: Vocabulary) -> np.ndarray:
        """int32 [images]: the vocabulary's id of each image's rarest tag, -1 without a known one."""
        known = np.array([vocabulary.id(name) for name in self.names], dtype=np.int64)
        counts = np.array(vocabulary.counts + [0])  # a last one, for tags that are not known
        # the rarest comes first, and of two the one that the vocabulary has first
        places = np.lexsort((known, counts[known], known < 0))
        order = np.empty(len(known), np.int64)
        order[places] = np.arange(len(known))
        first = np.full(self.images, len(known), np.int64)
        np.minimum.at(first, self.rows, order[self.ids])
        return np.append(known[places], -1)[first].astype(np.int32)


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


def of_column(column: pa.Array) -> Tags:
    """The tags of a column of texts or of lists of texts, as values.hashtags reads one of them; each
    different text is looked at once."""
    if pa.types.is_list(column.type):
        rows = pc.list_parent_indices(column).to_numpy()
        texts, convert = pc.list_flatten(column), lambda text: values.hashtags([text])
    else:
        rows = np.arange(len(column))
        texts, convert = column, values.hashtags
    encoded = texts.dictionary_encode()
    chosen = np.flatnonzero(encoded.indices.is_valid().to_numpy(zero_copy_only=False))
    rows, which = rows[chosen], encoded.indices.to_numpy(zero_copy_only=False)[chosen].astype(int)
    numbers: dict[str, int] = {}
    ids, sizes = [], []
    for text in encoded.dictionary.to_pylist():
        tags = {canonical(tag) for tag in convert(text)} - {""}
        ids += [numbers.setdefault(tag, len(numbers)) for tag in tags]
        sizes.append(len(tags))
    rows, which = _repeated(rows, which, np.array(sizes, np.int64))
    pairs = np.sort(rows * max(1, len(numbers)) + np.array(ids, np.int64)[which])
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    rows, tags = np.divmod(pairs, max(1, len(numbers)))
    return Tags(list(numbers), rows, tags, len(column))


def _repeated(rows: np.ndarray, which: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
    """The rows, each once for each tag of its text, and the places of those tags in the list of all."""
    starts, counts = np.cumsum(sizes) - sizes, sizes[which]
    firsts = np.cumsum(counts) - counts
    within = np.arange(counts.sum()) - np.repeat(firsts, counts)
    return np.repeat(rows, counts), np.repeat(starts[which], counts) + within
