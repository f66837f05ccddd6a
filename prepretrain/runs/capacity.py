"""Whether a training run fits on N GPUs, with which settings, and how long it takes: by simulated
steps, without a GPU."""

import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

from prepretrain import config as configs
from prepretrain.config import Training
from prepretrain.runs import memory
from prepretrain.runs.plan import (
    RESERVE,
    Plan,
    build_objective,
    build_optimizer,
    with_model_options,
)

logger = logging.getLogger(__name__)

RECOMPUTE = ("none", "block", "offload")  # each holds less memory than the one before
# not from the paper: the share of a data sheet's bytes a second that copies reach
REACHED = 0.8


@dataclass(frozen=True)
class Machine:
    """What GPUs can do, and how they are connected; by default an H100 SXM in a DGX H100, as remembered
    of the data sheets of both. Rates are in 10⁹ bytes a second, one way.

    gigabytes: a GPU's memory, in 10⁹ bytes. tflops: its peak, dense bf16. mfu: the share of it at
    which the step's FLOPs run, recomputed ones included. bandwidth: of its memory. per_node: GPUs in
    a node. inside: from a GPU to others in its node (NVLink). between: to other nodes, for each GPU
    (one adapter of 400 Gbit/s).
    """

    gigabytes: float = 80.0
    tflops: float = 989.0
    mfu: float = 0.4  # not from the paper; an H200 reached 0.29 to 0.44 (docs/precision.md)
    bandwidth: float = 3350.0
    per_node: int = 8
    inside: float = 450.0
    between: float = 50.0

    def __post_init__(self) -> None:
        if min(vars(self).values()) <= 0 or self.mfu > 1:
            values = " ".join(f"{name}={value:g}" for name, value in vars(self).items())
            raise ValueError(f"{values}: all must be more than 0, and mfu at most 1.")

    @property
    def room(self) -> float:
        """The bytes of a GPU that a step may take."""
        return self.gigabytes * 1e9 * (1 - RESERVE)

    def split(self, one: memory.Collective) -> tuple[float, float]:
        """The bytes that a GPU sends inside its node and to others. A ring leaves a node once for each
        of its GPUs that takes part, which share what is sent."""
        near = sum(rank // self.per_node == 0 for rank in one.ranks)
        return one.bytes * (near > 1), one.bytes / near * (near < len(one.ranks))

    def seconds(self, step: memory.Step) -> dict[str, float]:
        """The time that a step needs for each of what it does at the same time."""
        network = 0.0
        for one in step.collectives:
            inside, between = self.split(one)
            network += max(inside / self.inside, between / self.between)
        return {
            "compute": step.flops / (self.tflops * 1e12 * self.mfu),
            "memory": step.traffic / (self.bandwidth * 1e9 * REACHED),
            "network": network / (1e9 * REACHED),
        }


@dataclass(frozen=True)
class Settings:
    """What may be changed to make a run fit: none of it changes the result but for rounding."""

    group: int
    reshard: bool
    recompute: str
    batch_per_process: int
    accumulate: int


@dataclass(frozen=True)
class Attempt:
    """A way to run, and what a simulated step of it needs."""

    config: Training
    settings: Settings
    step: memory.Step


def load(stage: str, overrides: list[str], init: str | None = None) -> Training:
    """A training stage's config, with the options of what it starts from. Raises ValueError for an
    evaluation."""
    config = configs.load(stage, overrides, init)
    if not isinstance(config, Training):
        raise ValueError(f"--stage {stage}: evaluates; only training is planned.")
    return with_model_options(config)


def estimate(
    config: Training, machine: Machine, *, gpus: int, images: float | None = None
) -> dict[str, Any]:
    """The facts of a run on `gpus`, as JSON can hold them: as it is configured if that fits, else with
    the first settings that do.

    Tried in order: gathering weights again in the backward pass; recomputing more; then smaller parts, accumulated; then the same with larger
    groups. images: seen in the whole run; None takes the config's length. A step takes as long as the
    slowest of computing, of its memory and of the network, which a GPU has at the same time. Raises
    ValueError for a config that cannot work on so many.
    """
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: must be more than 0.")
    plan = Plan(config, gpus)
    if images is None and plan.schedule is None:
        raise ValueError(
            f"length: {config.length} counts epochs of data that are not here. Give the images of the "
            f"whole run, as in --images 5e9."
        )
    images = plan.schedule.steps * config.batch_size if images is None else images
    how = plan.sharding(machine.gigabytes * 1e9, machine.per_node)
    config = _changed(config, group=how.group, reshard=how.reshard)
    room = machine.room
    tried: list[Attempt] = []
    for attempt in _attempts(config, gpus, room):
        tried.append(attempt)
        if attempt.step.peak <= room:
            break
    fits = bool(tried) and tried[-1].step.peak <= room
    best = min(tried, key=lambda one: one.step.peak) if tried else _attempt(config, gpus)
    step, settings = best.step, best.settings
    seconds = machine.seconds(step)
    speed = config.batch_size / max(seconds.values())
    splits = [machine.split(one) for one in step.collectives]
    return {
        "fits": fits,
        "gpus": gpus,
        "gpus_needed": gpus if fits else _enough(config, gpus, room),
        "settings": {**asdict(settings), "precision": _precision(config)},
        "overrides": _overrides(config, best.config) if fits else [],
        "bytes": step.bytes,
        "peak_bytes": step.peak,
        "bytes_at_peak": step.at_peak,
        "usable_bytes": round(room),
        "communicated_bytes": sum(step.sent.values()),
        "communicated_bytes_inside": sum(inside for inside, _ in splits),
        "communicated_bytes_between": round(sum(between for _, between in splits)),
        "collectives": [
            {"kind": one.kind, "gpus": len(one.ranks), "number": one.number, "bytes": one.bytes}
            for one in step.collectives
        ],
        "traffic_bytes": step.traffic,
        **plan.size,
        "training_flops_per_image": round(step.flops * gpus / config.batch_size),
        "seconds": seconds,
        "seconds_per_step": max(seconds.values()),
        "limited_by": max(seconds, key=lambda name: seconds[name]),
        "images_per_second": speed,
        "images": round(images),
        "days": images / speed / 86400,
        "machine": asdict(machine),
        "reasons": how.reasons if gpus > 1 else (),
        "tried": [{**asdict(one.settings), "peak_bytes": one.step.peak} for one in tried],
    }


def after_out_of_memory(
    config: Training, gpus: int, per_node: int, memory: float, others: float
) -> str:
    """What to change, in a sentence, so that a run which ran out of memory fits.

    memory: bytes of its GPU. others: what other programs hold of it. Computed in a process of its own,
    since a step cannot be simulated in one that has a process group.
    """
    machine = Machine(gigabytes=(memory - others) / 1e9, per_node=per_node)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
            found = pool.submit(_less, config, machine, gpus).result()
    except Exception as error:  # which must not hide the one that this is about
        return f"What would fit could not be planned ({error}): prepretrain-plan says it."
    said = (
        f"Other programs hold {others / 1e9:.1f} GB of this GPU. " if others > memory / 20 else ""
    )
    if not found["fits"]:
        more = found["gpus_needed"]
        return f"{said}By the planner none of the settings that save memory fits" + (
            f"; {more} GPUs would do." if more else "; take a smaller model or batch_size."
        )
    return f"{said}By the planner it fits with {' '.join(found['overrides'])}."


def _less(config: Training, machine: Machine, gpus: int) -> dict[str, Any]:
    """The estimate of a run that did not fit: where that says it does, of one that takes less."""
    found = estimate(config, machine, gpus=gpus, images=1)
    if found["fits"] and not found["overrides"]:
        less = found["peak_bytes"] / 1e9  # less RESERVE, as of any GPU
        found = estimate(config, replace(machine, gigabytes=less), gpus=gpus, images=1)
    return found


def _attempts(config: Training, gpus: int, room: float) -> Iterator[Attempt]:
    """Ways to run a config, the given one first, each cheaper in memory and dearer in time; those
    whose state alone is too large are left out."""
    given, *larger = _groups(config, gpus)
    for group in (given, *larger):
        wider = config if group == given else _changed(config, group=group)
        if Plan(wider, gpus).state_bytes() > room:
            logger.info("groups of %d: weights, gradients and optimizer alone do not fit", group)
            continue
        kept = gpus > 1 and not config.shard.reshard
        if kept:
            yield _attempt(wider, gpus)
        for how in RECOMPUTE[RECOMPUTE.index(config.shard.recompute) :]:
            saving = {"recompute": how, **({"reshard": True} if kept else {})}
            last = _attempt(_changed(wider, **saving), gpus)
            yield last
        objective = Plan(config, gpus).objective
        least = last.settings.batch_per_process if objective.whole_batch else objective.multiple
        while last.settings.batch_per_process >= 2 * least:
            smaller = replace(last.config, batch_per_process=last.settings.batch_per_process // 2)
            before, last = last, _attempt(smaller, gpus)
            yield last
            if last.step.peak >= before.step.peak:
                break  # what accumulated gradients take is more than what smaller parts save


def _groups(config: Training, gpus: int) -> list[int]:
    """The processes that share a copy, as given and larger."""
    given = min(config.shard.group or gpus, gpus)
    if given < 1 or gpus % given:
        raise ValueError(f"shard.group: {given} must divide the number of GPUs, {gpus}.")
    return [g for g in range(given, gpus + 1) if gpus % g == 0 and (g % given == 0)]


def _changed(config: Training, **shard: Any) -> Training:
    return replace(config, shard=replace(config.shard, **shard))


def _precision(config: Training) -> str:
    """A GPU computes bf16, which "auto" then stands for."""
    given = config.shard.precision
    return "bf16" if given == "auto" else given


def _attempt(config: Training, gpus: int) -> Attempt:
    plan, given = Plan(config, gpus), config.shard
    images = config.batch_size // gpus // plan.accumulate
    group = min(given.group or gpus, gpus)
    reshard = given.reshard is not False
    settings = Settings(group, reshard, given.recompute, images, plan.accumulate)
    step = memory.simulate(
        partial(build_objective, config),
        images=images,
        accumulate=plan.accumulate,
        world=gpus,
        group=given.group,
        reshard=reshard,
        precision="fp32" if _precision(config) == "fp32" else "bf16",  # fp8 holds what bf16 does
        recompute=given.recompute,
        optimizer=partial(build_optimizer, config),
    )
    logger.info("%s: %.3g GB", settings, step.peak / 1e9)
    return Attempt(config, settings, step)


def _overrides(old: Training, new: Training) -> list[str]:
    """What to add to the command line for another way to run."""
    pairs = [
        ("shard.group", old.shard.group, new.shard.group),
        ("shard.reshard", old.shard.reshard, new.shard.reshard),
        ("shard.recompute", old.shard.recompute, new.shard.recompute),
        ("batch_per_process", old.batch_per_process, new.batch_per_process),
    ]
    return [f"{key}={str(after).lower()}" for key, before, after in pairs if before != after]


def _enough(config: Training, gpus: int, room: float) -> int | None:
    """The first doubling of GPUs on which the run fits with all that saves memory; None if there is
    none that the batch divides among."""
    saving = _changed(config, group=None, reshard=True, recompute="offload")
    multiple = Plan(config, gpus).objective.multiple
    while config.batch_size % ((gpus := gpus * 2) * multiple) == 0:
        plan = Plan(replace(saving, batch_per_process=None), gpus)
        for parts in (None,) if plan.objective.whole_batch else (None, multiple):
            one = replace(saving, batch_per_process=parts)
            if plan.state_bytes() <= room and _attempt(one, gpus).step.peak <= room:
                return gpus
    return None


def _times(found: dict[str, Any]) -> list[str]:
    """What a step and GPU does, and how long each takes alone."""
    gb, seconds, machine = 1e9, found["seconds"], Machine(**found["machine"])
    sends = [
        f"{one['number']} {one['kind']} of {one['gpus']} GPUs ({one['bytes'] / gb:.2f} GB)"
        for one in found["collectives"]
    ]
    return [
        f"compute {seconds['compute']:.3g} s a step: {found['training_flops_per_image'] / 1e9:,.0f} "
        f"GFLOPs an image in training ({found['flops_per_image'] / 1e9:,.0f} forward), at "
        f"{machine.mfu:.0%} of {machine.tflops:g} TFLOP/s",
        f"memory  {seconds['memory']:.3g} s: {found['traffic_bytes'] / gb:,.0f} GB, at {REACHED:.0%} of "
        f"{machine.bandwidth:g} GB/s",
        f"network {seconds['network']:.3g} s: {found['communicated_bytes_inside'] / gb:.2f} GB in the "
        f"node, at {REACHED:.0%} of {machine.inside:g} GB/s; "
        f"{found['communicated_bytes_between'] / gb:.2f} GB to others, at {REACHED:.0%} of "
        f"{machine.between:g} GB/s" + (f": {', '.join(sends)}" if sends else ""),
    ]


def table(found: dict[str, Any]) -> str:
    """An estimate, to read."""
    gb, used = 1e9, found["settings"]
    lines = [
        f"{found['parameters'] / 1e6:,.0f} M parameters on {found['gpus']} GPUs, "
        f"{used['batch_per_process']} images at a time in each, {used['accumulate']} times a step; "
        f"groups of {used['group']}, {used['precision']}, recompute {used['recompute']}",
        "",
        f"{'per GPU, GB':<16}{'largest':>10}{'at peak':>10}",
    ]
    for kind in memory.KINDS:
        largest, then = found["bytes"][kind], found["bytes_at_peak"][kind]
        lines.append(f"{kind:<16}{largest / gb:>10.2f}{then / gb:>10.2f}")
    lines += [
        f"{'together':<16}{'':>10}{found['peak_bytes'] / gb:>10.2f}"
        f"   of {found['usable_bytes'] / gb:g}, which is {1 - RESERVE:.0%} of the GPU's",
        "",
        *_times(found),
        f"{found['images_per_second']:,.0f} images/s, limited by {found['limited_by']}: "
        f"{found['days']:,.1f} days for {found['images']:,} images",
        "",
        *found["reasons"],
        "",
    ]
    if not found["fits"]:
        enough = found["gpus_needed"]
        more = f"{enough} GPUs do" if enough else "no number that the batch divides among does"
        lines.append(f"It does not fit, with any of the settings tried: {more}.")
    elif found["overrides"]:
        lines.append(f"It fits with: {' '.join(found['overrides'])}")
    else:
        lines.append("It fits.")
    return "\n".join(lines)
