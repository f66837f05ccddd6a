"""What one process does for a stage: turns a config into parts, and runs them. Reads the config;
all below do not."""

import contextlib
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from prepretrain import config as configs
from prepretrain.cluster import lease, slurm
from prepretrain.config import Evaluating, Training
from prepretrain.data import card
from prepretrain.data.loader import Stream, loading
from prepretrain.data.subset import evenly_spaced
from prepretrain.distributed import checkpoint, deterministic, heartbeat, shard
from prepretrain.distributed import group as distributed
from prepretrain.evaluation import validation
from prepretrain.evaluation.evaluators.base import Evaluator
from prepretrain.models import weights
from prepretrain.models.export import save
from prepretrain.models.load import described, filled, fitting, open_weights
from prepretrain.models.model import Model
from prepretrain.objectives.base import Objective
from prepretrain.runs import capacity, results
from prepretrain.runs.plan import Plan, build_evaluator, build_optimizer, with_model_options
from prepretrain.training import log, optim
from prepretrain.training.fit import Evaluation, Stopped, fit
from prepretrain.training.signals import Signals

logger = logging.getLogger(__name__)


def start(config: Training | Evaluating, folder: Path) -> None:
    """Runs a stage to its end in this process, as one of those that the environment describes."""
    with joined(folder, config.device):
        if isinstance(config, Evaluating):
            evaluate(config, folder)
        else:
            train(config, folder)


@contextlib.contextmanager
def joined(folder: Path, device: Literal["auto", "cpu"]) -> Iterator[None]:
    """This process as one of those that the environment describes, with its log in the folder."""
    try:
        distributed.init(device)
        _open_folder(folder)
        log.setup(folder)
        yield
    except Exception as error:
        slurm.leave(error, stopped=isinstance(error, Stopped))
        raise
    finally:
        distributed.shutdown()


def _open_folder(folder: Path) -> None:
    """Makes the run's folder, on one process. Raises ValueError, on all, if others do not see it."""
    mark = folder.absolute() / f".shared-{distributed.from_main(os.urandom(4).hex())}"
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    distributed.barrier()
    for _ in range(50):  # a network's file system may show it late
        if mark.exists():
            break
        time.sleep(0.1)
    seen = distributed.all_gather_object((f"{socket.gethostname()}:{mark.parent}", mark.exists()))
    if distributed.is_main():
        mark.unlink()
    blind = sorted({place for place, sees in seen if not sees})
    if blind:
        raise ValueError(
            f"{folder}: is not shared: {', '.join(blind)} is not what process 0 writes to, "
            f"{seen[0][0]}. Give --out a folder that all machines share."
        )


def train(config: Training, folder: Path) -> None:
    """Stage one, stage two or fine-tuning: whatever the objective says."""
    asked = Signals()  # from here on, so that whatever is started gets at least a step further
    try:
        with (
            lease.held(folder, asked.stop) as own,
            heartbeat.watching(folder, config.hang),
            deterministic.kernels(config.deterministic),
        ):
            _train(config, folder, asked, own)
    finally:
        asked.restore()


def _train(config: Training, folder: Path, asked: Signals, own: lease.Lease) -> None:
    config = with_model_options(config, folder)
    plan, source, order = Plan(config, distributed.world()).open_data()
    _record(config, folder)
    objective = plan.objective
    precision = shard.chosen(config.shard.precision)
    memory, per_node = distributed.machine()
    how = plan.sharding(memory, per_node)
    for reason in how.reasons if plan.world > 1 else ():
        logger.info("%s", reason)
    sharding = {"group": how.group, "reshard": how.reshard, "precision": precision}
    shard.shard(
        objective, **sharding, recompute=config.shard.recompute, compile=config.shard.compile
    )
    objective.prepare(partial(shard.shard, **sharding))
    saved = checkpoint.newest(folder) or plan.branch_point()
    if saved is None:
        shard.initialise(objective, config.seed)
        for module, found in starting(config, objective):
            weights.fill(module, found)
    optimizer = build_optimizer(config, objective)
    data = Stream(
        source,
        objective.transform(train=True),
        batch_size=config.batch_size,
        accumulate=plan.accumulate,
        workers=loading(config.data.workers),
        max_bad=config.data.max_bad,
        order=order,
        changes=plan.open_changes(),
    )
    logger.info("%s, in %s", plan.summary(), precision)
    for warning in plan.warnings():
        logger.warning("%s", warning)
    background = config.checkpoint.async_save
    evaluators = plan.evaluators()
    for _, _, evaluator in evaluators:
        evaluator.open_data()
    evals = [
        Evaluation(f"{name}/", every, partial(_measure, name, evaluator, objective.model, folder))
        for name, every, evaluator in evaluators
    ]
    if config.checkpoint.best:
        quoted = evaluators[0][2].quoted
        evals[0] = replace(evals[0], run=partial(_best, evals[0], quoted, objective.model, folder))
    if config.validation.data is not None:
        sets = plan.open_validation(), source
        batch = config.batch_size // plan.world // plan.accumulate
        run = partial(_validate, objective, *sets, batch, data.workers, folder)
        evals.append(Evaluation("val_", plan.steps_of("validation.every"), run))
    try:
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
            always=plan.always(),
            async_save=distributed.on_gpu() if background is None else background,
            policy=plan.policy,
            evals=evals,
            wandb=config.wandb,
            signals=asked,
            lost=own.lost,
        )
    except torch.OutOfMemoryError as error:
        asked_for = replace(
            config, shard=replace(config.shard, group=how.group, reshard=how.reshard)
        )
        advice = capacity.after_out_of_memory(asked_for, plan.world, per_node, *_gpu_memory())
        raise ValueError(f"{error}\n{advice}") from error
    if said := distributed.from_main(own.lost()):  # a folder that was removed is not made again
        raise ValueError(said)
    with optim.averaged(objective, optimizer):
        _finish(plan, folder)


def _gpu_memory() -> tuple[float, float]:
    """Bytes of this process's GPU, and of those what other programs hold."""
    free, whole = torch.cuda.mem_get_info(distributed.device())
    return whole, whole - free - torch.cuda.memory_reserved(distributed.device())


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
        found.append(fitting(objective.model, open_weights(config.init)))
    return found + objective.starting()


def _measure(
    name: str,
    evaluator: Evaluator,
    model: Model,
    folder: Path,
    asked: dict[str, Any] | None = None,
) -> dict[str, float]:
    """asked: see `evaluate`; None while the model is training, whose weights have no name."""
    found = evaluator.run(model, folder)
    logger.info("%s: %s", name, ", ".join(f"{k} {v:g}" for k, v in found.items()))
    results.add(folder, {name: found}, {name: asked or request(evaluator, {}, None)})
    return found


def _validate(
    objective: Objective, held: Any, trained: Any, batch_size: int, workers: int, folder: Path
) -> dict[str, float]:
    """Measures val_loss on held-out images, and val_gap = val_loss - train_loss, both on equally
    many images with the same crops and masks."""
    loss, images = validation.measure(objective, held, batch_size=batch_size, workers=workers)
    some = evenly_spaced(trained, images)
    seen, _ = validation.measure(objective, some, batch_size=batch_size, workers=workers)
    found = {"loss": loss, "gap": loss - seen, "images": images}
    logger.info("validation: %s", ", ".join(f"{k} {v:.6g}" for k, v in found.items()))
    results.add(folder, {f"val_{k}": v for k, v in found.items()})
    return found


def _best(evaluation: Evaluation, quoted: Callable, model: Model, folder: Path) -> dict[str, float]:
    """Measures, and exports the model to best/ if it is the best of the run so far."""
    found = evaluation.run()
    key = quoted(found)
    name = f"best {evaluation.prefix}{key}"
    if results.read(folder)[0].get(name, -math.inf) < found[key]:
        _export(model, folder, "best")
        results.add(folder, {name: found[key]})
    return found


def _export(model: Model, folder: Path, name: str) -> None:
    state = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if distributed.is_main():
        save(model, folder / name, str(folder), state)


def _finish(plan: Plan, folder: Path) -> None:
    _export(plan.objective.model, folder, "export")
    plan.objective.export(folder / "export")
    results.add(folder, {"images": plan.schedule.steps * plan.config.batch_size, **plan.size})
    logger.info("%s: done. Its weights: %s", folder, folder / "export" / "model.safetensors")


def evaluate(config: Evaluating, folder: Path, sha256: str | None = None) -> dict[str, float]:
    """Measures a model and adds the numbers to the folder's results.json under
    "<evaluator>/<card>", with a label behind it if there is one, and what was asked to its
    evaluations.json.

    sha256: of the model's weights, where it is known.
    """
    name, evaluator = evaluator_of(config)
    model, found = described(config.init, **config.model)
    evaluator.check(model)
    evaluator.open_data()
    model = _on_devices(model, found, config.shard.group)
    asked = request(evaluator, config.model, sha256 or fingerprint(config.init))
    return _measure(name, evaluator, model, folder, asked)


def _on_devices(model: Model, found: weights.Weights, group: int | None) -> Model:
    """A model that is described, with its weights: each process's own on its device, or sharded, as
    `config.Copies` says; one that is sharded is whole on no device and in no memory."""
    if group is None:
        room, needed = distributed.memory(), 4 * sum(p.numel() for p in model.parameters())
        group = distributed.world() if room is not None and needed > room / 4 else 1
    if shard.size(group, distributed.world()) == 1:
        return filled(model, found).to(distributed.device())
    shard.shard(model, group=group, precision="fp32")
    weights.fill(model, found)
    logger.info("the model is sharded over %d processes", group)
    return model.eval()


def evaluator_of(config: Evaluating) -> tuple[str, Evaluator]:
    """The evaluator, and the name that its results have."""
    name, evaluator = build_evaluator(config.evaluator, config.data)
    if config.label is None:
        return name, evaluator
    return f"{name}/{checked_label(config.label)}", evaluator


def checked_label(label: str) -> str:
    """The label. Raises ValueError for one that would not do in names of results and folders."""
    if not isinstance(label, str) or not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", label):
        raise ValueError(
            f"label: {label!r} does not fit; it is text of letters, digits and _.+-, not of dots alone"
        )
    return label


def fingerprint(source: str) -> str:
    """The sha256 of the weights of a source, which every process calls for together."""
    found = open_weights(source)
    return distributed.from_main(weights.sha256(found) if distributed.is_main() else None)


def request(evaluator: Evaluator, model: dict[str, Any], sha256: str | None) -> dict[str, Any]:
    """What evaluations.json says of a result, as JSON has it: with two alike the numbers are.

    model: the options that it is loaded with. sha256: of its weights; without, as in training, where
    they change, the data are not looked at either. Called on every process.
    """
    asked = {"options": {"evaluator": evaluator.options, "model": model}, "model": sha256}
    if sha256 is not None:
        asked["data"] = evaluator.data_state()
    return json.loads(json.dumps(asked))


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
    if changed := changes(config, folder):
        raise ValueError(
            f"{folder}: was started with another config:\n  "
            + "\n  ".join(changed)
            + "\nUse the same, or start another run with --out."
        )


def changes(config: Training, folder: Path) -> list[str]:
    """'optim.lr: 0.1 -> 0.2' for every key that differs from what the run in a folder was started with;
    [] where there is none."""
    path = folder / "config.yaml"
    if not path.exists():
        return []
    before, now = configs.plain(configs.read_training(path, config)), configs.plain(config)
    return configs.differences(before, now)


def check(config: Training | Evaluating, folder: Path, world: int) -> None:
    """Checks all that a start would, without a device. Raises ValueError."""
    if isinstance(config, Evaluating):
        _, evaluator = evaluator_of(config)
        open_weights(config.init)
        evaluator.open_data()
    else:
        _opened(_planned(config, folder, world))


def _planned(config: Training, folder: Path, world: int) -> Plan:
    config = with_model_options(config, folder)
    _check_unchanged(config, folder)
    return Plan(config, world)


def _opened(plan: Plan) -> Plan:
    """The plan with its data, and everything checked that it starts from and measures."""
    plan, *_ = plan.open_data()
    plan.open_changes()
    plan.open_validation()
    plan.check_durations()
    plan.always()
    plan.branch_point()
    for module, found in starting(plan.config, plan.objective):
        weights.check(module, found)
    for _, _, evaluator in plan.evaluators():
        evaluator.open_data()
    return plan


_NOT_HERE = "not here, so not checked: {}"  # what a dry run says of data


def checked(config: Training, folder: Path, world: int) -> tuple[Plan, str]:
    """The plan of a training after all checks that a start would make, and what they say of its data.

    Data that are not here are no error where the card declares how many images there are.
    """
    plan = _planned(config, folder, world)
    try:
        return _opened(plan), "checked"
    except card.MissingData as error:
        if plan.schedule is None:
            raise
        return plan, _NOT_HERE.format(error)


def dry_run(config: Training | Evaluating, folder: Path, stage: str, world: int) -> dict[str, Any]:
    """Checks everything that a start would, on the meta device, and returns the facts of the run.

    Data that are not here are no error for an evaluation, nor for a training whose card declares how
    many images there are: "data" then says so.
    """
    if isinstance(config, Evaluating):
        evaluator, data = evaluator_of(config)[1], "checked"
        model, _ = described(config.init, **config.model)
        evaluator.check(model)
        try:
            evaluator.open_data()
        except card.MissingData as error:
            data = _NOT_HERE.format(error)
        encoder = model.encoder
        return {
            "stage": stage,
            "encoder": type(encoder).__name__,
            "encoder_parameters": sum(p.numel() for p in encoder.parameters()),
            "data": data,
        }
    plan, data = checked(config, folder, world)
    return {
        "stage": stage,
        "encoder": plan.config.model["encoder"],
        **plan.size,
        "steps": plan.schedule.steps,
        "images": plan.schedule.steps * config.batch_size,
        "accumulate": plan.accumulate,
        "lr": plan.schedule.peak,
        "state_gib_per_process": round(plan.state_bytes() / 2**30, 3),
        "data": data,
        "warnings": plan.warnings(),
        "summary": plan.told(),
    }
