"""Ranks candidates by their validation loss, the proxy that arXiv 2206.04664 recommends, and says how
far a study's own runs bear it out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prepretrain.data.card import open_data
from prepretrain.evaluation import validation
from prepretrain.runs.export import load_objective
from prepretrain.scaling import analysis
from prepretrain.scaling.table import Table

MADE_BY = ("objective", "image_size")  # what losses that are compared must agree in


def rank(
    runs: Sequence[str | Path],
    data: str,
    table: Table | None = None,
    metric: str = "top1",
    *,
    batch_size: int = 64,
    workers: int = 0,
) -> dict[str, Any]:
    """The runs by their validation loss on a card, the best first; with a study's table, how far its
    runs say that this order is the metric's.

    Raises ValueError for what is no run of an objective with such a loss, and for runs whose losses
    have no common scale.
    """
    source = open_data(data)
    _comparable(runs)
    ranking = []
    for run in runs:
        objective = load_objective(Path(run))
        validation.check(objective, source, data)
        loss, images = validation.measure(objective, source, batch_size=batch_size, workers=workers)
        ranking.append({"run": str(run), "val_loss": loss, "images": images})
    ranking.sort(key=lambda row: row["val_loss"])
    found = {"data": data, "ranking": ranking, "metric": metric, "trust": None}
    if table is not None:
        gap = None if len(ranking) < 2 else ranking[1]["val_loss"] - ranking[0]["val_loss"]
        found["trust"] = trust(table, metric, gap)
    return found | {"verdicts": words(found)}


def _comparable(runs: Sequence[str | Path]) -> None:
    """Raises ValueError unless all are runs of the same objective on images of the same size."""
    first: dict[str, Any] = {}
    for run in runs:
        path = Path(run) / "config.yaml"
        if not path.exists():
            raise ValueError(
                f"{run}: there is no config.yaml. Name a run's folder: an export holds the encoder "
                "only, and a validation loss needs the decoder too."
            )
        config = yaml.safe_load(path.read_text())
        kind = config["objective"], config["model"].get("image_size")
        made = dict(zip(MADE_BY, kind))
        for name, value in made.items():
            if first.setdefault(name, value) != value:
                raise ValueError(
                    f"{run}: its {name} is {value}, and that of {runs[0]} is {first[name]}: their "
                    "losses cannot be compared."
                )


def trust(table: Table, metric: str, gap: float | None) -> dict[str, Any]:
    """How a study's validation losses rank its metric: the correlations of runs that overfit and of
    the others, and of all pairs whose losses differ by at least `gap`, the share in the right order."""
    groups = analysis.groups(table, metric, table.loss)
    return {
        "correlations": groups,
        "pairs": None if gap is None or table.loss is None else _pairs(table, metric, gap),
    }


def _pairs(table: Table, metric: str, gap: float) -> dict[str, Any]:
    i, j = np.triu_indices(len(table), 1)
    loss, value = (of[i] - of[j] for of in (table.loss, table.metrics[metric]))
    apart = (np.abs(loss) >= gap) & (loss != 0) & (value != 0)
    right = (np.sign(loss) != np.sign(value))[apart]
    return {
        "gap": float(gap),
        "pairs": int(apart.sum()),
        "right": float(right.mean()) if apart.any() else None,
    }


def words(found: dict[str, Any]) -> list[str]:
    """The ranking and its worth, in sentences."""
    metric, trusted = found["metric"], found["trust"]
    said = [
        f"{place}. {row['run']}: validation loss {row['val_loss']:.4f} on {row['images']} images"
        for place, row in enumerate(found["ranking"], 1)
    ]
    if trusted is None:
        return [*said, "How far to trust this order is not known: name a study's table (--csv)."]
    for kind, name in (("other", "do not overfit"), ("overfit", "overfit")):
        group = trusted["correlations"][kind]
        if group is None:
            said.append(f"Of runs that {name}, the study has too few to say anything.")
            continue
        low, high = group["spearman_interval"]
        said.append(
            f"Among the study's {group['runs']} runs that {name}, the loss ranks {metric} with Spearman "
            f"{group['spearman']:.2f} ({low:.2f} to {high:.2f}): {_worth(group)}."
        )
    pairs = trusted["pairs"]
    if pairs is not None and pairs["right"] is not None:
        said.append(
            f"Of the study's {pairs['pairs']} pairs of runs whose losses differ by at least as much as "
            f"those of the first two ({pairs['gap']:.4f}), {100 * pairs['right']:.0f} % have the lower "
            f"loss with the better {metric}."
        )
    return said


def _worth(group: dict[str, Any]) -> str:
    if analysis.bears_out(group):
        return "choose by it"
    if group["runs"] < analysis.SAFE:
        return "too few to rely on"
    return "a hint, no more" if group["spearman_interval"][1] < 0 else "it may say nothing"
