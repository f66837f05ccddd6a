"""The sums of images' weights, by which an order finds the image of a slot: 4 bytes an image, in a file
that all processes of a machine share where the images are many."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from prepretrain.data.sampling.weights import CHUNK, Weights
from prepretrain.distributed import heartbeat
from prepretrain.files import create, draft

BITS = 24  # of the fraction in fixed-point numbers of slots
IN_MEMORY = 1 << 22  # not from the paper: images of which nothing is kept in a file
_BLOCK = 64  # sums that are kept as differences from the first of them
_STEPS = (32, 16, 8, 4, 2, 1)  # of a search in a block
_HEAD = 4096  # bytes before the sums in a file
_FORMAT = 1


class Bounds:
    """int64 [images + 1], by `bounds[indexes]`: the sums of the weights before each image, times
    2 ** BITS, where the fractions of weights are scaled to a whole sum.

    Kept are each 64th sum, and the others' differences from those.
    """

    def __init__(self, starts: np.ndarray, steps: np.ndarray, images: int, digest: str):
        self._starts, self._steps, self.images, self.digest = starts, steps, images, digest
        self.length = int(self[np.array([images])][0]) >> BITS

    def __getitem__(self, indexes: np.ndarray) -> np.ndarray:
        return self._starts[indexes // _BLOCK] + self._steps[indexes].astype(np.int64)

    def image_of(self, sums: np.ndarray) -> np.ndarray:
        """The first image with which the sum reaches so much: above 0, and at most all."""
        blocks = np.searchsorted(self._starts, sums) - 1
        wanted, last = sums - self._starts[blocks], blocks * _BLOCK
        for step in _STEPS:
            below = self._steps[last + step] < wanted
            last = np.where(below, last + step, last)
        return last


def bounds(weights: Weights) -> Bounds:
    """The sums of these weights; those of many images are computed once, and kept in a file under
    $XDG_CACHE_HOME/prepretrain/weights. Raises ValueError for weights that make no epoch."""
    if len(weights) <= IN_MEMORY:
        total = _Total(weights)
        starts, steps = total.empty()
        return Bounds(starts, steps, len(weights), total.fill(starts, steps))
    file = cache_file(f"{weights.key}.sums")
    write_once(file, lambda place: _write(weights, place))
    return _opened(file, len(weights))


class _Total:
    """What all weights come to, which the sums of the fractions are scaled by."""

    def __init__(self, weights: Weights):
        self.weights, self.whole, self.share, self.narrow = weights, 0, 0.0, True
        first = 0
        for values in weights.chunks():
            _check(values, first)
            whole = np.floor(values)
            self.whole += _whole_sum(whole)
            self.share = _running(values - whole, self.share)[-1]
            ceiling = np.add.reduceat(np.ceil(values), np.arange(0, len(values), _BLOCK))
            self.narrow &= bool(ceiling.max() < 1 << 32 - BITS)
            first += len(values)
        if not 0 < self.whole + self.share < 1 << 62 - BITS:
            raise ValueError(
                f"weights: their sum, {self.whole + self.share:g}, is no length of an epoch, which holds "
                f"at least an image and at most {float(1 << 62 - BITS):.3g}."
            )
        # Rounded down, as no share may become more than 1, but for what summing them has lost.
        self.slots = max(1, int(self.share * (1 + 1e-9))) if self.share else 0
        self.scale = self.slots / self.share if self.slots else 0.0

    def shapes(self) -> tuple[int, int, type]:
        """How many starts and differences there are, and of which type those are."""
        blocks = len(self.weights) // _BLOCK + 1
        return blocks, blocks * _BLOCK, np.uint32 if self.narrow else np.int64

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Arrays of these shapes."""
        blocks, sums, kind = self.shapes()
        return np.empty(blocks, np.int64), np.empty(sums, kind)

    def fill(self, starts: np.ndarray, steps: np.ndarray) -> str:
        """Writes the sums into these arrays; the SHA-256 of all as int64."""
        digest = hashlib.sha256(np.zeros(1, np.int64))
        share, whole, first, last = 0.0, 0, 0, 0
        for values in self.weights.chunks():
            floors = np.floor(values)
            shares = _running(values - floors, share)
            wholes = np.cumsum(floors.astype(np.int64)) + whole
            sums = np.rint(np.minimum(shares * self.scale, self.slots) * (1 << BITS))
            sums = sums.astype(np.int64)
            # exactly, also for images without a share
            sums[shares == self.share] = self.slots << BITS
            sums += wholes << BITS
            digest.update(sums)
            _put(starts, steps, first, np.concatenate([[last], sums]))
            share, whole, last = shares[-1], int(wholes[-1]), int(sums[-1])
            first += len(values)
        return digest.hexdigest()


def _put(starts: np.ndarray, steps: np.ndarray, first: int, sums: np.ndarray) -> None:
    """Writes the sums before image `first`, which begins a block, and before those after it; the last
    one stands for all that its block has no image for."""
    blocks = -(-len(sums) // _BLOCK)
    padded = np.pad(sums, (0, blocks * _BLOCK - len(sums)), mode="edge").reshape(blocks, _BLOCK)
    begin = first // _BLOCK
    starts[begin : begin + blocks] = padded[:, 0]
    differences = (padded - padded[:, :1]).ravel()
    steps[first : first + len(differences)] = differences


def _running(values: np.ndarray, before: float) -> np.ndarray:
    """The sums up to each value, with what came before them: the same as over all at once."""
    values[0] += before
    return np.cumsum(values)


def _whole_sum(whole: np.ndarray) -> int:
    """Of whole numbers as floats, exactly where it is less than 2 ** 53; no length if it is more."""
    return int(min(whole.sum(), float(1 << 62)))


def _check(values: np.ndarray, first: int) -> None:
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(wrong):
        raise ValueError(
            f"weights[{first + wrong[0]}]: {values[wrong[0]]} must be finite and at least 0."
        )


def _write(weights: Weights, place: Path) -> None:
    total = _Total(weights)
    blocks, sums, kind = total.shapes()
    size = _HEAD + blocks * 8 + sums * np.dtype(kind).itemsize
    allocate(place, size)
    starts = np.memmap(place, np.int64, "r+", _HEAD, (blocks,))
    steps = np.memmap(place, kind, "r+", _HEAD + blocks * 8, (sums,))
    head = {"format": _FORMAT, "images": len(weights), "narrow": total.narrow}
    head["digest"] = total.fill(starts, steps)
    starts.flush(), steps.flush()
    with open(place, "r+b") as stream:
        stream.write(json.dumps(head).encode().ljust(_HEAD - 1) + b"\n")


def _opened(file: Path, images: int) -> Bounds:
    try:
        with open(file, "rb") as stream:
            head = json.loads(stream.read(_HEAD))
        if (head["format"], head["images"]) != (_FORMAT, images):
            raise ValueError(f"it holds {head}")
        blocks = images // _BLOCK + 1
        kind = np.uint32 if head["narrow"] else np.int64
        starts = np.memmap(file, np.int64, "r", _HEAD, (blocks,))
        steps = np.memmap(file, kind, "r", _HEAD + blocks * 8, (blocks * _BLOCK,))
        # plain arrays over the mapping: indexing np.memmap itself is slower
        return Bounds(np.asarray(starts), np.asarray(steps), images, head["digest"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is damaged: {error}. Remove it; it is made again.") from error


def cache_file(name: str) -> Path:
    """Where something that can be made again at any time is kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "prepretrain" / "weights" / name


def allocate(place: Path, size: int) -> None:
    """Gives a file its size. Raises OSError where there is no room, which a mapping finds too late."""
    with open(place, "r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, size)


def write_once(file: Path, write: Callable[[Path], None]) -> None:
    """Writes a file whole or not at all, if it is not there; of several processes one does, and the
    others wait for it. Raises ValueError where nothing can be written."""
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(file.with_name(f"{file.name}.lock")):
                if not file.exists():
                    with draft(file) as place:
                        write(place)
    except OSError as error:
        raise ValueError(
            f"{file}: cannot be written: {error}. Set XDG_CACHE_HOME to a folder that can be written, with "
            f"8 bytes an image of room."
        ) from error


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with contextlib.suppress(FileExistsError):
        os.close(create(file))
    handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                heartbeat.beat("the weights that another process computes")
                time.sleep(0.1)
            except OSError:  # a file system without locks: several processes may write the same
                break
        yield
    finally:
        os.close(handle)


assert CHUNK % _BLOCK == 0
