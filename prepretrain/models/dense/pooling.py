"""What UPerNet (arXiv 1807.10221) makes of an encoder's maps, by mmsegmentation's code.

B images, D channels of the encoder, C of the head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prepretrain.models.dense.layers import ChannelNorm
from prepretrain.models.dense.norms import BatchNorm, norm_relu
from prepretrain.models.encoders.base import Encoder

_BINS = (1, 2, 3, 6)  # rows and columns that the coarsest map is pooled to


class Levels(nn.Module):
    """Four maps at 1/4 to 1/32 of the image: of a ViT's four, which are all at 1/16, by deconvolutions and
    pooling (BEiT's code); of the stages of a hierarchical encoder with a norm each, as Swin's are."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.norms = nn.ModuleList(ChannelNorm(width) for width, _ in encoder.scales)
        if not encoder.scales:
            double = lambda: nn.ConvTranspose2d(encoder.width, encoder.width, 2, stride=2)
            norm = BatchNorm(encoder.width)
            self.fourfold = nn.Sequential(double(), norm, nn.GELU(), double())
            self.twofold = double()

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Four maps, the finest first."""
        if len(self.norms):
            return [norm(one) for norm, one in zip(self.norms, maps)]
        first, second, third, fourth = maps
        return [self.fourfold(first), self.twofold(second), third, F.max_pool2d(fourth, 2)]


class Pyramid(nn.Module):
    """One map [B, C, rows, columns] at the finest level's resolution of all four, with what is pooled
    over parts of the coarsest."""

    def __init__(self, widths: list[int], channels: int):
        """widths: channels of the levels, the finest first."""
        super().__init__()
        self.pooled = nn.ModuleList(norm_relu(widths[-1], channels, 1) for _ in _BINS)
        self.coarsest = norm_relu(widths[-1] + len(_BINS) * channels, channels, 3)
        self.laterals = nn.ModuleList(norm_relu(width, channels, 1) for width in widths[:-1])
        self.smooth = nn.ModuleList(norm_relu(channels, channels, 3) for _ in widths[:-1])
        self.fusion = norm_relu(len(widths) * channels, channels, 3)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """See the class."""
        last = levels[-1]
        parts = [
            resize(conv(F.adaptive_avg_pool2d(last, bins)), last)
            for bins, conv in zip(_BINS, self.pooled)
        ]
        sums = [conv(one) for conv, one in zip(self.laterals, levels)]
        sums.append(self.coarsest(torch.cat([last, *parts], 1)))
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + resize(sums[i], sums[i - 1])
        scales = [*(conv(one) for conv, one in zip(self.smooth, sums)), sums[-1]]
        return self.fusion(torch.cat([resize(one, scales[0]) for one in scales], 1))


def resize(maps: Tensor, like: Tensor) -> Tensor:
    """[B, C, …] with the height and width of another, bilinearly."""
    if maps.shape[-2:] == like.shape[-2:]:
        return maps
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)
