"""Some images of a source."""

from collections.abc import Iterable, Sequence

import numpy as np

from prepretrain.data.sources.base import Source, fingerprint_of


class Subset(Source):
    """Some images of a source, in the order of their numbers given."""

    def __init__(self, source: Source, indexes: Sequence[int]):
        # an array, not a list: see Files
        self.source, self.indexes = source, np.asarray(indexes, dtype=np.int64)
        self.fields, self.classes, self.groups = source.fields, source.classes, [len(indexes)]
        self.categories, self.stamp = source.categories, source.stamp
        self.fingerprint = fingerprint_of([source.fingerprint, *self.indexes.tolist()])

    def __getitem__(self, index: int) -> dict:
        return self.source[self._index(index)]

    def _index(self, index: int) -> int:
        return int(self.indexes[index])

    def only(self, fields: Iterable[str]) -> "Subset":
        narrowed = super().only(wanted := tuple(fields))
        narrowed.source = self.source.only(wanted)
        return narrowed

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
