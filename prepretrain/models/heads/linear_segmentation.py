"""A linear segmenter: how good an encoder's patches are by themselves."""

import torch
from torch import Tensor, nn

from prepretrain.models.dense.norms import BatchNorm
from prepretrain.models.encoders.base import Encoder
from prepretrain.models.heads.base import Segmenter, joined, last


class LinearSegmentation(Segmenter):
    """Scores of each cell by a batch norm and one linear layer, as DINOv2 and DINOv3 probe."""

    def __init__(self, encoder: Encoder, *, classes: int, layers: tuple[int, ...] | None = None):
        """layers: the blocks whose maps are read, side by side; null: the last."""
        super().__init__(encoder, classes, last(encoder) if layers is None else layers)
        width = self.width_of(encoder)
        self.norm, self.scores = BatchNorm(width), nn.Conv2d(width, classes, 1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """See Segmenter.forward."""
        return [self.scores(self.norm(joined(maps)))]

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """Weights N(0, 0.01), no bias."""
        if not name.startswith("scores."):
            return False
        tensor.normal_(std=0.01, generator=generator) if name.endswith("weight") else tensor.zero_()
        return True
