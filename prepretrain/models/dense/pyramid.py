"""Pyramids of maps for detectors: from what an encoder gives to one map for each scale.

B images, D channels of the encoder, C of the pyramid.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from prepretrain.models.dense.layers import ChannelNorm, normed_conv, uniform


class SimplePyramid(nn.Module):
    """Maps at 4, 2, 1, 1/2 and 1/4 times the resolution of one map (ViTDet, arXiv 2203.16527, section
    3)."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        half, quarter = width // 2, width // 4
        self.fourfold = nn.Sequential(
            nn.ConvTranspose2d(width, half, 2, stride=2),
            ChannelNorm(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
            *_out(quarter, channels),
        )
        twofold = nn.ConvTranspose2d(width, half, 2, stride=2)
        self.twofold = nn.Sequential(twofold, *_out(half, channels))
        self.same = nn.Sequential(*_out(width, channels))
        self.halved = nn.Sequential(nn.MaxPool2d(2), *_out(width, channels))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One map [B, D, rows, columns] to five of C channels, the finest first."""
        (cells,) = maps
        scales = [self.fourfold(cells), self.twofold(cells), self.same(cells), self.halved(cells)]
        return [*scales, scales[-1][:, :, ::2, ::2]]

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """torch's defaults, which ViTDet's code leaves."""
        layer = self.get_submodule(name.rpartition(".")[0])
        if isinstance(
            layer, nn.ConvTranspose2d
        ):  # whose fan in is, for torch, its second dimension
            uniform(tensor, layer.out_channels * 4, generator)
        elif isinstance(layer, nn.Conv2d):
            uniform(tensor, layer.in_channels * layer.kernel_size[0] ** 2, generator)
        else:
            return False
        return True


class FeaturePyramid(nn.Module):
    """Maps of the stages of a hierarchical encoder, each with what the coarser ones say, and one of half
    the coarsest's resolution (FPN, arXiv 1612.03144), on torchvision's. Each map is normed before, as
    Swin's are."""

    def __init__(self, widths: list[int], channels: int):
        """widths: channels of each stage's map, the finest first."""
        super().__init__()
        self.norms = nn.ModuleList(ChannelNorm(width) for width in widths)
        self.scales = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool())

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps [B, D, rows, columns], the finest first, to one more of C channels."""
        normed = {str(i): norm(one) for i, (norm, one) in enumerate(zip(self.norms, maps))}
        return list(self.scales(normed).values())

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """As torchvision's and detectron2's: uniform with the variance 1 / fan in, no bias."""
        if name.startswith("norms."):
            return False
        if name.endswith("bias"):
            tensor.zero_()
        else:
            nn.init.kaiming_uniform_(tensor, a=1, generator=generator)
        return True


def _out(before: int, channels: int) -> tuple[nn.Module, nn.Module]:
    return normed_conv(before, channels, 1), normed_conv(channels, channels, 3)
