"""Convolutions with a norm over channels: what ViTDet's pyramid and heads are made of."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W], at each place by itself."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        places = maps.permute(0, 2, 3, 1)
        return F.layer_norm(
            places, self.normalized_shape, self.weight, self.bias, self.eps
        ).permute(0, 3, 1, 2)


def normed_conv(before: int, after: int, size: int) -> nn.Sequential:
    """A convolution without a bias, which keeps height and width, and a norm."""
    conv = nn.Conv2d(before, after, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, ChannelNorm(after))


def kaiming(weight: Tensor, generator: torch.Generator) -> None:
    """Fills a kernel before a ReLU with N(0, 2 / fan out), as detectron2's heads are."""
    out = weight.shape[0] * math.prod(weight.shape[2:])
    weight.normal_(std=math.sqrt(2 / out), generator=generator)


def uniform(tensor: Tensor, inputs: int, generator: torch.Generator) -> None:
    """Fills a layer's weight or bias as torch's own default, by the number of its inputs."""
    limit = 1 / math.sqrt(inputs)
    tensor.uniform_(-limit, limit, generator=generator)
