"""Measures a source part by part, and keeps each part, so that a kill costs one."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prepretrain.data.sources.base import Source
from prepretrain.data.subset import Subset
from prepretrain.distributed import group as distributed
from prepretrain.files import read_json, write_json

_PART = 250  # not from the paper: images of a part


def by_parts(
    source: Source,
    folder: Path | None,
    measure: Callable[[Source], dict[str, Any]],
    whole: Callable[[dict[str, Any], int], bool],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its first image, what `measure` gave) of each part of a source. All processes
    iterate together.

    folder: where process 0 keeps parts as JSON, which a later call finds; it is the caller's to say
    that what is measured is the same. whole: whether what was found there is a part of so many
    images.
    """
    for first in range(0, len(source), _PART):
        some = Subset(source, range(first, min(first + _PART, len(source))))
        path = None if folder is None else folder / f"{first:09d}.json"
        part = _kept(path, len(some), whole)
        if not distributed.from_main(part is not None):
            part = measure(some)
            if path is not None and distributed.is_main():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, part, indent=None)
        yield first, part or {}


def forget(folder: Path) -> None:
    """Removes what `by_parts` kept. Called on every process."""
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)


def _kept(
    path: Path | None, count: int, whole: Callable[[dict[str, Any], int], bool]
) -> dict[str, Any] | None:
    """A part that process 0 wrote before, on process 0."""
    if path is None or not distributed.is_main():
        return None
    try:
        part = read_json(path)
        return part if whole(part, count) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
