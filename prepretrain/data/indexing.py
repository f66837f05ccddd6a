"""Builds the indexes of many shards: each is a function of its shard alone, so any process may build any."""

import os
from collections.abc import Sequence
from pathlib import Path

from prepretrain.data import tar_index
from prepretrain.data.on_cores import on_cores
from prepretrain.distributed import group as distributed
from prepretrain.distributed import heartbeat

_ALONE = 1 << 28  # not from the paper: bytes that one process indexes sooner than several start


def index_shards(shards: Sequence[Path], rank: int = 0, world_size: int = 1) -> list[dict]:
    """Builds what is missing of the indexes of every world_size-th shard, from number `rank` on, and
    returns their heads (see tar_index.read_head).

    Ranks share nothing but the files, so any engine can call it on any machine, again and with
    another world_size, too: what is there and fits its shard is not built again.
    """
    return [_read(shard) for shard in shards[rank::world_size]]


def read_heads(shards: Sequence[Path], processes: int | None = None) -> list[dict]:
    """The heads of all shards; indexes that are missing are built on all cores.

    Several processes of a run may call this at the same time: each begins at another shard, and
    passes over what the others have built by then.
    """
    heads = [_kept(shard) for shard in shards]
    missing = [number for number, head in enumerate(heads) if head is None]
    first = len(missing) * distributed.rank() // distributed.world()
    missing = missing[first:] + missing[:first]
    if sum(os.path.getsize(shards[number]) for number in missing) < _ALONE and processes is None:
        processes = 1
    built = on_cores(_read, [shards[number] for number in missing], processes)
    for number, head in zip(missing, built):
        heartbeat.beat(f"indexed {shards[number]}")
        heads[number] = head
    return heads


def _kept(shard: Path) -> dict | None:
    heartbeat.beat(f"opening {shard}")
    return tar_index.kept_head(shard)


def _read(shard: Path) -> dict:
    heartbeat.beat(f"indexing {shard}")
    return tar_index.read_head(shard)
