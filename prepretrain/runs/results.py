"""What a run's folder says of measurements: results.json, and what was asked in evaluations.json."""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prepretrain.distributed import group as distributed

logger = logging.getLogger(__name__)


def add(folder: Path, found: dict[str, Any], asked: dict[str, Any] | None = None) -> None:
    """Adds to results.json and, what was asked, to evaluations.json; each whole or not at all.
    Other jobs may add to them at the same time. Called on every process."""
    if distributed.is_main():
        with _locked(folder):  # in this order: cut off between the two, it is measured anew
            _add(folder / "results.json", found)
            _add(folder / "evaluations.json", asked or {})
    distributed.barrier()


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What results.json and evaluations.json hold, the same on every process; {} where there is
    none."""
    return distributed.from_main(
        (_held(folder / "results.json"), _held(folder / "evaluations.json"))
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "results.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # a network's file system without locks
            logger.warning(
                "%s: %s; two jobs that write here at once may lose results", lock.name, error
            )
        yield


def _add(path: Path, values: dict[str, Any]) -> None:
    if values:
        path.with_suffix(".tmp").write_text(json.dumps(_held(path) | values, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)


def _held(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
