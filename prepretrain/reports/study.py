"""What the figures of a scaling study have in common: its runs, their colours, a chart's parts."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.ticker import FuncFormatter, NullLocator

from prepretrain.reports.figure import COLOURS, INK
from prepretrain.scaling.analysis import overfit
from prepretrain.scaling.forecast import FACTOR
from prepretrain.scaling.table import Table, count

MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "*": "★", "X": "✖\ufe0e"}
# Where on matplotlib's plasma the smallest and the largest of an axis lie, on white and on black: between
# these, all colours have the contrast of 3 to 1 that WCAG asks of graphics.
RAMP_LIGHT, RAMP_DARK = (0.0, 0.62), (0.42, 0.98)
# Colours of kinds, not of sizes: {on white: on black}.
KINDS = {COLOURS[0]: "#5cb3f0", COLOURS[1]: "#ff8a4c", COLOURS[2]: "#33c79a", COLOURS[3]: "#e59fc8"}
FIRST, SECOND, THIRD, FOURTH = KINDS


@dataclass(frozen=True)
class Style:
    """How one of several models, amounts of data or lengths is drawn."""

    colour: str  # on white
    marker: str


@dataclass(frozen=True)
class Key:
    """A line of a chart's legend."""

    name: str
    colour: str
    marker: str = ""  # matplotlib's; "" of a line alone
    line: str = ""  # matplotlib's dashes; "" of points alone
    hollow: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure of the page: some panels that share a legend, and the numbers behind them.

    A chart without panels is said in words and by its table only.
    """

    name: str
    title: str
    words: list[str]  # what is seen, a paragraph each
    panels: dict[str, Callable[[Axes], None]] = field(default_factory=dict)  # by title
    keys: list[Key] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)  # the first row names the columns
    strong: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the table's best values
    open: bool = False  # whether the table is shown at once
    images: dict[str, bytes] = field(default_factory=dict)  # PNGs by title

    @property
    def place(self) -> str:
        """The name of its file, and of its place in the page."""
        return re.sub(r"[^\w.-]+", "-", self.name)

    @property
    def drawn(self) -> bool:
        """Whether there is something to look at; else the words say why not."""
        return bool(self.panels or self.table or self.images)


@dataclass(frozen=True)
class Study:
    """The runs of a table with their analysis, and how each is drawn."""

    table: Table
    answers: dict[str, dict[str, Any]]  # of each metric, as scaling.verdict.answer gives them
    over: np.ndarray  # [runs] whether it overfits
    models: dict[str, Style]  # the smallest first
    data: dict[str, Style]
    lengths: dict[float, Style]
    dark: dict[str, str]  # colours on white to those on black
    folders: list[Path | None]  # [runs] of each run, where it is here
    factor: float  # how far beyond the largest run anything is said

    @property
    def targets(self) -> dict[str, tuple[np.ndarray, bool]]:
        """{name: (values, whether less is better)} of the validation loss and the metrics."""
        losses = {} if self.table.loss is None else {"val_loss": (self.table.loss, True)}
        return losses | {name: (self.table.metrics[name], False) for name in self.answers}

    @property
    def losses(self) -> dict[str, np.ndarray]:
        """{name: values} of training and validation, those that the table has."""
        both = {"train_loss": self.table.train_loss, "val_loss": self.table.loss}
        return {name: values for name, values in both.items() if values is not None}

    @property
    def hollow(self) -> list[Key]:
        """The legend of runs that overfit, if any does."""
        return [Key("hollow: overfits", INK, "o", hollow=True)] * bool(self.over.any())

    def of(self, model: str | None = None, data: str | None = None) -> np.ndarray:
        """[runs] which are of a model, of data, or of both."""
        chosen = np.ones(len(self.table), bool)
        if model is not None:
            chosen &= self.table.model == model
        return chosen if data is None else chosen & (self.table.data == data)

    def label(self, i: int) -> str:
        """A run's facts in a line."""
        table = self.table
        facts = [f"{name} {number(v[i])}" for name, v in self.losses.items()]
        facts += [f"{name} {number(values[i])}" for name, (values, _) in self.metrics().items()]
        over = ", overfits" if self.over[i] else ""
        name = f"{table.model[i]}, {table.data[i]}, {count(table.iterations[i])} iterations"
        return f"{name}: {', '.join(facts)}{over}"

    def metrics(self) -> dict[str, tuple[np.ndarray, bool]]:
        """The targets but for the validation loss."""
        return {name: target for name, target in self.targets.items() if name != "val_loss"}


def arrange(
    table: Table,
    answers: dict[str, dict[str, Any]],
    place: Path = Path(),
    factor: float = FACTOR,
) -> Study:
    """The study of a table: sizes in order, each with its colour and its marker.

    place: what the folders in the column `run` are relative to.
    """
    models = _ordered(table.model.tolist(), table.params)
    data = _ordered(table.data.tolist(), table.images)
    lengths = sorted(set(table.iterations.tolist()))
    dark = dict(KINDS)
    styles = []
    for names in (models, data, lengths):
        light, black = (_ramp(ends, len(names)) for ends in (RAMP_LIGHT, RAMP_DARK))
        dark |= dict(zip(light, black))
        markers = [tuple(MARKERS)[i % len(MARKERS)] for i in range(len(names))]
        styles.append({name: Style(*pair) for name, *pair in zip(names, light, markers)})
    return Study(table, answers, overfit(table), *styles, dark, _folders(table, place), factor)


def _folders(table: Table, place: Path) -> list[Path | None]:
    rows = [{}] * len(table) if table.cells is None else table.cells
    named = [place / row["run"] if row.get("run") else None for row in rows]
    return [folder if folder and (folder / "config.yaml").exists() else None for folder in named]


def _ordered(names: Sequence[str], sizes: np.ndarray | None) -> list[str]:
    """Each name once: by size where it is known, else as they come."""
    once = list(dict.fromkeys(names))
    if sizes is None:
        return once
    size = dict(zip(names, sizes.tolist()))
    return sorted(once, key=lambda name: size[name])


def _ramp(ends: tuple[float, float], count: int) -> list[str]:
    places = np.linspace(0, 1, max(count, 2)) ** 0.8  # the dark end has the smaller differences
    colours = matplotlib.colormaps["plasma"](ends[0] + (ends[1] - ends[0]) * places)
    return [to_hex(colour) for colour in colours][:count]


def number(value: float) -> str:
    """Four digits of a value: 0.4821, 83.10, 1.25e+06."""
    return f"{value:#.4g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def keys(styles: dict[Any, Style], name: Callable[[Any], str] = str) -> list[Key]:
    """The legend of models, data or lengths."""
    return [Key(name(k), style.colour, style.marker, "-") for k, style in styles.items()]


def points(
    axes: Axes,
    study: Study,
    chosen: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    style: Style,
    size: float = 24.0,
) -> None:
    """Draws some runs, each a link to its facts; those that overfit are hollow.

    size: one for all, in points², so that an SVG holds the mark once.
    """
    for hollow in (False, True):
        which = np.flatnonzero(chosen & (study.over == hollow))
        axes.scatter(
            x[which],
            y[which],
            s=size,
            marker=style.marker,
            facecolors="none" if hollow else style.colour,
            edgecolors=style.colour,
            linewidths=1.2,
            urls=[f"#run-{i}" for i in which],
            zorder=3,
            clip_on=False,
        )


def line(axes: Axes, x: np.ndarray, y: np.ndarray, style: Style, dash: str = "-") -> None:
    """Draws the line through some values, from left to right."""
    order = np.argsort(x)
    axes.plot(x[order], y[order], dash, color=style.colour, linewidth=1.3)


def logarithmic(axes: Axes, ticks: Iterable[float] | None = None) -> None:
    """Makes x logarithmic, with ticks at some values, by default round ones, as far as they have
    room."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.set_xticks(_apart(sorted(set(_round(*axes.get_xlim()) if ticks is None else ticks))))


def _round(low: float, high: float) -> list[float]:
    """Round values within some limits: decades and their thirds, or more of them if these are few."""
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)))
    for shares in ((1, 3), (1, 2, 3, 4, 5, 6, 8)):
        inside = [d * s for d in decades for s in shares if low <= d * s <= high]
        if len(inside) > 2:
            break
    return inside or [low]


def _apart(values: list[float], least: float = 0.14) -> list[float]:
    """Those of some values whose labels do not touch on a logarithmic axis that spans them."""
    whole = np.log(values[-1] / values[0]) or 1.0
    kept = values[:1]
    for value in values[1:]:
        if np.log(value / kept[-1]) / whole >= least:
            kept.append(value)
    return kept


def share(
    panels: dict[str, Callable[[Axes], None]], *values: np.ndarray
) -> dict[str, Callable[[Axes], None]]:
    """The same panels with the same limits of y, so that they can be compared."""
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    room = 0.06 * (high - low) or 1.0

    def limited(draw: Callable[[Axes], None], axes: Axes) -> None:
        draw(axes)
        axes.set_ylim(low - room, high + room)

    return {title: partial(limited, draw) for title, draw in panels.items()}
