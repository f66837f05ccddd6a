"""`fit()`, the one training loop: it knows steps, files and `objective(batch)["loss"]`, and nothing
of any task."""

import gc
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prepretrain.data.loader import Stream, to_device
from prepretrain.distributed import checkpoint, heartbeat, shard
from prepretrain.distributed import group as distributed
from prepretrain.training import durations, numerics, optim
from prepretrain.training.log import Metrics, Progress
from prepretrain.training.schedule import Schedule
from prepretrain.training.signals import Signals

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was asked to stop by a signal, and saved; the same command continues it."""


@dataclass(frozen=True)
class Evaluation:
    """Something to measure during a run: `run()` returns named numbers, on every process.

    prefix: of their names in metrics.jsonl, as `linear/cifar10/` or `val_`.
    """

    prefix: str
    every: int
    run: Callable[[], dict[str, float]]


def fit(
    objective: nn.Module,
    data: Stream,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    folder: Path,
    saved: Path | None = None,
    policy: numerics.Policy = numerics.Policy(),
    **how: Any,
) -> None:
    """Trains to `schedule.steps` optimizer steps, from a checkpoint of the run if there is one.

    saved: that checkpoint, verified. policy: how many non-finite steps to skip or roll back before
    stopping. how: the options of `_fit`: seed, options, clip, log_every, save_every, keep, always,
    async_save, evals, wandb, signals, lost. Raises FloatingPointError, on every process and before the
    weights change, for a non-finite loss or gradient past the policy's limits; ValueError for too
    many bad images or data that are not the run's; Stopped after a signal.
    """
    guard = numerics.Guard(policy)
    if saved is not None:
        guard.load(checkpoint.state(saved).get("numerics", {}))
    while True:  # going back is what continuing a killed run is, with other images
        try:
            return _fit(
                objective, data, optimizer, schedule, guard, folder=folder, saved=saved, **how
            )
        except numerics.GoBack as asked:
            saved = checkpoint.newest(folder) or saved
            if saved is None:
                raise FloatingPointError(f"{asked} There is no checkpoint to go back to.") from None
            optimizer.zero_grad()
            guard.go_back(asked.step, checkpoint.state(saved), data.batch_size)
            logger.warning("%s Goes back to %s, and on with later images.", asked, saved)


def _fit(
    objective: nn.Module,
    data: Stream,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    guard: numerics.Guard,
    *,
    folder: Path,
    seed: int,
    options: dict[str, Any],
    saved: Path | None = None,
    clip: float | None = None,
    log_every: int = 10,
    save_every: int | None = 0,
    keep: int = 2,
    always: Collection[int] = (),
    async_save: bool = False,
    evals: Sequence[Evaluation] = (),
    wandb: str | None = None,
    signals: Signals | None = None,
    lost: Callable[[], str | None] = lambda: None,
) -> None:
    """options: what made the model, kept in checkpoints so that they describe themselves. clip:
    largest gradient norm. save_every: steps between checkpoints, one is always saved at the end; None
    saves none at all. always: steps that are saved, and never removed. async_save: save while training
    goes on. wandb: see Metrics. signals: those of a caller that notes them before; else they are
    noted from here on. lost: see checkpoint.save. Raises numerics.GoBack to be started again from the
    newest checkpoint.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    step, bad = _resume(saved, objective, optimizer, data)
    metrics, progress = Metrics(folder, step, wandb), Progress(schedule.steps, step)
    asked = Signals() if signals is None else signals
    metrics.write_rollbacks(step, guard.rollbacks)
    stream = data.batches(guard.position(step, data.batch_size))
    meter, before = _Meter(data.batch_size), metrics.seconds if distributed.is_main() else 0.0
    measure = partial(_evaluate, evals, objective, optimizer, schedule.steps, metrics, asked)
    measure(step, skip=distributed.from_main(metrics.measured))
    objective.train()
    collecting = gc.isenabled()  # not where an evaluation trains within a run
    if collecting:
        gc.disable()  # a collection at a random time on one of many processes stops them all
        gc.freeze()  # what is there already is not searched at every checkpoint

    def state() -> dict[str, Any]:
        kept = {"step": step, "images": step * data.batch_size, "bad": dict(bad)}
        return kept | {
            "data": data.fingerprint,
            "options": options,
            "numerics": guard.state(),
        }

    def refused() -> str | None:
        """See checkpoint.save; a checkpoint also comes after the rows of its steps."""
        if (said := metrics.unwritten()) is not None:
            raise OSError(said)
        return lost()

    saver = (
        checkpoint.Background(folder, keep=keep, always=always, lost=refused)
        if async_save
        else None
    )
    try:
        while step < schedule.steps:
            heartbeat.beat(f"step {step + 1}")
            seed_all(seed, step)
            rate = schedule.apply(optimizer, step)
            figures, replaced, seen = _gradients(objective, stream, data.accumulate, meter)
            norm = _norm(parameters)
            vote = _vote(figures, norm, replaced, asked.received is not None)
            if vote.finite:
                event = guard.spike(step, vote.norm)
            else:
                said = _not_finite(folder, step, figures, norm)
                if save_every is not None:
                    facts = {"seed": seed, "position": guard.position(step, data.batch_size)}
                    parts = (objective, optimizer, state())
                    place = numerics.dump(folder, step, *parts, figures, norm, seen, facts)
                    said += f" To look into it: tools/launch.py --replay {place}"
                event = guard.not_finite(step, said)
            if event in (None, numerics.SPIKE):
                _clip(parameters, norm, clip)
                optimizer.step()
            optimizer.zero_grad()
            step += 1
            meter.step()
            bad.update(one["cause"] for one in vote.bad)
            metrics.quarantine(step, vote.bad)
            _check_bad(bad, step * data.batch_size, data.max_bad)
            progress.advance()
            if event or durations.due(step, log_every, schedule.steps):
                row = {"step": step, "images": step * data.batch_size}
                row |= {"seconds": round(before + meter.total(), 3), **vote.figures, "lr": rate}
                row |= {"grad_norm": vote.norm, **meter.rates()}
                row |= {"bad_images": sum(bad.values())} if bad else {}
                row |= {"event": event} if event else {}
                metrics.write(
                    {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
                )
                progress.show(*_texts(row, schedule.steps))
            if save_every is not None and (
                vote.stop or step in always or durations.due(step, save_every, schedule.steps)
            ):
                gc.collect()
                if not _finite(objective, optimizer):
                    guard.spoilt(step, _spoilt(folder, step))
                parts = (step, objective, optimizer, state())
                if saver is not None:
                    saver.save(*parts)
                else:
                    checkpoint.save(folder, *parts, keep=keep, always=always, lost=refused)
            if saver is not None and (vote.stop or step == schedule.steps):
                saver.wait()
            if vote.stop and step < schedule.steps:
                saved_too = "" if save_every is None else " and saved"
                raise Stopped(
                    f"{folder}: stopped by a signal after step {step}{saved_too}. "
                    f"The same command continues it."
                )
            measure(step)
        if (said := distributed.from_main(metrics.unwritten())) is not None:
            raise OSError(said)
    except Exception as error:
        error.step = step  # for those who decide whether to start again
        raise
    finally:
        stream.close()
        if collecting:
            gc.unfreeze()
            gc.enable()
        if saver is not None:
            saver.close()
        if signals is None:
            asked.restore()
        metrics.close()
        progress.close()


def _evaluate(
    evals: Sequence[Evaluation],
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    metrics: Metrics,
    asked: Signals,
    step: int,
    skip: Sequence[str] = (),
) -> None:
    """Runs what is due after a step, on the averaged weights if there are; `skip` names what a run
    that was cut off had measured by then."""
    due = [
        one
        for one in evals
        if step
        and durations.due(step, one.every, steps)
        and not any(name.startswith(one.prefix) for name in skip)
    ]
    if not due:  # to exchange the weights in each step would take as long as a small model's step
        return
    with optim.averaged(objective, optimizer):
        for one in due:
            with asked.passed_on():
                figures = one.run()
            metrics.write({"step": step, **{f"{one.prefix}{k}": v for k, v in figures.items()}})
    objective.train()


def _resume(
    saved: Path | None, objective: nn.Module, optimizer: torch.optim.Optimizer, data: Stream
) -> tuple[int, Counter]:
    if saved is None:
        return 0, Counter()
    state = checkpoint.state(saved)
    if state.get("data") != data.fingerprint:
        raise ValueError(
            f"data.train: is not what {saved} was trained on (fingerprint {data.fingerprint}, and "
            f"{state.get('data')} then). Restore the data, or start another run with --out."
        )
    checkpoint.restore(saved, objective, optimizer)
    logger.info("continues from %s", saved)
    return state["step"], Counter(state["bad"])


def seed_all(seed: int, step: int, rank: int | None = None) -> None:
    """Seeds what draws from global generators (drop path, mixup), so that a step that is taken again
    draws the same. rank: as if in this process of the run."""
    rank = distributed.rank() if rank is None else rank
    value = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def _gradients(
    objective: nn.Module, stream: Any, accumulate: int, meter: "_Meter"
) -> tuple[dict[str, Tensor], list, list]:
    """Adds up the gradients of one step's micro batches; their mean figures, the images replaced in
    them, and which images each was of."""
    total: dict[str, Tensor] = {}
    bad: list[dict] = []
    seen: list[dict] = []
    for part in range(accumulate):
        with meter.waiting():
            batch = next(stream)
        bad += batch.pop("bad")
        seen.append({"position": batch["position"], "key": batch["key"]})
        shard.send_gradients(objective, part == accumulate - 1)
        figures = objective(to_device(batch))
        (figures["loss"] / accumulate).backward()
        for name, value in figures.items():
            total[name] = total.get(name, 0) + value.detach().float() / accumulate
    return total, bad, seen


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    """The gradients' norm over all processes."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return distributed.whole(norm)


def _clip(parameters: list[nn.Parameter], norm: Tensor, limit: float | None) -> None:
    """Clips gradients whose norm is known to be finite; those of a failed step stay as they are."""
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)


@dataclass(frozen=True)
class _Vote:
    finite: bool
    stop: bool
    bad: list[dict]
    figures: dict[str, float]
    norm: float


def _vote(figures: dict[str, Tensor], norm: Tensor, bad: list, stop: bool) -> _Vote:
    """One small exchange a step, in which all processes agree to go on, and share their figures'
    means."""
    values = [float(v) for v in figures.values()] + [float(norm)]
    finite = all(math.isfinite(v) for v in values)
    sums = distributed.all_sum(
        torch.tensor(
            [0.0 if finite else 1.0, float(stop), float(bool(bad)), *values], dtype=torch.float64
        )
    ).tolist()
    replaced = (
        [one for part in distributed.all_gather_object(bad) for one in part] if sums[2] else []
    )
    means = [v / distributed.world() for v in sums[3:]]
    return _Vote(sums[0] == 0, sums[1] > 0, replaced, dict(zip(figures, means)), means[-1])


def _not_finite(folder: Path, step: int, figures: dict[str, Tensor], norm: Tensor) -> str:
    shown = ", ".join(f"{k} {float(v):g}" for k, v in figures.items())
    return (
        f"{folder}: step {step + 1} is not finite ({shown}, gradient norm {float(norm):g} on process "
        f"{distributed.rank()}). The weights are those of step {step}. Lower optim.lr, set optim.clip, or "
        f"use shard.precision=fp32; the newest checkpoint is intact."
    )


def _finite(objective: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether all weights, and what the optimizer keeps, are finite on every process: a finite
    gradient can still make weights that are not."""
    kept = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [t for t in (*objective.parameters(), *kept) if isinstance(t, Tensor)]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    wrong = sum(not bool(t.isfinite().all()) for t in local)
    return float(distributed.all_sum(torch.tensor([float(wrong)]))) == 0


def _spoilt(folder: Path, step: int) -> str:
    return (
        f"{folder}: the weights after step {step} are not finite, or what the optimizer keeps is not, so "
        f"they are not saved, and the earlier checkpoints stay. Lower optim.lr or optim.weight_decay, or "
        f"set optim.clip."
    )


def _check_bad(bad: Counter, images: int, limit: float) -> None:
    count = sum(bad.values())
    if count > max(limit * images, 10):  # ten may happen in the first steps of any run
        causes = ", ".join(f"{n} {cause}" for cause, n in bad.most_common())
        raise ValueError(
            f"data.max_bad: {count} bad images were replaced ({causes}) to fill {images} places, more than "
            f"the share {limit}. Look at them in the log; clean the data, or raise data.max_bad."
        )


class _Meter:
    """Images a second, and the share of time spent waiting for data, since they were last read."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.begin = self.since = time.perf_counter()
        self.waited, self.steps = 0.0, 0

    def waiting(self) -> "_Waiting":
        return _Waiting(self)

    def step(self) -> None:
        self.steps += 1

    def total(self) -> float:
        return time.perf_counter() - self.begin

    def rates(self) -> dict[str, float]:
        now = time.perf_counter()
        spent = max(now - self.since, 1e-9)
        rates = {
            "images_per_second": round(self.steps * self.batch_size / spent, 2),
            "data_wait": round(self.waited / spent, 4),
        }
        self.since, self.waited, self.steps = now, 0.0, 0
        return rates


class _Waiting:
    def __init__(self, meter: _Meter):
        self.meter = meter

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        self.meter.waited += time.perf_counter() - self.start


def _texts(row: dict[str, Any], steps: int) -> tuple[str, str]:
    """The figures behind a bar, and as a plain line with the time left."""
    speed = row["images_per_second"]
    left = (steps / row["step"] - 1) * row["images"] / speed if speed else math.inf
    bar = f"{speed:.0f} images/s, loss {row['loss']:.4f}, waits for data {row['data_wait']:.0%}"
    bar += f", {row['event']}" if "event" in row else ""
    return (
        bar,
        f"step {row['step']}/{steps}  {bar}  lr {row['lr']:.2e}  left {time.strftime('%H:%M:%S', time.gmtime(left))}",
    )
