"""The folder of a curation: which shards it is of, and a table for each shard and stage.

    OUT/manifest.json        the shards: path, bytes, checksum, samples; the number of tasks
        recipe.yaml          the stages and their options
        <table>/NNNNN.parquet  a row for each sample of shard NNNNN, in order
        <table>/stage.json   what made it: the stage's options, and what it read
        tasks/<table>/       logs and marks of the engine

A table is a pure function of its shard and the tables that its stage reads: whoever writes it, on any
number of workers, writes the same bytes, under another name first.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prepretrain.data.sources.shards import Shards
from prepretrain.files import draft, read_json, write_json

_PIECES, _PIECE = (
    64,
    4096,
)  # not from the paper: parts of a shard that its checksum is of, and bytes
_ROWS = 65_536  # not from the paper: of a row group
_TASKS = 1000  # what an array of SLURM holds, where nothing else is set


@dataclass(frozen=True)
class ShardFile:
    """A shard as it was when the curation began."""

    path: str
    bytes: int
    checksum: str
    samples: int


@dataclass(frozen=True)
class Manifest:
    """The shards of a curation, in the order of their numbers; task t does t, t + tasks, …"""

    data: str  # card:split
    options: dict[str, Any]  # of the source: where hashtags, texts, captions and labels are
    fields: list[str]  # of the whole split; a shard may lack some
    tasks: int
    shards: list[ShardFile]

    def of_task(self, task: int) -> range:
        """The numbers of the shards of a task."""
        return range(task, len(self.shards), self.tasks)


def make_manifest(
    data: str, source: Shards, options: dict[str, Any], tasks: int | None
) -> Manifest:
    """The manifest of a split's shards as they are now."""
    if far := [path for path in source.paths if not isinstance(path, Path)]:
        raise ValueError(f"{far[0]}: shards are curated on disks of their own. Copy them there.")
    count = len(source.paths)
    tasks = min(count, _TASKS) if tasks is None else tasks
    if not 1 <= tasks <= count:
        raise ValueError(f"--tasks {tasks}: must be from 1 to {count}, the number of shards.")
    with ThreadPoolExecutor(16) as pool:
        shards = list(pool.map(_shard_file, source.paths, source.groups))
    return Manifest(data, options, list(source.fields), tasks, shards)


def _shard_file(path: Path, samples: int) -> ShardFile:
    return ShardFile(str(path.absolute()), path.stat().st_size, checksum(path), samples)


def checksum(path: Path) -> str:
    """A checksum of pieces that are spread over a file, its first and last bytes among them: cheap,
    and another for a file that was packed again or cut; not for every changed byte."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in np.linspace(0, max(size - _PIECE, 0), _PIECES).astype(int).tolist():
            digest.update(os.pread(file.fileno(), _PIECE, start))
    return digest.hexdigest()[:32]


class Folder:
    """A curation's folder, which has a manifest."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def manifest(self) -> Manifest:
        """What the folder is of. Raises ValueError where it is damaged or missing."""
        file = self.path / "manifest.json"
        if not file.exists():
            raise ValueError(f"{file}: is missing, so {self.path} is no curation's folder.")
        content = read_json(file)
        try:
            shards = [ShardFile(**shard) for shard in content.pop("shards")]
            return Manifest(**content, shards=shards)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file}: is damaged: {error}.") from error

    @property
    def exists(self) -> bool:
        """Whether it was begun."""
        return (self.path / "manifest.json").exists()

    def begin(self, manifest: Manifest) -> None:
        """Writes the manifest, or checks that it is the one that is there."""
        if self.exists:
            return self.check(manifest)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "manifest.json", asdict(manifest))

    def check(self, manifest: Manifest) -> None:
        """Raises ValueError if another manifest is there."""
        there = self.manifest
        way_out = "Name another --out, or remove this folder."
        if there.data != manifest.data or there.options != manifest.options:
            raise ValueError(f"{self.path}: is of {there.data}, not of {manifest.data}. {way_out}")
        if len(there.shards) != len(manifest.shards):
            raise ValueError(
                f"{self.path}: is of {len(there.shards)} shards, and {manifest.data} has "
                f"{len(manifest.shards)} now. {way_out}"
            )
        for old, new in zip(there.shards, manifest.shards):
            if old != new:
                raise ValueError(
                    f"{new.path}: is not the shard that {self.path} was begun with "
                    f"({old.path}, {old.bytes} bytes, checksum {old.checksum}). {way_out}"
                )
        if there.tasks != manifest.tasks:
            raise ValueError(
                f"--tasks {manifest.tasks}: {self.path} was begun with {there.tasks} tasks, and a relaunch "
                f"must have as many, or shards would be left out. Leave --tasks out."
            )

    def table(self, name: str, number: int) -> Path:
        """The file of a shard's table."""
        return self.path / name / f"{number:05d}.parquet"

    def there(self, name: str) -> set[int]:
        """The numbers of the shards that have a table of this name."""
        files = (self.path / name).glob("[0-9]*.parquet")
        return {int(file.stem) for file in files if file.stem.isdigit()}

    def has(self, name: str, number: int) -> bool:
        """Whether a shard's table is there; what has this name is whole."""
        return self.table(name, number).exists()

    def read(self, name: str, number: int, columns: list[str] | None = None) -> pa.Table:
        """A shard's table, in the order of its samples. Raises ValueError where it is missing or is
        not of the shard."""
        file = self.table(name, number)
        try:
            found = pq.read_table(file, columns=columns, partitioning=None)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file}: cannot be read: {error}. Run its stage again.") from error
        samples = self.manifest.shards[number].samples
        if len(found) != samples:
            raise ValueError(
                f"{file}: has {len(found)} rows, and the shard {samples} samples. Remove it, and run its "
                f"stage again."
            )
        return found

    def write(self, name: str, number: int, table: pa.Table) -> None:
        """Writes a shard's table, whole or not at all; equal tables are equal bytes."""
        file = self.table(name, number)
        file.parent.mkdir(exist_ok=True)
        with draft(file) as place:
            pq.write_table(table, place, compression="zstd", row_group_size=_ROWS)

    def clear_drafts(self, name: str) -> None:
        """Removes what tasks that were killed left half written."""
        for file in (self.path / name).glob(".*.parquet.*"):
            file.unlink(missing_ok=True)

    def stage_file(self, name: str) -> Path:
        """Where it is written what made a table."""
        return self.path / name / "stage.json"


def fingerprint(content: Any) -> str:
    """A short digest of something that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
