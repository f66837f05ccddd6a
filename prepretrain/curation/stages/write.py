"""Copies what is kept into shards of its own, for others than this project; here `keep` is read."""

from typing import Any

import pyarrow as pa
import webdataset

from prepretrain.curation.shard import Shard
from prepretrain.curation.stages.base import Stage


class Write(Stage):
    """Writes OUT/write/NNNNN.tar with the kept samples of shard NNNNN, if any, byte by byte, and says in
    `key` under which key. Keys are numbers, of the shard and the row: an old key may hold anything,
    also a path that leads out of the folder where a tar is unpacked."""

    reads = {"keep": ("keep",)}
    columns = {"key": pa.string()}

    def shard(self, shard: Shard) -> dict[str, list[Any]]:
        keep = shard.table("keep")["keep"].to_pylist()
        names = [f"{shard.number:05d}{row:07d}" if kept else None for row, kept in enumerate(keep)]
        if any(keep):
            # an open file, as webdataset may be told (WDS_SECURE) to open none by itself
            with shard.draft("write", "tar") as place, open(place, "wb") as file:
                with webdataset.TarWriter(file, mtime=0) as writer:
                    for row, name in enumerate(names):
                        if name is not None:
                            writer.write({"__key__": name, **shard.members(row)})
        return {"key": names}
