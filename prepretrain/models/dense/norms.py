"""Batch normalisation whose mean and variance are those of all processes' images together."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prepretrain.distributed import group as distributed

EPS, MOMENTUM = 1e-5, 0.1  # torch's, and mmsegmentation's


class BatchNorm(nn.Module):
    """Batch norm over the channels of [B, C, H, W], of the batches of all processes; float32."""

    precision = "fp32"

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))

    def init_non_persistent_buffers(self) -> None:
        """What it starts from, before there is a batch or a checkpoint."""
        self.running_mean.zero_()
        self.running_var.fill_(1.0)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """Scale 1, shift 0."""
        tensor.fill_(float(name == "weight"))
        return True

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape. Raises ValueError for a batch of a single value."""
        affine = self.weight, self.bias
        if not self.training:
            return F.batch_norm(maps, self.running_mean, self.running_var, *affine, eps=EPS)
        normed, mean, variance, count = _Synced.apply(maps, *affine)
        if count < 2 and not maps.is_meta:
            raise ValueError(
                "model.head: a batch norm sees one value a channel, so it would give its bias alone. "
                "Take at least 2 images at a time (batch_per_process)."
            )
        self._follow(mean, variance * (count / max(count - 1, 1)))
        return normed

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running values, unless the batch is not finite: its step is not taken either."""
        finite = (mean.isfinite() & variance.isfinite()).all()
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(torch.where(finite, running.lerp(now, MOMENTUM), running))


class _Synced(torch.autograd.Function):
    """[B, C, H, W], scale and shift to the normed, and the mean, variance and count of all
    processes."""

    @staticmethod
    def forward(context: Any, maps: Tensor, weight: Tensor, bias: Tensor) -> tuple:
        count = maps.numel() // maps.shape[1] * distributed.world()  # batches are of one size
        mean = distributed.all_sum(maps.sum((0, 2, 3))) / count
        centred = maps - mean[:, None, None]
        variance = distributed.all_sum(centred.square().sum((0, 2, 3))) / count
        scale = (variance + EPS).rsqrt()
        context.save_for_backward(maps, weight, mean, scale)
        context.count = count
        normed = torch.addcmul(bias[:, None, None], centred, (scale * weight)[:, None, None])
        context.mark_non_differentiable(mean, variance)
        return normed, mean, variance, count

    @staticmethod
    def backward(context: Any, gradient: Tensor, *_: Any) -> tuple:
        maps, weight, mean, scale = context.saved_tensors
        unit = (maps - mean[:, None, None]) * scale[:, None, None]
        of_bias, of_weight = gradient.sum((0, 2, 3)), (gradient * unit).sum((0, 2, 3))
        totals = distributed.all_sum(torch.stack([of_bias, of_weight])) / context.count
        along = gradient - totals[0, :, None, None] - unit * totals[1, :, None, None]
        return along * (scale * weight)[:, None, None], of_weight, of_bias


def norm_relu(before: int, after: int, size: int) -> nn.Sequential:
    """A convolution without a bias, which keeps height and width, a batch norm and a ReLU."""
    conv = nn.Conv2d(before, after, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, BatchNorm(after), nn.ReLU())
