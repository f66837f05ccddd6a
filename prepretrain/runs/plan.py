"""Everything about a training run that can be known before it starts: its parts on the meta device,
its steps, its sizes."""

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from prepretrain import config as configs
from prepretrain import plugin
from prepretrain.config import Training
from prepretrain.data import card
from prepretrain.data.loader import Change
from prepretrain.data.order import Interleaved, Order
from prepretrain.data.random import Random
from prepretrain.data.sampling import mix
from prepretrain.data.sampling.resample import resample
from prepretrain.data.sources.base import Source
from prepretrain.data.subset import evenly_spaced
from prepretrain.distributed import checkpoint, float8, heartbeat, shard
from prepretrain.evaluation import validation
from prepretrain.evaluation.evaluators import base as evaluators
from prepretrain.evaluation.evaluators.base import Evaluator
from prepretrain.models.encoders import base as encoders
from prepretrain.models.load import open_weights
from prepretrain.models.model import Model
from prepretrain.objectives.base import Objective
from prepretrain.runs.memory import activations
from prepretrain.runs.training_data import TrainingData, open_parts
from prepretrain.training import durations, numerics, optim
from prepretrain.training.optimizers.base import Optimizer
from prepretrain.training.schedule import Schedule, check_shape

_STEPS = 10**9  # of a run, at most
_KEPT = 10_000  # checkpoints that are never removed, at most
_FEW = 100  # steps
_SLOWER = 1280  # the widest encoder measured on a GPU; fp8 was slower there (docs/precision.md)
_GPU, _NODE = 80e9, 8  # a GPU's bytes and a node's GPUs, where a dry run has neither
_SPEEDS = (0.1, 100)  # TFLOP/s that training may reach, for a person to think of a machine
# not from the paper: the share of a GPU's memory that weights, gradients and optimizer may take by
# default, so that most is left for activations
STATE = 1 / 3
# not from the paper: the share of a GPU's memory that is left for CUDA's context, the workspaces of
# NCCL and cuBLAS, and fragmentation, none of which is counted
RESERVE = 0.1
_DURATIONS = ("log_every", "checkpoint.every", "validation.every")


@dataclass(frozen=True)
class Sharding:
    """How a model is shared by processes, as `shard.shard` takes it, and why so, a line each."""

    group: int | None
    reshard: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything about a training run that can be known without touching a device or the data:
    built on meta.

    counted: the images of an epoch, once the data are open; before, those that the card declares
    are taken. shards: how many the open data lie in, and how many of them stay open. part_images: the
    images of an epoch of each part of the open data.
    Raises ValueError for whatever in the config cannot work.
    """

    config: Training
    world: int
    counted: int | None = None
    shards: tuple[int, int] = (0, 0)
    part_images: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        config = self.config
        if config.wandb is not None:
            plugin.require("wandb", "wandb", f"wandb: {config.wandb}")
        _ = (
            [part.card for part in self.parts],
            self.objective,
        )  # as below: what cannot work is said when a plan is made
        shard.size(config.shard.group, self.world)
        if self.accumulate > 1 and self.objective.whole_batch:
            raise ValueError(
                f"batch_per_process: {config.batch_per_process} takes a process's share of "
                f"{config.batch_size // self.world} images in {self.accumulate} parts, and objective "
                f"'{config.objective['name']}' looks at all of a batch at once. Leave it out; to "
                f"save memory take more processes, shard.recompute=block or a smaller batch_size."
            )
        if config.checkpoint.keep < 1:
            raise ValueError(f"checkpoint.keep: {config.checkpoint.keep} must be at least 1.")
        if config.hang is not None and config.hang < heartbeat.LEAST:
            raise ValueError(
                f"hang: {config.hang} must be at least {heartbeat.LEAST} seconds, or null for "
                "never."
            )
        if config.shard.precision == "fp8":
            plugin.require("torchao", "fp8", "shard.precision: fp8")
            float8.check(shard.blocks(self.objective))
        check_shape(config.optim.schedule)
        if config.data.resample is not None:
            resample(config.data.resample, "data.resample")
        _ = self.policy, self.state_tensors, self.schedule

    @cached_property
    def objective(self) -> Objective:
        """The objective around its model, on the meta device until `shard` makes it real."""
        return build_objective(self.config)

    @cached_property
    def parts(self) -> list[mix.Part]:
        """The parts of the training data; one where it is no mix."""
        return mix.parts(self.config.data.train, self.config.data.subset)

    @cached_property
    def _sources(self) -> dict[str, Source]:
        """The sources of training data that are open, by address."""
        return {}

    @cached_property
    def accumulate(self) -> int:
        """How many parts each process takes its share of a batch in."""
        config = self.config
        multiple = self.objective.multiple
        return accumulation(config.batch_size, self.world, config.batch_per_process, multiple)

    @cached_property
    def policy(self) -> numerics.Policy:
        """What happens to steps that are not finite."""
        return numerics.Policy(**vars(self.config.numerics))

    @property
    def images(self) -> int | None:
        """The images of an epoch; None where neither the data nor their card have said."""
        if self.counted is not None:
            return self.counted
        declared = self.declared
        return None if None in declared else sum(declared)

    @property
    def declared(self) -> list[int | None]:
        """The images of each part as its card declares them, of which its subset takes some."""
        return [
            part.choice.count(part.card.images.get(part.split), f"{part.where}.subset")
            for part in self.parts
        ]

    @property
    def weighted(self) -> bool:
        """Whether images of an epoch may not come alike, so that it is known once the data are open."""
        kept = any("keep" in part.card.splits.get(part.split, {}) for part in self.parts)
        by_objective = type(self.objective).repeats is not Objective.repeats
        return kept or by_objective or self.config.data.resample is not None

    @cached_property
    def schedule(self) -> Schedule | None:
        """The learning rate; None where the length is in epochs of data that are not open."""
        in_epochs = durations.parse(self.config.length, "length")[1] == "ep"
        if self.images is None and in_epochs:
            return None
        return self.schedule_of(self.config.length, "length")

    def open_data(self) -> tuple["Plan", Source, Order | Interleaved]:
        """The plan with the length of an epoch, the training source, which its objective has found
        fit, and the order of its images. All processes call it together."""
        opened = self._opened(self.config.data, self.parts, self.config.seed)
        source, order = opened.source, opened.order
        shards = len(source.groups), source.open_at_once or len(source.groups)
        plan = replace(self, counted=order.length, shards=shards, part_images=opened.part_images)
        vars(plan)["objective"] = self.objective  # which has looked at the data
        plan._sources.update(self._sources)
        return plan, source, order

    def _opened(self, data: configs.Data, parts: list[mix.Part], seed: int) -> TrainingData:
        vocabulary = self.config.objective.get("vocabulary")
        return open_parts(
            data,
            parts,
            self.objective,
            seed=seed,
            vocabulary=vocabulary,
            opened=self._sources,
        )

    def open_changes(self) -> list[Change]:
        """What `data.changes` asks for, and from which image on, once the data are open. What is drawn
        from a change on is drawn anew."""
        changes, data, last = [], self.config.data, 0
        for i, given in enumerate(data.changes):
            where = f"data.changes[{i}]"
            data = configs.with_change(data, given, where)
            step = self._steps(str(given["from"]), f"{where}.from")
            if not last < step < self.schedule.steps:
                raise ValueError(
                    f"{where}.from: {given['from']} is step {step}; it must come after step {last}, and "
                    f"before the run's end, step {self.schedule.steps}."
                )
            seed = int(Random(self.config.seed, 0, step)("change").integers(1 << 62))
            try:
                opened = self._opened(data, mix.parts(data.train, data.subset), seed)
            except ValueError as error:
                raise type(error)(f"{where}: {error}") from error
            changes.append(Change(step * self.config.batch_size, opened.source, opened.order))
            last = step
        return changes

    def schedule_of(self, length: str, where: str) -> Schedule:
        """The schedule that a run of this config has at some length."""
        return schedule(self.config, self.images, length, where)

    def branches(self) -> list[int]:
        """The steps at which shorter runs will branch off this one: where each one's rate first
        falls."""
        found = [self.schedule_of(length, "branches") for length in self.config.branches]
        for length, schedule in zip(self.config.branches, found):
            check_trunk(self.schedule, schedule, f"branches: {length}")
        return [schedule.milestones[0] for schedule in found]

    def always(self) -> set[int]:
        """The steps that are saved and never removed: where shorter runs branch off, and every
        `checkpoint.permanent`."""
        every, steps = self.config.checkpoint.permanent, self.schedule.steps
        if every is None:
            return set(self.branches())
        apart = self.steps_of("checkpoint.permanent")
        if steps // apart > _KEPT:
            raise ValueError(
                f"checkpoint.permanent: {every!r} keeps {steps // apart} checkpoints for ever. Save less "
                f"often, so that it is at most {_KEPT}."
            )
        return {*self.branches(), *range(apart, steps + 1, apart)}

    def branch_point(self) -> Path | None:
        """The trunk's checkpoint that `branch` starts from, verified; None without one.

        A branch is the run that would have been trained straight to its length: the same config, but
        for the length, and the same rates up to its first milestone. Raises ValueError otherwise.
        """
        trunk = self.config.branch
        if trunk is None:
            return None
        before = _recorded(trunk)
        free = (*configs.CHANGEABLE, "length", "branch", "init")
        changed = configs.differences(configs.plain(before), configs.plain(self.config), free)
        if changed:
            raise ValueError(
                f"branch: {trunk} was trained with another config:\n  "
                + "\n  ".join(changed)
                + "\nA branch continues it exactly; only length may differ."
            )
        old = Plan(before, self.world, self.counted)
        check_trunk(old.schedule, self.schedule, f"branch: {trunk}, length: {self.config.length}")
        step = self.schedule.milestones[0]
        found = checkpoint.newest(Path(trunk), step)
        if found is None:
            there = [int(p.name) for p in checkpoint.listed(Path(trunk))]
            raise ValueError(
                f"branch: {trunk} holds no checkpoint of step {step}, where a run of "
                f"length={self.config.length} leaves it. It holds {there}. Name the length in the "
                f"trunk's `branches`, and let it train that far."
            )
        return found

    def open_validation(self) -> Any:
        """The validation set, or as many images of it as asked for; None if there is none."""
        given = self.config.validation
        if given.data is None:
            return None
        if given.images is not None and given.images < 1:
            raise ValueError(f"validation.images: {given.images} must be at least 1.")
        split, found = _split(given.data)
        source = found.open(split)
        validation.check(self.objective, source, given.data)
        return evenly_spaced(source.only(self.objective.fields), given.images)

    def steps_of(self, key: str) -> int:
        """The duration at `log_every`, `checkpoint.every`, … in steps, at least one."""
        value = self.config
        for part in key.split("."):
            value = getattr(value, part)
        return self._steps(value, key)

    def check_durations(self) -> None:
        """Raises ValueError for one of the config that is none, also where nothing needs it yet."""
        for key in _DURATIONS:
            self.steps_of(key)

    def _steps(self, length: str, where: str) -> int:
        total, batch = self.schedule.steps, self.config.batch_size
        counted = durations.steps(length, where, batch_size=batch, images=self.images, total=total)
        return max(1, counted)

    def evaluators(self) -> list[tuple[str, int, Evaluator]]:
        """(name, every how many steps, evaluator) of the `evaluators:` section."""
        built = []
        for i, given in enumerate(self.config.evaluators):
            options = dict(given)
            for key in ("name", "every"):
                if key not in options:
                    raise ValueError(f"evaluators[{i}].{key}: is missing.")
            every = options.pop("every")
            data = options.pop("data", self.parts[0].name)
            if "workers" in plugin.options(plugin.find("evaluators", options["name"])):
                options.setdefault("workers", self.config.data.workers)
            name, evaluator = build_evaluator(options, data, training=True)
            evaluator.check(self.objective.model)
            built.append((name, self._steps(every, f"evaluators[{i}].every"), evaluator))
        if self.config.checkpoint.best and not built:
            raise ValueError("checkpoint.best: nothing is measured. Name one in `evaluators`.")
        return built

    @cached_property
    def size(self) -> dict[str, int]:
        """{"encoder_parameters" (no head, no decoder), "parameters", "flops_per_image": those of one
        image's forward pass through the objective, 2 for a multiply-add, attention included}."""
        count = {
            name: sum(p.numel() for p in part.parameters())
            for name, part in (
                ("encoder_parameters", self.objective.model.encoder),
                ("parameters", self.objective),
            )
        }
        return {**count, "flops_per_image": forward_flops(build_objective(self.config))}

    @cached_property
    def state_tensors(self) -> int:
        """How many float32 tensors are kept for each trained parameter beside itself: those of the
        optimizer, and the moving average."""
        optimizer = build_optimizer(self.config, self.objective)
        return optimizer.state_tensors + (self.config.optim.ema is not None)

    def state_bytes(self, group: int | None = None) -> int:
        """Bytes of a process's share of the state, all float32: weights, and of those that are
        trained also gradients and what the optimizer keeps. group: by default the config's."""
        group = min(group or self.config.shard.group or self.world, self.world)
        trained = 2 + self.state_tensors
        return sum(p.numel() * 4 * (trained if p.requires_grad else 1) for p in self._held) // group

    def _keeps_gathered(self, state: int, memory: float) -> tuple[bool, str]:
        """Whether gathered weights fit in beside a process's state, and activations into the rest of
        its memory; and a sentence of it."""
        config, given = self.config, self.config.shard
        precision = "fp32" if given.precision == "fp32" else "bf16"
        gathered = sum(p.numel() for p in self._held) * (4 if precision == "fp32" else 2)
        said = f"gathered weights take {gathered / 1e9:.1f} GB, which "
        if state + gathered > memory * STATE:
            return False, f"{said}do not fit beside them"
        if self.world == 1 or given.reshard is not None:  # nothing is to be chosen
            return True, f"{said}fit beside them"
        images = config.batch_size // self.world // self.accumulate
        how = {"precision": precision, "recompute": given.recompute}
        needed = activations(build_objective(config), images, **how)
        kept = state + gathered + needed <= memory * (1 - RESERVE)
        fit = "fit" if kept else "do not fit"
        return kept, f"{said}{fit} beside them and activations of about {needed / 1e9:.1f} GB"

    @cached_property
    def _held(self) -> list[torch.nn.Parameter]:
        frozen = [p for module in self.objective.frozen() for p in module.parameters()]
        return [*self.objective.parameters(), *frozen]

    def sharding(self, memory: float | None, per_node: int) -> Sharding:
        """How the processes share the model, with what the config leaves open chosen: the smallest
        group, within a node if one will do, whose state takes at most STATE of a GPU's memory; and
        gathered weights are kept where they fit in beside it, and all of a step into the memory.

        memory: bytes of a GPU's memory; None on a CPU, whose processes have one memory together.
        """
        given, world = self.config.shard, self.world
        if memory is None:
            return Sharding(given.group, given.reshard in (None, True), ())
        most = memory * STATE
        fits = [g for g in _groups(world, per_node) if self.state_bytes(g) <= most]
        group = shard.size(given.group, world) if given.group else (fits or [world])[0]
        state = self.state_bytes(group)
        kept, why_kept = self._keeps_gathered(state, memory)
        reshard = not kept if given.reshard is None else given.reshard
        limit = f"{STATE:.0%} of a GPU's {memory / 1e9:.0f} GB"
        why = [
            f"shard.group {group} of {world}: "
            + ("as configured" if given.group else "the fewest" if fits else "all, and still")
            + f"; weights, gradients and optimizer take {state / 1e9:.1f} GB ({limit}: {most / 1e9:.1f})",
            f"shard.reshard {str(reshard).lower()}: "
            + ("as configured; " if given.reshard is not None else "")
            + why_kept,
        ]
        lists = shard.block_lists(self.objective)
        units = "; ".join(f"{shard.together(some)} of {len(some)}" for some in lists)
        why.append(
            f"blocks in a unit: {units}: at most {shard.BLOCKS}, and {shard.UNIT / 1e6:.0f} M parameters"
        )
        if given.precision == "fp8":
            why.append(
                "shard.precision fp8: memory and time are counted as with bf16; on an H200, compiled, a ViT-H "
                "took 0.72 of the memory and 1.2 to 1.3 times as long"
            )
        return Sharding(group, reshard, tuple(why))

    def warnings(self) -> list[str]:
        """What a run does as asked, and hardly anybody means."""
        found, batch, steps = [], self.config.batch_size, self.schedule.steps
        if self.images is not None and batch > self.images:
            found.append(
                f"batch_size: {batch} is more than the {self.images} images of data.train, so a step "
                f"sees some of them twice. Take a smaller one, as batch_size=256."
            )
        if steps < _FEW:
            found.append(
                f"length: {self.config.length} is {steps} steps, which teach a model little. Take a "
                f"smaller batch_size (now {batch}) or a longer length."
            )
        shards, stay_open = self.shards
        if self.config.data.window == 0 and shards > stay_open:
            found.append(
                f"data.window: 0 shuffles over all {shards:,} shards of data.train, of which {stay_open:,} "
                f"stay open, so most images open a shard anew. Take data.window=64."
            )
        width, given = self.objective.model.encoder.width, self.config.shard
        if given.precision == "fp8" and (width <= _SLOWER or not given.compile):
            found.append(
                f"shard.precision: fp8 was slower than bf16 for encoders up to a width of {_SLOWER} (this one's "
                f"is {width}) on an H200, and without shard.compile=true scaling takes passes of its own "
                f"over memory. Take bf16 unless memory is what lacks."
            )
        return found

    def told(self) -> str:
        """What a run will be, for a person to read before it is started."""
        config, schedule, size = self.config, self.schedule, self.size
        described = self.parts[0].card
        seen = schedule.steps * config.batch_size
        several = len(self.parts) > 1
        classes = 0 if several or not described.classes else len(described.classes)
        images = "an unknown number of images"
        if self.images is not None:
            images = f"{self.images:,} images" + (
                f", {classes} classes ({self.images / classes:,.0f} images each)" if classes else ""
            )
        epochs = f", {seen / self.images:,.1f} epochs" if self.images else ""
        work = 3 * size["flops_per_image"] * seen  # a backward pass costs two forward ones
        times = [f"{_time(work / (speed * 1e12))} at {speed} TFLOP/s" for speed in _SPEEDS]
        return "\n".join(
            [
                f"{config.objective['name']} on {mix.title(self.parts)}: {images}",
                *self._parts_told(),
                f"{config.model['encoder']}: {size['encoder_parameters'] / 1e6:,.1f} M parameters, "
                f"{size['parameters'] / 1e6:,.1f} M with all that is trained; "
                f"{size['flops_per_image'] / 1e9:,.1f} GFLOPs an image",
                f"{schedule.steps:,} steps of {config.batch_size:,} images{epochs}, {seen:,} images in "
                f"all; highest learning rate {schedule.peak:.3g} after {schedule.warmup:,} steps",
                f"about {' or '.join(times)} (a laptop's CPU, a GPU), without loading and evaluations",
                *(self.sharding(_GPU, _NODE).reasons if self.world > 1 else ()),
                *(f"warning: {one}" for one in self.warnings()),
            ]
        )

    def _parts_told(self) -> list[str]:
        """A line for each part of a mix, and for each change of the data."""
        lines, seen = [], self.schedule.steps * self.config.batch_size
        whole, lengths = sum(part.share for part in self.parts), self.part_images or self.declared
        for part, images in zip(self.parts, lengths) if len(self.parts) > 1 else ():
            drawn = part.share / whole * seen
            said = f"  {part.name}:{part.split}: {part.share / whole:.2%} of the images, {drawn:,.0f} in all"
            lines.append(said + (f", {drawn / images:,.2f} epochs of {images:,}" if images else ""))
        for given in self.config.data.changes:
            other = ", ".join(f"{k}={v}" for k, v in given.items() if k != "from")
            lines.append(f"  from {given.get('from')} on: {other}")
        return lines

    def summary(self) -> str:
        """One line of what is derived from the config."""
        optim_, s = self.config.optim, self.schedule
        return (
            f"{s.steps} steps of {self.config.batch_size} images ({self.world} processes, "
            f"{self.accumulate} at a time each step), peak lr {s.peak:.3g} = {optim_.lr:g} x batch / 256, "
            f"warm-up {s.warmup} steps, {self.images} images an epoch"
        )


def _groups(world: int, per_node: int) -> list[int]:
    """The sizes of groups that divide the processes, and stay in a node or take whole ones."""
    near = min(per_node, world)
    sizes = [g for g in range(1, world + 1) if world % g == 0]
    return [g for g in sizes if near % g == 0 or g % near == 0]


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{max(1, seconds):.0f} s"


def schedule(config: Training, images: int | None, length: str, where: str) -> Schedule:
    """The schedule that a config has at some length. images: in an epoch, if that is known."""
    batch, given = config.batch_size, config.optim
    total = durations.steps(length, where, batch_size=batch, images=images)
    if not 1 <= total <= _STEPS:
        raise ValueError(
            f"{where}: {length!r} is {total} steps of {batch} images; it must be 1 to {_STEPS:,}."
        )
    steps = partial(durations.steps, batch_size=batch, images=images, total=total)
    return Schedule(
        per_batch(given.lr, batch),
        total,
        steps(given.warmup, "optim.warmup"),
        given.schedule,
        per_batch(given.lr_end, batch),
        tuple(steps(m, "optim.milestones") for m in given.milestones),
        given.decay,
        given.power,
    )


def check_trunk(trunk: Schedule, branch: Schedule, where: str) -> None:
    """Raises ValueError unless a schedule follows another up to its own first milestone."""
    if not branch.milestones:
        raise ValueError(
            f"{where}: only optim.schedule=step has a constant part that runs of several lengths share."
        )
    point = branch.milestones[0]
    if point >= trunk.steps:
        raise ValueError(
            f"{where}: would leave at step {point}, and the trunk ends at step {trunk.steps}."
        )
    # between these steps, rates are constant, or rise on a line
    steps = sorted({0, 1, trunk.warmup, branch.warmup, *trunk.milestones, point - 1})
    differing = next((s for s in steps if s < point and trunk.lr(s) != branch.lr(s)), None)
    if differing is not None:
        raise ValueError(
            f"{where}: its rate differs from the trunk's at step {differing}, before it leaves at step "
            f"{point}. Give optim.warmup in steps (6250it), not as a share of the length."
        )


def accumulation(batch_size: int, world: int, most: int | None, multiple: int = 1) -> int:
    """How many parts each process takes its share of a batch in: the fewest of at most `most`
    images each, a multiple of `multiple`."""
    if batch_size < 1 or batch_size % world:
        raise ValueError(
            f"batch_size: {batch_size} does not divide among {world} processes. "
            f"Take a multiple of {world}."
        )
    if most is not None and most < 1:
        raise ValueError(f"batch_per_process: {most} must be at least 1.")
    share = batch_size // world
    if share % multiple or (most or share) < multiple:
        raise ValueError(
            f"batch_size: {batch_size} gives each of {world} processes {share} images, at most "
            f"{most or share} at a time (batch_per_process), and the objective takes a multiple of "
            f"{multiple}, as mixup, which mixes pairs. Choose both so that it can."
        )
    parts = 1 if most is None else math.ceil(share / most)
    while share % (parts * multiple):
        parts += 1
    return parts


def subset_images(config: Training, whole: int | None) -> int | None:
    """How many of `whole` training images are trained on; None where that needs the data."""
    (part,) = mix.parts(config.data.train, config.data.subset)
    return part.choice.count(whole, "data.subset")


def _split(name: str) -> tuple[str, card.Card]:
    place, _, split = name.partition(":")
    return split or "train", card.load_card(place)


def build_objective(config: Training) -> Objective:
    """The objective of a config around its model, on the meta device."""
    options = dict(config.objective)
    if "name" not in options:
        raise ValueError(
            f"objective.name: is missing. There are: {', '.join(plugin.names('objectives'))}."
        )
    with torch.device("meta"):
        built = plugin.build("objectives", options.pop("name"), Model(**config.model), **options)
    shard.keep_float32(built, config.shard.float32)
    return built


def forward_flops(objective: Objective) -> int:
    """FLOPs of one image's forward pass through an objective on the meta device, which is then of no
    other use: plain matrix products take the place of fused attention, since those are counted on
    every device."""
    shard.fuse_attention(objective, False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        objective.eval().requires_grad_(False)(objective.example(1))
    return counter.get_total_flops()


def per_batch(rate: float, batch_size: int) -> float:
    """A learning rate of the config, which is per 256 images, for a step."""
    return rate * (batch_size / 256)


def build_optimizer(config: Training, objective: Objective) -> Optimizer:
    """The optimizer of a config over an objective, on the meta device or sharded."""
    given = config.optim
    return optim.build(
        objective,
        given.name,
        lr=per_batch(given.lr, config.batch_size),
        weight_decay=given.weight_decay,
        layer_decay=given.layer_decay,
        ema=given.ema,
        **given.options,
    )


def build_evaluator(
    given: dict[str, Any], data: str, *, training: bool = False
) -> tuple[str, Evaluator]:
    """("linear/cifar10", or with a variant "lowshot/cifar10/vpt", and the evaluator) of an
    `evaluator:` section; training: of one that measures a model between its steps."""
    options = dict(given)
    if "name" not in options:
        raise ValueError(
            f"evaluator.name: is missing. There are: {', '.join(plugin.names('evaluators'))}."
        )
    name = options.pop("name")
    built = evaluators.build(name, cache=not training, **{"data": data, **options})
    return "/".join([name, data, *([built.variant] if built.variant else [])]), built


def with_model_options(config: Training, folder: Path | None = None) -> Training:
    """The config with every option of its model: those of `--init` or, once started, of the run,
    under its own.

    A run's folder describes itself, so a continued run does not need what it was started from.
    Raises ValueError where the init's encoder is not the one that the config names.
    """
    recorded = folder / "config.yaml" if folder is not None else None
    known: dict[str, Any] = {}
    if recorded is not None and recorded.exists():
        known = configs.read(recorded, config).get("model", {})
    elif config.branch is not None:
        known = _recorded(config.branch, config).model
    elif config.init is not None:
        known = open_weights(config.init).options or {}
    asked = config.model.get("encoder", known.get("encoder"))
    if asked is None:
        raise ValueError(
            "model.encoder: is missing. Name a size, as in model.encoder=vit_b16, or give --init a run "
            "to start from."
        )
    if known.get("encoder", asked) != asked:
        raise ValueError(
            f"model.encoder: the config asks for {asked}, and {config.init or folder} holds "
            f"{known['encoder']}. Leave model.encoder out, or give another --init or --out."
        )
    return replace(config, model=encoders.follow(known, config.model))


def steps(folder: Path) -> int:
    """The length of a recorded run. Raises ValueError if that needs data that are not here."""
    plan = Plan(_recorded(str(folder)), 1)
    if plan.schedule is None:
        plan, *_ = plan.open_data()
    return plan.schedule.steps


def _recorded(run: str, asked: Training | None = None) -> Training:
    """The config that a run was started with; asked: see `config.read`."""
    path = Path(run) / "config.yaml"
    if not path.exists():
        raise ValueError(f"branch: {run} is no run's folder: it holds no config.yaml.")
    return configs.read_training(path, asked)
