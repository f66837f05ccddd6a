"""DPT's decoder (arXiv 2103.13413): the maps of a ViT's blocks at four resolutions, joined from coarse
to fine. Without its readout, since maps hold no class token.

B images, D channels of the encoder, C of the decoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prepretrain.models.dense.layers import uniform
from prepretrain.models.dense.pooling import resize
from prepretrain.models.encoders.base import Encoder


class DPT(nn.Module):
    """Four maps to one [B, C, rows, columns], of a ViT of patches of 16 at half the image's
    resolution."""

    def __init__(self, encoder: Encoder, widths: tuple[int, ...] | None, channels: int):
        """widths: channels that a ViT's maps are brought to, the finest first; None: an eighth of the
        encoder's, a quarter, half and all."""
        super().__init__()
        if encoder.scales:  # which has resolutions of its own
            widths = tuple(width for width, _ in encoder.scales)
            self.reassembled = nn.ModuleList(nn.Identity() for _ in widths)
        else:
            widths = widths or tuple(encoder.width // part for part in (8, 4, 2, 1))
            self.reassembled = nn.ModuleList(
                nn.Sequential(nn.Conv2d(encoder.width, width, 1), at_scale)
                for width, at_scale in zip(widths, _scales(widths))
            )
        self.narrowed = nn.ModuleList(
            nn.Conv2d(width, channels, 3, padding=1, bias=False) for width in widths
        )
        self.fused = nn.ModuleList(_Fusion(channels, first=i == 0) for i in range(len(widths)))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """See the class."""
        scales = [part(one) for part, one in zip(self.reassembled, maps)]
        found = None
        for conv, one, fusion in zip(reversed(self.narrowed), reversed(scales), self.fused):
            found = fusion(found, conv(one))
        return found

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """torch's defaults, which DPT's code leaves."""
        layer = self.get_submodule(name.rpartition(".")[0])
        inputs = layer.out_channels if isinstance(layer, nn.ConvTranspose2d) else layer.in_channels
        uniform(tensor, inputs * layer.kernel_size[0] ** 2, generator)
        return True


def _scales(widths: tuple[int, ...]) -> list[nn.Module]:
    """What brings maps of one resolution to 4, 2, 1 and 1/2 times it."""
    first, second, _, last = widths
    return [
        nn.ConvTranspose2d(first, first, 4, stride=4),
        nn.ConvTranspose2d(second, second, 2, stride=2),
        nn.Identity(),
        nn.Conv2d(last, last, 3, stride=2, padding=1),
    ]


class _Fusion(nn.Module):
    """Adds a map to what the coarser ones gave, at twice its resolution."""

    def __init__(self, channels: int, first: bool):
        """first: there is no coarser one."""
        super().__init__()
        self.own = None if first else _Unit(channels)
        self.both, self.out = _Unit(channels), nn.Conv2d(channels, channels, 1)

    def forward(self, coarser: Tensor | None, own: Tensor) -> Tensor:
        """[B, C, rows, columns] of both, to twice the rows and columns of the coarser one."""
        both = own if self.own is None else coarser + self.own(resize(own, coarser))
        doubled = F.interpolate(
            self.both(both), scale_factor=2, mode="bilinear", align_corners=True
        )
        return self.out(doubled)


class _Unit(nn.Module):
    """Two convolutions, each after a ReLU, beside what they start from."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, rows, columns] to the same shape."""
        return maps + self.second(self.first(maps.relu()).relu())
