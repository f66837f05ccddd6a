"""How often the intervals of the scaling laws hold what was planted: 200 grids and 200 curves.

python benchmarks/scaling_fits.py     two minutes on one core; one JSON line
"""

import argparse
import json

import numpy as np

from prepretrain.scaling import forecast, laws
from prepretrain.scaling.table import Table

FLOOR = 0.4


def grid(rng: np.random.Generator) -> tuple[Table, np.ndarray]:
    """48 runs of E + A/N^α + B/D^β + C/T^γ with noise."""
    axes = np.meshgrid([2e7, 5e7, 1e8, 3e8], [1e5, 3e5, 1e6, 1e7], [1e5, 2e5, 4e5], indexing="ij")
    n, d, t = (axis.ravel() for axis in axes)
    powers, amounts = rng.uniform(0.15, 0.5, 3), np.exp(rng.normal(np.log(0.03), 0.3, 3))
    terms = zip(amounts, (n / 1e8, d / 1e6, t / 2e5), powers)
    loss = FLOOR + sum(amount * x**-power for amount, x, power in terms)
    table = Table(n.astype(str), d.astype(str), t, None, {}, n, d)
    return table, loss + 0.002 * rng.standard_normal(len(n))


def curve(rng: np.random.Generator) -> tuple[Table, np.ndarray]:
    """Seven runs of E + B/D^β with noise."""
    images = np.logspace(4, 7, 7)
    loss = FLOOR + 0.05 * (images / 3e5) ** -rng.uniform(0.2, 0.5)
    table = Table(np.array(["a"] * 7), images.astype(str), np.ones(7), None, {}, None, images)
    return table, loss + 0.001 * rng.standard_normal(7)


def inside(draws: np.ndarray, value: float, level: float) -> bool:
    """Whether the interval of draws [draws] holds a value."""
    low, high = forecast.interval(draws[:, None], level)[:, 0]
    return bool(low <= value <= high)


def main() -> None:
    """Prints the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=200)
    draws = parser.parse_args().draws
    scores, floors, ends, curves = [], [], [], []
    for seed in range(draws):
        table, loss = grid(np.random.default_rng(seed))
        scores.append(forecast.grade(table, loss, falls=True))
        floors.append(inside(laws.fit(table, loss, falls=True).floor(), FLOOR, 0.95))
        table, loss = curve(np.random.default_rng(seed))
        law = laws.fit(table.take(np.arange(6)), loss[:6], falls=True)
        ends.append(inside(law.draw(table.take(np.array([6])))[:, 0], loss[6], 0.8))
        curves.append(inside(law.floor(), FLOOR, 0.95))
    rules = ("law", "last value", "linear in logarithms")
    found = {
        "figure": "scaling_fits",
        "draws": draws,
        "grid_forecast_coverage_80": np.mean([s["law"]["coverage"] for s in scores]),
        "grid_floor_coverage_95": np.mean(floors),
        "curve_forecast_coverage_80": np.mean(ends),
        "curve_floor_coverage_95": np.mean(curves),
    } | {f"grid_crps {rule}": np.mean([s[rule]["crps"] for s in scores]) for rule in rules}
    print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()}))


if __name__ == "__main__":
    main()
