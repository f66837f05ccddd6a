"""Writes the table of a study's runs, a row each, as `table.read` takes it."""

import csv
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from prepretrain import config as configs
from prepretrain import plugin
from prepretrain.data.sampling import mix
from prepretrain.files import draft
from prepretrain.runs.results import measured
from prepretrain.scaling.plan import Planned, speeds
from prepretrain.scaling.progress import State, states
from prepretrain.scaling.study import Study


def collect(study: Study, planned: list[Planned], world: int) -> tuple[list[Path], list[str]]:
    """(runs.csv and runs.parquet in the study's folder, what was left out of them, in words)."""
    rows, left = [], []
    for one, state in zip(planned, states(study, planned)):
        if one.stale:
            left.append(f"{one.name}: stale: {'; '.join(one.stale)}")
        elif state.what != "done":
            left.append(f"{one.name}: {state.what} at step {state.step} of {state.of}. {state.why}")
        else:
            rows.append(_row(study, one, state, world))
    if not rows:
        raise ValueError(f"{study.folder}: no run is done.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in names} for row in rows]
    paths = [study.folder / "runs.csv", study.folder / "runs.parquet"]
    with draft(paths[0]) as place, place.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    with draft(paths[1]) as place:
        parquet.write_table(pa.Table.from_pylist(rows), place)
    return paths, left


def _row(study: Study, one: Planned, state: State, world: int) -> dict[str, Any]:
    """A run: `images_seen` with repetitions, `images_before` in the runs that it started from, whose
    FLOPs are in `flops`; `cost` is in device-days. Steps of a trunk count as the run's own."""
    found, config = state.results, one.run.config
    speed = _speed(one)
    loss, gap = found.get("val_loss"), found.get("val_gap")
    started = _started(config.init)
    row = {
        "run": one.name,
        "model": _labels(study, one, "model", "objective") or config.model.get("encoder"),
        "data": _labels(study, one, "data") or mix.name(one.shape.plan.parts),
        "iterations": one.steps,
        "val_loss": loss,
        "train_loss": None if loss is None or gap is None else loss - gap,
        "params": one.shape.size["encoder_parameters"],
        "images": one.shape.plan.images,
        "images_seen": one.seen,
        "images_before": started["images"],
        "flops": one.flops + started["flops"],
        "cost": None if speed is None else one.seen / speed * world / 86400,
        "objective": config.objective["name"],
        "stage": study.stage,
        "init": config.init,
        "seed": config.seed,
    }
    return row | _metrics(found)


def _labels(study: Study, one: Planned, *sections: str) -> str:
    """A run's values on the axes that set these sections of the config."""
    axes = dict.fromkeys(axis for section in sections for axis in study.setting(section))
    return " ".join(one.run.labels[axis] for axis in axes)


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """{evaluation: the metric that tables quote}; a training of the suite has several."""
    quoted = {}
    for key, values in found.items():
        if isinstance(values, dict):
            several = all(isinstance(inner, dict) for inner in values.values())
            for name, metrics in values.items() if several else [(None, values)]:
                kind = plugin.find("evaluators", (name or key).partition("/")[0])
                quoted[f"{key} {name}" if several else key] = metrics[kind.quoted(metrics)]
    return quoted


def _started(init: str | None) -> dict[str, float]:
    """The images and FLOPs that went into the run that another started from; 0 of what is no run."""
    folder = Path((init or "").partition(":")[0])
    if init is None or not (folder / "config.yaml").exists():
        return {"images": 0, "flops": 0.0}
    found = measured(folder)
    before = _started(configs.read_training(folder / "config.yaml").init)
    images = found["images"]
    return {
        "images": images + before["images"],
        "flops": 3.0 * found["flops_per_image"] * images + before["flops"],
    }


def _speed(one: Planned) -> float | None:
    found = speeds(one)
    return statistics.median(found) if found else None
