"""Segmentation by DPT's decoder (arXiv 2103.13413)."""

import torch
from torch import Tensor, nn

from prepretrain.models.dense.dpt import DPT
from prepretrain.models.dense.layers import kaiming
from prepretrain.models.dense.norms import norm_relu
from prepretrain.models.encoders.base import Encoder
from prepretrain.models.heads.base import Segmenter, quarters


class DPTSegmentation(Segmenter):
    """Scores of each place, of four blocks' maps."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        classes: int,
        channels: int = 256,
        widths: tuple[int, int, int, int] | None = None,
        layers: tuple[int, ...] | None = None,
        dropout: float = 0.1,
    ):
        """channels: of the decoder. widths, layers: as of dpt_depth. dropout: before the scores."""
        super().__init__(encoder, classes, quarters(encoder) if layers is None else layers)
        self.decoder = DPT(encoder, widths, channels)
        self.joined = norm_relu(channels, channels, 3)
        self.dropout, self.scores = nn.Dropout(dropout), nn.Conv2d(channels, classes, 1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """See Segmenter.forward."""
        return [self.scores(self.dropout(self.joined(self.decoder(maps))))]

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """As UPerNet's, but for what the decoder says."""
        if name == "joined.0.weight":
            kaiming(tensor, generator)
        elif name == "scores.weight":
            tensor.normal_(std=0.01, generator=generator)
        else:
            return False
        return True
