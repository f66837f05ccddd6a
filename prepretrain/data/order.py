"""The order of a training set's images: a pure function of the seed and the position."""

import math

import numpy as np

from prepretrain.data.random import Random

_ROUNDS = 8


class Order:
    """position -> (epoch, index): every epoch holds each image once, in an order of its own.

    With `window`, shards are shuffled, and images only within windows of that many shards, so
    that a process reads from few files at a time; 0 shuffles over everything.
    """

    def __init__(self, groups: list[int], *, seed: int, window: int = 0):
        self.sizes = np.asarray(groups, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.length, self.seed, self.window = int(self.sizes.sum()), seed, window
        self._shuffled: tuple[int, tuple] = (-1, ())

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and the indexes at these positions."""
        epochs, within = np.divmod(positions, self.length)
        indexes = np.empty_like(within)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            find = self._in_windows if self.window else self._in_all
            indexes[here] = find(int(epoch), within[here])
        return epochs, indexes

    def _in_all(self, epoch: int, within: np.ndarray) -> np.ndarray:
        return permute(within, self.length, Random(self.seed, epoch, 0)("order"))

    def _in_windows(self, epoch: int, within: np.ndarray) -> np.ndarray:
        shards, starts = self._shards(epoch)
        ends = np.append(starts[self.window :: self.window], self.length)
        windows = np.searchsorted(ends, within, side="right")
        indexes = np.empty_like(within)
        for window in np.unique(windows):
            here, first = windows == window, starts[window * self.window]
            rng = Random(self.seed, epoch, int(window))("window")
            moved = first + permute(within[here] - first, int(ends[window] - first), rng)
            place = np.searchsorted(starts, moved, side="right") - 1
            indexes[here] = self.starts[shards[place]] + moved - starts[place]
        return indexes

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of the shards that hold images, and where each starts in it."""
        if self._shuffled[0] != epoch:
            full = np.flatnonzero(self.sizes)
            shards = Random(self.seed, epoch, 0)("shards").permutation(full)
            starts = np.cumsum(self.sizes[shards]) - self.sizes[shards]
            self._shuffled = (epoch, (shards, starts))
        return self._shuffled[1]


def permute(values: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation of range(n) at `values`, in constant memory.

    A Feistel network over the cells of a grid of about sqrt(n) x sqrt(n); what falls on the few
    cells past n goes through again until it does not.
    """
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    keys = rng.integers(2**64, size=_ROUNDS, dtype=np.uint64)
    out = np.array(values, dtype=np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        row, column = np.divmod(out[todo], np.uint64(columns))
        for i in range(0, _ROUNDS, 2):
            row = (row + _mixed(column ^ keys[i]) % np.uint64(rows)) % np.uint64(rows)
            column = (column + _mixed(row ^ keys[i + 1]) % np.uint64(columns)) % np.uint64(columns)
        out[todo] = row * np.uint64(columns) + column
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (Stafford's thirteenth mix, the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
