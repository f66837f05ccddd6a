"""Plans and runs a recipe on a split: stage after stage, and in each only what is missing."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from prepretrain import plugin
from prepretrain.curation import engine, recipe, summary
from prepretrain.curation.engine import Machines, Tables
from prepretrain.curation.folder import Folder, Manifest, fingerprint, make_manifest
from prepretrain.curation.recipe import Recipe
from prepretrain.curation.shard import Shard
from prepretrain.curation.stages.base import Stage
from prepretrain.data.card import load_card
from prepretrain.data.sources.shards import Shards
from prepretrain.files import draft, read_json, write_json


def plan(data: str, named: str, out: Path, tasks: int | None, machines: Machines) -> None:
    """Prints what a run would do, and about how long it takes; writes nothing."""
    engine.check_packages()
    machines.check(out)
    chosen, manifest = recipe.load(named), _manifest(data, out, tasks)
    samples = sum(shard.samples for shard in manifest.shards)
    size = sum(shard.bytes for shard in manifest.shards)
    print(
        f"{manifest.data}: {samples:,} samples in {len(manifest.shards):,} shards, {size / 1e9:,.2f} GB; "
        f"{manifest.tasks:,} tasks, {_at_once(machines, manifest)} at a time; {out}"
    )
    folder, marks = Folder(out), _fingerprints(chosen, manifest)
    if folder.exists:
        folder.check(manifest)
    for table, stage in chosen.stages.items():
        there = len(folder.there(table))
        expected = _expected(stage, manifest, there, machines)
        if _mark(folder, table) not in (None, marks[table]):
            expected = "was made with other options; --again makes it anew"
        print(f"{table:>12}: {expected}")


def _expected(stage: Stage, manifest: Manifest, there: int, machines: Machines) -> str:
    """What is left of a stage, in words."""
    shards = len(manifest.shards)
    if there == shards:
        return "done"
    if stage.kind == "reduce":
        return "1 task over all tables"
    left = f"{shards - there:,} of {shards:,} shards"
    if stage.images_a_second is None:
        return left
    samples = sum(shard.samples for shard in manifest.shards) * (shards - there) / shards
    minutes = samples / stage.images_a_second / _at_once(machines, manifest) / 60
    return f"{left}, about {minutes:,.1f} minutes at {stage.images_a_second:,.0f} samples/s a task"


def _at_once(machines: Machines, manifest: Manifest) -> int:
    """How many tasks run at a time: where nothing is said, one here, and all elsewhere."""
    everywhere = machines.slurm is not None or machines.ray
    return min(machines.workers or (manifest.tasks if everywhere else 1), manifest.tasks)


def run(
    data: str, named: str, out: Path, tasks: int | None, machines: Machines, again: bool = False
) -> None:
    """Runs what is missing of a recipe, and prints a summary.

    again: stages whose options, or what they read, are others than those that their tables were made
    with are run anew; without it they are an error. Raises ValueError for what the user can mend.
    """
    engine.check_packages()
    machines.check(out)
    chosen, manifest = recipe.load(named), _manifest(data, out, tasks)
    for stage in chosen.stages.values():
        stage.check()
    folder = Folder(out)
    folder.begin(manifest)
    marks = _fingerprints(chosen, manifest)
    changed = [table for table in marks if _mark(folder, table) not in (None, marks[table])]
    if changed and not again:
        raise ValueError(
            f"{out}: {', '.join(changed)}: made with other options, or of other tables, than {chosen.path} "
            f"says now. Add --again to make them anew, or name another --out."
        )
    for table in changed:
        shutil.rmtree(out / table)
        shutil.rmtree(_logs(folder, table), ignore_errors=True)
    with draft(out / "recipe.yaml") as place:
        place.write_text(yaml.safe_dump(chosen.content, sort_keys=False))
    for table, stage in chosen.stages.items():
        (out / table).mkdir(exist_ok=True)
        write_json(folder.stage_file(table), {"mark": marks[table], **chosen.options[table]})
        run_stage(folder, table, stage, machines)
    if "keep" in chosen.stages:
        counts = summary.summary(out)
        print(summary.as_text(counts))
        print(json.dumps(counts))


def _manifest(data: str, out: Path, tasks: int | None) -> Manifest:
    """The manifest of "card:split" as it is now; `tasks` as in the folder where it is left open."""
    name, _, split = data.rpartition(":") if ":" in data else (data, "", "train")
    card = load_card(name)
    source = card.open(split)
    if not isinstance(source, Shards):
        raise ValueError(
            f"{data}: its source is {type(source).__name__}, and only shards are curated, as a whole. "
            f"Pack others with datasets/make_shards.py."
        )
    if tasks is None and Folder(out).exists:
        tasks = Folder(out).manifest.tasks
    return make_manifest(f"{card.name}:{split}", source, source.places, tasks)


def _fingerprints(chosen: Recipe, manifest: Manifest) -> dict[str, str]:
    """What each table depends on, as a digest: options, shards, and the tables that it reads."""
    marks: dict[str, str] = {}
    shards = [shard.checksum for shard in manifest.shards]
    for table, stage in chosen.stages.items():
        options = plugin.defaults(type(stage)) | chosen.options[table]
        read = {name: [marks[name], list(columns)] for name, columns in stage.reads.items()}
        marks[table] = fingerprint([repr(options), read, shards])
    return marks


def _mark(folder: Folder, table: str) -> str | None:
    file = folder.stage_file(table)
    return read_json(file).get("mark") if file.exists() else None


def _logs(folder: Folder, table: str) -> Path:
    return folder.path / "tasks" / table


def run_stage(folder: Folder, table: str, stage: Stage, machines: Machines) -> None:
    """Makes the tables of one stage that are not there."""
    manifest = folder.manifest
    missing = set(range(len(manifest.shards))) - folder.there(table)
    count = manifest.tasks if stage.kind == "map" else 1
    kinds = {"map": MapTask, "reduce": ReduceTask}
    task = kinds[stage.kind](folder.path.absolute(), table, stage)
    engine.forget(_logs(folder, table), {number % count for number in missing})
    engine.run(task, count, _logs(folder, table), machines, table, stage.gpu)
    folder.clear_drafts(table)


class MapTask:
    """Makes the tables of one task's shards, as far as they are not there."""

    def __init__(self, out: Path, table: str, stage: Stage):
        self.out, self.table, self.stage = out, table, stage

    def __call__(self, data: Any, task: int, count: int) -> None:
        folder = Folder(self.out)
        if count != folder.manifest.tasks:
            raise ValueError(
                f"{self.table}: is run with {count} tasks, and {self.out} was begun with "
                f"{folder.manifest.tasks}: shards would be left out."
            )
        for number in folder.manifest.of_task(task):
            if not folder.has(self.table, number):
                shard = Shard(folder, number, self.stage.reads)
                columns = self.stage.shard(shard)
                folder.write(self.table, number, self._as_table(columns, shard))

    def _as_table(self, columns: dict[str, Sequence[Any]], shard: Shard) -> pa.Table:
        if columns.keys() != self.stage.columns.keys():
            raise ValueError(
                f"{self.table}: gave the columns {sorted(columns)}, and declares "
                f"{sorted(self.stage.columns)}."
            )
        lengths = {name: len(values) for name, values in columns.items()}
        if set(lengths.values()) - {len(shard)}:
            raise ValueError(
                f"{self.table}: {shard.path} has {len(shard)} samples, and the columns' lengths are "
                f"{lengths}."
            )
        arrays = [pa.array(columns[n], kind) for n, kind in self.stage.columns.items()]
        rows = pa.array(range(len(shard)), pa.int32())
        return pa.table([rows, *arrays], schema=_schema(self.stage))


class ReduceTask:
    """Makes the tables of all shards from earlier ones."""

    def __init__(self, out: Path, table: str, stage: Stage):
        self.out, self.table, self.stage = out, table, stage

    def __call__(self, data: Any, task: int, count: int) -> None:
        folder = Folder(self.out)
        spill = _logs(folder, self.table) / f"spill-{os.getpid()}"
        try:
            tables = Tables(folder, self.stage.reads, spill)
            found = self.stage.reduce(tables)
            for number, rows in enumerate(tables.divided(found, self.stage.columns)):
                folder.write(self.table, number, rows.cast(_schema(self.stage)))
        finally:
            shutil.rmtree(spill, ignore_errors=True)


def _schema(stage: Stage) -> pa.Schema:
    return pa.schema([("row", pa.int32()), *stage.columns.items()])
