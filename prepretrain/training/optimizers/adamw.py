"""AdamW: Adam with decoupled weight decay (arXiv 1711.05101)."""

from typing import Any

import torch
from torch import Tensor

from prepretrain.training.optimizers.base import Groups, Optimizer, here


class AdamW(Optimizer, torch.optim.AdamW):
    """torch's AdamW."""

    state_tensors = 2

    def __init__(
        self, groups: Groups, *, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ):
        """betas: decay of the averages of the gradient and of its square."""
        # fused: one pass over the state, a third of the default loop's time on a CPU (benchmarks/)
        super().__init__(groups, betas=betas, eps=eps, fused=True)

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Collects what the kernel works on: of sharded tensors the local parts, whose elements are
        the same, at a quarter of a DTensor's time on the host. The state stays as it is kept."""
        is_complex = super()._init_group(group, *lists)
        for one in lists:
            one[:] = here(one)
        return is_complex
