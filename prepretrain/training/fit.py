"""`fit()`, the one training loop: it knows steps, files and `objective(batch)["loss"]`, and nothing
of any task."""

import gc
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prepretrain.data.loader import Stream
from prepretrain.distributed import checkpoint, heartbeat, shard
from prepretrain.distributed import group as distributed
from prepretrain.training import durations, numerics, optim
from prepretrain.training.feed import Feed
from prepretrain.training.ledger import Ledger
from prepretrain.training.log import Metrics, Progress
from prepretrain.training.outcome import Gradients, Outcome
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
    gradients = Gradients([p for group in optimizer.param_groups for p in group["params"]])
    step, bad = _resume(saved, objective, optimizer, data)
    metrics, progress = Metrics(folder, step, wandb), Progress(schedule.steps, step)
    ledger = Ledger(
        *(metrics, progress, bad),
        steps=schedule.steps,
        log_every=log_every,
        batch_size=data.batch_size,
        max_bad=data.max_bad,
    )
    asked = Signals() if signals is None else signals
    metrics.write_rollbacks(step, guard.rollbacks)
    stream = data.batches(guard.position(step, data.batch_size))
    feed = Feed(stream, ledger.meter.waiting)
    measure = partial(_evaluate, evals, objective, optimizer, schedule.steps, metrics, asked)
    measure(step, skip=distributed.from_main(metrics.measured))
    objective.train()
    collecting = gc.isenabled()  # not where an evaluation trains within a run
    if collecting:
        gc.disable()  # a collection at a random time on one of many processes stops them all
        gc.freeze()  # what is there already is not searched at every checkpoint

    def state(step: int) -> dict[str, Any]:
        ledger.share_bad(step)
        kept = {"step": step, "images": step * data.batch_size, "bad": dict(bad)}
        return kept | {
            "data": data.fingerprint(guard.position(step, data.batch_size)),
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

    def settle(taken: _Taken) -> bool:
        """Reads what a step came to, and notes it; whether to stop."""
        found = taken.outcome.read()
        if found.finite:
            event = guard.spike(taken.step, found.norm)
        else:
            said = _not_finite(folder, taken)
            if save_every is not None:
                facts = {"seed": seed, "position": guard.position(taken.step, data.batch_size)}
                parts = (objective, optimizer, state(taken.step))
                with counted.as_of(taken.counts):
                    place = numerics.dump(
                        folder, taken.step, *parts, *taken.described(objective), facts
                    )
                said += f" To look into it: tools/launch.py --replay {place}"
            event = guard.not_finite(taken.step, said)
        ledger.note(taken.step + 1, taken.rate, found, taken.replaced, event)
        return found.stop

    late, stop, counted = _reads_late(), False, numerics.Counted(objective)
    unread: _Taken | None = None
    try:
        while step < schedule.steps:
            heartbeat.beat(f"step {step + 1}")
            seed_all(seed, step)
            rate = schedule.apply(optimizer, step)
            before = counted.copy()
            figures, replaced, seen = _gradients(objective, feed, data.accumulate)
            # a stop saves, which raises what an earlier save met
            failed = saver is not None and saver.problem is not None
            own = {"stop": failed or asked.received is not None, "bad": len(replaced)}
            outcome = Outcome(figures, gradients.norms(), **own)
            if unread is not None:
                stop |= settle(unread)
            left_out = outcome.left_out(guard.limit())
            if clip is not None:
                gradients.clip(outcome.norm, clip)
            optim.step(optimizer, left_out)
            outcome.send()
            unread = _Taken(step, rate, outcome, replaced, seen, before)
            step += 1
            saves = save_every is not None and (
                step in always or durations.due(step, save_every, schedule.steps)
            )
            ends = step == schedule.steps
            if not late or stop or saves or ends or _due(evals, step, schedule.steps):
                stop |= settle(unread)
                unread = None
            # not before a dump, which would make an optimizer that kept nothing yet take a step of 0
            optimizer.zero_grad()
            if saves or (stop and save_every is not None):
                gc.collect()
                if not _finite(objective, optimizer):
                    guard.spoilt(step, _spoilt(folder, step))
                parts = (step, objective, optimizer, state(step))
                if saver is not None:
                    saver.save(*parts)
                else:
                    checkpoint.save(folder, *parts, keep=keep, always=always, lost=refused)
            if saver is not None and (stop or ends):
                saver.wait()
            if stop and not ends:
                saved_too = "" if save_every is None else " and saved"
                raise Stopped(
                    f"{folder}: stopped by a signal after step {step}{saved_too}. "
                    f"The same command continues it."
                )
            if unread is None:
                measure(step)
        if (said := distributed.from_main(metrics.unwritten())) is not None:
            raise OSError(said)
    except Exception as error:
        # for those who decide whether to start again
        error.step = step if unread is None else unread.step
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


@dataclass(frozen=True)
class _Taken:
    """A step that the device was given. step: the number of those before it. replaced, seen: this
    process's images, see `_gradients`. counts: what the objective had counted before it."""

    step: int
    rate: float
    outcome: Outcome
    replaced: list[dict]
    seen: list[dict]
    counts: list[Tensor]

    def described(self, objective: nn.Module) -> tuple[dict[str, Any], dict[str, float]]:
        """What a dump says of it: of this process, and the square of each gradient's norm over all of
        them, which call for it together."""
        figures = {k: numerics.as_json(v) for k, v in self.outcome.figures.items()}
        norm = numerics.as_json(self.outcome.norm)
        mine = {"figures": figures, "gradient_norm": norm, "batches": self.seen}
        return mine, self.outcome.squares(dict(objective.named_parameters()))


def _reads_late() -> bool:
    """Whether the host reads a step's figures when the next one has been queued, as it must where it
    would wait for a device. A step that is not finite is still never taken: that is decided on the
    device. What follows from it (dump, rollback, error) comes before the next step changes the
    weights; only rows of metrics come a step later, and so does a stop.

    A CPU has computed them by then anyway, and a run that is killed there has the rows of all steps.
    """
    return distributed.device().type != "cpu"


def _due(evals: Sequence[Evaluation], step: int, steps: int) -> list[Evaluation]:
    return [one for one in evals if step and durations.due(step, one.every, steps)]


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
        for one in _due(evals, step, steps)
        if not any(name.startswith(one.prefix) for name in skip)
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
    now = data.fingerprint(numerics.position_of(state))
    if state.get("data") != now:
        raise ValueError(
            f"data.train: is not what {saved} was trained on (fingerprint {now}, and "
            f"{state.get('data')} then). Restore the data, declare the change, as in "
            f"data.changes=[{{from: {state['step']}it, …}}], or start another run with --out."
        )
    checkpoint.restore(saved, objective, optimizer)
    logger.info("continues from %s", saved)
    return state["step"], Counter(state["bad"])


def seed_all(seed: int, step: int, rank: int | None = None) -> None:
    """Seeds what draws from global generators (drop path, mixup), so that a step that is taken again
    draws the same. rank: as if in this process of the run."""
    rank = distributed.rank() if rank is None else rank
    value = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    # not torch.manual_seed, which looks for devices of every make: half of a millisecond in each step
    torch.default_generator.manual_seed(value)
    if distributed.on_gpu():
        torch.cuda.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def _gradients(
    objective: nn.Module, feed: Feed, accumulate: int
) -> tuple[dict[str, Tensor], list, list]:
    """Adds up the gradients of one step's micro batches; their mean figures, the images replaced in
    them, and which images each was of."""
    total: dict[str, Tensor] = {}
    bad: list[dict] = []
    seen: list[dict] = []
    for part in range(accumulate):
        batch = feed.take()
        bad += batch.pop("bad")
        seen.append({"position": batch["position"], "key": batch["key"]})
        if accumulate > 1:
            shard.send_gradients(objective, part == accumulate - 1)
        figures = objective(batch)
        (figures["loss"] / accumulate).backward()
        for name, value in figures.items():
            total[name] = total.get(name, 0) + value.detach().float() / accumulate
        feed.prepare()
    return total, bad, seen


def _not_finite(folder: Path, taken: _Taken) -> str:
    figures, norm = taken.outcome.figures, float(taken.outcome.norm)
    shown = ", ".join(f"{k} {float(v):g}" for k, v in figures.items())
    return (
        f"{folder}: step {taken.step + 1} is not finite ({shown}, gradient norm {norm:g} on process "
        f"{distributed.rank()}). The weights are those of step {taken.step}. Lower optim.lr, set optim.clip, or "
        f"use shard.precision=fp32; the newest checkpoint is intact."
    )


def _finite(objective: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether all weights, and what the optimizer keeps, are finite on every process: a finite
    gradient can still make weights that are not."""
    kept = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [t for t in (*objective.parameters(), *kept) if isinstance(t, Tensor)]
    wrong = sum(not bool(distributed.local(t).isfinite().all()) for t in tensors)
    return float(distributed.all_sum(torch.tensor([float(wrong)]))) == 0


def _spoilt(folder: Path, step: int) -> str:
    return (
        f"{folder}: the weights after step {step} are not finite, or what the optimizer keeps is not, so "
        f"they are not saved, and the earlier checkpoints stay. Lower optim.lr or optim.weight_decay, or "
        f"set optim.clip."
    )
