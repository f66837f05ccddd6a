"""What a run's folder says of measurements: results.json, and what was asked in evaluations.json."""

import contextlib
import fcntl
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prepretrain.distributed import group as distributed
from prepretrain.files import read_json, write_json

logger = logging.getLogger(__name__)


def add(folder: Path, found: dict[str, Any], request: dict[str, Any] | None = None) -> None:
    """Adds to results.json and, what was asked, to evaluations.json; each whole or not at all.
    Other jobs may add to them at the same time. Called on every process."""
    if distributed.is_main():
        with _locked(folder):  # in this order: cut off between the two, it is measured anew
            _add(folder / "results.json", found, measured(folder))
            _add(folder / "evaluations.json", request or {}, asked(folder))
    distributed.barrier()


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What results.json and evaluations.json hold, the same on every process; {} where there is
    none. Raises ValueError for a damaged one."""
    return distributed.from_main((measured(folder), asked(folder)))


def measured(folder: Path) -> dict[str, Any]:
    """What results.json holds: a number or a mapping of metrics for each name."""
    return _held(folder / "results.json", _is_measured)


def asked(folder: Path) -> dict[str, dict[str, Any]]:
    """What evaluations.json holds: for each name of a result the options that were asked for."""
    return _held(folder / "evaluations.json", lambda one: isinstance(one, dict))


def _is_measured(value: Any) -> bool:
    """Whether it is a number, or a mapping of such."""
    if isinstance(value, dict):
        return all(_is_measured(inner) for inner in value.values())
    return isinstance(value, (int, float))


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


def _add(path: Path, values: dict[str, Any], held: dict[str, Any]) -> None:
    if values:
        write_json(path, held | values)


def _held(path: Path, fits: Callable[[Any], bool]) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = read_json(path)
    if odd := [name for name, value in found.items() if not fits(value)]:
        raise ValueError(f"{path}: is damaged: what it holds under {odd[0]!r} is no result.")
    return found
