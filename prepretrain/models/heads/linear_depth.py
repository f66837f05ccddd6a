"""Linear depth: how much an encoder's patches say of distances by themselves."""

from torch import Tensor

from prepretrain.models.dense.depth import ToDepth
from prepretrain.models.dense.norms import BatchNorm
from prepretrain.models.encoders.base import Encoder
from prepretrain.models.heads.base import Depths, joined, last


class LinearDepth(Depths):
    """A depth for each cell, by a batch norm and one linear layer."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        range: tuple[float, float] = (0.001, 10.0),
        bins: int = 256,
        layers: tuple[int, ...] | None = None,
    ):
        """range: metres, of the nearest and the farthest depth that is said. bins: a depth is the mean
        of so many depths by their weights (DINOv2, DINOv3); 0: it is one number. layers: the blocks
        whose maps are read, side by side; null: the last."""
        super().__init__(encoder, range, last(encoder) if layers is None else layers)
        width = self.width_of(encoder)
        self.norm, self.depth = BatchNorm(width), ToDepth(width, bins, range)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """See Depths.forward."""
        return self.depth(self.norm(joined(maps)))
