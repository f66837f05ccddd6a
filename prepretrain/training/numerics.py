"""Decides what to do about NaN, Inf and gradient spikes: skip the step, roll back to the last
checkpoint, or stop. Dumps the failing step for `--replay`."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from prepretrain.distributed import checkpoint
from prepretrain.distributed import group as distributed
from prepretrain.files import write_json

logger = logging.getLogger(__name__)

DUMP = "dump.json"
# What metrics.jsonl says of a step that was not as others.
NOT_FINITE, SPIKE, SPIKE_LEFT_OUT = "not finite, left out", "spike", "spike, left out"
_SPAN = 1000  # not from the paper: steps among which the skipped ones are counted
_DUMPS = 3  # not from the paper: dumps of a run that hold its weights; each is a whole checkpoint


class GoBack(Exception):
    """A step could not be taken, and the run is to go on from a checkpoint, without its images."""

    def __init__(self, said: str, step: int):
        super().__init__(said)
        self.step = step


@dataclass(frozen=True)
class Policy:
    """Limits how many non-finite steps a run skips or rolls back; by default it stops at once."""

    skip: int = 0  # most non-finite steps to skip among any 1000
    rollbacks: int = 0  # after that, how often to roll back and continue after the offending batch
    sigma: float = 6.0  # a spike is a gradient norm above the mean + sigma standard deviations
    window: int = 128  # steps over which mean and standard deviation are computed
    skip_spikes: bool = False  # also skip a spike's step; otherwise it is only logged

    def __post_init__(self) -> None:
        for name, least in (("skip", 0), ("rollbacks", 0), ("window", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"numerics.{name}: {getattr(self, name)} must be {least} or more.")
        if not self.sigma > 0:
            raise ValueError(f"numerics.sigma: {self.sigma} must be more than 0.")


@dataclass
class Guard:
    """A run's past as far as it decides on later steps; it is kept in checkpoints, so that a resumed
    run decides alike. Every process gives it the same figures, and gets the same answer."""

    policy: Policy
    shift: int = 0  # images that rollbacks have passed over
    skipped: list[int] = field(default_factory=list)  # steps that were not finite and left out
    rollbacks: list[dict[str, int]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {k: v for k, v in asdict(self).items() if k != "policy"}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what a checkpoint kept; of an old one, which kept nothing, that is empty."""
        for name, value in {**Guard(self.policy).state(), **state}.items():
            setattr(self, name, value)

    def position(self, step: int, batch_size: int) -> int:
        """The position in the data of the first image of the batch after `step` steps."""
        return step * batch_size + self.shift

    def limit(self) -> float:
        """The norm above which the next step must not be taken."""
        if not self.policy.skip_spikes or len(self.norms) < self.policy.window:
            return math.inf
        mean, deviation = self._usual()
        return mean + self.policy.sigma * deviation

    def _usual(self) -> tuple[float, float]:
        """The last norms' mean and standard deviation."""
        return float(np.mean(self.norms)), float(np.std(self.norms))

    def spike(self, step: int, norm: float) -> str | None:
        """None; or SPIKE or SPIKE_LEFT_OUT for a finite norm that is far above the last ones. It joins
        them: where all become larger, they soon are no spikes (the rule of OLMo-core's SkipStep)."""
        last, policy = self.norms, self.policy
        if len(last) < policy.window:
            self.norms = [*last, norm]
            return None
        mean, deviation = self._usual()
        self.norms = [*last, norm][-policy.window :]
        if norm <= mean + policy.sigma * deviation:
            return None
        event = SPIKE_LEFT_OUT if policy.skip_spikes else SPIKE
        logger.warning(
            "step %d: gradient norm %.4g, and %.4g +- %.4g in the %d steps before: %s",
            *(step + 1, norm, mean, deviation, policy.window, event),
        )
        return event

    def not_finite(self, step: int, said: str) -> str:
        """NOT_FINITE for a step that is left out within the budget. Past it raises GoBack where that
        may help, and otherwise FloatingPointError."""
        recent = [s for s in self.skipped if s > step + 1 - _SPAN]
        if len(recent) < self.policy.skip:
            self.skipped = [*recent, step + 1]
            logger.warning("%s It is left out.", said)
            return NOT_FINITE
        limits = f"numerics.skip={self.policy.skip} and numerics.rollbacks={self.policy.rollbacks}"
        if len(self.rollbacks) < self.policy.rollbacks:
            raise GoBack(said, step)
        raise FloatingPointError(
            f"{said} (The limits are {limits}; raise one to continue past this step.)"
        )

    def spoilt(self, step: int, said: str) -> NoReturn:
        """For weights that are not finite after a step that was taken: raises GoBack within the budget,
        and otherwise FloatingPointError."""
        if len(self.rollbacks) < self.policy.rollbacks:
            raise GoBack(said, step - 1)
        raise FloatingPointError(
            f"{said} (The limit is numerics.rollbacks={self.policy.rollbacks}.)"
        )

    def go_back(self, failed: int, kept: dict[str, Any], batch_size: int) -> None:
        """The past at a checkpoint with state `kept`, from which the run goes on with the images
        behind those of the step after `failed` steps."""
        behind = self.position(failed + 1, batch_size)
        rollbacks = [*self.rollbacks, {"failed": failed + 1, "to": kept["step"]}]
        self.load(kept.get("numerics", {}))
        self.shift, self.rollbacks = behind - kept["step"] * batch_size, rollbacks


def position_of(kept: dict[str, Any]) -> int:
    """The position in the data that a checkpoint with this state was saved at."""
    return kept.get("images", 0) + kept.get("numerics", {}).get("shift", 0)


def _block_norms(squares: dict[str, float]) -> dict[str, float | str]:
    """{block: its gradient's norm}, of the square of each parameter's; a block is the parameters up to
    the first number in their names, as model.encoder.blocks.3."""
    blocks: dict[str, float] = {}
    for name, square in squares.items():
        blocks[_block(name)] = blocks.get(_block(name), 0.0) + square
    return {block: as_json(math.sqrt(square)) for block, square in blocks.items()}


def _block(name: str) -> str:
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[:-1])


class Counted:
    """What a forward pass itself changes of an objective: the buffers that checkpoints keep, such as counts
    of labels. A dump must hold them as they were before its step, or a replay would count that twice."""

    def __init__(self, objective: nn.Module):
        kept = objective.state_dict().keys()
        self._buffers = [found for name, found in objective.named_buffers() if name in kept]

    def copy(self) -> list[Tensor]:
        """Their values now."""
        return [buffer.clone() for buffer in self._buffers]

    @contextlib.contextmanager
    def as_of(self, values: list[Tensor]) -> Iterator[None]:
        """They have these values for as long."""
        now = self.copy()
        self._set(values)
        try:
            yield
        finally:
            self._set(now)

    def _set(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer.copy_(value)


def dump(
    folder: Path,
    step: int,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    mine: dict[str, Any],
    squares: dict[str, float],
    facts: dict[str, int],
) -> Path:
    """Writes `<folder>/dumps/<step>`: what a step was made of, on every process, and for a run's first
    dumps the state that it started from, so that it can be replayed.

    step: the number of steps before it. mine: this process's {"figures", "gradient_norm", "batches":
    [{"key", "position"}]}. squares: of each gradient's norm over all processes. facts: "seed",
    "position". A disk that cannot take it is logged, and no error: the step's fate is decided.
    """
    place = folder / "dumps" / f"{step + 1:09d}"
    processes = distributed.all_gather_object(mine)
    others = [p for p in folder.glob("dumps/*/checkpoints") if p.parent != place]
    try:
        if distributed.from_main(len(others)) < _DUMPS:
            checkpoint.save(place, step, objective, optimizer, state, keep=1)
        if distributed.is_main():
            place.mkdir(parents=True, exist_ok=True)
            row = {"step": step + 1, **facts, "world": len(processes)}
            row |= {"gradient_norms": _block_norms(squares), "processes": processes}
            write_json(place / DUMP, row)
    except OSError as error:
        logger.warning("%s: could not be written, so it cannot be replayed: %s", place, error)
    return place


def as_json(value: Any) -> float | str:
    """A number, or as text what JSON has no number for."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


class FirstNotFinite:
    """Watches a module's forward and backward pass for the first value that is not finite.

    `found`: None, or {"where": "weights", "forward" or "backward", "module"}. The first module in the
    forward pass has finite inputs; in the backward pass, the one whose output's gradient was the
    first that is not.
    """

    def __init__(self, module: nn.Module):
        self.found: dict[str, str] | None = None
        self.hooks = []
        for name, parameter in module.named_parameters():
            if not bool(torch.isfinite(distributed.local(parameter)).all()):
                self._note("weights", name)
        for name, part in module.named_modules():
            self.hooks.append(part.register_forward_hook(self._forward(name or "objective")))

    def _note(self, where: str, name: str) -> None:
        self.found = self.found or {"where": where, "module": name}

    def _forward(self, name: str) -> Any:
        def look(part: nn.Module, given: Any, made: Any) -> None:
            for value in _floats(made):
                if not bool(torch.isfinite(value).all()):
                    self._note("forward", name)
                if value.requires_grad:
                    self.hooks.append(value.register_hook(self._backward(name)))

        return look

    def _backward(self, name: str) -> Any:
        def look(gradient: Tensor) -> None:
            if not bool(torch.isfinite(gradient).all()):
                self._note("backward", name)

        return look

    def close(self) -> None:
        """Watches no more."""
        for hook in self.hooks:
            hook.remove()


def _floats(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _floats(v)] if isinstance(value, (list, tuple)) else []
