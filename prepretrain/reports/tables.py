"""Lays the results of runs and published ones beside each other."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prepretrain import plugin
from prepretrain.data.card import load_card
from prepretrain.runs import results
from prepretrain.zoo import published


def measured(run: str | Path) -> dict:
    """What a run's results.json holds."""
    if not (Path(run) / "results.json").exists():
        raise ValueError(f"{run}: there is no results.json. Has the run been evaluated?")
    return results.measured(Path(run))


def rows(
    runs: Sequence[str | Path], names: Sequence[str] = (), groups: Sequence[str] = ()
) -> list[dict[str, str | int]]:
    """One row a run: the headline metric of each evaluation (± its deviation, where it is a mean),
    images seen, parameters and FLOPs, and what was asked of the evaluations ("protocol"); then the
    published rows of groups, one a number.

    Published numbers have a column of their own, beside the name of what was measured, which says
    data and protocol; so none stands under one of ours. names: of the runs, by default their
    folders'.
    """
    if names and len(names) != len(runs):
        raise ValueError(f"--names: {len(names)} names for {len(runs)} runs.")
    called = names or [Path(run).resolve().name for run in runs]
    ours = [{"run": name, **_measured(run)} for run, name in zip(runs, called)]
    return ours + [
        line for group in groups for row in published.find(group) for line in _lines(row)
    ]


def _measured(run: str | Path) -> dict[str, str | int]:
    row, protocols, asked = {}, [], results.asked(Path(run))
    for name, value in measured(run).items():
        if not isinstance(value, dict):
            row[name] = value if isinstance(value, int) else f"{value:.4g}"
            continue
        # a suite's training has several, each under its own name
        several = all(isinstance(inner, dict) for inner in value.values())
        for key, found in value.items() if several else [(None, value)]:
            quoted = _evaluator((key or name).split("/")[0]).quoted(found)
            if not isinstance(found.get(quoted), (int, float)):
                raise ValueError(f"{run}/results.json: {key or name}: lacks its metric {quoted}.")
            deviation = f" ± {found[f'{quoted}_std']:.2f}" if f"{quoted}_std" in found else ""
            row[f"{name} {key + ' ' if key else ''}{quoted}"] = f"{found[quoted]:.2f}{deviation}"
        protocols.append(f"{name}: {_told(asked[name]) if name in asked else 'not recorded'}")
    return row | ({"protocol": "; ".join(protocols)} if protocols else {})


def chance(run: str | Path) -> dict[str, str]:
    """The row of a guesser: top-1 in those evaluations of a run whose card names its classes."""
    row = {"run": "chance"}
    for name, metrics in measured(run).items():
        evaluator, _, card = name.partition("/")
        if evaluator not in plugin.names("evaluators"):
            continue
        quoted = plugin.find("evaluators", evaluator).quoted(metrics)
        classes = load_card(card.partition("/")[0]).classes
        if quoted.startswith("top1") and classes:
            row[f"{name} {quoted}"] = f"{100 / len(classes):.2f}"
    return row


def _evaluator(name: str) -> Any:
    """The class of an evaluator that a file names."""
    plugin.check_trusted({"name": name}, "report")
    return plugin.find("evaluators", name)


def _told(record: dict[str, Any]) -> str:
    """What evaluations.json says of a result; that it says nothing, where that cannot be read."""
    try:
        return _asked(record)
    except (KeyError, TypeError, AttributeError):
        return "not recorded"


def _asked(record: dict[str, Any]) -> str:
    """The record of a training; of an evaluation, the options that are no defaults."""
    options = record["options"]
    if "evaluator" not in options:
        objective, rate = options["objective"]["name"], options["optim"]["lr"]
        return f"{objective} {options['length']}, batch {options['batch_size']}, lr {rate:g}"
    kind = _evaluator(options["evaluator"]["name"])
    default = json.loads(json.dumps(plugin.defaults(kind)))  # a tuple is a list in the record
    other = {k: v for k, v in options["evaluator"].items() if k not in ("name", "data")}
    other = {k: v for k, v in other.items() if k not in default or v != default[k]}
    other |= {f"model.{key}": value for key, value in options["model"].items()}
    return ", ".join(f"{key}={value}" for key, value in other.items()) or "defaults"


def _lines(row: published.Row) -> list[dict[str, str | int]]:
    said = row.source + ("" if row.checked else " (its columns re-aligned by hand)")
    return [
        {"run": row.name, "published": str(value), "metric": name, "protocol": said}
        for name, value in row.metrics.items()
    ]


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
    text = [
        key in ("run", "metric", "protocol") for key in names
    ]  # to the left, numbers to the right
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
    *,
    guesser: bool = False,
) -> None:
    """Prints the table of runs and of published groups, and writes it to a file, if one is named.

    guesser: a first row says what chance gives in the first run's evaluations.
    """
    found = rows(runs, names, groups)
    found = [chance(runs[0]), *found] if guesser else found
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
