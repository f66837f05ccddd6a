"""Shards that lie here, and those that lie in a store: one way to open both."""

import contextlib
import logging
import os
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prepretrain.data.io.remote import Remote
from prepretrain.data.shards import tar_index
from prepretrain.data.shards.cache import CacheFull, ShardCache
from prepretrain.data.sources.base import fingerprint_of, stamp_of

logger = logging.getLogger(__name__)

Shard = Path | Remote

_PATIENCE = 60.0  # not from the paper: seconds to wait for others who read from a full cache
_MTIME = 0  # of all shards in the cache, for which their indexes were built


# What this process holds of the cache, and can let go of: close().
holders: weakref.WeakSet[Any] = weakref.WeakSet()


def open_shard(shard: Shard) -> tuple[Path, int]:
    """(where a shard lies on this machine, its open file); one of a store is fetched if need be, and
    stays while the file is open. See ShardCache.open."""
    if isinstance(shard, Path):
        return shard, os.open(shard, os.O_RDONLY)
    cache = ShardCache()
    try:
        handle = cache.open(shard)
    except CacheFull:  # perhaps because of what this process holds
        for holder in list(holders):
            holder.close()
        handle = cache.open(shard, wait=_PATIENCE)
    return cache.path(shard), handle


def kept_head(shard: Shard) -> dict | None:
    """See tar_index.kept_head; the index of a shard in a store is taken from there, if it has one."""
    if isinstance(shard, Path):
        return tar_index.kept_head(shard)
    file = _sidecar(shard)
    if head := tar_index.kept_elsewhere(file, shard.size, _MTIME):
        return head
    if there := shard.beside(f"{shard.name}.index"):
        content = b"".join(there.read([(0, there.size)]))
        ends = b"".join(_read_all(shard, tar_index.ends_of(shard.size)))
        file.parent.mkdir(parents=True, exist_ok=True)
        return tar_index.adopt(content, file, shard.size, _MTIME, ends)
    return None


def read_head(shard: Shard) -> dict:
    """See tar_index.read_head; a shard of a store is fetched for it."""
    if isinstance(shard, Path):
        return tar_index.read_head(shard)
    if head := tar_index.kept_elsewhere(_sidecar(shard), shard.size, _MTIME):
        return head  # which another process has built since
    path, handle = open_shard(shard)
    try:
        return tar_index.read_head(path)
    except ValueError as error:
        raise ValueError(f"{shard}: {error}") from error
    finally:
        os.close(handle)


def open_index(shard: Remote) -> tar_index.Index:
    """The index of a shard of a store, which is fetched only if there is no sound one."""
    if (head := kept_head(shard)) and tar_index.is_sound(head):
        return tar_index.Index.of_head(head)
    path, handle = open_shard(shard)
    try:
        return tar_index.Index(path)
    finally:
        os.close(handle)


def read_members(shard: Remote, rows: Sequence[int], field: str) -> dict[int, bytes]:
    """A member of some samples of a shard in a store, of those that have it, without fetching the whole."""
    index = open_index(shard)
    spans = {row: index.span(row, field) for row in rows if index.has(row, field)}
    ends = [(start, start + size) for start, size in spans.values() if size]
    if not ShardCache().path(shard).exists():
        pieces = iter(_read_all(shard, ends))
        return {row: next(pieces) if size else b"" for row, (_, size) in spans.items()}
    _, handle = open_shard(shard)
    try:
        return {row: os.pread(handle, size, start) for row, (start, size) in spans.items()}
    finally:
        os.close(handle)


@contextlib.contextmanager
def beside(shard: Shard, name: str) -> Iterator[Path | None]:
    """The file of this name beside a shard, on this machine for as long; None where there is none."""
    if isinstance(shard, Path):
        file = shard.with_name(name)
        yield file if file.is_file() else None
        return
    there = shard.beside(name)
    if there is None:
        yield None
        return
    path, handle = open_shard(there)
    try:
        yield path
    finally:
        os.close(handle)


def stamp(shards: Sequence[Shard]) -> str:
    """A short hash of which versions of the files these are: see Source.stamp."""
    here = stamp_of(os.stat(shard) for shard in shards if isinstance(shard, Path))
    versions = [shard.version for shard in shards if isinstance(shard, Remote)]
    return fingerprint_of([here, *versions]) if versions else here


def size(shard: Shard) -> int:
    """A shard's bytes."""
    return os.path.getsize(shard) if isinstance(shard, Path) else shard.size


class ReadAhead:
    """Fetches shards that will be read soon, in a thread; whatever fails is met when they are read."""

    def __init__(self) -> None:
        self._process: int | None = None

    def ask(self, shards: Iterable[Remote]) -> None:
        """Fetches those that are not here, one after another."""
        if self._process != os.getpid():  # a thread does not come along into a forked process
            self._process, self._asked = os.getpid(), set[Remote]()
            self._queue: queue.Queue[Remote] = queue.Queue()
            threading.Thread(target=self._run, daemon=True).start()
        cache = ShardCache()
        for shard in shards:
            if shard not in self._asked and not cache.path(shard).exists():
                self._asked.add(shard)
                self._queue.put(shard)

    def _run(self) -> None:
        while True:
            shard = self._queue.get()
            try:
                ShardCache().fetch(shard)
            except (OSError, ValueError) as error:
                logger.info("not fetched ahead: %s", error)
            self._asked.discard(shard)


def _read_all(shard: Remote, spans: list[tuple[int, int]]) -> list[bytes]:
    pieces: list[bytes] = []
    while len(pieces) < len(spans):
        pieces += shard.read(spans[len(pieces) :])
    return pieces


def _sidecar(shard: Remote) -> Path:
    path = ShardCache().path(shard)
    return path.with_name(path.name + ".index")
