"""What Mask R-CNN's heads do for each region of an image: pool maps, say class, box and mask.

R regions of a batch, C channels, K classes.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from prepretrain.models.dense import boxes
from prepretrain.models.dense.layers import kaiming, normed_conv

BOX_CELLS, MASK_CELLS = 7, 14  # along a side of a pooled region


def levels(regions: Tensor, count: int) -> Tensor:
    """[R], which of the maps from stride 4 on each region is pooled from: by its area, 224 x 224
    pixels being of the third (FPN, arXiv 1612.03144, equation 1)."""
    side = ((regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1])).sqrt()
    return (2 + (side / 224 + 1e-8).log2()).floor().clamp(0, count - 1).long()


def pool(maps: list[Tensor], regions: list[Tensor], strides: list[float], cells: int) -> Tensor:
    """Each region [n, 4] of each image out of the map that is for its size: float32 [R, C, cells,
    cells]. Aligned, with as many samples a cell as it has places."""
    found = torch.cat(regions)
    image = torch.cat([torch.full_like(one[:, :1], i) for i, one in enumerate(regions)])
    level, numbers = levels(found, len(maps)), range(len(maps))

    def aligned(number: int, rows: Tensor) -> Tensor:
        return roi_align(maps[number].float(), rows, cells, 1 / strides[number], 0, True)

    if boxes.counts_freely(found):
        order = level.argsort(stable=True)
        counts = level.bincount(minlength=len(maps)).tolist()
        rows = torch.cat([image, found], 1)[order].split(counts)
        return torch.cat(list(map(aligned, numbers, rows))).index_select(0, order.argsort())
    # what is of another map is a region without an area there, which is no work and gives zeros
    empty = (torch.cat([image, found * (level == n)[:, None]], 1) for n in numbers)
    return reduce(torch.add, map(aligned, numbers, empty))


class BoxHead(nn.Module):
    """Four convolutions and a hidden layer, then a region's class and box (ViTDet's 4conv1fc)."""

    def __init__(self, before: int, channels: int, hidden: int, classes: int, boxes: int):
        """before: channels of the maps. boxes: how many a region has, one for each class or one for
        all."""
        super().__init__()
        self.convs = _convs(before, channels)
        self.hidden = nn.Linear(channels * BOX_CELLS**2, hidden)
        self.scores = nn.Linear(hidden, classes + 1)
        self.deltas = nn.Linear(hidden, 4 * boxes)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """[R, C, 7, 7] to logits [R, K + 1], the last of them the background's, and deltas
        [R, 4 boxes]."""
        hidden = F.relu(self.hidden(self.convs(pooled).flatten(1)))
        return self.scores(hidden), self.deltas(hidden)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """As detectron2's."""
        if name.startswith("convs.") and tensor.ndim == 4:
            kaiming(tensor, generator)
        elif name in ("scores.weight", "deltas.weight"):
            tensor.normal_(std=0.01 if name == "scores.weight" else 0.001, generator=generator)
        elif name == "hidden.weight":
            limit = (3 / tensor.shape[1]) ** 0.5
            tensor.uniform_(-limit, limit, generator=generator)
        else:
            return False
        return True


class MaskHead(nn.Module):
    """Four convolutions and one that doubles the resolution, then a region's mask for each class."""

    def __init__(self, before: int, channels: int, classes: int):
        """before: channels of the maps."""
        super().__init__()
        self.convs = _convs(before, channels)
        self.upscale = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.masks = nn.Conv2d(channels, classes, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """[R, C, 14, 14] to logits [R, K, 28, 28]."""
        return self.masks(F.relu(self.upscale(self.convs(pooled))))

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """As detectron2's."""
        if name == "masks.weight":
            tensor.normal_(std=0.001, generator=generator)
        elif tensor.ndim == 4:
            kaiming(tensor, generator)
        elif name == "upscale.bias":
            tensor.zero_()
        else:
            return False
        return True


def _convs(before: int, channels: int) -> nn.Sequential:
    parts = [normed_conv(before if i == 0 else channels, channels, 3) for i in range(4)]
    return nn.Sequential(*(layer for part in parts for layer in (part, nn.ReLU(inplace=True))))
