"""Reads the hashtags of each sample, in one spelling."""

from typing import Any

import pyarrow as pa

from prepretrain.curation.shard import Shard
from prepretrain.curation.stages.base import Stage
from prepretrain.data.tags.vocabulary import canonical
from prepretrain.data.transforms import BadImage


class Tags(Stage):
    """`tags`, each hashtag once, as a vocabulary spells it, in order; and `error` where they cannot be
    read."""

    columns = {"tags": pa.list_(pa.string()), "error": pa.string()}

    def shard(self, shard: Shard) -> dict[str, list[Any]]:
        if "hashtags" not in shard.fields:
            raise ValueError(
                f"tags: {shard.path} has no hashtags. Name their place in the card, as in "
                f"hashtags: json.tags."
            )
        rows = [_row(shard, row) for row in range(len(shard))]
        return {name: [row.get(name) for row in rows] for name in self.columns}


def _row(shard: Shard, row: int) -> dict[str, Any]:
    try:
        spelled = {canonical(tag) for tag in shard.hashtags(row)}
    except BadImage as error:
        return {"error": str(error)}
    return {"tags": sorted(spelled - {""})}
