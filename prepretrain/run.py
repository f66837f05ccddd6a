"""What one process does for a stage: turns a config into parts, and runs them. Reads the config;
all below do not."""

import contextlib
import fcntl
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.flop_counter import FlopCounterMode

from prepretrain import (
    card,
    checkpoint,
    clock,
    distributed,
    log,
    optim,
    plugin,
    shard,
    validation,
    weights,
)
from prepretrain import config as configs
from prepretrain import model as models
from prepretrain.config import Evaluating, Training
from prepretrain.encoders import base as encoders
from prepretrain.evaluators import zeroshot
from prepretrain.evaluators.base import SPEED, Evaluator
from prepretrain.loader import Stream
from prepretrain.model import Model
from prepretrain.objectives.base import Objective
from prepretrain.optim import Schedule
from prepretrain.train import Evaluation, fit
from prepretrain.transforms import BadImage, decode, resize_center_crop

logger = logging.getLogger(__name__)


def start(config: Training | Evaluating, folder: Path) -> None:
    """Runs a stage to its end in this process, as one of those that the environment describes."""
    with joined(folder):
        if isinstance(config, Evaluating):
            evaluate(config, folder)
        else:
            train(config, folder)


@contextlib.contextmanager
def joined(folder: Path) -> Iterator[None]:
    """This process as one of those that the environment describes, with its log in the folder."""
    distributed.init()
    folder.mkdir(parents=True, exist_ok=True)
    log.setup(folder)
    try:
        yield
    finally:
        distributed.shutdown()


def train(config: Training, folder: Path) -> None:
    """Stage one, stage two or fine-tuning: whatever the objective says."""
    config = with_model_options(config, folder)
    plan = Plan(config, distributed.world())
    source = plan.open_data()
    _record(config, folder)
    objective = plan.objective
    spread = {"group": config.shard.group, "precision": config.shard.precision}
    shard.shard(objective, **spread, recompute=config.shard.recompute, compile=config.shard.compile)
    objective.prepare(partial(shard.shard, **spread))
    saved = checkpoint.newest(folder) or plan.branch_point()
    if saved is None:
        shard.initialise(objective, config.seed)
        for module, found in starting(config, objective):
            weights.fill(module, found)
    optimizer = optim.build(
        objective,
        lr=plan.schedule.peak,
        weight_decay=config.optim.weight_decay,
        betas=config.optim.betas,
        eps=config.optim.eps,
        layer_decay=config.optim.layer_decay,
    )
    data = Stream(
        source,
        objective.transform(train=True),
        batch_size=config.batch_size,
        seed=config.seed,
        accumulate=plan.accumulate,
        workers=config.data.workers,
        max_bad=config.data.max_bad,
        window=config.data.window,
    )
    logger.info("%s", plan.summary())
    evals = [
        Evaluation(f"{name}/", every, partial(_measure, name, evaluator, objective.model, folder))
        for name, every, evaluator in plan.evaluators()
    ]
    if config.validation.data is not None:
        sets = plan.open_validation(), source
        batch = config.batch_size // plan.world // plan.accumulate
        run = partial(_validate, objective, *sets, batch, config.data.workers, folder)
        evals.append(Evaluation("val_", plan.steps_of("validation.every"), run))
    fit(
        objective,
        data,
        optimizer,
        plan.schedule,
        folder=folder,
        seed=config.seed,
        options=objective.model.options,
        saved=saved,
        clip=config.optim.clip,
        log_every=plan.steps_of("log_every"),
        save_every=plan.steps_of("checkpoint.every"),
        keep=config.checkpoint.keep,
        always=plan.branches(),
        evals=evals,
    )
    _finish(plan, folder)


def starting(config: Training, objective: Objective) -> list[tuple[Any, weights.Weights]]:
    """(module, weights) of all that a fresh run starts from: --init, then what the objective names.

    Raises ValueError if there is no --init and the objective makes no sense without.
    """
    if config.init is None and objective.needs_init:
        raise ValueError(
            f"--init: is missing; objective '{config.objective['name']}' leaves the image tower as it "
            f"is, so it must have been trained before: --init runs/wsp, or the like."
        )
    found = []
    if config.init is not None:
        found.append(models.fitting(objective.model, models.open_weights(config.init)))
    return found + objective.starting()


def _measure(
    name: str,
    evaluator: Evaluator,
    model: Model,
    folder: Path,
    asked: dict[str, Any] | None = None,
) -> dict[str, float]:
    """asked: see `evaluate`; None while the model is training, whose weights have no name."""
    results = evaluator.run(model, folder)
    logger.info("%s: %s", name, ", ".join(f"{k} {v:g}" for k, v in results.items()))
    add_results(folder, {name: results}, {name: asked or request(evaluator, {}, None)})
    return results


def _validate(
    objective: Objective, held: Any, trained: Any, batch_size: int, workers: int, folder: Path
) -> dict[str, float]:
    """The loss on held-out images, and how far it lies above that on as many training images seen in
    the same way."""
    loss, images = validation.measure(objective, held, batch_size=batch_size, workers=workers)
    some = validation.spread(trained, images)
    seen, _ = validation.measure(objective, some, batch_size=batch_size, workers=workers)
    found = {"loss": loss, "gap": loss - seen, "images": images}
    logger.info("validation: %s", ", ".join(f"{k} {v:.6g}" for k, v in found.items()))
    add_results(folder, {f"val_{k}": v for k, v in found.items()})
    return found


def _finish(plan: "Plan", folder: Path) -> None:
    state = get_model_state_dict(
        plan.objective.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if distributed.is_main():
        models.write(plan.objective.model, state, folder / "export", str(folder))
    add_results(folder, {"images": plan.schedule.steps * plan.config.batch_size, **plan.size()})
    logger.info("%s: done. Its weights: %s", folder, folder / "export" / "model.safetensors")


def evaluate(config: Evaluating, folder: Path, sha256: str | None = None) -> dict[str, float]:
    """Measures a model and adds the numbers to the folder's results.json under
    "<evaluator>/<card>", with a label behind it if there is one, and what was asked to its
    evaluations.json.

    sha256: of the model's weights, where it is known.
    """
    name, evaluator = evaluator_of(config)
    model = models.load(config.init, **config.model).to(distributed.device())
    evaluator.check(model)
    asked = request(evaluator, config.model, sha256 or fingerprint(config.init))
    return _measure(name, evaluator, model, folder, asked)


def evaluator_of(config: Evaluating) -> tuple[str, Evaluator]:
    """The evaluator, and the name that its results have."""
    name, evaluator = build_evaluator(config.evaluator, config.data)
    if config.label is None:
        return name, evaluator
    return f"{name}/{checked_label(config.label)}", evaluator


def checked_label(label: str) -> str:
    """The label. Raises ValueError for one that would not do in names of results and folders."""
    if not isinstance(label, str) or not re.fullmatch(r"[\w.+-]+", label):
        raise ValueError(f"label: {label!r} does not fit; it is text of letters, digits and _.+-")
    return label


def fingerprint(source: str) -> str:
    """The sha256 of the weights of a source, which every process calls for together."""
    found = models.open_weights(source)
    return distributed.from_main(weights.sha256(found) if distributed.is_main() else None)


def request(evaluator: Evaluator, model: dict[str, Any], sha256: str | None) -> dict[str, Any]:
    """What evaluations.json says of a result, as JSON has it: with two alike the numbers are.

    model: the options that it is loaded with. sha256: of its weights.
    """
    asked = {"options": {"evaluator": evaluator.options, "model": model}, "model": sha256}
    return json.loads(json.dumps(asked))


def add_results(folder: Path, results: dict[str, Any], asked: dict[str, Any] | None = None) -> None:
    """Adds to a run's results.json and, what was asked, to its evaluations.json; each whole or not
    at all. Other jobs may add to them at the same time."""
    if distributed.is_main():
        with _locked(folder):  # in this order: cut off between the two, it is measured anew
            _add(folder / "results.json", results)
            _add(folder / "evaluations.json", asked or {})
    distributed.barrier()


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


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run's results.json and evaluations.json hold, the same on every process."""
    return distributed.from_main(
        (_held(folder / "results.json"), _held(folder / "evaluations.json"))
    )


def build_evaluator(given: dict[str, Any], data: str) -> tuple[str, Evaluator]:
    """("linear/cifar10", the evaluator) of an `evaluator:` section."""
    options = dict(given)
    if "name" not in options:
        raise ValueError(
            f"evaluator.name: is missing. There are: {', '.join(plugin.names('evaluators'))}."
        )
    name = options.pop("name")
    evaluator = plugin.build("evaluators", name, data=data, **options)
    given = plugin.check(type(evaluator), {"data": data, **options}, "evaluator")
    every = {"name": name, **plugin.defaults(type(evaluator)), **given}
    evaluator.options = {k: v for k, v in every.items() if k not in SPEED}
    return f"{name}/{data}", evaluator


def with_model_options(config: Training, folder: Path | None = None) -> Training:
    """The config with every option of its model: those of `--init` or, once started, of the run,
    under its own.

    A run's folder describes itself, so a continued run does not need what it was started from.
    Raises ValueError where the init's encoder is not the one that the config names.
    """
    recorded = folder / "config.yaml" if folder is not None else None
    known: dict[str, Any] = {}
    if recorded is not None and recorded.exists():
        known = configs.read(recorded).get("model", {})
    elif config.branch is not None:
        known = _recorded(config.branch).get("model", {})
    elif config.init is not None:
        known = models.open_weights(config.init).options or {}
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


def _recorded(run: str) -> dict[str, Any]:
    """The config that a run was started with."""
    path = Path(run) / "config.yaml"
    if not path.exists():
        raise ValueError(f"branch: {run} is no run's folder: it holds no config.yaml.")
    return configs.read(path)


def _record(config: Training, folder: Path) -> None:
    """Writes config.yaml at a run's first start; later, raises as `_check_unchanged`."""
    _check_unchanged(config, folder)
    distributed.barrier()
    if distributed.is_main():
        configs.write(configs.plain(config), folder / "config.yaml")
    distributed.barrier()


def _check_unchanged(config: Training, folder: Path) -> None:
    """Raises ValueError listing the keys that differ from what the run was started with, if it
    was."""
    path = folder / "config.yaml"
    changed = (
        configs.differences(configs.read(path), configs.plain(config)) if path.exists() else []
    )
    if changed:
        raise ValueError(
            f"{folder}: was started with another config:\n  "
            + "\n  ".join(changed)
            + "\nUse the same, or start another run with --out."
        )


class Plan:
    """Everything about a training run that can be known without touching a device or the data:
    built on meta."""

    def __init__(self, config: Training, world: int):
        """Raises ValueError for whatever in the config cannot work."""
        self.config, self.world = config, world
        self.split, self.card = _split(config.data.train)
        with torch.device("meta"):
            self.objective = build_objective(config)
        self.accumulate = accumulation(config.batch_size, world, config.batch_per_process)
        if self.objective.whole_batch and self.accumulate > 1:
            raise ValueError(
                f"batch_per_process: {config.batch_per_process} takes a process's share of "
                f"{config.batch_size // world} images in {self.accumulate} parts, and objective "
                f"'{config.objective['name']}' compares all of a batch with each other. Leave it out; to "
                f"save memory take more processes, shard.recompute=block or a smaller batch_size."
            )
        declared = self.card.images[self.split] if self.split in self.card.images else None
        self._schedule(declared)

    def open_data(self) -> Any:
        """The training source, which the objective has found fit. Fixes the length of an epoch."""
        source = self.card.open(self.split)
        self.objective.check(self.card, source)
        self._schedule(len(source))
        return source

    def _schedule(self, images: int | None) -> None:
        self.images = images
        if images is None and clock.parse(self.config.length, "length")[1] == "ep":
            self.schedule = None  # known once the data are open
            return
        self.schedule = self.schedule_of(self.config.length, "length")
        self._steps = partial(
            clock.steps,
            batch_size=self.config.batch_size,
            images=images,
            total=self.schedule.steps,
        )

    def schedule_of(self, length: str, where: str) -> Schedule:
        """The schedule that a run of this config has at some length."""
        batch, given = self.config.batch_size, self.config.optim
        total = clock.steps(length, where, batch_size=batch, images=self.images)
        if total < 1:
            raise ValueError(f"{where}: {length!r} is less than a step.")
        steps = partial(clock.steps, batch_size=batch, images=self.images, total=total)
        scale = batch / 256
        return Schedule(
            given.lr * scale,
            total,
            steps(given.warmup, "optim.warmup"),
            given.schedule,
            given.lr_end * scale,
            tuple(steps(m, "optim.milestones") for m in given.milestones),
            given.decay,
        )

    def branches(self) -> list[int]:
        """The steps at which shorter runs will branch off this one: where each one's rate first
        falls."""
        found = [self.schedule_of(length, "branches") for length in self.config.branches]
        for length, schedule in zip(self.config.branches, found):
            _check_trunk(self.schedule, schedule, f"branches: {length}")
        return [schedule.milestones[0] for schedule in found]

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
        changed = configs.differences(before, configs.plain(self.config), free)
        if changed:
            raise ValueError(
                f"branch: {trunk} was trained with another config:\n  "
                + "\n  ".join(changed)
                + "\nA branch continues it exactly; only length may differ."
            )
        old = Plan(configs.check(Training, before, ""), self.world)
        old._schedule(self.images)
        _check_trunk(old.schedule, self.schedule, f"branch: {trunk}, length: {self.config.length}")
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
        return validation.spread(source, given.images)

    def steps_of(self, key: str) -> int:
        """The duration at `log_every`, `checkpoint.every`, … in steps, at least one."""
        value = self.config
        for part in key.split("."):
            value = getattr(value, part)
        return max(1, self._steps(value, key))

    def evaluators(self) -> list[tuple[str, int, Evaluator]]:
        """(name, every how many steps, evaluator) of the `evaluators:` section."""
        built = []
        for i, given in enumerate(self.config.evaluators):
            options = dict(given)
            for key in ("name", "data", "every"):
                if key not in options:
                    raise ValueError(f"evaluators[{i}].{key}: is missing.")
            every, data = options.pop("every"), options.pop("data")
            name, evaluator = build_evaluator(options, data)
            evaluator.check(self.objective.model)
            built.append(
                (
                    (name, evaluator),
                    max(1, self._steps(every, f"evaluators[{i}].every")),
                )
            )
        return [(name, every, evaluator) for (name, evaluator), every in built]

    def size(self) -> dict[str, int]:
        """{"encoder_parameters" (no head, no decoder), "parameters", "flops_per_image"}."""
        count = {
            name: sum(p.numel() for p in part.parameters())
            for name, part in (
                ("encoder_parameters", self.objective.model.encoder),
                ("parameters", self.objective),
            )
        }
        return {**count, "flops_per_image": self.flops()}

    def flops(self) -> int:
        """FLOPs of one image's forward pass through the objective, 2 for a multiply-add, attention
        included."""
        with torch.device("meta"):
            objective = build_objective(self.config)
        for module in objective.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = (
                    False  # plain matrix products, so that they are counted on every device
                )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            objective.eval().requires_grad_(False)(objective.example(1))
        return counter.get_total_flops()

    def summary(self) -> str:
        """One line of what is derived from the config."""
        optim_, s = self.config.optim, self.schedule
        return (
            f"{s.steps} steps of {self.config.batch_size} images ({self.world} processes, "
            f"{self.accumulate} at a time each step), peak lr {s.peak:.3g} = {optim_.lr:g} x batch / 256, "
            f"warm-up {s.warmup} steps, {self.images} images an epoch"
        )


def _check_trunk(trunk: Schedule, branch: Schedule, where: str) -> None:
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
    differing = next((s for s in range(point) if trunk.lr(s) != branch.lr(s)), None)
    if differing is not None:
        raise ValueError(
            f"{where}: its rate differs from the trunk's at step {differing}, before it leaves at step "
            f"{point}. Give optim.warmup in steps (6250it), not as a share of the length."
        )


def accumulation(batch_size: int, world: int, most: int | None) -> int:
    """How many parts each process takes its share of a batch in: the fewest of at most `most`
    images each."""
    if batch_size < 1 or batch_size % world:
        raise ValueError(
            f"batch_size: {batch_size} does not divide among {world} processes. "
            f"Take a multiple of {world}."
        )
    if most is not None and most < 1:
        raise ValueError(f"batch_per_process: {most} must be at least 1.")
    share = batch_size // world
    parts = 1 if most is None else math.ceil(share / most)
    while share % parts:
        parts += 1
    return parts


def _split(name: str) -> tuple[str, card.Card]:
    place, _, split = name.partition(":")
    return split or "train", card.load_card(place)


def build_objective(config: Training) -> Objective:
    """The objective of a config around its model, without weights; build it on the meta device."""
    options = dict(config.objective)
    if "name" not in options:
        raise ValueError(
            f"objective.name: is missing. There are: {', '.join(plugin.names('objectives'))}."
        )
    return plugin.build("objectives", options.pop("name"), Model(**config.model), **options)


def check(config: Training | Evaluating, folder: Path, world: int) -> "Plan | None":
    """Checks all that a start would, without a device; a training run's plan. Raises ValueError."""
    if isinstance(config, Evaluating):
        evaluator_of(config)
        models.open_weights(config.init)
        return None
    config = with_model_options(config, folder)
    _check_unchanged(config, folder)
    plan = Plan(config, world)
    plan.open_data()
    plan.open_validation()
    plan.branches()
    plan.branch_point()
    for module, found in starting(config, plan.objective):
        weights.check(module, found)
    plan.evaluators()
    return plan


def dry_run(config: Training | Evaluating, folder: Path, stage: str, world: int) -> dict[str, Any]:
    """Checks everything that a start would, on the meta device, and returns the facts of the run.

    Data that are not here are no error if the card declares how many images there are: "data" then
    says so.
    """
    if isinstance(config, Evaluating):
        check(config, folder, world)
        model = models.load(config.init, **config.model)
        evaluator_of(config)[1].check(model)
        encoder = model.encoder
        return {
            "stage": stage,
            "encoder": type(encoder).__name__,
            "encoder_parameters": sum(p.numel() for p in encoder.parameters()),
        }
    data = "checked"
    try:
        plan = check(config, folder, world)
    except card.MissingData as error:
        plan = Plan(with_model_options(config, folder), world)
        if plan.schedule is None:
            raise
        data = f"not here, so not checked: {error}"
    group, size = min(config.shard.group or world, world), plan.size()
    # 16 bytes a parameter: weights, gradients and two moments in float32
    return {
        "stage": stage,
        "encoder": plan.config.model["encoder"],
        **size,
        "steps": plan.schedule.steps,
        "images": plan.schedule.steps * config.batch_size,
        "accumulate": plan.accumulate,
        "lr": plan.schedule.peak,
        "state_gib_per_process": round(size["parameters"] * 16 / group / 2**30, 3),
        "data": data,
    }


def load_objective(folder: Path) -> Objective:
    """A run's trained objective on the CPU, decoder and heads included."""
    given = configs.check(Training, configs.read(Path(folder) / "config.yaml"), "")
    with torch.device("meta"):
        objective = build_objective(given)
    objective.to_empty(device="cpu")
    shard.fill_buffers(objective)
    saved = checkpoint.newest(Path(folder))
    if saved is None:
        raise ValueError(f"{folder}: holds no complete checkpoint.")
    shapes, read, _ = checkpoint.open_tensors(saved)
    weights.fill(objective, weights.Weights(str(folder), shapes, read))
    return objective.eval()


def classify(
    source: str, images: list[Path], names: list[str], templates: list[str]
) -> list[dict[str, float]]:
    """{name: probability} of each image file, by a model with a text tower.

    Raises ValueError naming an image that cannot be read, or names that are empty or not different.
    """
    model, rows = models.load(source), []
    for path in images:
        try:
            pixels = decode(path.read_bytes())
        except (OSError, BadImage) as error:
            raise ValueError(f"{path}: {error}") from error
        rows.append(resize_center_crop(pixels, model.encoder.image_size, share=1.0))
    found = zeroshot.probabilities(model, torch.stack(rows), names, templates)
    return [dict(zip(names, row.tolist())) for row in found]


def export(source: str, folder: Path) -> Path:
    """Writes a run's or file's encoder for others to load; returns the weights' path."""
    return models.load(source).save(folder, source)


def export_released(run: Path, folder: Path) -> Path:
    """Writes a run's tensors as `released.pth`, under the names of the files that the objective's
    authors released; returns its path. Raises ValueError for an objective without such files."""
    objective = load_objective(run)
    if not hasattr(objective, "release"):
        raise ValueError(f"--released: {run} is of an objective without released files of its own.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "released.pth"
    torch.save({"model": objective.release()}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
    return path
