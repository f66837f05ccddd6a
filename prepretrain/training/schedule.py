"""The learning rate as a pure function of the step."""

from dataclasses import dataclass
from typing import Literal

import torch
from fvcore.common.param_scheduler import CosineParamScheduler, LinearParamScheduler


@dataclass(frozen=True)
class Schedule:
    """The learning rate at a step: linear warm-up from 0, then cosine, linear or step decay.

    milestones: steps at which "step" multiplies the rate by `decay`. end: the last rate of the
    other two.
    """

    peak: float
    steps: int
    warmup: int = 0
    shape: Literal["cosine", "linear", "step"] = "cosine"
    end: float = 0.0
    milestones: tuple[int, ...] = ()
    decay: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"optim.warmup: {self.warmup} steps leave nothing of the run's {self.steps}."
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
            return self.peak * step / self.warmup
        if self.shape == "step":
            return self.peak * self.decay ** sum(step >= m for m in self.milestones)
        after = (step - self.warmup) / (self.steps - self.warmup)
        kind = CosineParamScheduler if self.shape == "cosine" else LinearParamScheduler
        return kind(self.peak, self.end)(after)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Sets every group's rate for a step, by its own scale; returns the rate at scale 1."""
        rate = self.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate
