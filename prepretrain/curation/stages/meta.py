"""What each sample is: its key, bytes, size and checksum, and what img2dataset says of it."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prepretrain.curation.shard import Shard
from prepretrain.curation.stages.base import Stage
from prepretrain.data.transforms import BadImage, header

_STATED = ("status", "sha256")  # columns of img2dataset's parquet


class Meta(Stage):
    """The key, the image's bytes, width, height and SHA-256 of each sample, and the `status` and
    `sha256` (here `original_sha256`: of the file before it was resized) of img2dataset's parquet
    beside the shard, where there is one; null where there is none."""

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
        stated = _stated(shard.path, keys)
        return {
            "key": [key.encode(errors="replace").decode() for key in keys],
            **{name: [image.get(name) for image in images] for name in list(self.columns)[1:5]},
            "status": [stated.get(key, {}).get("status") for key in keys],
            "original_sha256": [stated.get(key, {}).get("sha256") for key in keys],
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


def _stated(shard: Path, keys: list[str]) -> dict[str, dict[str, Any]]:
    """What img2dataset's parquet beside a shard says of its keys."""
    file = shard.with_suffix(".parquet")
    if not file.exists():
        return {}
    try:
        names = set(pq.read_schema(file).names)
        if "key" not in names:
            return {}
        rows = pq.read_table(file, columns=["key", *(n for n in _STATED if n in names)])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{file}: cannot be read: {error}. Remove it, or fetch it again."
        ) from error
    wanted = set(keys)
    return {str(row["key"]): row for row in rows.to_pylist() if str(row["key"]) in wanted}
