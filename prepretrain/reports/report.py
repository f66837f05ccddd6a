"""Pictures and tables of runs, read from the runs' folders and from nothing else."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor

from prepretrain import plugin
from prepretrain.data.card import open_source
from prepretrain.data.loader import evaluation_batches
from prepretrain.data.subset import spread
from prepretrain.runs.export import load_objective
from prepretrain.zoo import published

# Okabe and Ito's colours, told apart with any kind of colour vision; past eight the dashes differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
DASHES = ("-", "--", "-.", ":")
INK, GRID = "#333333", "#e4e4e4"


def metrics(run: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(
            f"{run}: there is no metrics.jsonl. Is it a run's folder, and has the run logged a step?"
        )
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a line of JSON ({error}).") from error
    return rows


def results(run: str | Path) -> dict:
    """A run's results.json."""
    path = Path(run) / "results.json"
    if not path.exists():
        raise ValueError(f"{run}: there is no results.json. Has the run been evaluated?")
    return json.loads(path.read_text())


def curves(
    runs: Sequence[str | Path],
    path: str | Path,
    keys: Sequence[str] = ("loss",),
    names: Sequence[str] = (),
) -> None:
    """Draws one panel a key, one line a run, over images seen; where there are many points, the
    smooth line over its own values. names: of the runs, by default their folders'."""
    if not runs:
        raise ValueError("report: no runs to draw. Name at least one run's folder.")
    if names and len(names) != len(runs):
        raise ValueError(f"--names: {len(names)} names for {len(runs)} runs.")
    figure = _figure(6.4 * len(keys), 4.2)
    called = names or [Path(run).resolve().name for run in runs]
    read = [(name, metrics(run)) for name, run in zip(called, runs)]
    for axes, key in zip(_row(figure, len(keys)), keys):
        for number, (name, rows) in enumerate(read):
            _curve(axes, number, name, _points(rows, key), key)
        axes.set(xlabel="images seen", ylabel=key)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(frameon=False, labelcolor=INK)
    _save(figure, path)


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


def rows(
    runs: Sequence[str | Path], names: Sequence[str] = (), groups: Sequence[str] = ()
) -> list[dict[str, str | int]]:
    """One row a run: the headline metric of each evaluation, images seen, parameters and FLOPs, and
    what was asked of the evaluations ("protocol"); then the published rows of groups.

    A published metric has a column of its own, under the name that it was published by. names: of
    the runs, by default their folders'.
    """
    if names and len(names) != len(runs):
        raise ValueError(f"--names: {len(names)} names for {len(runs)} runs.")
    called = names or [Path(run).resolve().name for run in runs]
    ours = [{"run": name, **_measured(run)} for run, name in zip(runs, called)]
    return ours + [_published(row) for group in groups for row in published.find(group)]


def _measured(run: str | Path) -> dict[str, str | int]:
    path, row, protocols = Path(run) / "evaluations.json", {}, []
    asked = json.loads(path.read_text()) if path.exists() else {}
    for name, value in results(run).items():
        if not isinstance(value, dict):
            row[name] = value if isinstance(value, int) else f"{value:.4g}"
            continue
        # a suite's training has several, each under its own name
        several = all(isinstance(inner, dict) for inner in value.values())
        for key, found in value.items() if several else [(None, value)]:
            quoted = plugin.find("evaluators", (key or name).split("/")[0]).quoted(found)
            row[f"{name} {key + ' ' if key else ''}{quoted}"] = f"{found[quoted]:.2f}"
        protocols.append(f"{name}: {_asked(asked[name]) if name in asked else 'not recorded'}")
    return row | ({"protocol": "; ".join(protocols)} if protocols else {})


def _asked(record: dict[str, Any]) -> str:
    """What evaluations.json says of a result: of an evaluation the options that are no defaults."""
    options = record["options"]
    if "evaluator" not in options:
        objective, rate = options["objective"]["name"], options["optim"]["lr"]
        return f"{objective} {options['length']}, batch {options['batch_size']}, lr {rate:g}"
    kind = plugin.find("evaluators", options["evaluator"]["name"])
    default = json.loads(json.dumps(plugin.defaults(kind)))  # a tuple is a list in the record
    other = {k: v for k, v in options["evaluator"].items() if k not in ("name", "data")}
    other = {k: v for k, v in other.items() if k not in default or v != default[k]}
    other |= {f"model.{key}": value for key, value in options["model"].items()}
    return ", ".join(f"{key}={value}" for key, value in other.items()) or "defaults"


def _published(row: published.Row) -> dict[str, str | int]:
    said = "; ".join([*row.metrics, row.source])
    doubt = "" if row.checked else " (its columns re-aligned by hand)"
    numbers = {name: str(value) for name, value in row.metrics.items()}
    return {"run": f"{row.name} (published)", **numbers, "protocol": said + doubt}


def columns(rows: Sequence[dict[str, str | int]]) -> list[str]:
    """Those of a table in the order in which the rows name them, the protocol last."""
    if not rows:
        raise ValueError("report: no rows for a table. Name at least one run's folder.")
    found = dict.fromkeys(key for row in rows for key in row)
    return sorted(found, key=lambda key: key == "protocol")


def table(rows: Sequence[dict[str, str | int]]) -> str:
    """A Markdown table, with a dash where a row has nothing."""
    names = columns(rows)
    cells = [names] + [[_cell(row.get(key, "–")) for key in names] for row in rows]
    width = [max(len(line[i]) for line in cells) for i in range(len(names))]
    text = [key in ("run", "protocol") for key in names]  # to the left, numbers to the right
    lines = [
        "| "
        + " | ".join(c.ljust(w) if t else c.rjust(w) for c, w, t in zip(line, width, text))
        + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if t else ":") for w, t in zip(width, text)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(value: str | int) -> str:
    return f"{value:,}" if isinstance(value, int) else value.replace("|", "\\|")


def compare(
    runs: Sequence[str | Path],
    path: str | Path | None = None,
    names: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> None:
    """Prints the table of runs and of published groups, and writes it to a file, if one is named."""
    found = rows(runs, names, groups)
    if path is not None:
        write_table(found, path)
    print(table(found))


def write_table(rows: Sequence[dict[str, str | int]], path: str | Path) -> None:
    """The table as Markdown (.md), or as .csv with an empty field where a row has nothing."""
    path = Path(path)
    if path.suffix not in (".md", ".csv"):
        raise ValueError(f"--out: {path} is neither .md nor .csv.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".md":
        path.write_text(table(rows) + "\n")
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def reconstruct(
    runs: Sequence[str | Path], data: str, images: int, path: str | Path, names: Sequence[str] = ()
) -> None:
    """Draws `images` images of a card, spread evenly over it, as the objectives of one or several
    runs see and rebuild them.

    Masks are drawn by each image's place: runs with equal masks share a column for them. names: of
    the runs, by default their folders'. Raises ValueError for runs of other image sizes, or that
    predict no pixels.
    """
    source = open_source(data)
    if not 1 <= images <= len(source):
        raise ValueError(f"--images: {images} does not fit; '{data}' has {len(source)} images.")
    if names and len(names) != len(runs):
        raise ValueError(f"--names: {len(names)} names for {len(runs)} runs.")
    some = spread(source, images)
    columns: dict[str, Tensor] = {}
    masked: Tensor | None = None
    for run, name in zip(runs, names or [Path(run).resolve().name for run in runs]):
        objective = load_objective(run)
        batch = next(iter(evaluation_batches(some, objective.transform(False), batch_size=images)))
        versions = objective.reconstruct(batch)
        original = columns.setdefault("original", versions["original"])
        if original.shape != versions["original"].shape:
            raise ValueError(
                f"{run}: sees images of {versions['original'].shape[-1]} pixels, and {runs[0]} of "
                f"{original.shape[-1]}: they cannot be drawn side by side."
            )
        if masked is None or not torch.equal(masked, versions["masked"]):
            masked = versions["masked"]
            title = "masked" if "masked" not in columns else f"masked for {name}"
            columns[title] = masked
        columns["reconstructed" if len(runs) == 1 else name] = versions["reconstructed"]
    reconstructions(columns, path)


def reconstructions(columns: dict[str, Tensor], path: str | Path) -> None:
    """Draws a grid: a row an image, its versions side by side. All uint8 [N, 3, H, W]."""
    first = next(iter(columns.values()))
    for name, version in columns.items():
        if version.dtype.is_floating_point or version.shape != first.shape or first.shape[1] != 3:
            raise ValueError(
                f"report: '{name}' must be uint8 of shape [N, 3, H, W] like the originals, "
                f"and is {version.dtype} of shape {list(version.shape)}."
            )
    # sets beside each other, so that many images stay on a page
    sets, wide = 1 if len(first) < 4 or len(columns) > 4 else 2, len(columns)
    deep = -(-len(first) // sets)
    figure = _figure(1.6 * (wide * sets + 0.15 * (sets - 1)), 1.6 * deep + 0.3)
    outer = figure.add_gridspec(
        1, sets, wspace=0.06, left=0.01, right=0.99, bottom=0.01, top=1 - 0.3 / (1.6 * deep + 0.3)
    )
    for i in range(len(first)):
        inner = outer[i // deep].subgridspec(deep, wide, wspace=0.03, hspace=0.03)
        for column, (name, version) in enumerate(columns.items()):
            axes = figure.add_subplot(inner[i % deep, column])
            axes.imshow(version[i].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_axis_off()
            if i % deep == 0:
                axes.set_title(name, fontsize=10, color=INK, pad=4)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)  # no display and no global state
    return figure


def _row(figure: Figure, count: int) -> list[Axes]:
    figure.set_layout_engine("constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    return panels


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
