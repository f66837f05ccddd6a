"""Ends a process that would wait for ever: one that no longer moves, with its stacks on disk, and one
whose peer has ended or stands still, which it names.

Two threads watch. One looks at the time of the last `beat`, which loops over batches give. The other
counts up in the processes' common store, where process 0 looks at all counters and the others at
its own: whatever a collective waits for, on whatever device, a lost process is noticed in seconds.
"""

import contextlib
import datetime
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from prepretrain.distributed import group as distributed

# Exit statuses of a process that ended itself; the same command continues the run.
HUNG, LOST = 70, 76  # EX_SOFTWARE, EX_PROTOCOL
LEAST = 5.0  # seconds: less is no hang
_PERIOD = 1.0  # seconds between two looks
_MISSED = 15  # looks without a sign of life, after which a process is lost
_GRACE = 5.0  # seconds in which the others may write their stacks, too

_current: "_Watch | None" = None


def beat(doing: str) -> None:
    """This process has come as far as `doing`. Costs nothing where nothing is watched."""
    if _current is not None:
        _current.moved = (time.monotonic(), doing)


@contextlib.contextmanager
def watching(folder: Path, hang: float | None) -> Iterator[None]:
    """Watches this process and its peers, which all enter together.

    A process that gives no `beat` for `hang` seconds (None: never mind) writes all its stacks to
    `<folder>/stacks/<rank>.txt` and ends with status HUNG. One that has lost a peer raises
    RuntimeError with its name or, where it cannot be reached, ends with status LOST.
    """
    global _current
    if _current is not None:  # an evaluation that trains, within a run
        yield
        return
    _current = watch = _Watch(folder, hang)
    try:
        yield
        distributed.barrier()  # a peer that leaves first is not lost
    except RuntimeError as error:
        lost = watch.lost_by(error)
        if lost is not None:
            raise RuntimeError(lost) from error
        raise
    finally:
        _current = None
        watch.close()


class _Watch:
    def __init__(self, folder: Path, hang: float | None):
        self.folder, self.hang = folder, hang
        self.moved = (time.monotonic(), "the start")
        self.lost: str | None = None
        self.ended = threading.Event()
        self.file = None
        if hang is not None:
            place = folder / "stacks" / f"{distributed.rank()}.txt"
            place.parent.mkdir(parents=True, exist_ok=True)
            self.file = place.open("a")  # an earlier hang is still of interest
            threading.Thread(target=self._look, name="watch", daemon=True).start()
        if distributed.world() > 1:
            _Pulse(self)

    def _look(self) -> None:
        """Looks after the last beat; where even this thread is held up (by foreign code that never
        lets others run), faulthandler's own timer ends the process."""
        while True:
            faulthandler.dump_traceback_later(self.hang + 2 * _GRACE, exit=True, file=self.file)
            if self.ended.wait(min(_PERIOD, self.hang / 4)):
                break
            when, doing = self.moved
            still = time.monotonic() - when
            if still > self.hang:
                self._end(still, doing)
        faulthandler.cancel_dump_traceback_later()
        self.file.close()

    def _end(self, still: float, doing: str) -> None:
        rank = distributed.rank()
        said = (
            f"{self.folder}: process {rank} has not moved for {still:.0f} s (hang: {self.hang:g}) since "
            f"{doing}. Its stacks: {self.file.name}. The same command continues the run."
        )
        self.file.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {said}\n\n")
        self.file.flush()
        faulthandler.dump_traceback(file=self.file)
        print(said, file=sys.stderr, flush=True)
        time.sleep(_GRACE)
        os._exit(HUNG)

    def lost_by(self, error: RuntimeError) -> str | None:
        """Which process is lost, if an error of a collective may come from that; waits for the
        answer as long as one takes."""
        if distributed.world() == 1 or not _of_a_connection(error):
            return None
        deadline = time.monotonic() + _PERIOD * (_MISSED + 6)  # longer than `_wait` takes
        while self.lost is None and time.monotonic() < deadline:
            time.sleep(_PERIOD / 4)
        return self.lost

    def close(self) -> None:
        self.ended.set()


def _of_a_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        said in text for said in ("connection", "gloo", "broken pipe", "timed out", "nccl")
    )


class _Pulse:
    """Counters in the store of `init`, over a connection of its own."""

    def __init__(self, watch: _Watch):
        self.watch, self.rank, self.world = watch, distributed.rank(), distributed.world()
        self.answered = time.monotonic()
        # each watch has counters of its own: a process may watch several runs, one after another
        self.name = distributed.from_main(os.urandom(4).hex())
        self.store = distributed.second_store(datetime.timedelta(seconds=_PERIOD * _MISSED))
        threading.Thread(target=self._talk, name="pulse", daemon=True).start()
        threading.Thread(target=self._wait, name="pulse watch", daemon=True).start()

    def _talk(self) -> None:
        store = self.store
        try:
            others = range(1, self.world) if self.rank == 0 else [0]
            seen = dict.fromkeys(others, (0, 0))  # counter, looks since it last changed
            mine = 0
            while not self.watch.ended.wait(_PERIOD):
                mine += 1
                store.add(f"{self.name}/{self.rank}", 1)
                for other in others:
                    counter = store.add(f"{self.name}/{other}", 0)
                    count = 0 if counter != seen[other][0] else seen[other][1] + 1
                    seen[other] = (counter, count)
                gone = [other for other, (_, count) in seen.items() if count >= _MISSED]
                if gone and self.rank == 0:
                    store.set(f"{self.name}/lost", ",".join(map(str, gone)))
                    self._lose(gone)
                elif self.rank and store.check([f"{self.name}/lost"]):
                    self._lose([int(r) for r in store.get(f"{self.name}/lost").split(b",")])
                elif gone:
                    self._lose(gone)
                self.answered = time.monotonic()
        except Exception:  # the store's process is gone, or answers no more
            if not self.watch.ended.is_set():
                self._lose([0])

    def _wait(self) -> None:
        """A store that does not answer, be its process dead or standing still, has lost process 0."""
        while not self.watch.ended.wait(_PERIOD):
            if time.monotonic() - self.answered > _PERIOD * (_MISSED + 3):
                self._lose([0])

    def _lose(self, ranks: list[int]) -> None:
        """Tells the main thread, which may be waiting for the lost ones in a collective: then there
        is no way but to end."""
        who = ", ".join(map(str, ranks))
        if self.watch.lost is None:
            self.watch.lost = (
                f"{self.watch.folder}: process {who} has ended or stands still; see its output. "
                f"The same command continues the run."
            )
            threading.Thread(target=self._leave, name="pulse end", daemon=True).start()

    def _leave(self) -> None:
        if not self.watch.ended.wait(_GRACE):
            print(self.watch.lost, file=sys.stderr, flush=True)
            os._exit(LOST)
