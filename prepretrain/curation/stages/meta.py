"""What each sample is: its key, bytes, size and checksum, and what img2dataset says of it."""

import hashlib
from typing import Any

import pyarrow as pa

from prepretrain.curation.shard import Shard
from prepretrain.curation.stages.base import Stage
from prepretrain.data.shards.img2dataset import Disagrees, read_rows
from prepretrain.data.transforms import BadImage, header


class Meta(Stage):
    """The key, the image's bytes, width, height and SHA-256 of each sample, and the `status` and
    `sha256` (here `original_sha256`: of the file before it was resized) of img2dataset's parquet
    beside the shard, where there is one; null where there is none. One whose successful rows are not
    the shard's samples is an error."""

    columns = {
        "key": pa.string(),
        "bytes": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "sha256": pa.string(),
        "status": pa.string(),
        "original_sha256": pa.string(),
    }
    images_a_second = 17_000  # benchmarks/results/curate_speed.json: pictures 256 pixels wide

    def shard(self, shard: Shard) -> dict[str, list[Any]]:
        keys = [shard.key(row) for row in range(len(shard))]
        images = [_image(sample) for sample in shard.pictures()]
        stated = _stated(shard)
        return {
            "key": [key.encode(errors="replace").decode() for key in keys],
            **{name: [image.get(name) for image in images] for name in list(self.columns)[1:5]},
            "status": stated["status"],
            "original_sha256": stated["sha256"],
        }


def _image(sample: dict[str, Any] | BadImage) -> dict[str, Any]:
    """What is to be said of an image's file; of one that is missing, and of a video, nothing."""
    if isinstance(sample, BadImage) or "image" not in sample:
        return {}
    data = sample["image"]
    found = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        width, height = header(data).size
    except BadImage:  # `look` says what is wrong
        return found
    return found | {"width": width, "height": height}


def _stated(shard: Shard) -> dict[str, list[Any]]:
    """What img2dataset's parquet beside a shard says of each of its samples."""
    file, columns = shard.path.with_suffix(".parquet"), ["status", "sha256"]
    rows = None
    try:
        for wanted in (columns, columns[:1]) if file.exists() else ():
            if (rows := read_rows(file, shard.index, wanted)) is not None:
                break
    except Disagrees as error:
        raise ValueError(
            f"{error}. Fetch it again, or move it away where the shard was packed anew."
        ) from error
    names = [] if rows is None else rows.column_names
    return {n: rows[n].to_pylist() if n in names else [None] * len(shard) for n in columns}
