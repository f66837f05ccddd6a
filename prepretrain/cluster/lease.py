"""Keeps two jobs from training in one folder: owner.json names the one that does, and its time of
change is that one's last sign of life."""

import contextlib
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prepretrain.cluster import slurm
from prepretrain.distributed import group as distributed

logger = logging.getLogger(__name__)

OWNER = "owner.json"
BEAT = 30.0  # seconds between signs of life
PATIENCE = (
    300.0  # seconds without one, after which an owner that cannot be asked for counts as dead
)


class Lease:
    """This job's right to write to a folder; `lost` says whether it still has it."""

    def __init__(self, path: Path, text: str):
        self.path, self.text = path, text

    def lost(self) -> str | None:
        """Why the folder is no longer this job's; None while it is, or nobody can tell."""
        try:
            found = self.path.read_text(errors="replace")
        except FileNotFoundError:
            found = None
        except OSError:  # a server that is away for a while
            return None
        if found == self.text:
            return None
        what = "is gone" if found is None else f"names {_named(_owner(found))}"
        return (
            f"{self.path.parent}: is no longer this run's: {self.path.name} {what}. The folder was "
            f"removed, or taken over while this process gave no sign of life. Nothing more is written "
            f"to it. Start the same command again for what the folder holds, or another with --out."
        )


@contextlib.contextmanager
def held(folder: Path, when_lost: Callable[[], None] = lambda: None) -> Iterator[Lease]:
    """The folder as this job's own. Raises ValueError, on every process, naming another owner.

    The same SLURM job takes it over after a requeue, anyone from an owner that is dead. A job that
    will be started again keeps it. when_lost: called, from a thread of process 0, when the folder
    turns out to be no longer this job's.
    """
    path = folder / OWNER
    me = {"job": slurm.job(), "host": socket.gethostname(), "pid": os.getpid()}
    me |= {"began": _began(os.getpid()), "system": _system(), "mark": os.urandom(4).hex()}
    text = json.dumps(me)
    problem = distributed.from_main(_take(path, text) if distributed.is_main() else None)
    if problem is not None:
        raise ValueError(problem)
    lease, over = Lease(path, text), threading.Event()
    if distributed.is_main():
        threading.Thread(target=_beat, args=(lease, over, when_lost), daemon=True).start()
    try:
        yield lease
    except Exception:
        if slurm.job() is None:  # a job may be started again; if not, SLURM says that it is over
            _release(lease, over)
        raise
    except BaseException:  # Ctrl-C
        _release(lease, over)
        raise
    else:
        _release(lease, over)
    finally:
        over.set()


def _release(lease: Lease, over: threading.Event) -> None:
    over.set()
    if distributed.is_main() and lease.lost() is None:
        lease.path.unlink(missing_ok=True)


def _beat(lease: Lease, over: threading.Event, when_lost: Callable[[], None]) -> None:
    while not over.wait(BEAT):
        if lease.lost() is not None:
            if not over.is_set():
                when_lost()
            return
        with contextlib.suppress(OSError):  # a server that is away for a while
            os.utime(lease.path)


def refusal(folder: Path) -> str | None:
    """Why this process may not train in a folder; None if it may."""
    path = folder / OWNER
    try:
        owner, beat = _owner(path.read_text(errors="replace")), path.stat().st_mtime
        age = _now(folder) - beat
        reason = _alive(folder, owner, age)
        if reason is None or age > -1 or _alive(folder, owner, math.inf) is not None:
            return reason
        # a clock was set back, and nobody knows when this was; a living owner gives another sign
        logger.warning("%s: was changed %.0f s from now; waits for a change", path, -age)
        time.sleep(2 * BEAT)
        return None if path.stat().st_mtime == beat else reason
    except FileNotFoundError:
        return None


def _now(folder: Path) -> float:
    """The time by the clock that the folder's files have their times from, which on a network may
    not be this machine's."""
    mark = folder / f".now-{os.urandom(4).hex()}"
    try:
        mark.touch()
        return mark.stat().st_mtime
    except OSError:  # no room, or not ours to write to
        return time.time()
    finally:
        mark.unlink(missing_ok=True)


def _take(path: Path, mine: str) -> str | None:
    while True:
        try:
            with path.open("x") as file:  # O_EXCL: one of several creates it
                file.write(mine)
            return None
        except FileExistsError:
            pass
        try:
            text = path.read_text(errors="replace")
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
        if gone.read_text(errors="replace") != text:
            os.link(gone, path)
        gone.unlink()
    except (FileNotFoundError, FileExistsError):
        pass


def _owner(text: str) -> dict[str, Any]:
    """What a file says; of one that is just being written, or was damaged, nothing is known."""
    unknown = dict.fromkeys(("job", "pid", "began", "system")) | {"host": "another machine"}
    try:
        found = json.loads(text)
    except ValueError:
        return unknown
    return unknown | found if isinstance(found, dict) else unknown


def _named(owner: dict[str, Any]) -> str:
    if owner["job"] is not None:
        return f"job {owner['job']}"
    return f"process {owner['pid']} on {owner['host']}"


def _alive(folder: Path, owner: dict[str, Any], age: float) -> str | None:
    """What says that an owner is at work; None if it is not, or is this job.

    A process of this machine is alive while it is there, however long it stood still; of others the
    age of their last sign of life decides, where SLURM does not know them.
    """
    name = owner["job"]
    if name is not None and name == slurm.job():
        return None
    state = None if name is None else slurm.state(name)
    if state in slurm.FINAL:
        return None
    if state is None:
        here = owner["host"] == socket.gethostname() and owner["system"] in (None, _system())
        known = here and isinstance(owner["pid"], int)
        if not _runs(owner["pid"], owner["began"]) if known else age > PATIENCE:
            return None
    who = _named(owner) + ("" if name is None else f" ({state or 'unknown'})")
    return (
        f"{folder}: is {who}'s, whose last sign of life was {age:.0f} s ago, and two jobs must not "
        f"write to one run. End that one, or start another run with --out. An owner that was killed "
        f"and cannot be asked for counts as dead after {PATIENCE / 60:.0f} minutes."
    )


def _runs(pid: int, began: str | None) -> bool:
    """Whether a process of this machine is there, and is the one that began then, if that is known."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return began is None or _began(pid) in (None, began)


def _system() -> str | None:
    """What this process's number is one of: several machines, and the containers of one, may have the
    same name. None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _began(pid: int) -> str | None:
    """When a process began, in ticks of the machine's uptime; None where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]
    except (OSError, IndexError):
        return None
