"""The learning rate as a pure function of the step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fvcore.common.param_scheduler import CosineParamScheduler, LinearParamScheduler

from prepretrain import plugin


@dataclass(frozen=True)
class Schedule:
    """The learning rate at a step: linear warm-up from 0, then cosine, linear, step or poly decay.

    milestones: steps at which "step" multiplies the rate by `decay`. end: the last rate of the
    others. power: of "poly", which falls from the first step on, and rises and falls at once during the
    warm-up, as mmsegmentation's.
    """

    peak: float
    steps: int
    warmup: int = 0
    shape: str = "cosine"  # one of SHAPES
    end: float = 0.0
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    power: float = 1.0

    def __post_init__(self) -> None:
        check_shape(self.shape)
        if not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"optim.warmup: {self.warmup} steps leave nothing of the run's {self.steps}. Give a "
                f"share of the run, as optim.warmup=5%, or a longer length."
            )
        if self.milestones and self.shape != "step":
            raise ValueError(
                f"optim.milestones: only optim.schedule=step has them, not {self.shape}."
            )
        inside = all(self.warmup < m < self.steps for m in self.milestones)
        if not inside or sorted(set(self.milestones)) != list(self.milestones):
            raise ValueError(
                f"optim.milestones: {list(self.milestones)} must rise, between the warm-up's end "
                f"({self.warmup}) and the run's ({self.steps})."
            )

    def lr(self, step: int) -> float:
        """The rate of step `step`, counted from 0."""
        if step < self.warmup:
            top = SHAPES["poly"](self, step) if self.shape == "poly" else self.peak
            return top * step / self.warmup
        return SHAPES[self.shape](self, step)

    def done(self, step: int) -> float:
        """The share of the steps after the warm-up that lies before a step."""
        return (step - self.warmup) / (self.steps - self.warmup)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Sets every group's rate for a step, by its own scale; returns the rate at scale 1."""
        rate = self.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate


SHAPES: dict[str, Callable[[Schedule, int], float]] = {  # the rate after the warm-up
    "cosine": lambda s, step: CosineParamScheduler(s.peak, s.end)(s.done(step)),
    "linear": lambda s, step: LinearParamScheduler(s.peak, s.end)(s.done(step)),
    "step": lambda s, step: s.peak * s.decay ** sum(step >= m for m in s.milestones),
    "poly": lambda s, step: s.end + (s.peak - s.end) * (1 - step / s.steps) ** s.power,
}


def check_shape(name: str) -> None:
    """Raises ValueError for a shape that there is not."""
    if name not in SHAPES:
        known = plugin.unknown("no schedule", name, list(SHAPES), quote=True)
        raise ValueError(f"optim.schedule: {known}")
