"""The answer of a study: all of its analysis in one object, and what follows, in words."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from prepretrain.scaling import analysis, forecast, laws
from prepretrain.scaling.table import Table, count, number, read


def analyse(
    path: str | Path,
    columns: Sequence[str] = (),
    metric: str = "top1",
    sizes: Sequence[str] = (),
    *,
    budget: float | None = None,
    factor: float = forecast.FACTOR,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """The answer (see `answer`) of a CSV file; written to `out`, if it is given.

    columns: "model=arch" where the file calls ours otherwise. sizes: "ImageNet-1K=1281167", images
    by the name of the data. Raises ValueError naming the option, or the file, line and column.
    """
    check_limits(budget, factor)
    table, left_out = open_table(path, columns, (metric,), sizes)
    found = answer(table, metric, left_out=left_out, budget=budget, factor=factor)
    if out is not None:
        Path(out).write_text(json.dumps(found, indent=1) + "\n")
    return found


def open_table(
    path: str | Path, columns: Sequence[str], metrics: Sequence[str], sizes: Sequence[str]
) -> tuple[Table, list[str]]:
    """A table and what was left out of it, by the options of a command line (see `analyse`)."""
    named = dict(_pair(text, "--columns", "model=arch") for text in columns)
    counted = {}
    for text in sizes:
        name, count = _pair(text, "--sizes", "ImageNet-1K=1281167")
        try:
            counted[name] = number(count)
        except ValueError as error:
            raise ValueError(f"--sizes {text}: {error}") from error
    return read(path, named, tuple(metrics), counted)


def check_limits(budget: float | None, factor: float) -> None:
    """Raises ValueError for a budget or a factor that no forecast can be made for."""
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"--budget: {budget:g} is no finite number above 0.")
    if not 1 <= factor < math.inf:
        raise ValueError(f"--factor: {factor:g} is no finite number of at least 1.")


def _pair(text: str, option: str, example: str) -> tuple[str, str]:
    left, sign, right = text.partition("=")
    if not (left and sign and right):
        raise ValueError(f"{option}: '{text}' is not of the form {example}.")
    return left, right


def answer(
    table: Table,
    metric: str,
    *,
    left_out: list[str] | None = None,
    budget: float | None = None,
    factor: float = forecast.FACTOR,
) -> dict[str, Any]:
    """What a table's runs say of the validation loss and of a metric: overfitting, correlations, the
    best runs, saturation with data, a graded forecast, and what the next run should be.

    budget: see `forecast.moves`. A part that the runs are too few for is None, and "not_said" says
    why. Everything can be written as JSON.
    """
    not_said: dict[str, str] = {}

    def attempt(name: str, part: Any, *args: Any, **options: Any) -> Any:
        try:
            return part(*args, **options)
        except laws.TooFew as error:
            not_said[name] = str(error)
            return None

    targets = {} if table.loss is None else {"val_loss": (table.loss, True)}
    targets |= {metric: (table.metrics[metric], False)}
    groups = analysis.groups(table, metric, table.loss)
    found: dict[str, Any] = {
        "runs": len(table),
        "overfit_runs": int(analysis.overfit(table).sum()),
        "left_out": list(left_out or []),
        "metric": metric,
        "pearson": {k: None if v is None else v["pearson"] for k, v in groups.items()},
        "correlations": groups,
        "train_correlations": analysis.groups(table, metric, table.train_loss),
        "best": analysis.best(table, metric),
        "proxy": {"regret": analysis.regret(table, metric)},
        "saturation": {},
        "forecast": {},
        "moves": {},
    }
    if table.loss is None:
        not_said["overfitting"] = "the table has no validation loss."
    for name, (values, falls) in targets.items():
        found["saturation"][name] = attempt(
            f"saturation of {name}", saturation, table, values, falls=falls
        )
        found["forecast"][name] = attempt(
            f"forecast of {name}", forecast.grade, table, values, falls=falls, factor=factor
        )
        if budget is not None:
            found["moves"][name] = attempt(
                f"next run by {name}",
                forecast.moves,
                table,
                values,
                falls=falls,
                budget=budget,
                factor=factor,
            )
    return found | {"not_said": not_said, "verdicts": words(found, not_said)}


def saturation(table: Table, values: np.ndarray, *, falls: bool) -> dict[str, Any]:
    """Where growth with data ends, over the best length of each model and amount of data: the change
    point of all models, and for each model what is left to gain from endless data, by its own law.

    Raises laws.TooFew.
    """
    if table.images is None:
        raise laws.TooFew(
            "the images in the data are not known. Give a column `images`, or --sizes NAME=1.2M."
        )
    chosen = analysis.best_lengths(table, values, falls=falls)
    kept, values = table.take(chosen), values[chosen]
    change = laws.change_point(kept.images, values, kept.model)
    models = {}
    for name in dict.fromkeys(kept.model.tolist()):
        own = kept.model == name
        try:
            law = laws.fit(kept.take(own), values[own], falls=falls, axes=("images",))
        except laws.TooFew:
            continue  # the change point of all models stands without it
        last = int(kept.images[own].argmax())
        gain = (values[own][last] - law.floor()) * (1 if falls else -1)
        low, high = forecast.interval(gain[:, None])[:, 0]
        models[name] = {"left": float(np.median(gain)), "low": float(low), "high": float(high)}
    return {"change_point": asdict(change), "left_at_most_data": models}


def words(found: dict[str, Any], not_said: dict[str, str]) -> list[str]:
    """The verdicts, a sentence or two each, with how sure they are."""
    said = [text for texts in by_topic(found).values() for text in texts]
    return said + [f"No {name}: {why}" for name, why in not_said.items()]


def by_topic(found: dict[str, Any]) -> dict[str, list[str]]:
    """What an answer says of overfitting, of the loss as a proxy, of data, forecasts, the next run."""
    said = {
        "Data": [_saturates(*item) for item in found["saturation"].items() if item[1]],
        "Forecast": [_graded(*item) for item in found["forecast"].items() if item[1]],
        "Next": [_next(*item) for item in found["moves"].items() if item[1]],
    }
    return {"Overfitting": _overfits(found), "Proxy": _proxy(found)} | said


def _overfits(found: dict[str, Any]) -> list[str]:
    if not found["overfit_runs"]:
        return []
    return [
        f"{found['overfit_runs']} of {found['runs']} runs overfit: a shorter run of the same model and "
        "data has a lower validation loss. There, more data come before longer training."
    ]


def _proxy(found: dict[str, Any]) -> list[str]:
    other = found["correlations"]["other"]
    if other is None:
        return []
    low, high = other["spearman_interval"]
    trust = "can" if analysis.bears_out(other) else "cannot safely"
    return [
        f"Among the {other['runs']} runs that do not overfit, the validation loss ranks "
        f"{found['metric']} with Spearman {other['spearman']:.2f} ({low:.2f} to {high:.2f}): checkpoints "
        f"{trust} be chosen by it. The run of the lowest loss is {found['proxy']['regret']:.2f} below "
        "the best."
    ]


def _saturates(name: str, part: dict[str, Any]) -> str:
    change = part["change_point"]
    if change["slope_p"] > 0.05 and change["p"] > 0.05:
        return (
            f"That {name} changes with data is not shown (p = {change['slope_p']:.2f}): at these "
            "lengths, more of them bought nothing."
        )
    if change["p"] > 0.05 and (change["slope"] > 0) == (name == "val_loss"):
        return (
            f"{name} gets worse with the logarithm of the data (p = {change['slope_p']:.3f}): at these "
            "lengths, more of them bought nothing."
        )
    if change["p"] > 0.05:
        return (
            f"{name} improves with the logarithm of the data as far as they go; that it stops "
            f"somewhere is not shown (p = {change['p']:.2f})."
        )
    left = ", ".join(
        f"{model} {m['left']:.2g} ({m['low']:.2g} to {m['high']:.2g})"
        for model, m in part["left_at_most_data"].items()
    )
    at, low, high = (count(change[key]) for key in ("at", "low", "high"))
    return (
        f"{name} stops improving with data at {at} images ({low} to {high} at 95 %; p = "
        f"{change['p']:.3f}). Left to gain from endless data: "
        f"{left + ' at 80 %' if left else 'not known, as no model has enough amounts'}."
    )


def _graded(name: str, part: dict[str, Any]) -> str:
    rules = {k: v for k, v in part.items() if isinstance(v, dict)}
    best = min(rules, key=lambda rule: rules[rule]["crps"])
    others = ", ".join(f"{k} {v['crps']:.3g}" for k, v in rules.items() if k != "law")
    trust = "Forecasts by it can be used" if best == "law" else f"Do not use it: {best} does better"
    runs, coverage = part["runs"], rules["law"]["coverage"]
    narrow = stats.binom.cdf(round(coverage * runs), runs, part["level"]) < 0.05
    if best == "law" and narrow:
        trust += ", but its intervals are too narrow"
    return (
        f"Forecast of {name} from {part['from_runs']} smaller runs, graded on the {runs} "
        f"largest: CRPS {rules['law']['crps']:.3g} (naive rules: {others}), "
        f"{100 * coverage:.0f} % inside the {100 * part['level']:.0f} % intervals. "
        f"{trust}."
    )


def _next(name: str, moves: list[dict[str, Any]]) -> str:
    labels = {"params": "a larger model", "images": "more data", "iterations": "longer training"}
    told = "; ".join(
        f"{labels[m['axis']]} ({m['times']:.2g}x): {m['gain']:.3g} ({m['low']:.3g} to {m['high']:.3g})"
        for m in moves
    )
    if moves[0]["sure"] < 0.9:
        return f"Next, by {name}: no gain is sure. {told}."
    return f"Next, by {name}: {labels[moves[0]['axis']]}. Expected gains: {told}."
