"""Checkpoints that are complete and verified, or invisible: DCP in a folder with a manifest,
renamed when done."""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from prepretrain import distributed

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp-"
MANIFEST, STATE = "manifest.json", "state.json"


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
    always: Sequence[int] = (),
) -> Path:
    """Saves all processes' shards as `<folder>/checkpoints/<step>`, then removes all but the newest
    `keep`, and those of the steps in `always`.

    state: what is no tensor, as JSON. Raises OSError, on every process, if it cannot be written (no
    space, for one); what was there before is untouched, and nothing half-written is left under a
    final name.
    """
    final = folder / "checkpoints" / f"{step:09d}"
    temporary = distributed.from_main(
        final.with_name(f"{final.name}{TEMPORARY}{os.urandom(4).hex()}")
    )
    problem = None
    try:
        _write(temporary, module, optimizer, state)
    except CheckpointException as error:  # DCP's own, which is no Exception
        problem = "; ".join(
            f"process {rank}: {cause!r}" for rank, (cause, _) in error.failures.items()
        )
    except Exception as error:  # whatever the storage raised; all processes must leave together
        problem = repr(error)
    problems = [p for p in distributed.all_gather_object(problem) if p]
    if problems:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"{final}: could not be saved ({problems[0][:300]}). Earlier checkpoints are intact. Of its "
            f"disk {shutil.disk_usage(folder).free / 2**30:.1f} GiB are free. Make room, and start the "
            f"same command again: it resumes."
        )
    if distributed.is_main():
        if final.exists():  # damaged, or this step would not have been trained again
            os.rename(final, final.with_name(f"{final.name}{TEMPORARY}damaged"))
        os.rename(temporary, final)
        _sync(final.parent)
        _clean(folder, keep, always)
    distributed.barrier()
    return final


def _write(
    temporary: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    if distributed.is_main():
        temporary.mkdir(parents=True)
    distributed.barrier()
    model_state, optimizer_state = get_state_dict(module, optimizer)
    dcp.save({"module": model_state, "optimizer": optimizer_state}, checkpoint_id=str(temporary))
    mine = {p.name: describe(p) for p in temporary.glob(f"__{distributed.rank()}_*")}
    files = {
        name: row for part in distributed.all_gather_object(mine) for name, row in part.items()
    }
    if distributed.is_main():
        (temporary / STATE).write_text(json.dumps(state, indent=1))
        files |= {name: describe(temporary / name) for name in (STATE, ".metadata")}
        (temporary / MANIFEST).write_text(json.dumps(files, indent=1))
        for name in (STATE, MANIFEST):
            _sync(temporary / name)
        _sync(temporary)


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


def _clean(folder: Path, keep: int, always: Sequence[int]) -> None:
    """Removes old checkpoints, each under a temporary name first, and what killed processes left
    behind."""
    done = [p for p in listed(folder) if int(p.name) not in always]
    for old in done[:-keep]:
        gone = old.with_name(f"{old.name}{TEMPORARY}old")
        os.rename(old, gone)
    for left in (folder / "checkpoints").glob(f"*{TEMPORARY}*"):
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
        wrong = [w for part in distributed.all_gather_object(_damage(candidate)) for w in part]
        if not wrong:
            return candidate
        logger.warning(
            "%s: damaged, so it is not used: %s",
            candidate,
            "; ".join(sorted(set(wrong))),
        )
    return None


def _damage(candidate: Path) -> list[str]:
    try:
        files = json.loads((candidate / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: {error}"]
    wrong = []
    for name in sorted(files)[distributed.rank() :: distributed.world()]:
        path = candidate / name
        if not path.exists():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != files[name]["size"]:
            wrong.append(
                f"{name} has {path.stat().st_size} bytes and should have {files[name]['size']}"
            )
        elif describe(path) != files[name]:
            wrong.append(f"{name} does not have the bytes that were written")
    return wrong


def state(saved: Path) -> dict[str, Any]:
    """What a checkpoint holds that is no tensor."""
    return json.loads((saved / STATE).read_text())


def restore(saved: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Loads a verified checkpoint into a sharded module and its optimizer, saved on any number of
    processes."""
    model_state, optimizer_state = get_state_dict(module, optimizer)
    content = {"module": model_state, "optimizer": optimizer_state}
    dcp.load(content, checkpoint_id=str(saved))
    set_state_dict(
        module, optimizer, model_state_dict=content["module"], optim_state_dict=content["optimizer"]
    )
    return state(saved)


def open_tensors(
    saved: Path,
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor], dict[str, Any]]:
    """The module's tensors of a checkpoint, without its optimizer: (shapes, a reader of one, the
    state).

    A run's folder is trusted: DCP's own `.metadata` is a pickle.
    """
    reader = dcp.FileSystemReader(str(saved))
    prefix = "module."
    metadata = {
        k.removeprefix(prefix): m
        for k, m in reader.read_metadata().state_dict_metadata.items()
        if k.startswith(prefix)
    }

    def read(name: str) -> Tensor:
        target = {
            prefix + name: torch.empty(metadata[name].size, dtype=metadata[name].properties.dtype)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it loads in this process alone, as meant
            dcp.load(target, storage_reader=dcp.FileSystemReader(str(saved)), no_dist=True)
        return target[prefix + name]

    return {k: tuple(m.size) for k, m in metadata.items()}, read, state(saved)
