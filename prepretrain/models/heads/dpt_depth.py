"""Depth by DPT's decoder (arXiv 2103.13413)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prepretrain.models.dense.depth import ToDepth
from prepretrain.models.dense.dpt import DPT
from prepretrain.models.dense.layers import uniform
from prepretrain.models.encoders.base import Encoder
from prepretrain.models.heads.base import Depths, quarters

_NARROW = 32  # channels before the last layer


class DPTDepth(Depths):
    """A depth for each pixel, of four blocks' maps."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        range: tuple[float, float] = (0.001, 10.0),
        bins: int = 256,
        channels: int = 256,
        widths: tuple[int, int, int, int] | None = None,
        layers: tuple[int, ...] | None = None,
    ):
        """range, bins: as of linear_depth. channels: of the decoder. widths: channels that the four
        maps are brought to; null: an eighth of the encoder's, a quarter, half and all. layers: the
        blocks that are read, four; null: the ends of the quarters, or the stages."""
        super().__init__(encoder, range, quarters(encoder) if layers is None else layers)
        self.decoder = DPT(encoder, widths, channels)
        self.halved = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.narrow = nn.Conv2d(channels // 2, _NARROW, 3, padding=1)
        self.depth = ToDepth(_NARROW, bins, range)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """See Depths.forward."""
        half = self.halved(self.decoder(maps))
        doubled = F.interpolate(half, scale_factor=2, mode="bilinear", align_corners=True)
        return self.depth(self.narrow(doubled).relu())

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """torch's defaults, but for what inner parts say."""
        if not name.startswith(("halved.", "narrow.")):
            return False
        layer = self.get_submodule(name.rpartition(".")[0])
        uniform(tensor, layer.in_channels * 9, generator)
        return True
