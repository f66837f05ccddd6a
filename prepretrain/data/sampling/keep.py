"""The weights of a split's images from files beside its shards: what a curation decided."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prepretrain.data.sampling import bounds
from prepretrain.data.sampling.weights import Weights
from prepretrain.data.shards.files import Shard, size
from prepretrain.data.sources.base import fingerprint_of
from prepretrain.distributed import heartbeat
from prepretrain.files import read_json

MANIFEST = "manifest.json"  # of a curation, above the folder of its files


def read_weights(folder: Path, shards: list[Shard], samples: list[int]) -> Weights:
    """The weights of all samples of these shards, 0 for those that are not kept.

    The folder holds a Parquet file for each shard, whose rows are the shard's samples in order, with
    columns `keep` and `weight`, and `row`, their number, if it has that. It has the shard's name or,
    below a curation's manifest, its number there. Raises ValueError for files of other shards.
    """
    files = _files(folder, shards, samples)
    state = [
        (file.name, stat.st_size, stat.st_mtime_ns)
        for file, stat in zip(files, map(os.stat, files))
    ]
    key = fingerprint_of([folder.absolute(), *samples, *state])
    images = sum(samples)
    if images <= bounds.IN_MEMORY:
        values = np.empty(images, np.float32)
        _fill(values, files, samples)
    else:
        kept = bounds.cache_file(f"{key}.weights")
        bounds.write_once(kept, lambda place: _write(place, files, samples))
        values = np.asarray(np.memmap(kept, np.float32, "r", shape=(images,)))
    return Weights(images, key, lambda where: values[where])


def _files(folder: Path, shards: list[Shard], samples: list[int]) -> list[Path]:
    """The file of each shard."""
    if not (folder.parent / MANIFEST).exists():
        files = [folder / f"{shard.stem}.parquet" for shard in shards]
    else:
        _check_manifest(folder.parent / MANIFEST, shards, samples)
        files = [folder / f"{number:05d}.parquet" for number in range(len(shards))]
    for file, shard in zip(files, shards):
        if not file.is_file():
            raise ValueError(
                f"{file}: is missing, so {folder} is not of shard {shard}. Name the folder that was made "
                f"from these shards, or complete it."
            )
    return files


def _check_manifest(file: Path, shards: list[Shard], samples: list[int]) -> None:
    """Raises ValueError unless a manifest names these shards."""
    try:
        named = [
            (Path(s["path"]).name, s["bytes"], s["samples"]) for s in read_json(file)["shards"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: is damaged: {error!r} is no shard.") from error
    there = [(shard.name, size(shard), n) for shard, n in zip(shards, samples)]
    said = "is another's: it was made from {} (name, bytes, samples), and the data has {}. Curate again."
    if len(named) != len(there):
        raise ValueError(f"{file}: {said.format(f'{len(named)} shards', len(there))}")
    for old, new in zip(named, there):
        if old != new:
            raise ValueError(f"{file}: {said.format(old, new)}")


def _write(place: Path, files: list[Path], samples: list[int]) -> None:
    bounds.allocate(place, 4 * sum(samples))
    values = np.memmap(place, np.float32, "r+", shape=(sum(samples),))
    _fill(values, files, samples)
    values.flush()


def _fill(values: np.ndarray, files: list[Path], samples: list[int]) -> None:
    first = 0
    for file, count in zip(files, samples):
        heartbeat.beat(f"reading {file}")
        values[first : first + count] = _weights(file, count)
        first += count
    if not values.any():
        raise ValueError(f"{files[0].parent}: all weights are 0, so no image is left to train on.")


def _weights(file: Path, samples: int) -> np.ndarray:
    """The weights of one file's rows."""
    try:
        table = pq.read_table(file, partitioning=None, use_threads=False)
        keep, weight = (table[name].to_numpy() for name in ("keep", "weight"))
        rows = table["row"].to_numpy() if "row" in table.column_names else np.arange(len(table))
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(
            f"{file}: cannot be read: {error}. It needs the columns keep (bool) and weight (float)."
        ) from error
    if len(rows) != samples:
        raise ValueError(
            f"{file}: has {len(rows)} rows, and its shard {samples} samples: it is another's, or was cut."
        )
    checks = (
        (rows != np.arange(samples), "row", rows, "a row for each sample in order, from 0"),
        (~np.isin(keep, (True, False)), "keep", keep, "true or false"),
        (~(np.isfinite(weight) & (weight >= 0)), "weight", weight, "finite and at least 0"),
        (~keep.astype(bool) & (weight != 0), "weight", weight, "0 where keep is false"),
    )
    for wrong, name, values, wanted in checks:
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"{file}: {name} of row {row}: {values[row]} must be {wanted}.")
    return weight
