"""Muon: momentum whose matrices are made orthogonal (kellerjordan.github.io/posts/muon), beside AdamW
for all that is no matrix."""

from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from prepretrain.distributed.group import whole
from prepretrain.training.optimizers.base import Groups, Optimizer

_QUINTIC = (3.4445, -4.7750, 2.0315)  # Muon's: singular values rise fastest to about 1, in 5 rounds
_ROUNDS = 5


class Muon(Optimizer, torch.optim.AdamW):
    """Muon for parameters of two dimensions, heads and tables of tokens among them, and torch's AdamW for
    the others.

    A step of a matrix is as large as AdamW's by 0.2 sqrt(its longer side) (arXiv 2502.16982), so that
    both have one rate and weight decay. A sharded matrix is gathered, and every process of its group
    makes the same step orthogonal.
    """

    state_tensors = 1  # AdamW's other one is of small parameters only

    def __init__(
        self,
        groups: Groups,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        """momentum: decay of the average of a matrix's gradient. betas, eps: AdamW's."""
        kinds = [
            {**group, "momentum": momentum, "matrices": matrices, "params": some}
            for group in groups
            for matrices in (True, False)
            if (some := [p for p in group["params"] if (p.ndim == 2) == matrices])
        ]
        super().__init__(kinds, betas=betas, eps=eps, fused=True)
        self._step_supports_amp_scaling = False  # AdamW's kernel does, and `_matrices` does not
        self.register_step_pre_hook(_matrices)

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Collects AdamW's parameters."""
        return False if group["matrices"] else super()._init_group(group, *lists)


@torch.no_grad()
def _matrices(optimizer: Muon, *_: Any) -> None:
    """Takes the step of every matrix."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["matrices"] else ():
            if parameter.grad is not None:
                _step(parameter, optimizer.state[parameter], group)


def _step(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    gradient, momentum, rate = parameter.grad, group["momentum"], group["lr"]
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(gradient)
        state["step"] = torch.zeros((), device=gradient.device)  # which torch's AdamW looks for
    state["step"] += 1
    state["momentum"].lerp_(gradient, 1 - momentum)
    step = orthogonal(whole(gradient.lerp(state["momentum"], momentum))).to(parameter.dtype)
    if isinstance(parameter, DTensor):
        step = distribute_tensor(
            step, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.mul_(1 - rate * group["weight_decay"])
    parameter.add_(step, alpha=-rate * 0.2 * sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix whose singular vectors are those of another, and whose singular values are near 1,
    within about 0.7 and 1.2: by Newton and Schulz's iteration, in bf16, on its shorter side."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / x.norm().clamp(min=1e-7)  # which bounds the largest singular value by 1
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
