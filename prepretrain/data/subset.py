"""Some images of a source, and how a random subset of them is chosen."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from prepretrain import plugin
from prepretrain.data.order import permute
from prepretrain.data.random import Random
from prepretrain.data.sources.base import Source, fingerprint_of

_AT_ONCE = 1 << 22  # images whose places in the random order are computed at once


class Subset(Source):
    """Some images of a source, in the order of their numbers given."""

    def __init__(self, source: Source, indexes: Sequence[int]):
        # an array, not a list: see Files
        self.source, self.indexes = source, np.asarray(indexes, dtype=np.int64)
        self.fields, self.classes = source.fields, source.classes
        self.categories = source.categories
        self.left_out, self.open_at_once = source.left_out, source.open_at_once
        self.reads_ahead, self.cached = source.reads_ahead, source.cached
        self.stamp, self.groups = source.stamp, self._groups()
        if source.weights is not None:
            self.weights = source.weights.taken(self.indexes)
        digest = hashlib.sha256(self.indexes).hexdigest()
        self.fingerprint = fingerprint_of([source.fingerprint, digest])

    def _groups(self) -> list[int]:
        """The images of each of the source's groups, where they stand in its order; else all as one."""
        if not (np.diff(self.indexes) > 0).all():
            return [len(self.indexes)]
        bounds = np.cumsum(self.source.groups)
        counts = np.diff(np.searchsorted(self.indexes, bounds), prepend=0)
        return counts[counts > 0].tolist()

    def __getitem__(self, index: int) -> dict:
        return self.source[self._index(index)]

    def _index(self, index: int) -> int:
        return int(self.indexes[index])

    def only(self, fields: Iterable[str]) -> "Subset":
        narrowed = super().only(wanted := tuple(fields))
        narrowed.source = self.source.only(wanted)
        return narrowed

    def read_ahead(self, indexes: np.ndarray) -> None:
        self.source.read_ahead(self.indexes[indexes])

    def keep_open(self, shards: int) -> None:
        self.source.keep_open(shards)

    def key(self, index: int) -> str:
        return self.source.key(self._index(index))

    def label(self, index: int) -> int:
        return self.source.label(self._index(index))

    def hashtags(self, index: int) -> list[str]:
        return self.source.hashtags(self._index(index))

    def classes_shown(self, index: int) -> list[int]:
        return self.source.classes_shown(self._index(index))

    def texts(self, index: int) -> dict:
        return self.source.texts(self._index(index))


class Choice:
    """Says which images a random subset holds: the first of one random order of all, which depends on
    the seed and on their number alone. So each smaller subset lies within each larger one.

    images     a share, as "10%", or a number of them
    per_class  take the same share of each class, of one image at least
    classes    so many of the classes, at random, and only their images; labels stay as they are
    seed       of the random order
    """

    def __init__(
        self,
        *,
        images: str | int = "100%",
        per_class: bool = False,
        classes: int | None = None,
        seed: int = 0,
    ):
        self.images, self.per_class, self.classes, self.seed = images, per_class, classes, seed

    def count(self, whole: int | None, where: str) -> int | None:
        """How many of `whole` images the subset holds; None where that needs the data. Raises
        ValueError for a number that is none, or is more than there are."""
        if whole is None or self.classes is not None:
            return None
        return self._count(whole, where)

    def of(self, source: Source, where: str) -> Source:
        """The subset of a source; the source itself if that is all of it."""
        if not len(source):  # which is said where it is read
            return source
        if self.classes is None and not self.per_class:
            count = self._count(len(source), where)
            chosen = self._order(count, len(source))
        else:
            chosen = self._by_label(source, where)
        if len(chosen) == len(source):
            return source
        return Subset(source, np.sort(chosen))

    def _count(self, whole: int, where: str) -> int:
        text = str(self.images).strip()
        try:
            count = round(float(text[:-1]) / 100 * whole) if text[-1:] == "%" else int(text)
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"{where}.images: {self.images!r} is no share, as 10%, and no number of images."
            ) from error
        if not 0 < (count or 1) <= whole or text.startswith("-"):
            raise ValueError(
                f"{where}.images: {self.images} of {whole:,} images cannot be taken. Take from 1 to all."
            )
        return max(1, count)

    def _order(self, count: int, whole: int) -> np.ndarray:
        """The first `count` of the random order of all images."""
        parts = [
            permute(np.arange(first, min(first + _AT_ONCE, count)), whole, self._random("subset"))
            for first in range(0, count, _AT_ONCE)
        ]
        return np.concatenate(parts)

    def _by_label(self, source: Source, where: str) -> np.ndarray:
        if "label" not in source.fields:
            raise ValueError(f"{where}: per_class and classes need images with labels.")
        labels, order = np.array(source.labels()), self._order(len(source), len(source))
        if self.classes is not None:
            known = len(source.classes) if source.classes else int(labels.max()) + 1
            if not 1 <= self.classes <= known:
                raise ValueError(f"{where}.classes: {self.classes}, and there are {known}.")
            some = permute(np.arange(self.classes), known, self._random("classes"))
            order = order[np.isin(labels[order], some)]
        count = self._count(len(order), where)
        if self.per_class:
            order = order[np.argsort(_shares(labels[order]), kind="stable")]
        return order[:count]

    def _random(self, purpose: str) -> np.random.Generator:
        return Random(self.seed, 0, 0)(purpose)


def _shares(labels: np.ndarray) -> np.ndarray:
    """The share of its class that comes before each image."""
    order = np.argsort(labels, kind="stable")
    _, first, place, sizes = np.unique(
        labels[order], return_index=True, return_inverse=True, return_counts=True
    )
    shares = np.empty(len(labels))
    shares[order] = (np.arange(len(labels)) - first[place]) / sizes[place]
    return shares


def choice(given: Any, where: str) -> Choice:
    """The choice that a config or a card asks for: 10%, a number, or the options of `Choice`.

    Raises ValueError naming `where`.
    """
    options = dict(given) if isinstance(given, dict) else {"images": given}
    return Choice(**plugin.check(Choice, options, where))


def evenly(count: int, images: int | None) -> list[int]:
    """The numbers of `images` of `count` images, spread evenly; of all if None or if there are
    fewer."""
    if images is None or images >= count:
        return list(range(count))
    return [i * count // images for i in range(images)]


def evenly_spaced(source: Source, images: int | None) -> Source:
    """`images` images spread evenly over a source; all of it if None or if it has fewer."""
    if images is None or images >= len(source):
        return source
    return Subset(source, evenly(len(source), images))
