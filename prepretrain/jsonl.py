"""Reads files of JSON lines, as metrics.jsonl: a process that was killed leaves a line torn, and a
damaged disk any bytes, and neither may keep the other lines from being read."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

STEP = {"step": int}  # what a row of metrics.jsonl holds at least
_BLOCK = 1 << 16  # bytes that are read at once from the end


def rows(path: Path, needs: Mapping[str, type] = STEP) -> Iterator[dict[str, Any]]:
    """Yields a file's rows, first to last; none where there is no file.

    needs: what a row holds, and of which type. Lines that are no such rows are skipped; their count
    goes to the log.
    """
    skipped = 0
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                found = row(line, needs)
                skipped += found is None
                if found is not None:
                    yield found
    if skipped:
        logger.warning("%s: %d lines are damaged, and skipped", path, skipped)


def row(line: bytes, needs: Mapping[str, type] = STEP) -> dict[str, Any] | None:
    """The row of a line; None for one that is torn or holds something else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    fits = all(type(found.get(name)) is kind for name, kind in needs.items())
    return found if fits else None


def last(path: Path, needs: Mapping[str, type] = STEP) -> dict[str, Any] | None:
    """The last row of a file, without reading what comes before; None where there is none."""
    found = (row(line, needs) for _, line in backwards(path))
    return next((one for one in found if one is not None), None)


def backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields a file's lines from the last one to the first: (where it begins, its bytes)."""
    if not path.exists():
        return
    with path.open("rb") as file:
        begin, rest = file.seek(0, 2), b""
        while begin:
            size = min(_BLOCK, begin)
            begin -= size
            file.seek(begin)
            rest = file.read(size) + rest
            pieces = rest.split(b"\n")
            lines = [piece + b"\n" for piece in pieces[:-1]] + [p for p in pieces[-1:] if p]
            at = begin + len(rest)
            for line in lines[:0:-1]:
                at -= len(line)
                yield at, line
            rest = lines[0]  # its beginning may lie in the block before
        if rest:
            yield 0, rest
