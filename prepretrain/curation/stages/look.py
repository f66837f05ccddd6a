"""Looks at each picture, decoded small: perceptual hashes, and what makes it a poor one."""

from typing import Any

import pyarrow as pa

from prepretrain.curation import hashes
from prepretrain.curation.shard import Shard
from prepretrain.curation.stages.base import Stage
from prepretrain.curation.thumbnail import entropy, is_grey, thumbnail_of
from prepretrain.data.transforms import BadImage


class Look(Stage):
    """The hashes of curation/hashes.py; `aspect`, the longer side by the shorter; `entropy` of the
    histogram of grey levels, in bits; `grey`, whether there is no colour; and `error`, which says what
    is wrong with an image that cannot be read (then all others are null). Of a video it is the frame
    that is shown halfway."""

    columns = {
        **dict(zip(hashes.SCHEMA.names, hashes.SCHEMA.types)),
        "aspect": pa.float32(),
        "entropy": pa.float32(),
        "grey": pa.bool_(),
        "error": pa.string(),
    }
    images_a_second = 900  # curate_speed.json: 256 pixels wide; 340 of 640

    def shard(self, shard: Shard) -> dict[str, list[Any]]:
        rows = [_looked_at(sample) for sample in shard.pictures()]
        return {name: [row.get(name) for row in rows] for name in self.columns}


def _looked_at(sample: dict[str, Any] | BadImage) -> dict[str, Any]:
    try:
        if isinstance(sample, BadImage):
            raise sample
        image, aspect = thumbnail_of(sample)
    except BadImage as error:
        return {"error": str(error)}
    picture = image.permute(1, 2, 0).numpy()
    seen = {"aspect": aspect, "entropy": entropy(picture), "grey": is_grey(picture)}
    return hashes.hashes(image) | seen
