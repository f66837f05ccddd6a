"""The figures of what follows from a study's runs: where data end, forecasts, the next run, and what
pre-pretraining gains."""

from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from prepretrain.reports.figure import GRID, INK
from prepretrain.reports.study import (
    FIRST,
    KINDS,
    MARKERS,
    SECOND,
    THIRD,
    Chart,
    Key,
    Study,
    Style,
    keys,
    line,
    logarithmic,
    number,
    points,
)
from prepretrain.scaling import analysis, forecast, laws, two_stage
from prepretrain.scaling.table import count

AXES = {"params": "larger model", "images": "more data", "iterations": "longer training"}


def charts(study: Study) -> list[Chart]:
    """Those of this file that need one table only, in the order of the page."""
    return [saturation(study), forecasts(study), moves(study)]


def saturation(study: Study) -> Chart:
    """The best length's value over the data with each model's law, and where growth ends."""
    name, title = "saturation", "Where more data stop helping"
    panels, words = {}, []
    rows = [["value", "model", "left to gain from endless data", "80 % interval"]]
    for target, (values, falls) in study.targets.items():
        part = _any(study, "saturation", target)
        if part is None:
            words.append(f"{target}: {_why(study, f'saturation of {target}')}")
            continue
        panels[target] = partial(_saturating, study, values, falls, part["change_point"])
        for model, left in part["left_at_most_data"].items():
            interval = f"{number(left['low'])} to {number(left['high'])}"
            rows.append([target, model, number(left["left"]), interval])
        lacking = [m for m in study.models if m not in part["left_at_most_data"]]
        if lacking:
            words.append(f"{target}: too few amounts of data for a law of {', '.join(lacking)}.")
    if panels:
        words.insert(
            0,
            "Each point is the best length of a model and data; the curve and its band are the "
            "model's own law with its 80 % interval. The grey band is where growth ends, at 95 %: it "
            "is drawn only where that growth ends somewhere is shown (p below 0.05).",
        )
    return Chart(name, title, words, panels, keys(study.models), rows if len(rows) > 1 else [])


def _any(study: Study, part: str, target: str) -> dict[str, Any] | None:
    """A target's part of the answers; that of the validation loss stands in each of them."""
    return next(a[part].get(target) for a in study.answers.values() if target in a[part])


def _why(study: Study, name: str) -> str:
    said = [a["not_said"][name] for a in study.answers.values() if name in a["not_said"]]
    return said[0] if said else "not asked for."


def _saturating(
    study: Study, values: np.ndarray, falls: bool, change: dict[str, Any], axes: Axes
) -> None:
    chosen = analysis.best_lengths(study.table, values, falls=falls)
    kept, mask = study.table.take(chosen), np.isin(np.arange(len(values)), chosen)
    if change["p"] <= 0.05:
        axes.axvspan(change["low"], change["high"], color=GRID, zorder=0)
    for model, style in study.models.items():
        own = kept.model == model
        points(axes, study, mask & study.of(model), study.table.images, values, style)
        try:
            law = laws.fit(kept.take(own), values[chosen][own], falls=falls, axes=("images",))
        except laws.TooFew:
            continue
        _band(axes, law, kept.take(own), style)
    logarithmic(axes, study.table.images)
    room = 0.1 * np.ptp(values[mask])
    limits = values[mask].min() - room, values[mask].max() + room
    axes.set(xlabel="images", ylim=limits)


def _band(axes: Axes, law: laws.Law, runs: Any, style: Style) -> None:
    """Draws a law between its runs, with its 80 % interval."""
    ends = np.log([runs.images.min(), runs.images.max()])
    grid = np.exp(np.linspace(*ends, 40))
    asked = replace(runs.take(np.zeros(len(grid), int)), images=grid)
    low, high = forecast.interval(law.draw(asked, noise=False))
    axes.plot(grid, law.predict(asked), color=style.colour, linewidth=1.3)
    axes.fill_between(grid, low, high, color=style.colour, alpha=0.12, linewidth=0)


RULES = {"law": (FIRST, "o"), "last value": (SECOND, "^"), "linear in logarithms": (THIRD, "s")}


def forecasts(study: Study) -> Chart:
    """What the smaller runs say of the largest, against what was measured, and the score."""
    name, title = "forecast", "The forecast of the largest runs, graded"
    panels, words = {}, []
    rows = [["value", "rule", "CRPS", "mean absolute error", "inside 80 % intervals"]]
    for target, (values, falls) in study.targets.items():
        part = _any(study, "forecast", target)
        if part is None:
            words.append(f"{target}: {_why(study, f'forecast of {target}')}")
            continue
        held, said = forecast.predict_largest(study.table, values, falls=falls, factor=study.factor)
        panels[target] = partial(_forecast, study, values, held, said)
        for rule in RULES:
            score = part[rule]
            error = number(score["mean_absolute_error"])
            inside = f"{100 * score['coverage']:.0f} %"
            rows.append([target, rule, number(score["crps"]), error, inside])
    if panels:
        words.insert(
            0,
            f"From the {(~forecast.largest(study.table)).sum()} smaller runs, those of the largest model and of the "
            "greatest length are said, and then compared: on the diagonal, a forecast is right. Bars "
            "are the law's 80 % intervals. CRPS is in the value's unit; lower is better.",
        )
    legend = [Key(rule, colour, marker) for rule, (colour, marker) in RULES.items()]
    legend += study.hollow
    return Chart(name, title, words, panels, legend, rows if len(rows) > 1 else [], open=True)


def _forecast(
    study: Study,
    values: np.ndarray,
    held: np.ndarray,
    said: dict[str, np.ndarray],
    axes: Axes,
) -> None:
    truth = values[held]
    low, high = forecast.interval(said["law"])
    axes.vlines(truth, low, high, color=FIRST, linewidth=1.2, alpha=0.6)
    for rule, (colour, marker) in RULES.items():
        middle = np.full(len(values), np.nan)
        middle[held] = np.median(said[rule], 0)
        points(axes, study, held, values, middle, Style(colour, marker))
    ends = [truth.min(), truth.max()]
    axes.plot(ends, ends, "--", color=INK, linewidth=1, zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel="measured", ylabel="forecast")


def moves(study: Study) -> Chart:
    """What a larger model, more data or longer training would gain for the stated budget."""
    name, title = "next", "What to run next"
    if not any(answer["moves"] for answer in study.answers.values()):
        return Chart(name, title, ["not asked, as no budget was stated."])
    panels, words = {}, []
    rows = [["by", "move", "times as much", "expected gain", "80 % interval", "sure of a gain"]]
    for target in study.targets:
        part = _any(study, "moves", target)
        if part is None:
            words.append(f"{target}: {_why(study, f'next run by {target}')}")
            continue
        panels[target] = partial(_gain, part, target)
        for move in part:
            times = f"{move['times']:.3g}" + (" (the limit)" if move["capped"] else "")
            interval = f"{number(move['low'])} to {number(move['high'])}"
            sure = f"{100 * move['sure']:.0f} %"
            rows.append([target, AXES[move["axis"]], times, number(move["gain"]), interval, sure])
    if panels:
        words.insert(
            0,
            "The gain over the best run, by the law of all runs, for the stated budget; to the right of "
            "zero is better. Bars are 80 % intervals.",
        )
        if not study.over.any():
            words.append(
                "Where no run overfits, the law says by its shape that more of anything never hurts: how "
                "large a gain is says something, and that it is above zero does not."
            )
    return Chart(name, title, words, panels, [], rows if len(rows) > 1 else [], open=True)


def _gain(part: list[dict[str, Any]], target: str, axes: Axes) -> None:
    for height, move in enumerate(reversed(part)):
        axes.hlines(height, move["low"], move["high"], color=FIRST, linewidth=2)
        axes.scatter([move["gain"]], [height], color=FIRST, s=30, zorder=3)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(part)), [AXES[move["axis"]] for move in reversed(part)])
    axes.set_ylim(-0.6, len(part) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel=f"expected gain in {target}")


def stages(runs: two_stage.Runs, metric: str) -> tuple[Chart, dict[str, Any] | None]:
    """(stage two after pre-pretraining beside stage two alone, as Figures 5 and 4 of MAWS; the
    comparison's numbers)."""
    name, title = f"two-stage-{metric}", f"What pre-pretraining gains in {metric}"
    try:
        part = two_stage.compare(runs, metric)
    except laws.TooFew as error:
        return Chart(name, title, [f"Nothing is compared: {error}"]), None
    amounts = sorted(set(runs.before.tolist()))
    styles = {b: Style(*pair) for b, *pair in zip(amounts, cycle(KINDS), cycle(MARKERS))}
    of = two_stage.means(runs, metric)
    panels = {
        "at equal FLOPs": partial(_stages, runs, of, metric, styles, "flops"),
        "at equal lengths": partial(_stages, runs, of, metric, styles, "iterations"),
    }
    legend = [Key(_before(b), style.colour, style.marker, "-") for b, style in styles.items()]
    words = [
        "Each point is a seed of stage two; lines join their means. On the left, FLOPs are those of "
        "both stages. Gains are over stage two alone, with 95 % intervals from the seeds.",
        *two_stage.words(part),
    ]
    return Chart(name, title, words, panels, legend, _stage_rows(of, part), open=True), part


def _stage_rows(of: two_stage.Means, part: dict[str, Any]) -> list[list[str]]:
    """What each amount of pre-pretraining and of stage two gains."""
    rows = [["pre-pretraining", "stage two", "FLOPs", "equal FLOPs", "equal length", "alone needs"]]
    flops, length = (
        {(g["before"], g["iterations"]): g for g in part[name]}
        for name in ("equal_flops", "equal_length")
    )
    for i in np.flatnonzero(of.before > 0):
        key = float(of.before[i]), float(of.iterations[i])
        times = flops[key]["times"] if key in flops else None
        needs = "–" if times is None else f"{times:.2f} times the FLOPs"
        amounts = f"{count(key[0])} images", f"{count(key[1])} iterations", count(of.flops[i])
        gains = _interval(flops.get(key)), _interval(length.get(key))
        rows.append([*amounts, *gains, needs])
    return rows


def _before(images: float) -> str:
    return f"after {count(images)} images of pre-pretraining" if images else "stage two alone"


def _interval(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return "–"
    interval = "" if gain["low"] is None else f" ({gain['low']:+.2f} to {gain['high']:+.2f})"
    return f"{gain['gain']:+.2f}{interval}"


def _stages(
    runs: two_stage.Runs,
    of: two_stage.Means,
    metric: str,
    styles: dict[float, Style],
    axis: str,
    axes: Axes,
) -> None:
    for before, style in styles.items():
        own, mean = runs.before == before, of.before == before
        axes.scatter(
            getattr(runs, axis)[own],
            runs.values[metric][own],
            s=24,
            marker=style.marker,
            color=style.colour,
            alpha=0.6,
            linewidths=0,
            zorder=3,
            clip_on=False,
        )
        line(axes, getattr(of, axis)[mean], of.value[mean], style)
    logarithmic(axes)
    labels = {"flops": "FLOPs of both stages", "iterations": "iterations of stage two"}
    axes.set(xlabel=labels[axis], ylabel=metric)
