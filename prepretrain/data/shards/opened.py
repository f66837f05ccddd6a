"""Shards that a process holds open: as many as it may, the last that were read."""

import errno
import os
import resource
import sys
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from prepretrain.data.io.remote import Remote
from prepretrain.data.shards import files
from prepretrain.data.shards.cache import ShardCache
from prepretrain.data.shards.files import Shard
from prepretrain.data.shards.tar_index import Index
from prepretrain.data.transforms import BadImage

MAX_MEMBER = 64_000_000  # not from the paper: bytes of one member, checked before it is read

_MAPPINGS = Path("/proc/sys/vm/max_map_count")  # Linux's


class OpenShard:
    """One open shard and its index; closed, and free to leave the cache, when nothing refers to it any
    more. `pread` keeps no position, so forked workers may share it."""

    def __init__(self, place: Shard):
        self.place = place
        self.path, self._file = files.open_shard(place)
        weakref.finalize(self, os.close, self._file)
        self.index = Index(self.path)

    def read(self, row: int, field: str) -> bytes:
        """A member of a sample, which has it."""
        offset, size = self.index.span(row, field)
        if size > MAX_MEMBER:
            raise BadImage("too large", f"{field}: {size} bytes, the limit is {MAX_MEMBER}")
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise OSError(
                errno.ESTALE,
                f"{self.place}: {len(data)} of {size} bytes at offset {offset}: the file "
                "was cut since it was opened.",
            )
        return data


class FarShard:
    """A shard of a store that is not fetched: its index, and a member of some of its samples."""

    def __init__(self, place: Remote, rows: Sequence[int], member: str):
        self.place, self.index = place, files.open_index(place)
        self._members = files.read_members(place, rows, member)

    def read(self, row: int, field: str) -> bytes:
        """That member of one of those samples, which has it."""
        return self._members[row]


class OpenShards:
    """The shards of a source by their numbers, opened when they are read.

    most    how many are held at once
    cached  bytes of the largest one from a store, which is in the cache while it is held
    """

    def __init__(self, places: Sequence[Shard]):
        self.places, self._held = places, OrderedDict[int, OpenShard]()
        self.most = _most_open(len(places))
        far = [place.size for place in places if isinstance(place, Remote)]
        self.cached = max(far, default=0)
        if far:
            self.keep(ShardCache().limit // self.cached // 2)
        files.holders.add(self)

    def __getitem__(self, number: int) -> OpenShard:
        if number in self._held:
            self._held.move_to_end(number)
        else:
            while len(self._held) >= self.most:  # before the next one needs their room
                self._held.popitem(last=False)
            self._held[number] = OpenShard(self.places[number])
        return self._held[number]

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, most: int) -> None:
        """Holds at most so many shards from now on, if they are of a store, and none until one is read."""
        if self.cached:
            self.most = max(1, min(most, _most_open(len(self.places))))
            self.close()

    def close(self) -> None:
        """Lets go of all; they are opened again when they are read."""
        self._held.clear()


def _most_open(shards: int) -> int:
    """How many of so many shards are held open at once; others are closed and opened again, which
    takes ten times as long as reading an image.

    An open shard takes two files and a mapping, and a source takes a quarter of what its process may
    have. Where that is too few, the process's limit of files is raised as far as it may be.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    files, highest = (sys.maxsize if n == resource.RLIM_INFINITY else n for n in limits)
    if files < 8 * shards:
        files = min(8 * shards, highest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, limits[1]))
    mappings = int(_MAPPINGS.read_text()) if _MAPPINGS.exists() else sys.maxsize
    return max(1, min(shards, files // 8, mappings // 4))
