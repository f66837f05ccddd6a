"""Draws what runs logged, over the images seen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from prepretrain import jsonl
from prepretrain.reports.figure import COLOURS, DASHES, INK, blank, panels, save


def metrics(run: str | Path, keys: Sequence[str]) -> list[dict]:
    """The rows of a run's metrics.jsonl, of each the step, the images seen and some keys."""
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(
            f"{run}: there is no metrics.jsonl. Is it a run's folder, and has the run logged a step?"
        )
    kept = ("step", "images", *keys)
    return [{k: row[k] for k in kept if k in row} for row in jsonl.rows(path)]


def draw(
    runs: Sequence[str | Path],
    path: str | Path,
    keys: Sequence[str] = ("loss",),
    names: Sequence[str] = (),
) -> None:
    """Draws each key over images seen, one line a run; where there are many points, the smooth line
    over its own values.

    Runs of different objectives are in panels of their own: their losses have no common scale.
    names: of the runs, by default their folders'.
    """
    if not runs:
        raise ValueError("report: no runs to draw. Name at least one run's folder.")
    if names and len(names) != len(runs):
        raise ValueError(f"--names: {len(names)} names for {len(runs)} runs.")
    called = names or [Path(run).resolve().name for run in runs]
    lines = [(_objective(run), name, metrics(run, keys)) for run, name in zip(runs, called)]
    objectives = dict.fromkeys(objective for objective, _, _ in lines)
    shown = [(key, objective) for key in keys for objective in objectives]
    figure = blank(6.4 * len(shown), 4.2)
    for axes, (key, objective) in zip(panels(figure, len(shown)), shown):
        for number, (owner, name, rows) in enumerate(lines):
            if owner == objective:
                _curve(axes, number, name, _points(rows, key), key)
        axes.set(xlabel="images seen", ylabel=key, title=objective)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(frameon=False, labelcolor=INK)
    save(figure, path)


def _objective(run: str | Path) -> str:
    """The name of a run's objective; "" where its folder does not say."""
    path = Path(run) / "config.yaml"
    return yaml.safe_load(path.read_text())["objective"]["name"] if path.exists() else ""


def _points(rows: list[dict], key: str) -> list[tuple[float, float]]:
    """(images, value) of the rows that hold a key; an evaluation's rows name their step only."""
    batch = next((r["images"] / r["step"] for r in rows if "images" in r), 0.0)
    return [(r["step"] * batch, r[key]) for r in rows if key in r]


def _curve(axes: Axes, number: int, name: str, points: list[tuple[float, float]], key: str) -> None:
    if not points:
        raise ValueError(
            f"{name}: no line of metrics.jsonl holds '{key}'. Choose a key that the run logged."
        )
    images, values = np.array(points, dtype=float).T
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
    axes.plot(images, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(images, smooth(values), dash, color=colour, linewidth=1.8, label=name)


def smooth(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """A moving average over `share` of the points; of their logarithms, where all are positive.

    In logarithms, because a plain average bends a loss upwards where it falls fast.
    """
    half = round(len(values) * share / 2)
    safe = bool((values > 0).all())
    sums = np.concatenate([[0.0], np.cumsum(np.log(values) if safe else values)])
    middle = np.arange(len(values))
    left = np.minimum(half, middle)
    right = np.minimum(
        left, len(values) - 1 - middle
    )  # symmetric at the start, where a loss is steep
    means = (sums[middle + right + 1] - sums[middle - left]) / (left + right + 1)
    return np.exp(means) if safe else means
