"""Builds the indexes of many shards: each is a function of its shard alone, so any process may build any."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prepretrain.data.io.remote import Remote
from prepretrain.data.shards import files
from prepretrain.data.shards.cache import readers
from prepretrain.data.shards.files import Shard
from prepretrain.data.shards.on_cores import cores, on_cores
from prepretrain.distributed import group as distributed
from prepretrain.distributed import heartbeat

_ALONE = 1 << 28  # not from the paper: bytes that one process indexes sooner than several start
_TOGETHER = 16  # not from the paper: requests to a store at the same time


def index_shards(shards: Sequence[Shard], rank: int = 0, world_size: int = 1) -> list[dict]:
    """Builds what is missing of the indexes of every world_size-th shard, from number `rank` on, and
    returns their heads (see tar_index.read_head).

    Ranks share nothing but the files, so any engine can call it on any machine, again and with
    another world_size, too: what is there and fits its shard is not built again.
    """
    return read_heads(shards[rank::world_size], processes=1)


def read_heads(shards: Sequence[Shard], processes: int | None = None) -> list[dict]:
    """The heads of all shards; indexes that are missing are built on all cores.

    Several processes of a run may call this at the same time: each begins at another shard, and
    passes over what the others have built by then.
    """
    if all(isinstance(shard, Path) for shard in shards):
        heads = [_kept(shard) for shard in shards]
    else:
        with ThreadPoolExecutor(_TOGETHER) as threads:
            heads = list(threads.map(_kept, shards))
    missing = [number for number, head in enumerate(heads) if head is None]
    first = len(missing) * distributed.rank() // distributed.world()
    missing = missing[first:] + missing[:first]
    if processes is None and sum(files.size(shards[number]) for number in missing) < _ALONE:
        processes = 1
    if processes is None:
        far = [shards[number].size for number in missing if isinstance(shards[number], Remote)]
        processes = min(cores(), readers(max(far, default=0)))
    built = on_cores(_read, [shards[number] for number in missing], processes)
    for number, head in zip(missing, built):
        heartbeat.beat(f"indexed {shards[number]}")
        heads[number] = head
    return heads


def _kept(shard: Shard) -> dict | None:
    heartbeat.beat(f"opening {shard}")
    return files.kept_head(shard)


def _read(shard: Shard) -> dict:
    heartbeat.beat(f"indexing {shard}")
    return files.read_head(shard)
