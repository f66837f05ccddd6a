"""How often each image comes in an epoch on average: numbers that are computed part by part, so that
those of a billion images are never in memory together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from prepretrain.distributed import heartbeat

CHUNK = 1 << 20  # images that are looked at together

Where = slice | np.ndarray


class Weights:
    """float64 [images] by `weights[slice or indexes]`: 0 leaves an image out, 1.39 is once and in 39
    epochs of 100 a second time.

    `key` says which numbers they are, so that what is made of them can be found again.
    """

    def __init__(self, images: int, key: str, read: Callable[[Where], np.ndarray]):
        self.images, self.key, self._read = images, key, read

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, where: Where) -> np.ndarray:
        return np.asarray(self._read(where), dtype=np.float64)

    def chunks(self) -> Iterator[np.ndarray]:
        """All of them, in order, `CHUNK` at a time."""
        for first in range(0, self.images, CHUNK):
            heartbeat.beat("the weights of images")
            yield self[first : first + CHUNK]

    def taken(self, where: Where) -> Weights:
        """Those of some of the images: a slice of them without a step, or these indexes."""
        if isinstance(where, np.ndarray):
            key = _key(self.key, hashlib.sha256(where).hexdigest())
            return Weights(len(where), key, lambda inner: self[where[inner]])
        first, end, _ = where.indices(self.images)
        key = _key(self.key, first, end)
        return Weights(end - first, key, lambda inner: self[_moved(inner, first, end)])


def of(values: np.ndarray | Weights) -> Weights:
    """An array's numbers as weights."""
    if isinstance(values, Weights):
        return values
    key = hashlib.sha256(np.ascontiguousarray(values)).hexdigest()[:16]
    return Weights(len(values), key, lambda where: values[where])


def product(first: Weights | None, second: Weights | None) -> Weights | None:
    """Each image's numbers multiplied; None stands for 1 for all of them."""
    if first is None or second is None:
        return first if second is None else second
    key = _key("product", first.key, second.key)
    return Weights(len(first), key, lambda where: first[where] * second[where])


def joined(parts: list[Weights | None], sizes: list[int]) -> Weights | None:
    """Those of several sets, one after another; None stands for 1 for all of a set."""
    if all(part is None for part in parts):
        return None
    ends = np.cumsum(sizes)

    def read(where: Where) -> np.ndarray:
        indexes = where if isinstance(where, np.ndarray) else np.arange(*where.indices(sum(sizes)))
        numbers, values = np.searchsorted(ends, indexes, side="right"), np.ones(len(indexes))
        for number in np.unique(numbers):
            here, part = numbers == number, parts[number]
            if part is not None:
                values[here] = part[indexes[here] - (ends[number] - sizes[number])]
        return values

    keys = [part and part.key for part in parts]
    return Weights(sum(sizes), _key("joined", *keys, *sizes), read)


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _moved(inner: Where, first: int, end: int) -> Where:
    if isinstance(inner, np.ndarray):
        return first + inner
    low, high, _ = inner.indices(end - first)
    return slice(first + low, first + high)
