"""What a table of runs says as it stands: overfitting, correlations, the best run of each kind.

The questions are those of On Data Scaling in Masked Image Modeling (arXiv 2206.04664), section 3.
"""

from typing import Any

import numpy as np
from scipy import stats

from prepretrain.scaling.table import Table

FEWEST = 3  # points below which a correlation or a line says nothing
SAFE = 10  # runs below which a bootstrap's interval is too narrow to rely on  # not from the paper
DRAWS = 2000  # of a bootstrap
LEVEL = 0.95


def overfit(table: Table) -> np.ndarray:
    """[runs] whether a run overfits: a shorter one of the same model and data has a lower validation
    loss. With this rule the 63 released runs of 2206.04664 give its Table 7."""
    if table.loss is None:
        return np.zeros(len(table), bool)
    same = (table.model[:, None] == table.model) & (table.data[:, None] == table.data)
    shorter = table.iterations[:, None] > table.iterations
    return (same & shorter & (table.loss[:, None] > table.loss)).any(1)


def correlations(x: np.ndarray, y: np.ndarray, seed: int = 0) -> dict[str, Any] | None:
    """Pearson's and Spearman's coefficients with bootstrap intervals at 95 %, and the line through
    the points; None of fewer than three runs or where one side does not vary."""
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    line = stats.linregress(x, y)
    drawn = np.random.default_rng(seed).integers(len(x), size=(DRAWS, len(x)))
    ranks_x, ranks_y = stats.rankdata(x[drawn], axis=1), stats.rankdata(y[drawn], axis=1)
    return {
        "runs": len(x),
        "pearson": float(stats.pearsonr(x, y).statistic),
        "pearson_interval": _interval(_pearson(x[drawn], y[drawn])),
        "spearman": float(stats.spearmanr(x, y).statistic),
        "spearman_interval": _interval(_pearson(ranks_x, ranks_y)),
        "slope": float(line.slope),
        "intercept": float(line.intercept),
    }


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[draws] coefficients of [draws, runs]; NaN of a draw in which one side does not vary."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))


def _interval(values: np.ndarray) -> list[float]:
    """The percentile interval of a bootstrap."""
    tail = 100 * (1 - LEVEL) / 2
    return [float(v) for v in np.nanpercentile(values, [tail, 100 - tail])]


def groups(
    table: Table, metric: str, losses: np.ndarray | None
) -> dict[str, dict[str, Any] | None]:
    """Correlations of validation or training losses with a metric: of runs that overfit, of the
    others, of all (2206.04664, section 3.3: the two kinds lie on different lines)."""
    if losses is None:
        return {"overfit": None, "other": None, "all": None}
    over, values = overfit(table), table.metrics[metric]
    kinds = {"overfit": over, "other": ~over, "all": np.ones(len(table), bool)}
    return {name: correlations(losses[kind], values[kind]) for name, kind in kinds.items()}


def bears_out(group: dict[str, Any]) -> bool:
    """Whether correlations of a loss with a metric are strong for sure, so that one may choose by it."""
    return group["runs"] >= SAFE and group["spearman_interval"][1] < -0.8


def best(table: Table, metric: str) -> dict[str, dict[str, float]]:
    """{model: {data: the best value over all lengths}}, as Table 3 of 2206.04664."""
    found: dict[str, dict[str, float]] = {}
    for model, data, value in zip(table.model, table.data, table.metrics[metric]):
        row = found.setdefault(str(model), {})
        row[str(data)] = max(float(value), row.get(str(data), -np.inf))
    return found


def best_lengths(table: Table, values: np.ndarray, *, falls: bool) -> np.ndarray:
    """The numbers of the runs that are the best over the lengths of their model and data."""
    best: dict[tuple[str, str], int] = {}
    for i, key in enumerate(zip(table.model.tolist(), table.data.tolist())):
        if key not in best or (values[i] < values[best[key]]) == falls:
            best[key] = i
    return np.array(sorted(best.values()))


def regret(table: Table, metric: str) -> float | None:
    """How much of the metric is lost by taking the run with the lowest validation loss, the proxy that
    2206.04664 recommends, in the place of the best one; None without a validation loss."""
    if table.loss is None:
        return None
    values = table.metrics[metric]
    return float(values.max() - values[table.loss.argmin()])
