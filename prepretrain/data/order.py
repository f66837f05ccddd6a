"""The order of a training set's images: a pure function of the seed and the position."""

import hashlib
import math

import numpy as np

from prepretrain.data.random import Random

_ROUNDS = 8
_BITS = 24  # of the fraction in fixed-point numbers of slots


def repeat_factor(shares: np.ndarray, threshold: float) -> np.ndarray:
    """How often an image of a class is to come in an epoch, by the share of all images that have the
    class: max(1, sqrt(threshold / share)) (LVIS, arXiv 1908.03195, appendix B.2)."""
    return np.maximum(1, np.sqrt(threshold / shares))


class Order:
    """position -> (epoch, index, copy): every epoch holds each image once, in an order of its own.

    With `repeats` [images] it holds image i repeats[i] times on average: exactly so often where that
    is a whole number, and otherwise the number below or the one above; `copy` counts from 0. An
    epoch's length is the same for all epochs, so the fractions are scaled to a whole sum (by
    less than a slot in all). This takes 8 bytes an image; without `repeats` there is nothing to keep.

    With `window`, shards are shuffled, and images only within windows of that many shards, so
    that a process reads from few files at a time; 0 shuffles over everything.
    """

    def __init__(
        self,
        groups: list[int],
        *,
        seed: int,
        window: int = 0,
        repeats: np.ndarray | None = None,
    ):
        self.seed, self.window = seed, window
        self._groups = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])
        images = int(self._groups[-1])
        self._bounds = None if repeats is None else _fixed_point(repeats, images)
        self.length = images if self._bounds is None else int(self._bounds[-1]) >> _BITS
        self._shuffled: tuple[int, tuple] = (-1, ())

    def parts(self) -> list[object]:
        """What a fingerprint of this order is made of, beside the data's own."""
        if self._bounds is None:
            return [self.seed, self.window]
        return [self.seed, self.window, hashlib.sha256(self._bounds).hexdigest()]

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epochs, the indexes and the copies at these positions."""
        epochs, within = np.divmod(positions, self.length)
        indexes, copies = np.empty_like(within), np.empty_like(within)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            find = self._in_windows if self.window else self._in_all
            indexes[here], copies[here] = self.at(int(epoch), find(int(epoch), within[here]))
        return epochs, indexes, copies

    def at(self, epoch: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The indexes and the copies in these slots of an epoch: its `length` places for an image,
        before they are shuffled."""
        if self._bounds is None:
            return slots, np.zeros_like(slots)
        indexes = np.searchsorted(self._bounds[1:], (slots + 1 << _BITS) - self._offset(epoch))
        return indexes, slots - self._first_slots(epoch, indexes)

    def _first_slots(self, epoch: int, indexes: np.ndarray) -> np.ndarray:
        """The slot that is each image's first, if it has one."""
        if self._bounds is None:
            return indexes
        return self._bounds[indexes] + self._offset(epoch) >> _BITS

    def _offset(self, epoch: int) -> int:
        """How far the epoch's grid of whole numbers is moved over the sums of repeats: systematic
        sampling, which gives every image its share of the epochs, whatever the others have."""
        return int(Random(self.seed, epoch, 0)("repeats").integers(1 << _BITS))

    def _in_all(self, epoch: int, within: np.ndarray) -> np.ndarray:
        return permute(within, self.length, Random(self.seed, epoch, 0)("order"))

    def _in_windows(self, epoch: int, within: np.ndarray) -> np.ndarray:
        firsts, starts = self._shards(epoch)
        ends = np.append(starts[self.window :: self.window], self.length)
        windows = np.searchsorted(ends, within, side="right")
        slots = np.empty_like(within)
        for window in np.unique(windows):
            here, first = windows == window, starts[window * self.window]
            rng = Random(self.seed, epoch, int(window))("window")
            moved = first + permute(within[here] - first, int(ends[window] - first), rng)
            place = np.searchsorted(starts, moved, side="right") - 1
            slots[here] = firsts[place] + moved - starts[place]
        return slots

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the shards that hold images in this epoch, in its order of them: the first slot of
        each, and where it starts in that order."""
        if self._shuffled[0] != epoch:
            firsts = self._first_slots(epoch, self._groups)
            sizes = np.diff(firsts)
            shards = Random(self.seed, epoch, 0)("shards").permutation(np.flatnonzero(sizes))
            starts = np.cumsum(sizes[shards]) - sizes[shards]
            self._shuffled = (epoch, (firsts[shards], starts))
        return self._shuffled[1]


def _fixed_point(repeats: np.ndarray, images: int) -> np.ndarray:
    """int64 [images + 1]: the sums of the repeats before each image, times 2 ** _BITS.

    Whole parts are summed as integers, so that rounding neither loses an image nor adds one.
    """
    repeats = np.asarray(repeats, dtype=np.float64)
    if repeats.shape != (images,):
        raise ValueError(f"repeats: have the shape {repeats.shape}, and there are {images} images.")
    wrong = np.flatnonzero(~(np.isfinite(repeats) & (repeats >= 0)))
    if len(wrong):
        raise ValueError(f"repeats[{wrong[0]}]: {repeats[wrong[0]]} must be finite and at least 0.")
    if not 0 < repeats.sum() < 1 << 62 - _BITS:
        raise ValueError(f"repeats: their sum, {repeats.sum()}, is no length of an epoch.")
    whole = np.floor(repeats)
    shares = np.cumsum(repeats - whole)
    # Rounded down, as no share may become more than 1, but for what summing them has lost.
    slots = max(1, int(shares[-1] * (1 + 1e-9))) if shares[-1] else 0
    scale = slots / shares[-1] if slots else 0.0
    bounds = np.zeros(images + 1, dtype=np.int64)
    bounds[1:] = np.rint(np.minimum(shares * scale, slots) * (1 << _BITS))
    bounds[1:][shares == shares[-1]] = slots << _BITS  # exactly, also for images without a share
    bounds[1:] += np.cumsum(whole.astype(np.int64)) << _BITS
    return bounds


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
