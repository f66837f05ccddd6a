"""Checkpoints that are complete and verified, or invisible: DCP in a folder with a manifest,
renamed when done."""

import contextlib
import copy
import hashlib
import json
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from prepretrain.distributed import group as distributed
from prepretrain.distributed.metadata import Planner, Reader
from prepretrain.files import read_json

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp-"
MANIFEST, STATE, METADATA = "manifest.json", "state.json", ".metadata"
# 1 had no number, and no "numerics" in its state; docs/reliability.md says what each one changed.
FORMAT = 2


class Failed(Exception):
    """What one process could not do, on all of them."""

    def __init__(self, said: str, kind: str):
        super().__init__(said)
        self.kind = kind  # "storage"; "lost" for a folder that is not the run's any more; "other"


Lost = Callable[[], str | None]


def _kept() -> str | None:
    """Why a folder that nobody else can have is lost: never."""


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
    always: Collection[int] = (),
    lost: Lost = _kept,
) -> Path:
    """Saves all processes' shards as `<folder>/checkpoints/<step>`, then removes all but the newest
    `keep`, and those of the steps in `always`.

    state: what is no tensor, as JSON. lost: why the folder is no longer the run's, if so; process 0
    asks before it changes anything there. Raises, on every process, OSError if it cannot be written
    (no space, for one), ValueError for a folder that is lost; what was there before is untouched, and
    nothing half-written is left under a final name.
    """
    final = _final(folder, step)
    temporary = _temporary(final)
    content = _content(module, optimizer)

    def write() -> None:
        dcp.save(content, checkpoint_id=str(temporary))

    with _reported(final, temporary):
        _together(lambda: _prepare(temporary, lost))
        _together(write)
        _commit(final, temporary, state, keep, always, lost)
    return final


class Background:
    """Saves as `save` does, while training goes on: the weights are copied to host memory at once, and
    a thread writes them. One at a time; what failed is in `problem`, and raised by the next save or `wait`.

    Only here do two threads of a process exchange, each in a group of its own.
    """

    def __init__(
        self, folder: Path, *, keep: int, always: Collection[int] = (), lost: Lost = _kept
    ):
        self.folder, self.keep, self.always, self.lost = folder, keep, always, lost
        self.group = distributed.second_group(distributed.TIMEOUT)
        self.thread: threading.Thread | None = None
        self.problem: BaseException | None = None

    def save(
        self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Starts to save. Raises as `save`, on every process, if this or the one before fails."""
        self.wait()
        final = _final(self.folder, step)
        temporary = _temporary(final)
        content, state = _content(module, optimizer), copy.deepcopy(state)
        with _reported(final, temporary):
            _together(lambda: _prepare(temporary, self.lost))
            future = dcp.async_save(content, checkpoint_id=str(temporary), process_group=self.group)

        def finish() -> None:
            try:
                with _reported(final, temporary):
                    _together(future.result, self.group)
                    _commit(final, temporary, state, self.keep, self.always, self.lost, self.group)
            except BaseException as error:  # raised where the loop waits
                self.problem = error

        self.thread = threading.Thread(target=finish, name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what a save has met, on every process."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.problem is not None:
            problem, self.problem = self.problem, None
            raise problem

    def close(self) -> None:
        """Waits at the end of a run that may have failed already: a problem is only logged."""
        try:
            self.wait()
        except Exception as error:
            logger.error("%s", error)


def _final(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"{step:09d}"


def _temporary(final: Path) -> Path:
    """A name of its own, the same on every process."""
    return distributed.from_main(final.with_name(f"{final.name}{TEMPORARY}{os.urandom(4).hex()}"))


def _content(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(module, optimizer)
    return {"module": model_state, "optimizer": optimizer_state}


def _together(action: Callable[[], Any], group: Any = None) -> list:
    """What an action returned on each process; raises Failed on all if it raised on one, so that
    none waits for one that has left."""
    found = problem = None
    try:
        found = action()
    except Failed as error:
        problem = str(error), error.kind
    except CheckpointException as error:  # DCP's own, which is no Exception
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        said = "; ".join(f"process {rank}: {cause!r}" for rank, cause in causes.items())
        problem = said, _kind(*causes.values())
    except Exception as error:  # whatever the storage raised
        problem = f"process {distributed.rank()}: {error!r}", _kind(error)
    parts = distributed.all_gather_object((found, problem), group)
    problems = [p for _, p in parts if p]
    if problems:
        raise Failed(*problems[0])
    return [f for f, _ in parts]


def _kind(*errors: BaseException) -> str:
    """Whether the storage is to blame; torch's own writer says so in words alone."""
    of_storage = (OSError, "PytorchStreamWriter", "unexpected pos", "SafetensorError")
    for error in errors:
        if isinstance(error, of_storage[0]) or any(w in repr(error) for w in of_storage[1:]):
            return "storage"
    return "other"


@contextlib.contextmanager
def _reported(final: Path, temporary: Path) -> Iterator[None]:
    """Turns Failed into an error that says what to do, and removes what is half-written."""
    try:
        yield
    except Failed as failed:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        if failed.kind == "lost":
            raise ValueError(str(failed)) from failed
        said = f"{final}: could not be saved ({str(failed)[:300]}). Earlier checkpoints are intact."
        again = "tart the same command again: it resumes."
        if failed.kind == "other":
            raise RuntimeError(f"{said} S{again}") from failed
        free = shutil.disk_usage(next(p for p in final.parents if p.exists())).free
        raise OSError(
            f"{said} Of its disk {free / 2**30:.1f} GiB are free. Make room, and s{again}"
        ) from failed


def _ask(lost: Lost) -> None:
    """Raises Failed for a folder that is no longer the run's."""
    if (said := lost()) is not None:
        raise Failed(said, "lost")


def _prepare(temporary: Path, lost: Lost) -> None:
    """Room for a save: what killed processes left half-written goes first."""
    if distributed.is_main():
        _ask(lost)
        for left in temporary.parent.glob(f"*{TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)


def _commit(
    final: Path,
    temporary: Path,
    state: dict[str, Any],
    keep: int,
    always: Collection[int],
    lost: Lost,
    group: Any = None,
) -> None:
    """Completes what all processes have written: manifest, final name, and only then the old ones
    go."""

    def mine() -> dict[str, Any]:
        return {p.name: describe(p) for p in temporary.glob(f"__{distributed.rank()}_*")}

    files = {name: row for part in _together(mine, group) for name, row in part.items()}

    def finish() -> None:
        if not distributed.is_main():
            return
        _ask(lost)
        (temporary / STATE).write_text(json.dumps({"format": FORMAT, **state}, indent=1))
        known = files | {name: describe(temporary / name) for name in (STATE, METADATA)}
        (temporary / MANIFEST).write_text(json.dumps(known, indent=1))
        for name in (STATE, MANIFEST):
            _sync(temporary / name)
        _sync(temporary)
        if final.exists():  # damaged, or this step would not have been trained again
            os.rename(final, final.with_name(f"{final.name}{TEMPORARY}damaged"))
        os.rename(temporary, final)
        _sync(final.parent)
        _clean(final, keep, always)

    _together(finish, group)


def describe(path: Path) -> dict[str, Any]:
    """A file's size and sha256, as a manifest holds them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clean(final: Path, keep: int, always: Collection[int]) -> None:
    """Deletes old checkpoints, each renamed to a temporary name first. Also deletes checkpoints
    newer than this step: they were damaged, or a rollback discarded them."""
    step, places = int(final.name), listed(final.parent.parent)
    newer = [p for p in places if int(p.name) > step]
    free = [p for p in places if int(p.name) <= step and int(p.name) not in always]
    for gone in (*newer, *free[:-keep]):
        if gone != final:
            os.rename(gone, gone.with_name(f"{gone.name}{TEMPORARY}old"))
    for left in final.parent.glob(f"*{TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)


def listed(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first, not yet verified."""
    return sorted(p for p in (folder / "checkpoints").glob("*") if p.name.isdigit())


def newest(folder: Path, step: int | None = None) -> Path | None:
    """The newest checkpoint (of one step alone, if given) that passes its manifest; those that do
    not are named in the log. None if there is none.

    Every process verifies its share of the files and all agree.
    """
    candidates = [p for p in listed(folder) if step is None or int(p.name) == step]
    for candidate in reversed(distributed.from_main(candidates)):
        wrong = [w for part in distributed.all_gather_object(damage(candidate)) for w in part]
        if not wrong:
            return candidate
        logger.warning(
            "%s: damaged, so it is not used: %s",
            candidate,
            "; ".join(sorted(set(wrong))),
        )
    return None


def damage(candidate: Path) -> list[str]:
    """What is wrong with this process's share of a checkpoint's files."""
    try:
        files = read_json(candidate / MANIFEST)
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: {error}"]
    if lacking := [name for name in (STATE, METADATA) if name not in files]:
        return [f"{MANIFEST}: names no {', '.join(lacking)}"]
    mine = sorted(files)[distributed.rank() :: distributed.world()]
    return [what for name in mine if (what := _damage(candidate / name, name, files[name]))]


def _damage(path: Path, name: str, asked: Any) -> str | None:
    """What is wrong with a file that a manifest names; None if nothing is."""
    if Path(name).name != name:  # whoever wrote the manifest must not choose what is read
        return f"{name!r} is no file of the checkpoint"
    if not path.is_file():
        return f"{name} is missing"
    wanted = asked.get("size") if isinstance(asked, dict) else None
    try:
        if (size := path.stat().st_size) != wanted:
            return f"{name} has {size} bytes and should have {wanted}"
        if describe(path) != asked:
            return f"{name} does not have the bytes that were written"
        # not by `state`, which refuses a newer format: that is no damage
        if name == STATE and (step := read_json(path).get("step")) != int(path.parent.name):
            return f"{name} is of step {step}"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {error}"
    return None


def state(saved: Path) -> dict[str, Any]:
    """What a checkpoint holds that is no tensor. Raises ValueError for one of a newer format."""
    found = read_json(saved / STATE)
    number = found.get("format", 1)
    if type(number) is not int or number > FORMAT:
        raise ValueError(
            f"{saved}: is of format {number}, and this prepretrain reads formats up to "
            f"{FORMAT}. Update prepretrain, or start another run with --out."
        )
    return found


def restore(saved: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Loads a verified checkpoint into a sharded module and its optimizer, saved on any number of
    processes."""
    content = _content(module, optimizer)
    _load(Reader(str(saved)), content)
    set_state_dict(
        module, optimizer, model_state_dict=content["module"], optim_state_dict=content["optimizer"]
    )
    return state(saved)


def open_tensors(
    saved: Path,
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor], dict[str, Any]]:
    """The module's tensors of a checkpoint, without its optimizer: (shapes, a reader of one, the
    state). Raises ValueError for what is no checkpoint; nothing that it names is run."""
    prefix, reader = "module.", Reader(str(saved))
    tensors = {
        k.removeprefix(prefix): m
        for k, m in reader.read_metadata().state_dict_metadata.items()
        if k.startswith(prefix) and isinstance(m, TensorStorageMetadata)
    }

    def read(name: str) -> Tensor:
        found = tensors[name]
        target = {prefix + name: torch.empty(found.size, dtype=found.properties.dtype)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it loads in this process alone, as meant
            _load(reader, target, no_dist=True)
        return target[prefix + name]

    return {k: tuple(m.size) for k, m in tensors.items()}, read, state(saved)


def _load(reader: Reader, content: dict[str, Any], *, no_dist: bool = False) -> None:
    """Fills tensors and values from a checkpoint, on all processes or in this one alone."""
    try:
        dcp.load(content, storage_reader=reader, planner=Planner(), no_dist=no_dist)
    except CheckpointException as error:  # DCP's own, which is no Exception
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"{reader.path}: cannot be loaded: {cause}") from error
