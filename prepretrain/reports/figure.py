"""What all pictures have in common: colours, axes, and how they are written."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any kind of colour vision; past eight the dashes differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
DASHES = ("-", "--", "-.", ":")
INK, GRID = "#333333", "#e4e4e4"


def blank(width: float, height: float) -> Figure:
    """An empty figure of that many inches."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)  # no display and no global state
    return figure


def panels(figure: Figure, count: int, wide: int | None = None) -> list[Axes]:
    """Axes in rows of `wide`, by default in one row, drawn in the style of all."""
    figure.set_layout_engine("constrained")
    wide = count if wide is None else wide
    places = list(figure.subplots(-(-count // wide), wide, squeeze=False).flat)
    for axes in places[count:]:
        axes.remove()
    for axes in places[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    return places[:count]


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure, in the format that the file's name says."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
