"""The figures of what a study's runs gave: costs, losses, metrics, correlations, overfitting.

They answer to those of On Data Scaling in Masked Image Modeling (arXiv 2206.04664).
"""

from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from prepretrain.reports.study import (
    FIRST,
    SECOND,
    Chart,
    Key,
    Study,
    Style,
    keys,
    line,
    logarithmic,
    number,
    points,
    share,
)
from prepretrain.scaling.table import count

HOLLOWS = (
    "Hollow points are runs that overfit: a shorter run of the same model and data has a lower "
    "validation loss."
)

NAMES = {"overfit": "runs that overfit", "other": "the others", "all": "all runs"}


def charts(study: Study) -> list[Chart]:
    """Those of this file, in the order of the page."""
    data = [lengths(study, name) for name in study.targets]
    tables = [best(study, name) for name in study.metrics()]
    losses = [curves(study, by) for by in ("model", "data")]
    return [costs(study), *losses, *data, correlations(study), *tables, overfitting(study)]


def costs(study: Study) -> Chart:
    """Losses and metrics over the cost of training: the paper's Figures 1 and 3."""
    name, title = "cost", "What training costs, and what it gives"
    cost, unit = _cost(study)
    if cost is None:
        return Chart(name, title, ["No column tells the cost: neither flops, cost nor params."])
    values = study.losses | {key: of for key, (of, _) in study.metrics().items()}

    def draw(y: np.ndarray, axes: Axes) -> None:
        for data, style in study.data.items():
            for place, model in enumerate(study.models, 1):
                chosen = study.of(model, data)
                line(axes, cost[chosen], y[chosen], style)
                points(axes, study, chosen, cost, y, style, 12 + 68 * place / len(study.models))
        logarithmic(axes)
        axes.set(xlabel=unit)

    words = [
        "Each point is a run. Lines join the lengths of one model on the same data; the colour says "
        "which data, and a larger mark a larger model."
    ]
    if study.over.any():
        words.append(HOLLOWS)
    # the runs that no cheaper one is better than
    main, (best_values, _) = next(iter(study.metrics().items()))
    order = np.argsort(cost, kind="stable")
    peaks = [i for i in order if best_values[i] > best_values[cost < cost[i]].max(initial=-np.inf)]
    rows = [[unit, "model", "data", "iterations", main]]
    for i in peaks:
        rows.append([count(cost[i]), *_run(study, i), number(best_values[i])])
    words.append(f"The table names the runs that have a better {main} than all cheaper ones.")
    panels = {key: partial(draw, y) for key, y in values.items()}
    return Chart(name, title, words, panels, [*keys(study.data), *study.hollow], rows)


def _cost(study: Study) -> tuple[np.ndarray | None, str]:
    """([runs] what training costs, its name)."""
    table = study.table
    if table.flops is not None:
        return table.flops, "training FLOPs"
    if table.cost is not None:
        return table.cost, "GPU-days"
    if table.params is not None:
        cost = table.params * table.iterations
        return cost / cost.min(), "training cost (least = 1)"
    return None, ""


def _run(study: Study, i: int) -> list[str]:
    table = study.table
    return [str(table.model[i]), str(table.data[i]), count(table.iterations[i])]


def curves(study: Study, by: str) -> Chart:
    """Losses over the length, a panel for each model or for the data: the paper's Figures 7 and 8."""
    name = f"loss-by-{by}"
    title = {
        "model": "Losses of each model on more and on less data",
        "data": "Losses of small and of large models on the same data",
    }[by]
    if not study.losses:
        return Chart(name, title, ["The table has no losses."])
    outer, inner = (study.models, study.data) if by == "model" else (study.data, study.models)
    iterations, losses = study.table.iterations, study.losses

    def draw(panel: str, axes: Axes) -> None:
        for own, style in inner.items():
            pair = (panel, own) if by == "model" else (own, panel)
            chosen = study.of(*pair)
            for kind, values in losses.items():
                dash = "-" if kind == "val_loss" else ":"
                line(axes, iterations[chosen], values[chosen], style, dash)
                size = 24 if kind == "val_loss" else 8
                points(axes, study, chosen, iterations, values, style, size)
        logarithmic(axes, iterations)
        axes.set(xlabel="iterations", ylabel="loss")

    panels = share({panel: partial(draw, panel) for panel in outer}, *losses.values())
    of = "data" if by == "model" else "model"
    both = " Dotted lines are the training loss." if len(losses) > 1 else ""
    words = [
        f"A panel for each {'model' if by == 'model' else 'amount of data'}, a colour for each {of}. "
        f"A line that turns upwards is overfitting.{both}"
    ]
    legend = [*keys(inner), *study.hollow]
    return Chart(name, title, words, panels, legend, _pivot(study, *next(reversed(losses.items()))))


def _pivot(study: Study, name: str, values: np.ndarray) -> list[list[str]]:
    """A row for each model and data, a column for each length; * where the run overfits."""
    rows = [["model", "data", *[f"{count(length)} iterations" for length in study.lengths]]]
    for model in study.models:
        for data in study.data:
            own = study.of(model, data)
            found = {
                study.table.iterations[i]: number(values[i]) + "*" * int(study.over[i])
                for i in np.flatnonzero(own)
            }
            if found:
                rows.append([model, data, *[found.get(length, "–") for length in study.lengths]])
    return rows


def lengths(study: Study, target: str) -> Chart:
    """A value over the amount of data, a line for each length: what data buy at each length."""
    name, title = f"data-{target}", f"What more data buy at each length: {target}"
    images = study.table.images
    if images is None:
        return Chart(name, title, ["The images in the data are not known."])
    values, falls = study.targets[target]

    def draw(model: str, axes: Axes) -> None:
        for length, style in study.lengths.items():
            chosen = study.of(model) & (study.table.iterations == length)
            line(axes, images[chosen], values[chosen], style)
            points(axes, study, chosen, images, values, style)
        logarithmic(axes, images)
        axes.set(xlabel="images", ylabel=target)

    panels = share({model: partial(draw, model) for model in study.models}, values)
    legend = [*keys(study.lengths, lambda n: f"{count(n)} iterations"), *study.hollow]
    words = [
        f"A panel for each model, a colour for each length; {'less' if falls else 'more'} is better. "
        "Lines that part to the right mean that more data help with longer training only.",
        *_gains(study, values, falls),
    ]
    return Chart(name, title, words, panels, legend, _pivot(study, target, values))


def _gains(study: Study, values: np.ndarray, falls: bool) -> list[str]:
    """What the most data give over the least, at the shortest and at the greatest length."""
    least, most = next(iter(study.data)), list(study.data)[-1]
    told = []
    for length in (min(study.lengths), max(study.lengths)):
        own = study.table.iterations == length
        gains = [
            float(values[study.of(model, most) & own][0] - values[study.of(model, least) & own][0])
            for model in study.models
            if (study.of(model, most) & own).any() and (study.of(model, least) & own).any()
        ]
        if gains:
            gain = np.mean(gains) * (-1 if falls else 1)
            told.append(f"{number(float(gain))} at {count(length)} iterations")
    if len(told) < 2 or least == most:
        return []
    return [f"From {least} to {most}, the mean gain of a model is {told[0]}, {told[1]}."]


def correlations(study: Study) -> Chart:
    """Metrics against losses with lines: the paper's Figure 4, and its Table 7."""
    name, title = "correlations", "How far losses tell the metrics"
    losses, panels, words = study.losses, {}, []
    rows = [["metric", "loss", "runs", "number", "Pearson (95 %)", "Spearman (95 %)", "slope"]]
    for metric, (values, _) in study.metrics().items():
        for loss, x in losses.items():
            part = "correlations" if loss == "val_loss" else "train_correlations"
            groups = study.answers[metric][part]
            panels[f"{metric} against {loss}"] = partial(_scatter, study, groups, x, values, loss)
            for kind, group in groups.items():
                if group is None:
                    words.append(f"No line of {NAMES[kind]}: fewer than 3, or all have one value.")
                    continue
                rows.append([metric, loss, NAMES[kind], str(group["runs"]), *_coefficients(group)])
    if not losses:
        return Chart(name, title, ["The table has no losses."])
    first = (
        "Each point is a run: of those that overfit and of the others, with the least-squares line of "
        "each. Intervals are of a bootstrap over runs."
    )
    legend = [
        Key(NAMES["overfit"], SECOND, "o", "-", hollow=True),
        Key(NAMES["other"], FIRST, "o", "-"),
    ]
    return Chart(name, title, [first, *dict.fromkeys(words)], panels, legend, rows, open=True)


def _coefficients(group: dict[str, Any]) -> list[str]:
    told = []
    for kind in ("pearson", "spearman"):
        low, high = group[f"{kind}_interval"]
        told.append(f"{group[kind]:.2f} ({low:.2f} to {high:.2f})")
    return [*told, number(group["slope"])]


def _scatter(
    study: Study, groups: dict[str, Any], x: np.ndarray, y: np.ndarray, loss: str, axes: Axes
) -> None:
    for kind, colour in (("overfit", SECOND), ("other", FIRST)):
        chosen = study.over if kind == "overfit" else ~study.over
        points(axes, study, chosen, x, y, Style(colour, "o"))
        group = groups[kind]
        if group is not None:
            ends = np.array([x[chosen].min(), x[chosen].max()])
            fitted = group["intercept"] + group["slope"] * ends
            axes.plot(ends, fitted, "-", color=colour, linewidth=1.3)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel=loss)


def best(study: Study, metric: str) -> Chart:
    """The best value of each model and data over all lengths: the paper's Tables 3 to 6."""
    found = study.answers[metric]["best"]
    rows, strong = [["model", *study.data]], set()
    for model in study.models:
        rows.append([model, *[_cell(found[model].get(data)) for data in study.data]])
    for column, data in enumerate(study.data, 1):
        values = {r: found[m][data] for r, m in enumerate(study.models, 1) if data in found[m]}
        strong.add((max(values, key=lambda r: values[r]), column))
    words = ["The best over all lengths. Bold is the best model for those data."]
    title = f"The best {metric} of each model and data"
    return Chart(f"best-{metric}", title, words, table=rows, strong=frozenset(strong), open=True)


def _cell(value: float | None) -> str:
    return "–" if value is None else number(value)


def overfitting(study: Study) -> Chart:
    """How many of its lengths overfit, for each model and data."""
    rows = [["model", *study.data]]
    for model in study.models:
        cells = []
        for data in study.data:
            own = study.over[study.of(model, data)]
            cells.append(f"{own.sum()} of {len(own)}" if len(own) else "–")
        rows.append([model, *cells])
    words = ["How many lengths overfit, of those that were run."]
    if study.table.loss is None:
        words, rows = ["The table has no validation loss, by which overfitting is seen."], []
    return Chart("overfitting", "Which models overfit which data", words, table=rows, open=True)
