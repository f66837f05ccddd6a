"""Batches in an order that is a pure function: the same for any number of processes and workers."""

import errno
import math
import mmap
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prepretrain.data.batch import collate
from prepretrain.data.order import Interleaved, Order
from prepretrain.data.random import Random
from prepretrain.data.sampling.weights import Weights
from prepretrain.data.shards.cache import ShardCache
from prepretrain.data.sources.base import FIELDS, Source, fingerprint_of
from prepretrain.data.transforms import BadImage
from prepretrain.distributed import group as distributed
from prepretrain.distributed import heartbeat

Transform = Callable[[dict], dict]

_IN_A_ROW = 100  # not from the paper: bad images in a row, after which the data itself is broken
_AHEAD = 8  # not from the paper: batches, or a window if that is more, that are fetched ahead
_DETAIL = 200  # characters of what was wrong with an image that are kept
_OF_A_FILE = (  # what the system says of one file; all else it says is of the machine
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)


class Change(NamedTuple):
    """What a stream reads from the image at `position` on, which begins a batch; its order begins
    there."""

    position: int
    source: Source
    order: Order | Interleaved


class Stream:
    """An endless stream of global batches of `batch_size` images; the state is one integer.

    Rank r takes the r-th slice of every global batch, in `accumulate` equal parts. `repeats`
    [images] says how often each image comes in an epoch on average; None is once. With `order`,
    which then holds all that seed, window and repeats would say, they come in that order; `changes`
    are what follows from later positions on.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        seed: int = 0,
        accumulate: int = 1,
        workers: int = 0,
        max_bad: float = 0.01,
        window: int = 0,
        repeats: np.ndarray | Weights | None = None,
        order: Order | Interleaved | None = None,
        changes: Sequence[Change] = (),
        rank: int | None = None,
        world: int | None = None,
    ):
        self.rank = distributed.rank() if rank is None else rank
        self.world = distributed.world() if world is None else world
        for read in (source, *(change.source for change in changes)):
            _check(read, batch_size, self.world, accumulate)
        self.batch_size, self.accumulate = batch_size, accumulate
        self.workers, self.max_bad = workers, max_bad
        if order is None:
            order = Order(source.groups, seed=seed, window=window, repeats=repeats)
        self.length = order.length  # of an epoch
        self._parts = [Change(0, source, order), *changes]
        _share_cache([part.source for part in self._parts], workers)
        self._reader = _Training(self._parts, transform)

    def epoch_of(self, position: int) -> int:
        """The epoch that the image at this position belongs to, from 0."""
        return position // self.length

    def fingerprint(self, position: int = 0) -> str:
        """What the images before a position are, and their order; of the first, if there are none."""
        first, *changes = (
            (start, fingerprint_of([source.fingerprint, *order.parts()]))
            for start, source, order in self._parts
            if start < position or start == 0
        )
        return fingerprint_of([first[1], *changes]) if changes else first[1]

    def batches(self, consumed: int = 0) -> Generator[dict, None, None]:
        """This rank's micro batches of the global batches that start after `consumed` images.

        A batch also holds "key", "position" and "bad", the substitutions made in it. Workers start at
        once, and end when it is closed.
        """
        _share_cache([part.source for part in self._parts], self.workers)
        return _load(self._reader, _Slices(self, consumed), self.workers)


class _Slices:
    """The positions of each micro batch of one rank, for ever."""

    def __init__(self, stream: Stream, consumed: int):
        self.stream, self.consumed = stream, consumed

    def __iter__(self) -> Iterator[np.ndarray]:
        stream, start = self.stream, self.consumed
        share = stream.batch_size // stream.world
        part = share // stream.accumulate
        while True:
            first = start + stream.rank * share
            for micro in range(stream.accumulate):
                yield first + micro * part + np.arange(part)
            start += stream.batch_size


class _Training(Dataset):
    """Positions to a batch; a bad image is replaced, by a pure function of its position."""

    def __init__(self, parts: list[Change], transform: Transform):
        self.parts, self.transform = parts, transform

    def __getitem__(self, positions: np.ndarray) -> dict:
        keys, rows, bad = [], [], []
        part = next(part for part in reversed(self.parts) if part.position <= positions[0])
        own = positions - part.position
        if part.source.reads_ahead:
            ahead = max(part.order.in_window, _AHEAD * len(own))
            part.source.read_ahead(part.order(own + ahead)[1])
        for place in zip(positions, *part.order(own)):
            key, row = self._usable(part, *map(int, place), bad)
            keys.append(key)
            rows.append(row)
        return collate(rows) | {"key": keys, "position": positions.tolist(), "bad": bad}

    def _usable(
        self, part: Change, position: int, epoch: int, index: int, copy: int, bad: list
    ) -> tuple[str, dict]:
        first, last = index, None
        for attempt in range(_IN_A_ROW):
            try:
                random = Random(part.order.seed, epoch, index, copy)
                return _transformed(part.source, self.transform, index, random)
            except BadImage as error:
                last = error
                bad.append({"cause": error.cause, "key": error.key, "position": position})
                if error.detail:
                    bad[-1]["detail"] = error.detail[:_DETAIL]
            rng = Random(part.order.seed, epoch, position)(f"substitute {attempt}")
            index, copy = part.order.another(epoch, index, rng)
        raise RuntimeError(
            f"{_IN_A_ROW} bad images in a row in place of image {first}; the last: {last}. "
            "Check the data, or the transform where that is named."
        ) from last


def evaluation_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int | None = None,
    world: int | None = None,
    seed: int = 0,
    leave_out: bool = False,
) -> Generator[dict, None, None]:
    """Each image once, over all ranks, in the source's order; as many batches on every rank.

    Rank r gets the r-th contiguous share. "mask" is False for rows that only fill the last batch;
    their "position" is -1. An evaluation never substitutes: a bad image raises, or with leave_out
    is a row whose "mask" is False.
    """
    rank = distributed.rank() if rank is None else rank
    world = distributed.world() if world is None else world
    _check(source, batch_size, 1, 1)
    share = -(-len(source) // world)
    size = min(batch_size, share)
    end = min(len(source), (rank + 1) * share)
    shares = []
    for first in range(rank * share, (rank + 1) * share, size):
        shares.append(np.arange(first, min(first + size, end)))
    reader = _Evaluation(source, transform, size, end - 1, seed, leave_out)
    if len(shares) == 1:  # there is nothing to do while it is read
        workers = min(workers, 0)
    workers = min(workers, len(shares))
    _share_cache([source], workers)
    return _beating(_load(reader, shares, workers))


def _beating(batches: Iterator[dict]) -> Generator[dict, None, None]:
    for batch in batches:
        heartbeat.beat("a batch of an evaluation")
        yield batch


class _Evaluation(Dataset):
    """Indexes to a batch of a fixed size, filled up with copies of a row."""

    def __init__(
        self,
        source: Source,
        transform: Transform,
        size: int,
        last: int,
        seed: int,
        leave_out: bool,
    ):
        """size: of a batch. last: the last index that is read."""
        self.source, self.transform, self.size, self.seed = source, transform, size, seed
        self.last, self.leave_out = last, leave_out

    def __getitem__(self, indexes: np.ndarray) -> dict:
        if self.source.reads_ahead:
            ahead = max(len(self.source) // len(self.source.groups), _AHEAD * self.size)
            self.source.read_ahead(np.minimum(indexes + ahead, self.last))
        pairs = [self._read(int(index)) for index in indexes]
        missing = self.size - len(pairs)
        filler = next((row for _, row in reversed(pairs) if row is not None), None)
        if filler is None:
            filler = self._first()
        rows = [filler if row is None else row for _, row in pairs] + [filler] * missing
        return collate(rows) | {
            "key": [key for key, _ in pairs] + [""] * missing,
            "position": indexes.tolist() + [-1] * missing,
            "mask": torch.tensor([row is not None for _, row in pairs] + [False] * missing),
        }

    def _first(self) -> dict:
        """The source's first row that can be read."""
        for index in range(len(self.source)):
            if (row := self._read(index)[1]) is not None:
                return row
        raise ValueError(f"none of the {len(self.source)} images can be read.")

    def _read(self, index: int) -> tuple[str, dict | None]:
        try:
            return _transformed(self.source, self.transform, index, Random(self.seed, 0, index))
        except BadImage as error:
            if self.leave_out:
                return error.key or "", None
            raise ValueError(
                f"{error}. An evaluation counts every image: repair this one, or "
                "remove it from the data."
            ) from error


def _transformed(source: Source, transform: Transform, index: int, random: Random):
    """(key, what the transform makes of the image).

    Whatever goes wrong with one image is a BadImage with its key, so that no image ends a run; a bug
    of a source or a transform is one, too, and has its error's name as the cause to count by. The
    machine's own errors are raised on, with the key.
    """
    key, where, sample = f"image {index}", "source", {}
    try:
        sample = source[index]
        key, where = sample["key"], "transform"
        return key, transform(sample | {"random": random})
    except BadImage as error:
        raise BadImage(error.cause, error.detail, error.key or key) from error
    except Exception as error:
        if _is_of_the_machine(error):
            raise RuntimeError(f"{key}: {type(error).__name__}: {error}") from error
        lacking = error.args[0] if isinstance(error, KeyError) and error.args else None
        if where == "transform" and lacking in FIELDS and lacking not in sample:
            raise BadImage(f"no {lacking}", "the sample has none", key) from error
        raise BadImage(f"{type(error).__name__} in the {where}", str(error), key) from error


def _is_of_the_machine(error: Exception) -> bool:
    """Whether an error says nothing of the image that was being read."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(
        error
    ):  # torch's, of a CPU
        return True
    # parsers raise OSError, too, without a number
    return isinstance(error, OSError) and error.errno not in (None, *_OF_A_FILE)


def _load(reader: Dataset, places, workers: int) -> Generator[dict, None, None]:
    if workers < 0:
        raise ValueError(f"workers: {workers} is negative. 0 reads in the main process.")
    if workers:
        _share_leaving()
    # Each item of `places` is a whole batch, made in one call; the order is kept by torch. The
    # generator of its own keeps the loader from drawing on the global one.
    loader = DataLoader(
        reader,
        sampler=places,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_quiet,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),
        pin_memory=distributed.on_gpu(),
    )
    return _closing(iter(loader))


def _closing(batches: Iterator[dict]) -> Generator[dict, None, None]:
    """Ends the workers when it ends, by an error too: an iterator that is left to a garbage
    collection no longer reaches them, and waits for them in vain for ten seconds."""
    try:
        yield from batches
    finally:
        if hasattr(batches, "_shutdown_workers"):  # torch has no public name for it
            batches._shutdown_workers()


def _unchanged(batch: dict) -> dict:
    return batch


def _quiet(_: int) -> None:
    """Forget the handlers of the main process, which would act on its flags in a copy.

    They ask the main process for a checkpoint; SLURM sends them to all that a job started, a terminal
    Ctrl-C to all that a command did, and they must not end the workers, whose batches are still needed on the way to it. Workers end when the
    main process says so or is gone.
    """
    signal.signal(signal.SIGTERM, _end_if_leaving)
    for number in (signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# One byte that a process shares with the workers that it forks: whether it is leaving, at which it
# sends SIGTERM and waits for them. And which process that is: copies of it need a byte of their own.
_leaving: mmap.mmap | None = None
_whose: int | None = None


def _share_leaving() -> None:
    global _leaving, _whose
    if _whose != os.getpid():
        _leaving, _whose = mmap.mmap(-1, 1), os.getpid()
        # before multiprocessing ends its children, in a process that it started, too
        Finalize(None, _leaving.__setitem__, args=(0, 1), exitpriority=0)


def _end_if_leaving(*_: Any) -> None:
    if _leaving[0]:
        os._exit(0)


def _check(source: Source, batch_size: int, world: int, accumulate: int) -> None:
    if len(source) == 0:
        others = ", ".join(f"{count:,} {what}" for what, count in source.left_out.items())
        raise ValueError(
            "the source holds no image. "
            + (f"It is read without {others}." if others else "Check the path in its card.")
        )
    if batch_size < 1 or accumulate < 1:
        raise ValueError(f"batch_size {batch_size} and accumulate {accumulate} must be 1 or more.")
    parts = world * accumulate
    if batch_size % parts:
        near = max(parts, round(batch_size / parts) * parts)
        raise ValueError(
            f"batch_size: {batch_size} images cannot be cut into {world} processes x "
            f"{accumulate} parts. Take a multiple of {parts}, such as {near}, or "
            "another accumulate."
        )


def _share_cache(sources: Sequence[Source], workers: int) -> None:
    """Gives each process that reads its part of the shard cache, and lets go of what this one holds, which
    its workers would hold, too. Raises ValueError where the cache cannot hold two shards for each of them:
    the one that is read and the one that comes next."""
    shards = sum({id(source): source.cached for source in sources}.values())
    if not shards:
        return
    readers = max(1, workers) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    limit, least = ShardCache().limit, 2 * readers * shards
    if limit < least:
        raise ValueError(
            f"PREPRETRAIN_CACHE_GB: {limit / 1e9:g} is too little: {readers} processes of this machine each "
            f"read a shard and fetch another, of up to {shards:,} bytes. Set at least "
            f"{math.ceil(least / 1e6) / 1e3:g}, or fewer data.workers."
        )
    for source in sources:
        source.keep_open(limit // least)


def loading(asked: int | None) -> int:
    """The loading processes of each process: those asked for, or up to four, as many as there are cores
    for."""
    if asked is not None:
        return asked
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(4, len(os.sched_getaffinity(0)) // here))


def to_device(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with its tensors on this process's device."""
    device = distributed.device()
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
    }
