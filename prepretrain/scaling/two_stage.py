"""Whether pre-pretraining pays: stage two after it against stage two alone.

At equal FLOPs, as Figure 5 of MAWS (arXiv 2303.13496), and at equal lengths of stage two, as its
Figure 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from prepretrain.scaling.laws import TooFew
from prepretrain.scaling.table import numbers

COLUMNS = ("images_before", "iterations", "flops")
LEVEL = 0.95  # of the intervals
AT = {"equal_flops": "flops", "equal_length": "iterations"}


@dataclass(frozen=True)
class Runs:
    """Runs of stage two, one a row."""

    before: np.ndarray  # images seen in pre-pretraining; 0: none
    iterations: np.ndarray  # of stage two
    flops: np.ndarray  # of both stages
    values: dict[str, np.ndarray]  # of each metric; more is better


def read(path: str | Path, metrics: Sequence[str]) -> tuple[Runs, list[str]]:
    """The runs of a CSV file with the columns `images_before` (seen in pre-pretraining;
    0: none), `iterations` (of stage two), `flops` (of both) and the metrics, and
    what was left out, in words. Several rows of the same amounts are seeds.

    Raises ValueError naming the file, the line and the column.
    """
    found, left_out = numbers(Path(path), [*COLUMNS, *metrics])
    before, iterations, flops = (found[name] for name in COLUMNS)
    if len(before) == 0:
        raise ValueError(f"{path}: holds no run.")
    for name, least in zip(COLUMNS, (0, 1, 1)):
        values = found[name]
        if values.min() < least:
            raise ValueError(f"{path}: {name} must be at least {least}. One is {values.min():g}.")
    return Runs(before, iterations, flops, {name: found[name] for name in metrics}), left_out


@dataclass(frozen=True)
class Means:
    """The means over seeds of the runs with the same amounts."""

    before: np.ndarray
    iterations: np.ndarray
    flops: np.ndarray
    value: np.ndarray
    seeds: np.ndarray
    noise: float  # the deviation of one seed, pooled over all amounts; NaN of single seeds
    freedom: int


def means(runs: Runs, metric: str) -> Means:
    """Averages the seeds of each pair of amounts."""
    pairs, group = np.unique(np.stack([runs.before, runs.iterations]), axis=1, return_inverse=True)
    group, values = group.ravel(), runs.values[metric]
    seeds = np.bincount(group)
    value, flops = (np.bincount(group, of) / seeds for of in (values, runs.flops))
    freedom = len(values) - len(seeds)
    squares = ((values - value[group]) ** 2).sum()
    noise = float(np.sqrt(squares / freedom)) if freedom else float("nan")
    return Means(*pairs, flops, value, seeds, noise, freedom)


def compare(runs: Runs, metric: str) -> dict[str, Any]:
    """What pre-pretraining gains at equal FLOPs and at equal lengths of stage two, with intervals of
    95 % from the seeds, and how many times its FLOPs stage two alone needs for the same value.

    The value of stage two alone is read off the lines between its runs, over the logarithm of FLOPs
    or of the length; beyond them nothing is said, and "beyond" counts that. Raises TooFew.
    """
    of = means(runs, metric)
    alone, after = np.flatnonzero(of.before == 0), np.flatnonzero(of.before > 0)
    if not len(alone) or not len(after):
        lacking = "without" if not len(alone) else "with"
        raise TooFew(f"there is no run {lacking} pre-pretraining to compare with.")
    found: dict[str, Any] = {"runs": len(runs.flops), "metric": metric, "beyond": {}}
    found["noise"] = None if np.isnan(of.noise) else of.noise
    for name, axis in AT.items():
        amounts = getattr(of, axis)
        curve = alone[np.argsort(amounts[alone])]
        matched = {i: _at(of, curve, amounts, i) for i in after}
        found[name] = [_gain(of, i, *at) for i, at in matched.items() if at is not None]
        found["beyond"][name] = sum(at is None for at in matched.values())
    return found


def _at(of: Means, alone: np.ndarray, amounts: np.ndarray, i: int) -> tuple[float, float] | None:
    """(value, its variance in variances of a seed) of stage two alone at the amount of run i; None
    beyond its runs, but for a percent, which two ways to spend one budget may differ by."""
    x, at = np.log(amounts[alone]), np.log(amounts[i])
    if not x[0] - 0.01 <= at <= x[-1] + 0.01:
        return None
    weights = np.stack([np.interp(at, x, row) for row in np.eye(len(alone))])
    return float(weights @ of.value[alone]), float((weights**2 / of.seeds[alone]).sum())


def _times(of: Means, i: int) -> float | None:
    """How many times the FLOPs of a run stage two alone needs to be as good; None if it never is."""
    alone = np.flatnonzero(of.before == 0)
    alone = alone[np.argsort(of.flops[alone])]
    x, y = np.log(of.flops[alone]), np.maximum.accumulate(of.value[alone])
    if of.value[i] > y[-1] or of.value[i] < y[0]:
        return None
    return float(np.exp(np.interp(of.value[i], y, x)) / of.flops[i])


def _gain(of: Means, i: int, other: float, variance: float) -> dict[str, Any]:
    """A run's gain over a value of that variance, with its interval; None of single seeds."""
    gain = float(of.value[i]) - other
    low = high = None
    if of.freedom:
        width = stats.t.ppf((1 + LEVEL) / 2, of.freedom) * of.noise
        width = float(width * np.sqrt(1 / of.seeds[i] + variance))
        low, high = gain - width, gain + width
    amounts = {"before": float(of.before[i]), "iterations": float(of.iterations[i])}
    amounts |= {"flops": float(of.flops[i]), "times": _times(of, i)}
    return amounts | {"gain": gain, "low": low, "high": high}


def words(part: dict[str, Any]) -> list[str]:
    """What a comparison says, in sentences."""
    said = []
    for name, at in (("equal_flops", "FLOPs"), ("equal_length", "lengths of stage two")):
        gains, beyond = part[name], part["beyond"][name]
        if beyond:
            said.append(
                f"Of {beyond + len(gains)} amounts with pre-pretraining, {beyond} lie outside the {at} that "
                "stage two alone was run for, and are not compared there."
            )
        if not gains:
            continue
        better = sum(g["low"] is not None and g["low"] > 0 for g in gains)
        worse = sum(g["high"] is not None and g["high"] < 0 for g in gains)
        span = f"{min(g['gain'] for g in gains):+.2f} to {max(g['gain'] for g in gains):+.2f}"
        sure = (
            f"above zero in {better} and below zero in {worse} of {len(gains)} comparisons, with all of "
            "the 95 % interval from seeds"
            if part["noise"] is not None
            else f"how sure of that one seed cannot say ({len(gains)} comparisons)"
        )
        said.append(f"At equal {at}, pre-pretraining changes {part['metric']} by {span}: {sure}.")
    return said
