"""The runs of a study as one table of numbers, read from anybody's CSV."""

import csv
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

# What a table must and may hold. A column of the file has the same name, unless it is mapped.
NEEDED = ("model", "data", "iterations")
OPTIONAL = ("params", "images", "cost", "flops", "train_loss")
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
NUMBER = re.compile(r"\s*([-+]?[0-9][0-9,_]*\.?[0-9]*(?:e[-+]?[0-9]+)?)\s*([kmbg]?)\s*", re.I)
MEANT = " Name the one that is meant, as in --columns model=arch val_loss=loss, or --metric top5."
SHARE = re.compile(r"(.+?)\s+([0-9.]+)\s*%")


@dataclass(frozen=True)
class Table:
    """Runs, a row each; every array is as long as the table."""

    model: np.ndarray  # names
    data: np.ndarray  # names
    iterations: np.ndarray
    loss: np.ndarray | None  # on validation data
    metrics: dict[str, np.ndarray]
    params: np.ndarray | None = None
    images: np.ndarray | None = None  # in the training data, each counted once
    cost: np.ndarray | None = None  # of the run, in GPU-days
    flops: np.ndarray | None = None  # of the run's training
    train_loss: np.ndarray | None = None
    cells: np.ndarray | None = None  # {column: text} of each row, as the file has it

    def __len__(self) -> int:
        return len(self.model)

    def take(self, chosen: np.ndarray) -> "Table":
        """Some of the rows, by a mask or by numbers."""

        def cut(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[chosen]

        return Table(
            self.model[chosen],
            self.data[chosen],
            self.iterations[chosen],
            cut(self.loss),
            {name: values[chosen] for name, values in self.metrics.items()},
            *(cut(getattr(self, name)) for name in (*OPTIONAL, "cells")),
        )


def read(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    metrics: tuple[str, ...] = ("top1",),
    sizes: Mapping[str, float] | None = None,
) -> tuple[Table, list[str]]:
    """A table of runs, and what was left out of it, in words.

    columns: the file's names for `model`, `data`, `iterations`, `val_loss`, `params`, `images`,
    `cost`, `flops` and `train_loss`, where they differ. metrics: columns of which more is better. sizes: images in the data,
    by name; "NAME 10%" is then a tenth of NAME. Numbers may have a unit: 125k, 49M, 1.06B. Where there
    is a column `seed`, a run is the mean over its seeds.

    Raises ValueError naming the file, the row and the column of what cannot be read.
    """
    columns, path = dict(columns or {}), Path(path)
    unknown = columns.keys() - {*NEEDED, *OPTIONAL, "val_loss"}
    if unknown:
        raise ValueError(
            f"--columns: there is no '{min(unknown)}'. There are: "
            f"{', '.join((*NEEDED, 'val_loss', *OPTIONAL))}; metrics are named by --metric."
        )
    header, rows = _rows(path)
    named = {key: columns.get(key, key) for key in (*NEEDED, "val_loss", *OPTIONAL)}
    wanted = [named[key] for key in NEEDED] + [named[key] for key in columns] + list(metrics)
    _require(path, header, wanted, MEANT)
    numeric = [named[k] for k in ("iterations", "val_loss", *OPTIONAL) if named[k] in header]
    numbers, whole, left = _finite(path, rows, [*numeric, *metrics])
    model, data = (
        np.array([row[named[key]].strip() for _, row in rows]) for key in ("model", "data")
    )
    images = numbers.get(named["images"])
    if images is None and sizes:
        images = np.array([_size(name, sizes) for name in data])
    table = Table(
        model,
        data,
        numbers[named["iterations"]],
        numbers.get(named["val_loss"]),
        {name: numbers[name] for name in metrics},
        **{key: numbers.get(named[key]) for key in OPTIONAL} | {"images": images},
        cells=np.array([row for _, row in rows], object),
    ).take(whole)
    table = _averaged(table)
    _check(path, table)
    return table, left


def _averaged(table: Table) -> Table:
    """The same runs, where each is the mean over its seeds if the file has a column `seed`."""
    if len(table) == 0 or "seed" not in table.cells[0]:
        return table
    groups: dict[tuple[str, str, float], list[int]] = {}
    for i, key in enumerate(
        zip(table.model.tolist(), table.data.tolist(), table.iterations.tolist())
    ):
        groups.setdefault(key, []).append(i)
    seeds = [[table.cells[i]["seed"] for i in rows] for rows in groups.values()]
    if len(groups) == len(table) or any(len(set(own)) < len(own) for own in seeds):
        return table  # a seed that stands twice is refused as a run that stands twice

    def mean(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else np.array([values[r].mean() for r in groups.values()])

    first = table.take(np.array([rows[0] for rows in groups.values()]))
    cells = [row | {"seed": ", ".join(own)} for row, own in zip(first.cells, seeds)]
    return replace(
        first,
        loss=mean(table.loss),
        metrics={name: mean(values) for name, values in table.metrics.items()},
        cells=np.array(cells, object),
        **{name: mean(getattr(table, name)) for name in OPTIONAL},
    )


def numbers(path: Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Some columns of a CSV file, all of them numbers, and which rows were left out as one is not
    finite, in words. Raises ValueError naming the file, the line and the column."""
    header, rows = _rows(path)
    _require(path, header, names)
    found, whole, left = _finite(path, rows, names)
    return {name: values[whole] for name, values in found.items()}, left


def _require(path: Path, header: list[str], wanted: Sequence[str], way_out: str = "") -> None:
    """Raises ValueError if a column is not there."""
    missing = [name for name in dict.fromkeys(wanted) if name not in header]
    if missing:
        raise ValueError(
            f"{path}: has no column '{missing[0]}'. There are: {', '.join(header)}." + way_out
        )


def _finite(
    path: Path, rows: list[tuple[int, dict[str, str]]], names: Sequence[str]
) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    """({column: numbers}, [rows] whether all of them are finite, what is left out, in words)."""
    found = {
        name: np.array([_number(path, line, name, row[name]) for line, row in rows])
        for name in dict.fromkeys(names)
    }
    whole = np.all([np.isfinite(values) for values in found.values()], axis=0)
    left = [
        f"{path}, line {line}: left out, as {_empty(found, i)} has no finite number"
        for i, (line, _) in enumerate(rows)
        if not whole[i]
    ]
    return found, whole, left


def _rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """(names of the columns, (line, row) of each row) of a CSV file."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        doubled = [name for name, count in Counter(header).items() if count > 1]
        if doubled:
            raise ValueError(f"{path}: two columns are called '{doubled[0]}'. Rename one.")
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} fields under {len(header)} "
                    "columns. Quote a field that holds a comma."
                )
            rows.append((reader.line_num, dict(zip(header, cells))))
    return header, rows


def number(text: str) -> float:
    """A number with or without a unit: 1281167, 125k, 49M, 1.06B; NaN of nothing and of "nan".
    Raises ValueError."""
    if text.strip().lower() in ("", "-", "nan", "none"):
        return math.nan
    match = NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no number. Write it as in 1281167, 125k, 49M or 1.06B.")
    return float(re.sub("[,_]", "", match[1])) * UNITS[match[2].lower()]


def count(value: float) -> str:
    """A number as people write it: 125k, 1.28M, 14.2M."""
    units = {"Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}
    for unit, size in units.items():
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _number(path: Path, line: int, name: str, text: str) -> float:
    try:
        return number(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {line}, column '{name}': {error}") from error


def _empty(numbers: dict[str, np.ndarray], row: int) -> str:
    return next(f"'{name}'" for name, values in numbers.items() if not np.isfinite(values[row]))


def _size(name: str, sizes: Mapping[str, float]) -> float:
    """The images of a data set of that name; NaN is never returned."""
    share = SHARE.fullmatch(name)
    if name not in sizes and share and share[1] in sizes:
        return sizes[share[1]] * float(share[2]) / 100
    if name not in sizes:
        raise ValueError(f"--sizes: lacks '{name}'. Give its images, as in --sizes '{name}=1.2M'.")
    return sizes[name]


def _check(path: Path, table: Table) -> None:
    """Raises ValueError for rows that say the same run twice, and for impossible numbers."""
    if len(table) == 0:
        raise ValueError(f"{path}: holds no run.")
    keys = Counter(zip(table.model.tolist(), table.data.tolist(), table.iterations.tolist()))
    doubled = [key for key, count in keys.items() if count > 1]
    if doubled:
        model, data, iterations = doubled[0]
        raise ValueError(
            f"{path}: {keys[doubled[0]]} rows are of {model}, {data}, {iterations:g} iterations. "
            "Keep one; seeds are averaged where a column `seed` tells them apart."
        )
    for name in ("iterations", "params", "images", "cost", "flops"):
        values = getattr(table, name)
        if values is not None and (values <= 0).any():
            raise ValueError(f"{path}: {name} must be above 0. One is {values.min():g}.")
