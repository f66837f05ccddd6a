"""The page of a scaling study: one HTML file that needs nothing else, and its figures as PNGs."""

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.lines import Line2D

from prepretrain.reports import study_answers, study_runs
from prepretrain.reports.figure import GRID, INK, blank, panels, save
from prepretrain.reports.study import MARKERS, Chart, Key, Study, arrange
from prepretrain.reports.study_pictures import pictures
from prepretrain.scaling import forecast, two_stage, verdict
from prepretrain.scaling.table import count

WIDTH, HEIGHT = 3.6, 2.7  # inches of a panel: as wide as a phone, where its text is 12 pixels high
COLUMNS = 3  # of panels in a PNG
DRAWN = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a run may be called $x
    "font.size": 8.5,
    "legend.fontsize": 8.5,
}
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def report(
    path: str | Path,
    out: str | Path,
    columns: Sequence[str] = (),
    metrics: Sequence[str] = ("top1",),
    sizes: Sequence[str] = (),
    *,
    budget: float | None = None,
    factor: float = forecast.FACTOR,
    stages: str | Path | None = None,
    cards: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes index.html and a PNG a figure into a folder; returns the answers.

    The options are those of `scaling.verdict.analyse`, whose answers these are, by metric. stages: a
    table of stage two with and without pre-pretraining (`scaling.two_stage`). cards: of images that
    a run that overfits and another rebuild.
    """
    verdict.check_limits(budget, factor)
    table, left_out = verdict.open_table(path, columns, metrics, sizes)
    answers = {
        metric: verdict.answer(table, metric, left_out=left_out, budget=budget, factor=factor)
        for metric in dict.fromkeys(metrics)
    }
    study, folder = arrange(table, answers, Path(path).parent, factor), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [*study_runs.charts(study), *study_answers.charts(study)]
    compared = {}
    if stages is not None:
        runs, left = two_stage.read(stages, list(answers))
        left_out += left
        for metric in answers:
            chart, compared[metric] = study_answers.stages(runs, metric)
            drawn.append(chart)
    drawn.append(pictures(study, cards, folder))
    for chart in drawn:
        if chart.panels:
            write_png(chart, folder / f"{chart.place}.png")
    found = {"metrics": answers, "two_stage": compared}
    (folder / "index.html").write_text(page(study, drawn, found, left_out), encoding="utf-8")
    return found


def page(study: Study, drawn: list[Chart], found: dict[str, Any], left_out: list[str]) -> str:
    """The HTML of a study: its charts, and all that was found as JSON."""
    folder = files("prepretrain.reports")
    script = folder.joinpath("study_page.js").read_text()
    loader = jinja2.DictLoader({"page": folder.joinpath("study_page.html").read_text()})
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["variable"] = _variable
    environment.filters["base64"] = lambda image: base64.b64encode(image).decode()
    environment.filters["swatch"] = _swatch
    answers = list(study.answers.values())
    unsaid = {f"{k}: {why}": why for answer in answers for k, why in answer["not_said"].items()}
    reasons = tuple(unsaid.values())
    unsaid |= {
        f"{chart.title}: {words}": words
        for chart in drawn
        for words in chart.words
        if not chart.drawn and not words.endswith(reasons)
    }
    return environment.get_template("page").render(
        study=study,
        sections=[(chart, _drawings(chart, study)) for chart in drawn if chart.drawn],
        verdicts=_verdicts(answers, list(filter(None, found["two_stage"].values()))),
        unsaid=list(unsaid),
        left_out=left_out,
        facts=_facts(study),
        lengths=[count(length) for length in study.lengths],
        colours=study.dark,
        style=Markup(folder.joinpath("study_page.css").read_text()),
        script=Markup(script),
        allowed=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        answers=found,
    )


def _verdicts(
    answers: list[dict[str, Any]], compared: list[dict[str, Any]]
) -> dict[str, list[str]]:
    """{topic: sentences}, those that stand in several answers once."""
    said: dict[str, dict[str, None]] = {}
    for answer in answers:
        for topic, texts in verdict.by_topic(answer).items():
            said.setdefault(topic, {}).update(dict.fromkeys(texts))
    said["Two stages"] = dict.fromkeys(text for part in compared for text in two_stage.words(part))
    return {topic: list(texts) for topic, texts in said.items() if texts}


def _facts(study: Study) -> tuple[list[str], list[tuple[list[str], str]]]:
    """(names of the columns, (the cells as the file has them, the facts in a line) of each run)."""
    names = list(study.table.cells[0])
    cells = [[row[name] for name in names] for row in study.table.cells]
    return names, [(row, study.label(i)) for i, row in enumerate(cells)]


def _swatch(key: Key) -> Markup:
    """A mark of the legend, in the colour of the theme."""
    glyph = {"": ""} | MARKERS
    mark = "○" if key.hollow else glyph[key.marker]
    dash = {"": "", "-": "line", "--": "dashed", ":": "dotted"}[key.line]
    colour = "currentColor" if key.colour == INK else f"var({_variable(key.colour)})"
    html = '<span class="swatch {}" style="color: {}" aria-hidden="true">{}</span>'
    return Markup(html).format(dash, colour, mark)


def _variable(colour: str) -> str:
    """The name of a colour's CSS variable, which the theme sets."""
    return f"--c{colour.lower().removeprefix('#')}"


def _drawings(chart: Chart, study: Study) -> list[tuple[str, Markup]]:
    """(title, SVG) of each panel."""
    found = []
    for title, draw in chart.panels.items():
        with matplotlib.rc_context(DRAWN | {"svg.hashsalt": f"{chart.name} {title}"}):
            figure = blank(WIDTH, HEIGHT)
            (axes,) = panels(figure, 1)
            draw(axes)
            figure.patch.set_visible(False)
            axes.patch.set_visible(False)
            written = BytesIO()
            figure.savefig(written, format="svg", metadata={"Date": None})
        found.append((title, Markup(_inline(written.getvalue(), f"{chart.title}: {title}", study))))
    return found


def _inline(svg: bytes, title: str, study: Study) -> str:
    """A drawing as a part of the page: in the page's colours and font, its links with their runs'
    facts, and without what only a file of its own needs."""
    for prefix, name in (("", SVG), ("xlink", XLINK)):
        ElementTree.register_namespace(prefix, name[1:-1])
    root = ElementTree.fromstring(svg)
    for unused in [*root.findall(f"{SVG}metadata"), root.find(f"{SVG}defs")]:
        root.remove(unused)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for mark in root.iterfind(f".//{SVG}defs/{SVG}path"):
        mark.attrib.pop(
            "style", None
        )  # where it is used, it is said again, and may change on focus
    root.attrib |= {"role": "group", "aria-label": title}
    for element in root.iter():
        if element.tag == f"{SVG}g":
            element.attrib.pop("id", None)
        if element.tag == f"{SVG}a":
            run = element.get(f"{XLINK}href").removeprefix("#run-")
            element.attrib.clear()
            element.attrib |= {"href": f"#run-{run}", "class": "run", "tabindex": "-1"}
            element.set("aria-labelledby", f"facts-{run}")
        if "style" in element.attrib:
            element.set("style", _themed(element.get("style"), study))
        for name in ("d", "x", "y", "transform"):
            if name in element.attrib:
                element.set(name, _rounded(element.get(name)))
        element.tail = None
        if element.text is not None and not element.text.strip():
            element.text = None
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str, study: Study) -> str:
    """A style in the page's font and colours. What all points have in common is in the page's own,
    as there are thousands of them."""
    style = re.sub(r"font-family: [^;]*;? ?|font: ([\d.]+px) [^;]*", r"", style)
    style = re.sub(r"fill: (#\w+); stroke: \1; stroke-width: 1.2", r"color: \1", style)  # a point's
    style = re.sub(
        r"fill: none; stroke: (#\w+); stroke-width: 1.2", r"fill: none; color: \1", style
    )
    style = style.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for colour in study.dark:
        style = style.replace(colour.lower(), f"var({_variable(colour)})")
    return style


def _rounded(text: str) -> str:
    """Coordinates to a hundredth of a unit, without the lines' ends."""
    text = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}", text)
    return re.sub(r"\s+", " ", text).strip()


def write_png(chart: Chart, path: str | Path) -> None:
    """Draws a chart's panels and their legend, as a file."""
    wide = min(COLUMNS, len(chart.panels))
    deep = -(-len(chart.panels) // wide)
    with matplotlib.rc_context(DRAWN):
        figure = blank(WIDTH * wide, (HEIGHT + 0.2) * deep + 0.5 + 0.25 * bool(chart.keys))
        for axes, (title, draw) in zip(
            panels(figure, len(chart.panels), wide), chart.panels.items()
        ):
            draw(axes)
            axes.set_title(title, color=INK, fontsize=9)
        figure.suptitle(chart.title, color=INK, fontsize=11)
        if chart.keys:
            handles = [_handle(key) for key in chart.keys]
            figure.legend(
                handles=handles,
                loc="outside lower center",
                ncols=2 * wide,
                frameon=False,
                labelcolor=INK,
            )
        save(figure, path)


def _handle(key: Key) -> Any:
    """A legend's entry, as matplotlib draws it."""
    face = "none" if key.hollow else key.colour
    line = Line2D([], [], color=key.colour, linestyle=key.line or "none")
    line.set(marker=key.marker or "none", markerfacecolor=face, markersize=5, label=key.name)
    return line
