"""Forecasts one rung above the study of cifar10_scaling.yaml before it is trained, and grades it.

    python benchmarks/cifar10_rung.py forecast     # first: from benchmarks/results/cifar10_scaling.csv
    python benchmarks/cifar10_scaling.py --data FOLDER --study benchmarks/cifar10_rung.yaml
    python benchmarks/cifar10_rung.py grade        # then: by benchmarks/results/cifar10_rung.csv

Both write benchmarks/results/cifar10_rung.json; a forecast that is there is not made again.
"""

import argparse
import csv
import datetime
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from prepretrain.scaling import forecast, laws, table

RESULTS = Path(__file__).parent / "results"
TARGETS = {"val_loss": True, "knn/photos": False, "linear/photos": False}  # whether less is better
LARGEST, DATA = "w128", "100%"  # of the study; the rung's encoder is the next larger one
PARAMS, LENGTHS = 2_710_080, (200, 400)


def said(runs: table.Table) -> dict:
    """{target: {length: {"law": 10, 50 and 90 %, "last value", "draws"}}} of the rung."""
    found: dict = {}
    for target, falls in TARGETS.items():
        values = runs.loss if target == "val_loss" else runs.metrics[target]
        law = laws.fit(runs, values, falls=falls)
        found[target] = {}
        for length in LENGTHS:
            below = (runs.model == LARGEST) & (runs.data == DATA) & (runs.iterations == length)
            asked = replace(runs.take(below), params=np.array([float(PARAMS)]))
            draws = law.draw(asked)[:, 0]
            found[target][str(length)] = {
                "law": np.percentile(draws, [10, 50, 90]).round(4).tolist(),
                "last value": round(float(values[below][0]), 4),
                "draws": np.percentile(draws, np.arange(2.5, 100, 5)).round(4).tolist(),
            }
    return found


def graded(rung: dict, rows: list[dict]) -> dict:
    """What came out beside what was said."""
    found: dict = {}
    for target in TARGETS:
        for row in rows:
            one = rung[target][row["iterations"]]
            truth, (low, middle, high) = float(row[target]), one["law"]
            score = forecast.crps(np.array(one["draws"])[:, None], np.array([truth]))
            found[f"{target}, {row['iterations']} iterations"] = {
                "came_out": round(truth, 4),
                "forecast": middle,
                "interval": [low, high],
                "inside": low <= truth <= high,
                "crps": round(float(score[0]), 4),
                "error_of_last_value": round(abs(truth - one["last value"]), 4),
            }
    return found


def main() -> None:
    """Writes the forecast, or its grade."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("forecast", "grade"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    path = given.results / "cifar10_rung.json"
    if given.what == "forecast":
        if path.exists():
            parser.error(f"{path} is there: a forecast is made once.")
        metrics = tuple(t for t in TARGETS if t != "val_loss")
        runs, _ = table.read(given.results / "cifar10_scaling.csv", metrics=metrics)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        found = {"made": now, "from_runs": len(runs), "params": PARAMS, "said": said(runs)}
    else:
        found = json.loads(path.read_text())
        rows = list(csv.DictReader((given.results / "cifar10_rung.csv").open()))
        found["graded"] = graded(found["said"], rows)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found.get("graded", found)))


if __name__ == "__main__":
    main()
