"""The runs of a study as one table of numbers, read from anybody's CSV."""

import csv
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# What a table must and may hold. A column of the file has the same name, unless it is mapped.
NEEDED = ("model", "data", "iterations")
OPTIONAL = ("params", "images", "cost", "flops", "train_loss")
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
NUMBER = re.compile(r"\s*([-+]?[0-9][0-9,_]*\.?[0-9]*(?:e[-+]?[0-9]+)?)\s*([kmbg]?)\s*", re.I)
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
    by name; "NAME 10%" is then a tenth of NAME. Numbers may have a unit: 125k, 49M, 1.06B.

    Raises ValueError naming the file, the row and the column of what cannot be read.
    """
    columns, path = dict(columns or {}), Path(path)
    unknown = columns.keys() - {*NEEDED, *OPTIONAL, "val_loss"}
    if unknown:
        raise ValueError(
            f"--columns: there is no '{min(unknown)}'. There are: "
            f"{', '.join((*NEEDED, 'val_loss', *OPTIONAL))}; metrics are named by --metrics."
        )
    header, rows = _rows(path)
    named = {key: columns.get(key, key) for key in (*NEEDED, "val_loss", *OPTIONAL)}
    wanted = [named[key] for key in NEEDED] + [named[key] for key in columns] + list(metrics)
    missing = [name for name in dict.fromkeys(wanted) if name not in header]
    if missing:
        raise ValueError(
            f"{path}: has no column '{missing[0]}'. There are: {', '.join(header)}. Name the one "
            "that is meant, as in --columns model=arch val_loss=loss, or --metrics top5."
        )
    numeric = [named[k] for k in ("iterations", "val_loss", *OPTIONAL) if named[k] in header]
    numbers = {
        name: np.array([_number(path, line, name, row[name]) for line, row in rows])
        for name in dict.fromkeys([*numeric, *metrics])
    }
    whole = np.all([np.isfinite(values) for values in numbers.values()], axis=0)
    left = [
        f"{path}, line {line}: left out, as {_empty(numbers, i)} has no finite number"
        for i, (line, _) in enumerate(rows)
        if not whole[i]
    ]
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
    _check(path, table)
    return table, left


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
            "Keep one; average the seeds of a run first."
        )
    for name in ("iterations", "params", "images", "cost", "flops"):
        values = getattr(table, name)
        if values is not None and (values <= 0).any():
            raise ValueError(f"{path}: {name} must be above 0. One is {values.min():g}.")
