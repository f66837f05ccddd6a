"""The order of a training set's images: a pure function of the seed and the position."""

import math

import numpy as np

from prepretrain.data.random import Random
from prepretrain.data.sampling import weights
from prepretrain.data.sampling.bounds import BITS, bounds

_ROUNDS = 8
_BLOCK, _BLOCKS = 1 << 10, 1 << 14  # not from the paper: images of a block, blocks of a cycle
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = 10127  # the golden section of _BLOCKS, odd: its multiples are spread evenly over them


class Order:
    """position -> (epoch, index, copy): every epoch holds each image once, in an order of its own.

    With `repeats` [images] it holds image i repeats[i] times on average: exactly so often where that
    is a whole number, and otherwise the number below or the one above; `copy` counts from 0. An
    epoch's length is the same for all epochs, so the fractions are scaled to a whole sum (by
    less than a slot in all). This takes 4 bytes an image, in a file where they are many
    (data/sampling/bounds.py); without `repeats` there is nothing to keep.

    With `window`, shards are shuffled, and images only within windows of that many shards, so
    that a process reads from few files at a time; 0 shuffles over everything.
    """

    def __init__(
        self,
        groups: list[int],
        *,
        seed: int,
        window: int = 0,
        repeats: np.ndarray | weights.Weights | None = None,
    ):
        self.seed, self.window = seed, window
        images = sum(groups)
        _check_length(images)
        if repeats is not None and len(repeats) != images:
            raise ValueError(f"weights: there are {len(repeats)}, and there are {images} images.")
        self._groups = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])
        self._bounds = None if repeats is None else bounds(weights.of(repeats))
        self.length = images if self._bounds is None else self._bounds.length
        self._shuffled: tuple[int, tuple] = (-1, ())

    @property
    def in_window(self) -> int:
        """How many positions a window has on average; 0 without windows."""
        return self.length * self.window // (len(self._groups) - 1)

    def parts(self) -> list[object]:
        """What a fingerprint of this order is made of, beside the data's own."""
        if self._bounds is None:
            return [self.seed, self.window]
        return [self.seed, self.window, self._bounds.digest]

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epochs, the indexes and the copies at these positions."""
        epochs, within = np.divmod(positions, self.length)
        indexes, copies = np.empty_like(within), np.empty_like(within)
        for epoch in _different(epochs):
            here = epochs == epoch
            find = self._in_windows if self.window else self._in_all
            indexes[here], copies[here] = self.at(epoch, find(epoch, within[here]))
        return epochs, indexes, copies

    def at(self, epoch: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The indexes and the copies in these slots of an epoch: its `length` places for an image,
        before they are shuffled."""
        if self._bounds is None:
            return slots, np.zeros_like(slots)
        indexes = self._bounds.image_of((slots + 1 << BITS) - self._offset(epoch))
        return indexes, slots - self._first_slots(epoch, indexes)

    def another(self, epoch: int, index: int, generator: np.random.Generator) -> tuple[int, int]:
        """The index and the copy of an image of an epoch, drawn to take the place of image `index`."""
        slot = generator.integers(self.length, size=1)
        found, copy = self.at(epoch, slot)
        return int(found[0]), int(copy[0])

    def _first_slots(self, epoch: int, indexes: np.ndarray) -> np.ndarray:
        """The slot that is each image's first, if it has one."""
        if self._bounds is None:
            return indexes
        return self._bounds[indexes] + self._offset(epoch) >> BITS

    def _offset(self, epoch: int) -> int:
        """How far the epoch's grid of whole numbers is moved over the sums of repeats: systematic
        sampling, which gives every image its share of the epochs, whatever the others have."""
        return int(Random(self.seed, epoch, 0)("repeats").integers(1 << BITS))

    def _in_all(self, epoch: int, within: np.ndarray) -> np.ndarray:
        return permute(within, self.length, Random(self.seed, epoch, 0)("order"))

    def _in_windows(self, epoch: int, within: np.ndarray) -> np.ndarray:
        firsts, starts = self._shards(epoch)
        ends = np.append(starts[self.window :: self.window], self.length)
        windows = np.searchsorted(ends, within, side="right")
        slots = np.empty_like(within)
        for window in _different(windows):
            here, first = windows == window, starts[window * self.window]
            rng = Random(self.seed, epoch, window)("window")
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


class Interleaved:
    """position -> (epoch, index, copy) over several sets, each in an order of its own, whose images come
    in fixed shares of the positions.

    Of each 1,024 positions a set has its share, rounded to the number below or the one above, at
    random places, and of 16,777,216 exactly. The images of a set follow those of the sets before it;
    an epoch is the image's set's own, which may have begun more often than another's.
    """

    def __init__(self, orders: list[Order], images: list[int], shares: list[float]):
        _check_length(max(sum(images), sum(order.length for order in orders)))
        self.orders, self.seed = orders, orders[0].seed
        self.length = sum(order.length for order in orders)
        self._firsts = np.cumsum([0, *images], dtype=np.int64)
        self.counts = _whole_shares(shares, _BLOCK * _BLOCKS)
        # each remainder q once, so that a set's sum of (c + q) // blocks is c
        remainders = np.arange(_BLOCKS) * _GOLDEN % _BLOCKS
        self._ends = (np.cumsum(self.counts) + remainders[:, None]) // _BLOCKS
        self._sizes = np.diff(self._ends, axis=1, prepend=0)
        self._before = np.cumsum(self._sizes, axis=0) - self._sizes

    @property
    def in_window(self) -> int:
        """See Order.in_window; of the set whose windows take the most positions."""
        shares = self.counts / self.counts.sum()
        windows = (order.in_window / share for order, share in zip(self.orders, shares) if share)
        return int(max(windows))

    def parts(self) -> list[object]:
        """See Order.parts."""
        return [*self.counts.tolist(), *(part for order in self.orders for part in order.parts())]

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See Order; the epochs are those of each image's set."""
        sets, own = self.places(positions)
        found = np.empty((3, len(positions)), np.int64)
        for number in _different(sets):
            here = sets == number
            epochs, indexes, copies = self.orders[number](own[here])
            found[:, here] = epochs, self._firsts[number] + indexes, copies
        return found[0], found[1], found[2]

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The set of each position, and the position in the order of that set."""
        blocks, slots = np.divmod(positions, _BLOCK)
        sets, own = np.empty_like(slots), np.empty_like(slots)
        for block in _different(blocks):
            here, (cycle, row) = blocks == block, divmod(block, _BLOCKS)
            moved = permute(slots[here], _BLOCK, Random(self.seed, block, 0)("mix"))
            chosen = np.searchsorted(self._ends[row], moved, side="right")
            first = self._ends[row] - self._sizes[row]
            before = cycle * self.counts + self._before[row]
            sets[here], own[here] = chosen, before[chosen] + moved - first[chosen]
        return sets, own

    def another(self, epoch: int, index: int, generator: np.random.Generator) -> tuple[int, int]:
        """See Order.another; an image of the same set."""
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        first = int(self._firsts[number])
        found, copy = self.orders[number].another(epoch, index - first, generator)
        return first + found, copy


def _check_length(images: int) -> None:
    if images >= 1 << 63:
        raise ValueError(f"data.train: {images:,} images are more than an epoch can hold.")


def _different(values: np.ndarray) -> list[int]:
    """The different ones, which rise; of a batch in a tenth of the time of np.unique."""
    return sorted(set(values.tolist()))


def _whole_shares(shares: list[float], total: int) -> np.ndarray:
    """Whole numbers with this sum, in the proportion of the shares."""
    ends = np.rint(np.cumsum(shares) / np.sum(shares) * total).astype(np.int64)
    return np.diff(ends, prepend=0)


def permute(values: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation of range(n) at `values`, in constant memory.

    A Feistel network over the cells of a grid of about sqrt(n) x sqrt(n); what falls on the few
    cells past n goes through again until it does not.
    """
    side = math.isqrt(n - 1) + 1
    rows, columns = np.uint64(side), np.uint64(-(-n // side))
    keys = rng.integers(2**64, size=_ROUNDS, dtype=np.uint64)
    out = np.array(values, dtype=np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        row, column = np.divmod(out[todo], columns)
        for first, second in zip(keys[::2], keys[1::2]):
            row += _mixed(column ^ first) % rows
            row %= rows
            column += _mixed(row ^ second) % columns
            column %= columns
        row *= columns
        row += column
        out[todo] = row
        todo = todo[row >= n]
    return out.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (Stafford's thirteenth mix, the finaliser of SplitMix64), in place."""
    x ^= x >> _SHIFTS[0]
    x *= _FACTORS[0]
    x ^= x >> _SHIFTS[1]
    x *= _FACTORS[1]
    x ^= x >> _SHIFTS[2]
    return x
