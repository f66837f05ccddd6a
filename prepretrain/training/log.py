"""What a run tells a person and a program: log lines, metrics.jsonl, TensorBoard, a progress
bar."""

import contextlib
import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from prepretrain import jsonl
from prepretrain.distributed import group as distributed

logger = logging.getLogger("prepretrain")

ROLLBACKS = "rollbacks"  # the key of a row that is of a beginning, not of a step


def setup(folder: Path | None = None) -> None:
    """Log lines to the terminal (rank 0; others only warnings) and, with a folder, to
    `<folder>/log.txt`."""
    logger.setLevel(logging.INFO if distributed.is_main() else logging.WARNING)
    logger.propagate = False
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    rank = "" if distributed.world() == 1 else f"[{distributed.rank()}] "
    shape = logging.Formatter(f"%(asctime)s {rank}%(levelname).1s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [_Terminal()]
    if folder is not None:
        handlers.append(logging.FileHandler(folder / "log.txt", delay=True))
        if not distributed.is_main():
            handlers[-1].setLevel(logging.CRITICAL)  # why a job ends, whoever caused it
    for handler in handlers:
        handler.setFormatter(shape)
        logger.addHandler(handler)


class _Terminal(logging.StreamHandler):
    """Writes through tqdm, so that a line does not tear the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except OSError:  # the terminal is gone; the run and its log.txt go on
            pass


class Metrics:
    """metrics.jsonl, one line a logged step, each step once, with TensorBoard beside it. Rank 0
    writes."""

    def __init__(self, folder: Path, step: int, wandb: str | None = None):
        """Opens the log for a run that continues after `step`; later lines, from a run cut off, are
        removed. wandb: a Weights & Biases project to log to as well, in one run however often this
        one is continued."""
        self.file = self.board = self.remote = None
        self.measured: list[str] = []  # figures that were logged of this very step
        if not distributed.is_main():
            return
        path = folder / "metrics.jsonl"
        self.measured = _rewind(path, step)
        self.seconds = _seconds(path)
        self.file = _Lines(path)
        self.replaced = folder / "quarantine.jsonl"
        self.causes: set[str] = set()  # of which a warning was given
        _rewind(self.replaced, step)
        self.board = _board(folder, step)
        if wandb is not None:
            self.remote = _remote(folder, wandb)
            for row in jsonl.rows(path):  # what a killed process had not sent, or, offline, written
                if row["step"] >= self.remote.step:
                    self.remote.log(row, step=row["step"])

    def write(self, row: dict) -> None:
        """Appends one row, which holds at least "step"."""
        if self.file is None:
            return
        self.file.write(row)
        if self.board is not None:
            self._draw(row)
        if self.remote is not None:  # which drops steps that it had before the run was cut off
            self.remote.log(row, step=row["step"])

    def _draw(self, row: dict) -> None:
        """Adds a row to TensorBoard, whose own thread writes it; a disk that takes no curves ends them,
        and not the run."""
        try:
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(key, value, row["step"])
        except OSError as error:
            logger.warning("no more curves for TensorBoard in this process: %s", error)
            self.board = None

    def unwritten(self) -> str | None:
        """Why not all rows are on disk, after another try; None if they are."""
        return None if self.file is None else self.file.unwritten()

    def write_rollbacks(self, step: int, rollbacks: list[dict]) -> None:
        """Appends how a run came to begin at a step that it had left behind, if so."""
        if rollbacks and rollbacks[-1]["to"] == step:
            self.write({"step": step, ROLLBACKS: rollbacks})

    def quarantine(self, replaced: list[dict]) -> None:
        """Appends images that were replaced to quarantine.jsonl, with step, cause and key; warns of
        the first of each cause, since without a known tag many are no news."""
        if self.file is None or not replaced:
            return
        with self.replaced.open("a") as file:
            for one in replaced:
                file.write(json.dumps(one) + "\n")
                if one["cause"] not in self.causes:
                    self.causes.add(one["cause"])
                    why = ": ".join(one[name] for name in ("cause", "detail") if name in one)
                    said = "image %s was replaced: %s; more of these only in %s"
                    logger.warning(said, one["key"], why, self.replaced)

    def close(self) -> None:
        """Closes all of them."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            with contextlib.suppress(OSError):  # its disk is full, or its folder gone
                self.board.close()
        if self.remote is not None:
            self.remote.finish()


class _Lines:
    """Appends rows to a file. Those that a full disk does not take are kept, and written with a later
    row; what was written in part is continued where it ended."""

    def __init__(self, path: Path):
        self.path, self.waiting = path, b""
        self.file = path.open("ab", buffering=0)
        self.lock = threading.Lock()  # a save in the background asks, too

    def write(self, row: dict) -> None:
        with self.lock:
            fresh = not self.waiting
            self.waiting += json.dumps(row).encode() + b"\n"
        said = self.unwritten()
        if fresh and said is not None:
            logger.warning("%s Until then its rows are kept in memory.", said)

    def unwritten(self) -> str | None:
        with self.lock:
            try:
                while self.waiting:
                    self.waiting = self.waiting[self.file.write(self.waiting) :]
            except OSError as error:
                return f"{self.path}: cannot be written ({error}). Make room."
        return None

    def close(self) -> None:
        if (said := self.unwritten()) is not None:
            logger.error("%s Its last rows are lost.", said)
        self.file.close()


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, without what was written after the step; None if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow; only the writing rank pays
    except ImportError:
        logger.info('no curves for TensorBoard: pip install "prepretrain[tensorboard]"')
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _remote(folder: Path, project: str) -> Any:
    """The folder's Weights & Biases run: new, or the one whose id is in wandb.txt."""
    import wandb  # optional

    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    path = folder / "wandb.txt"
    if not path.exists():
        path.write_text(os.urandom(8).hex())
    name = path.read_text()
    return wandb.init(
        project=project, id=name, name=str(folder), dir=str(folder), config=config, resume="allow"
    )


def _rewind(path: Path, step: int) -> list[str]:
    """Removes the rows after a step, how the run came to begin at it, and what is no row among them,
    as the torn last line of a killed process; returns what was logged of this very step.

    Reads backwards, as a file may hold a million rows, and only the last ones go.
    """
    cut, torn = None, 0
    stay: list[tuple[int, bytes]] = []
    for at, line in jsonl.backwards(path):
        row = jsonl.row(line)
        if row is None or row["step"] > step or (row["step"] == step and ROLLBACKS in row):
            cut, torn = at, torn + (row is None)
            continue
        if row["step"] < step:
            break
        stay.append((at, line))
    if torn:
        logger.warning("%s: %d lines are damaged, and removed", path, torn)
    if cut is not None:
        _cut(path, cut, b"".join(line for at, line in reversed(stay) if at > cut))
    return sorted({key for _, line in stay for key in jsonl.row(line)})


def _seconds(path: Path) -> float:
    """How long the run that logged the rows had trained."""
    found = (jsonl.row(line, {"step": int, "seconds": float}) for _, line in jsonl.backwards(path))
    return next((row["seconds"] for row in found if row is not None), 0.0)


def _cut(path: Path, end: int, more: bytes) -> None:
    """The file's first `end` bytes and some more instead of its rest, whole or not at all."""
    new = path.with_suffix(".tmp")
    with path.open("rb") as old, new.open("wb") as file:
        while end and (block := old.read(min(end, 1 << 20))):
            file.write(block)
            end -= len(block)
        file.write(more)
    os.replace(new, path)


class Progress:
    """A bar on a terminal (images/s, loss, time left); elsewhere plain lines at the rate of the
    log."""

    def __init__(self, steps: int, start: int):
        self.bar = None
        if distributed.is_main() and sys.stderr.isatty():
            self.bar = tqdm(
                total=steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1
            )

    def advance(self) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.update()

    def show(self, text: str, plain: str) -> None:
        """Shows figures behind the bar, or a plain log line where there is no bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            logger.info(plain)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
