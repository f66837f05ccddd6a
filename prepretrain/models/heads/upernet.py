"""UPerNet (arXiv 1807.10221) on a ViT, as MAE and BEiT are fine-tuned for segmentation, and on a
hierarchical encoder."""

import torch
from torch import Tensor, nn

from prepretrain.models.dense.layers import kaiming, uniform
from prepretrain.models.dense.norms import norm_relu
from prepretrain.models.dense.pooling import Levels, Pyramid
from prepretrain.models.encoders.base import Encoder
from prepretrain.models.heads.base import Segmenter, quarters

_AUXILIARY = 2  # the level that the auxiliary head reads


class UPerNet(Segmenter):
    """Scores of each place from four levels: pooled over parts of the image, added from coarse to fine,
    and joined. In training an auxiliary head scores the third level, too."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        classes: int,
        channels: int = 512,
        layers: tuple[int, ...] | None = None,
        auxiliary: float = 0.4,
        auxiliary_channels: int = 256,
        dropout: float = 0.1,
    ):
        """channels: of the convolutions. layers: the blocks whose maps are read, four; null: the ends of
        the quarters, or the stages. auxiliary: weight of the auxiliary head's loss; 0 leaves it out.
        dropout: of whole channels before the scores. Defaults are mmsegmentation's."""
        layers = quarters(encoder) if layers is None else layers
        if len(layers) != 4:
            raise ValueError(f"model.head.layers: {list(layers)} must be 4 blocks.")
        super().__init__(encoder, classes, layers)
        widths = [width for width, _ in encoder.scales] or [encoder.width] * 4
        self.levels, self.pyramid = Levels(encoder), Pyramid(widths, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.scores = nn.Conv2d(channels, classes, 1)
        if auxiliary:
            self.weights = (1.0, auxiliary)
            self.helper = nn.Sequential(
                norm_relu(widths[_AUXILIARY], auxiliary_channels, 3),
                nn.Dropout2d(dropout),
                nn.Conv2d(auxiliary_channels, classes, 1),
            )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """See Segmenter.forward."""
        levels = self.levels(maps)
        found = [self.scores(self.dropout(self.pyramid(levels)))]
        if self.training and len(self.weights) > 1:
            found.append(self.helper(levels[_AUXILIARY]))
        return found

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """As mmsegmentation's code: convolutions before a norm by their fan out, those of scores
        N(0, 0.01); deconvolutions as torch's default."""
        layer = self.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.ConvTranspose2d):
            uniform(tensor, layer.out_channels * 4, generator)
        elif not isinstance(layer, nn.Conv2d):
            return False
        elif name.endswith("bias"):
            tensor.zero_()
        elif layer.bias is None:
            kaiming(tensor, generator)
        else:
            tensor.normal_(std=0.01, generator=generator)
        return True
