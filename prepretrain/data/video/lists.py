"""The forms in which data sets of videos list their splits: what each line names, and its class."""

import csv
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from prepretrain.data.io.names import is_video

_SHOWN = 1000  # entries that an error names
_LABELLED = re.compile(r"(.+?)(?:\s+|\s*,\s*)(\d{1,9})")
_PART = re.compile(r"(.+)_test_split\d+\.txt")  # HMDB51's lists are called by class and split
_KINETICS = ("label", "youtube_id", "time_start", "time_end")

Entries = list[tuple[str, str | int | None]]  # (path or stem, class: its name, its number, or none)


def read_list(
    listing: str,
    path: str,
    classes: list[str] | None,
    *,
    suffix: str = "",
    marked: int | None = None,
) -> tuple[list[str], list[int] | None, list[str] | None, list[str]]:
    """(paths below `path`, labels, classes, paths that are not there) of what a list names.

    A list by its form: lines of text; a .csv like Kinetics'; a .json like Something-Something's; a glob
    of lists like HMDB51's. Raises ValueError, which names all entries that are wrong.
    """
    stems = True
    if glob.has_magic(os.path.basename(listing)) and not os.path.exists(listing):
        entries = _marked(listing, marked)
    elif not os.path.isfile(listing):
        raise ValueError(f"{listing}: is no file.")
    elif listing.endswith(".json"):
        entries = _templates(listing)
    elif _is_kinetics(listing):
        entries = _kinetics(listing)
    else:
        entries, stems = _lines(listing, suffix), False
    if not entries:
        raise ValueError(f"{listing}: names no video.")
    names = [name for name, _ in entries]
    if twice := _repeated(names):
        raise ValueError(f"{listing}: names '{twice}' twice.")
    labels, classes = _labels(listing, path, entries, classes)
    found, missing = (_by_stem if stems else _by_path)(path, names, listing)
    kept = [i for i, name in enumerate(found) if name is not None]
    labels = None if labels is None else [labels[i] for i in kept]
    return [found[i] for i in kept], labels, classes, missing


def shown(entries: Iterable[object]) -> str:
    """Entries as an error names them: all, unless there are very many."""
    entries = [str(entry) for entry in entries]
    rest = len(entries) - _SHOWN
    return ", ".join(entries[:_SHOWN]) + (f", and {rest:,} more" if rest > 0 else "")


def _lines(listing: str, suffix: str) -> Entries:
    """Lines "path label", "path,label" or "path"; all of them with a label, or none."""
    written = Path(listing).read_text(errors="surrogateescape")  # names need not be UTF-8
    lines = [line.strip() for line in written.removeprefix("\ufeff").splitlines()]
    lines = [line for line in lines if line]
    matches = [_LABELLED.fullmatch(line) for line in lines]
    if any(matches) and not all(matches):
        bare = [line for line, match in zip(lines, matches) if not match]
        raise ValueError(
            f"{listing}: {len(bare):,} of {len(lines):,} lines have no label, as in 'cat/1.mp4 0': "
            f"{shown(bare)}."
        )
    pairs = [
        (match[1], int(match[2])) if match else (line, None) for line, match in zip(lines, matches)
    ]
    outside = [name for name, _ in pairs if ".." in name.split("/")]
    if outside:
        raise ValueError(f"{listing}: {shown(outside)} lie outside of the folder of the videos.")
    return [(name.lstrip("/") + suffix, label) for name, label in pairs]


def _is_kinetics(listing: str) -> bool:
    with open(listing, errors="surrogateescape") as file:
        columns = file.readline().removeprefix("\ufeff").strip().split(",")
    return set(_KINETICS) <= set(columns)


def _kinetics(listing: str) -> Entries:
    """Kinetics' table: label, youtube_id, time_start, time_end, …; files are <id>_<start>_<end>."""
    try:
        with open(listing, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{listing}: not readable as CSV: {error}") from error
    entries: Entries = []
    for number, row in enumerate(rows, 2):
        label, stem, *times = (row[column] for column in _KINETICS)
        try:
            start, end = (int(float(time)) for time in times)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{listing}: line {number} has no numbers for its times: {error}."
            ) from error
        if not label or not stem:
            raise ValueError(f"{listing}: line {number} has no label or no youtube_id.")
        entries.append((f"{stem}_{start:06d}_{end:06d}", label.strip('" ')))
    return entries


def _templates(listing: str) -> Entries:
    """Something-Something's list of {"id", "template"}; the class is the template without brackets."""
    try:
        content = json.loads(Path(listing).read_text())
        return [(str(one["id"]), re.sub(r"[\[\]]", "", one["template"])) for one in content]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{listing}: is no list of id and template, as Something-Something's are: "
            f"{type(error).__name__}: {error}. Its test split has no labels."
        ) from error


def _marked(listing: str, marked: int | None) -> Entries:
    """HMDB51's lists, <class>_test_split1.txt: "file 0", 1 or 2; those with the number `marked`."""
    if marked is None:
        raise ValueError(
            f"{listing}: source.marked must say which lines are read: 1 for training, 2 for the test."
        )
    entries: Entries = []
    folder, pattern = os.path.split(listing)
    for file in sorted(glob.glob(os.path.join(glob.escape(folder), pattern))):
        match = _PART.fullmatch(os.path.basename(file))
        if match is None:
            raise ValueError(f"{file}: is not called <class>_test_split<number>.txt.")
        for name, number in _lines(file, ""):
            if number == marked:
                entries.append((name.rpartition(".")[0], match[1]))
    return entries


def _labels(
    listing: str, path: str, entries: Entries, classes: list[str] | None
) -> tuple[list[int] | None, list[str] | None]:
    """The labels of entries, and the classes, where they are known."""
    given = [label for _, label in entries]
    numbered = isinstance(given[0], int)
    if isinstance(given[0], str):
        return _places(listing, given, classes or sorted(set(given))), classes or sorted(set(given))
    if numbered and classes is None:
        return given, None
    folders = [name.partition("/")[0] for name, _ in entries]
    classes = classes or sorted(e.name for e in os.scandir(path) if e.is_dir())
    if not numbered:
        return _places(listing, folders, classes), classes
    if set(folders) <= set(classes):
        return _agreed(listing, entries, _places(listing, folders, classes)), classes
    _check_numbers(listing, entries, classes)
    return given, classes


def _places(listing: str, names: list[str], classes: list[str]) -> list[int]:
    """The place of each name among the classes."""
    places = {name: label for label, name in enumerate(classes)}
    if odd := sorted(set(names) - places.keys()):
        raise ValueError(
            f"{listing}: {len(odd):,} of its classes are not among the {len(classes):,} of the card: "
            f"{shown(odd)}."
        )
    return [places[name] for name in names]


def _agreed(listing: str, entries: Entries, labels: list[int]) -> list[int]:
    """Labels by folder, with which the numbers must agree: all count from 0, or all from 1 (UCF101)."""
    offsets = {number - label for (_, number), label in zip(entries, labels)}
    if offsets not in ({0}, {1}):
        name, number = (
            next(
                entry for entry, label in zip(entries, labels) if entry[1] not in (label, label + 1)
            )
            if not offsets <= {0, 1}
            else entries[0]
        )
        raise ValueError(
            f"{listing}: '{name} {number}': the number is not the place of the folder's name among the "
            f"classes, counted from 0 or from 1."
        )
    return labels


def _check_numbers(listing: str, entries: Entries, classes: list[str]) -> None:
    outside = [f"{name} {label}" for name, label in entries if label >= len(classes)]
    if outside:
        raise ValueError(
            f"{listing}: {len(outside):,} of its labels are outside of the {len(classes):,} classes, which "
            f"count from 0: {shown(outside)}."
        )


def _by_path(path: str, names: list[str], _: str) -> tuple[list[str | None], list[str]]:
    found = [name if os.path.exists(os.path.join(path, name)) else None for name in names]
    return found, [name for name, there in zip(names, found) if there is None]


def _by_stem(path: str, stems: list[str], listing: str) -> tuple[list[str | None], list[str]]:
    """The videos of these names without ending, wherever they lie below a folder."""
    places: dict[str, str] = {}
    wanted = set(stems)
    for name in files_below(path):
        stem = os.path.basename(name).rpartition(".")[0]
        if stem not in wanted:
            continue
        if stem in places:
            raise ValueError(
                f"{path}: '{stem}' of {listing} is there twice: {places[stem]}, {name}."
            )
        places[stem] = name
    return [places.get(stem) for stem in stems], [stem for stem in stems if stem not in places]


def files_below(path: str) -> Iterator[str]:
    """The paths of all video files below a folder, from there; none is hidden."""
    for place, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(place, path)
        for name in sorted(files):
            if is_video(name):
                yield name if inside == "." else f"{inside}/{name}"


def _repeated(names: list[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)
