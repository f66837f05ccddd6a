"""Calls a function for each of many items, such as shards, in several processes."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

_work: Callable | None = None  # of a process of the pool


def on_cores(work: Callable, items: Sequence, processes: int | None = None) -> Iterator[Any]:
    """Yields work(item) of each item, in their order.

    `processes` are all cores that this process has a share of, unless they are given; one alone, and
    a process that may have no children (a loader's worker), does the work itself.
    """
    count = min(cores() if processes is None else processes, len(items))
    if count <= 1 or multiprocessing.current_process().daemon:
        yield from map(work, items)
        return
    # Copies of this process, as the loader's workers are: they have the data and plug-ins that it has.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(work,))
    try:
        yield from pool.map(_do, items)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"one of the {count} processes that work on {len(items):,} items was killed, perhaps for "
            "lack of memory. What they had completed is kept; start again with fewer cores."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """The cores of this process: those that it may use, shared with the machine's other processes."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // here)


def _begin(work: Callable) -> None:
    global _work
    _work = work
    # The main process's handlers would ask this copy for a checkpoint.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process once its parent was killed, for which it would wait for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _do(item: Any) -> Any:
    return _work(item)
