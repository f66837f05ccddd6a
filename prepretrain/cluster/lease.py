"""Keeps two jobs from training in one folder: owner.json names the one that does, and its time of
change is that one's last sign of life."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prepretrain.cluster import slurm
from prepretrain.distributed import group as distributed

OWNER = "owner.json"
BEAT = 30.0  # seconds between signs of life
PATIENCE = (
    300.0  # seconds without one, after which an owner that cannot be asked for counts as dead
)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder as this job's own. Raises ValueError, on every process, naming another owner.

    The same SLURM job takes it over after a requeue, anyone from an owner that is dead. A job that
    will be started again keeps it.
    """
    path = folder / OWNER
    problem = distributed.from_main(_take(path) if distributed.is_main() else None)
    if problem is not None:
        raise ValueError(problem)
    over = threading.Event()
    if distributed.is_main():
        threading.Thread(target=_beat, args=(path, over), daemon=True).start()
    try:
        yield
    except Exception:
        if slurm.job() is not None:  # may be started again; if not, SLURM says that it is over
            over.set()
            raise
        _release(path, over)
        raise
    _release(path, over)


def _release(path: Path, over: threading.Event) -> None:
    over.set()
    if distributed.is_main():
        path.unlink(missing_ok=True)


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):  # a server that is away for a while
            os.utime(path)


def refusal(folder: Path) -> str | None:
    """Why this process may not train in a folder; None if it may."""
    path = folder / OWNER
    try:
        text, age = path.read_text(), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    return _alive(folder, _owner(text), age)


def _take(path: Path) -> str | None:
    me = {"job": slurm.job(), "host": socket.gethostname(), "pid": os.getpid()}
    while True:
        try:
            with path.open("x") as file:  # O_EXCL: one of several creates it
                file.write(json.dumps(me))
            return None
        except FileExistsError:
            pass
        try:
            text = path.read_text()
        except FileNotFoundError:
            continue
        reason = refusal(path.parent)
        if reason is not None:
            return reason
        _remove(path, text)


def _remove(path: Path, text: str) -> None:
    """Removes a dead owner's file, unless another has taken it over in the meantime."""
    gone = path.with_name(f"{OWNER}.{os.urandom(4).hex()}")
    try:
        os.rename(path, gone)
        if gone.read_text() != text:
            os.link(gone, path)
        gone.unlink()
    except (FileNotFoundError, FileExistsError):
        pass


def _owner(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # it is just being written
        return {"job": None, "host": "another machine", "pid": None}


def _alive(folder: Path, owner: dict[str, Any], age: float) -> str | None:
    """What says that an owner is at work; None if it is not, or is this job."""
    name, host, pid = owner["job"], owner["host"], owner["pid"]
    if name is not None and name == slurm.job():
        return None
    state = None if name is None else slurm.state(name)
    if state is None and (age > PATIENCE or (host == socket.gethostname() and not _runs(pid))):
        return None
    if state in slurm.FINAL:
        return None
    who = f"process {pid} on {host}" if name is None else f"job {name} ({state or 'unknown'})"
    return (
        f"{folder}: is {who}'s, whose last sign of life was {age:.0f} s ago, and two jobs must not "
        f"write to one run. End that one, or start another run with --out. An owner that was killed "
        f"and cannot be asked for counts as dead after {PATIENCE / 60:.0f} minutes."
    )


def _runs(pid: int | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, TypeError):  # another user's; not yet written
        return True
    return True
