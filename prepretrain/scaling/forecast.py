"""What larger runs would give, said by the smaller ones and graded on runs that were made."""

from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from prepretrain.scaling import laws
from prepretrain.scaling.table import Table

FACTOR = 4.0  # how far beyond the largest run anything is said
LEVEL = 0.8  # of the intervals


def crps(draws: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[runs] the continuous ranked probability score of draws [draws, runs], in the value's unit;
    the absolute error, if all draws agree. Lower is better."""
    ordered = np.sort(draws, 0)
    count = len(ordered)
    weights = (2 * np.arange(1, count + 1) - count - 1)[:, None]
    spread = 2 * (weights * ordered).sum(0) / count**2  # the mean of |X - X'|
    return np.abs(draws - values).mean(0) - spread / 2


def interval(draws: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """[2, runs] the middle of draws [draws, runs]."""
    return np.percentile(draws, [50 * (1 - level), 50 * (1 + level)], axis=0)


def largest(table: Table) -> np.ndarray:
    """[runs] those of the largest model or of the greatest length: what is held out."""
    held = table.iterations == table.iterations.max()
    if table.params is not None and len(np.unique(table.params)) > 1:
        held |= table.params == table.params.max()
    return held


def predict_largest(
    table: Table, values: np.ndarray, *, falls: bool, factor: float = FACTOR
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(which runs are held out, {rule: draws [draws, runs held out]}), said by all other runs.

    Raises laws.TooFew.
    """
    held = largest(table)
    known, asked = table.take(~held), table.take(held)
    law = laws.fit(known, values[~held], falls=falls)
    beyond = law.beyond(asked, factor)
    if beyond:
        raise laws.TooFew(f"the runs held out lie too far out: {beyond}.")
    return held, {
        "law": law.draw(asked),
        "last value": _last(known, values[~held], asked),
        "linear in logarithms": _plane(known, values[~held], asked),
    }


def grade(
    table: Table, values: np.ndarray, *, falls: bool, factor: float = FACTOR
) -> dict[str, Any]:
    """The law's forecast of the largest model and the greatest length from all other runs, beside
    two naive rules: the next smaller run's value, and a plane in the logarithms.

    Raises laws.TooFew.
    """
    held, said = predict_largest(table, values, falls=falls, factor=factor)
    truth = values[held]
    scores = {}
    for name, draws in said.items():
        low, high = interval(draws)
        scores[name] = {
            "crps": float(crps(draws, truth).mean()),
            "mean_absolute_error": float(np.abs(np.median(draws, 0) - truth).mean()),
            "coverage": float(((low <= truth) & (truth <= high)).mean()),
        }
    return {"from_runs": int((~held).sum()), "runs": int(held.sum()), "level": LEVEL} | scores


def _axes(table: Table) -> tuple[str, ...]:
    return tuple(a for a in laws.AXES if getattr(table, a) is not None)


def _nearest(logs: np.ndarray, asked: np.ndarray) -> int | None:
    """The nearest of runs [axes, runs] that are nowhere larger than one asked for and not it."""
    gap = asked[:, None] - logs
    usable = (gap >= -1e-9).all(0) & (gap > 1e-9).any(0)
    if not usable.any():
        return None
    return int(np.where(usable, gap.sum(0), np.inf).argmin())


def _last(known: Table, values: np.ndarray, asked: Table) -> np.ndarray:
    """[draws, runs] the value of the next smaller run, with the errors that the same rule has among
    the known runs."""
    axes = _axes(known)
    inside, outside = laws.logs(known, axes), laws.logs(asked, axes)
    before = [_nearest(inside, inside[:, i]) for i in range(len(known))]
    errors = np.array([values[i] - values[b] for i, b in enumerate(before) if b is not None])
    chosen = [_nearest(inside, outside[:, i]) for i in range(len(asked))]
    middle = np.array([values.mean() if c is None else values[c] for c in chosen])
    spread = np.sqrt((errors**2).mean()) if len(errors) else values.std()
    normal = np.random.default_rng(0).standard_normal((laws.DRAWS, len(asked)))
    return middle + spread * normal


def _plane(known: Table, values: np.ndarray, asked: Table) -> np.ndarray:
    """[draws, runs] of ordinary least squares on the logarithms of all axes."""
    axes = _axes(known)

    def design(table: Table) -> np.ndarray:
        return np.vstack([np.ones(len(table)), laws.logs(table, axes)]).T

    inside, outside = design(known), design(asked)
    solution = np.linalg.lstsq(inside, values, rcond=None)[0]
    freedom = max(len(values) - inside.shape[1], 1)
    noise = np.sqrt(((values - inside @ solution) ** 2).sum() / freedom)
    leverage = (outside @ np.linalg.pinv(inside.T @ inside) * outside).sum(1)
    spread = noise * np.sqrt(1 + leverage)
    t = stats.t.rvs(freedom, size=(laws.DRAWS, len(asked)), random_state=np.random.default_rng(0))
    return outside @ solution + spread * t


def moves(
    table: Table, values: np.ndarray, *, falls: bool, budget: float, factor: float = FACTOR
) -> list[dict[str, Any]]:
    """What more data, a larger model and longer training would each change, from the best run on.

    budget: the next run's, in GPU-days if the table has costs, else in costs of the best run. A run
    costs as much as its parameters times its iterations; more data at the same length cost nothing
    more. No axis grows by more than `factor` over the largest run. Raises laws.TooFew; ValueError
    if the budget buys no more than the best run.
    """
    law = laws.fit(table, values, falls=falls)
    at = int(values.argmin() if falls else values.argmax())
    start = table.take(np.array([at]))
    multiple = budget if start.cost is None else budget / float(start.cost[0])
    if multiple <= 1:
        raise ValueError(
            f"--budget: {budget:g} buys {multiple:.3g} of the best run. Give more than it cost."
        )
    now = law.draw(start, noise=False)
    found = []
    for axis in law.shape.axes:
        reach = factor * law.largest[axis] / float(getattr(start, axis)[0])
        grown = min(multiple, reach)
        larger = replace(start, **{axis: getattr(start, axis) * grown})
        after = law.draw(larger, noise=False)
        gain = (now - after if falls else after - now)[:, 0]
        low, high = interval(gain[:, None])[:, 0]
        found.append(
            {
                "axis": axis,
                "times": float(grown),
                "capped": bool(reach < multiple),
                "gain": float(np.median(gain)),
                "low": float(low),
                "high": float(high),
                "sure": float((gain > 0).mean()),
            }
        )
    return sorted(found, key=lambda move: -move["gain"])
