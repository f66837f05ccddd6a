"""Whether a machine, and a stage's data on it, will do: checked in a minute, before a run takes hours
to find out."""

import io
import json
import math
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prepretrain.config import Training
from prepretrain.data.loader import Stream, loading
from prepretrain.data.order import Interleaved, Order
from prepretrain.data.sources.base import Source
from prepretrain.data.transforms import decode
from prepretrain.distributed import group as distributed
from prepretrain.runs.plan import Plan

# From which on a check fails; not from the paper, each is what is known to break runs.
_SHARED_GIB, _FILES, _FREE_GIB = 1.0, 1024, 10.0
_SECONDS_APART, _IMAGES_A_SECOND, _FIRST_BATCH = 2.0, 20, 120.0
_IMAGES = 200  # to read of the data, at least: the first ones may all lie in shards that are open
_AHEAD = 2 + 1  # batches of a loading process: torch has two made ahead, and one is in use


@dataclass
class Check:
    """What was found; the hint says what to do where it is not ok."""

    name: str
    value: str
    ok: bool
    hint: str
    process: int = 0


def examine(folder: Path, config: Training | None) -> list[Check]:
    """All checks, of every process, which all call for it. folder: where the run will be. config: a
    stage's, or None; without one its space and data are not checked."""
    plan = source = order = None
    if config is not None:
        plan, source, order = Plan(config, distributed.world()).open_data()
    place = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    checks: list[Callable[[], Check]] = [
        lambda: _shared_memory(plan),
        _files,
        lambda: _space(place, plan),
        lambda: _clock(place),
        _collectives,
        _decoding,
    ]
    if plan is not None:
        checks.append(lambda: _first_batches(plan, source, order))
    found = []
    for check in checks:
        one = check()
        one.process = distributed.rank()
        found.append(one)
    return [one for part in distributed.all_gather_object(found) for one in part]


def told(found: list[Check]) -> str:
    """A table of the first process's checks and of what is wrong in others; the last line is JSON."""
    lines = []
    for one in found:
        if one.process == 0 or not one.ok:
            where = f" (process {one.process})" if one.process else ""
            lines.append(f"{'ok   ' if one.ok else 'WRONG'}  {one.name:<20} {one.value}{where}")
            lines += [] if one.ok else [f"       {one.hint}"]
    whole = {"ok": all(one.ok for one in found), "checks": [asdict(one) for one in found]}
    return "\n".join([*lines, json.dumps(whole)])


def _shared_memory(plan: Plan | None) -> Check:
    need = _SHARED_GIB if plan is None else batches_gib(plan) * distributed.machine()[1]
    place = Path("/dev/shm")
    free = shutil.disk_usage(place).free / 2**30 if place.exists() else 0.0
    hint = (
        f"Loading processes hand over batches there, {need:.1f} GiB of this machine's at once. In a "
        f"container: --shm-size={math.ceil(need)}g or --ipc=host; or take fewer data.workers."
    )
    return Check("shared memory", f"{free:.1f} GiB free", free >= need, hint)


def batches_gib(plan: Plan) -> float:
    """What a process's loading processes have in shared memory at once."""
    images = plan.config.batch_size // plan.world // plan.accumulate
    batch = plan.objective.example(images).values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in batch)
    return size * _AHEAD * loading(plan.config.data.workers) / 2**30


def _files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hint = f"Shards and workers need more at once: ulimit -n {max(_FILES, min(hard, 65536))}."
    return Check("open files", f"{soft} at most", soft >= _FILES, hint)


def _space(place: Path, plan: Plan | None) -> Check:
    need, of = _FREE_GIB, "not knowing the model"
    if plan is not None:
        # weights and the optimizer's state in float32; one more is written before an old one goes
        state = plan.size["parameters"] * 4 * (1 + plan.state_tensors) / 2**30
        kept = plan.config.checkpoint.keep + 1 + len(plan.always())
        need, of = state * kept * 1.1, f"{kept} checkpoints of {state:.2f} GiB"
    free = shutil.disk_usage(place).free / 2**30
    writable = os.access(place, os.W_OK)
    value = f"{free:.1f} GiB free in {place}" + ("" if writable else ", which cannot be written")
    hint = f"{need:.1f} GiB are needed ({of}). Make room, or name another folder with --out."
    return Check("disk", value, writable and free >= need, hint)


def _clock(place: Path) -> Check:
    distributed.barrier()
    now = time.time()
    clocks = distributed.all_gather_object(now)
    apart = max(clocks) - min(clocks)
    probe = place / f".clock-{os.getpid()}-{distributed.rank()}"
    try:
        probe.touch()
        apart = max(apart, abs(probe.stat().st_mtime - time.time()))
        probe.unlink()
    except OSError:
        pass  # the check of the disk says so
    hint = "Machines and file servers differ: run NTP or chrony on all of them."
    return Check("clocks", f"{apart:.2f} s apart", apart <= _SECONDS_APART, hint)


def _collectives() -> Check:
    world, rank = distributed.world(), distributed.rank()
    if world == 1:
        return Check("collectives", "1 process: nothing to exchange", True, "")
    right, begin = True, time.perf_counter()
    for device in {torch.device("cpu"), distributed.device()}:
        total = distributed.all_sum(torch.full((1 << 20,), rank + 1.0, device=device))
        right = right and bool((total == world * (world + 1) / 2).all())
    right = right and distributed.all_gather_object(rank) == list(range(world))
    value = f"{world} processes, {(time.perf_counter() - begin) * 1000:.0f} ms for 4 MiB"
    hint = "The sum is wrong. Look at the network, NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME."
    return Check("collectives", value + ("" if right else ", WRONG sums"), right, hint)


def _decoding() -> Check:
    pixels = np.random.default_rng(0).integers(0, 256, (47, 63, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((500, 375), Image.BICUBIC).save(file, "JPEG", quality=90)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() < begin + 0.5:
        decode(file.getvalue())
        count += 1
    speed = count / (time.perf_counter() - begin)
    hint = "Processors are busy or throttled: see top; ask SLURM for more with --cpus-per-task."
    value = f"{speed:.0f} images/s (500 x 375) in one process"
    return Check("decoding", value, speed >= _IMAGES_A_SECOND, hint)


def _first_batches(plan: Plan, source: Source, order: Order | Interleaved) -> Check:
    config = plan.config
    begin = time.perf_counter()
    stream = Stream(
        source,
        plan.objective.transform(train=True),
        batch_size=config.batch_size,
        accumulate=plan.accumulate,
        workers=loading(config.data.workers),
        order=order,
    )
    share = config.batch_size // plan.world // plan.accumulate
    read = list(islice(stream.batches(), math.ceil(_IMAGES / share)))
    bad = sum(len(batch["bad"]) for batch in read)
    took = time.perf_counter() - begin
    value = f"{took:.1f} s for {share * len(read)} images, {bad} of them bad"
    hint = "Copy the shards nearer, set data.window so that few are open at once, or take more data.workers."
    return Check("first batches", value, took <= _FIRST_BATCH, hint)
