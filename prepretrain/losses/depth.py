"""The loss of depths, by their ratio."""

import torch.nn.functional as F
from torch import Tensor

_OF_MEAN = (
    0.15  # weight of the mean's square, as of AdaBins (arXiv 2011.14141) and DINOv2's SigLoss
)


def of_depths(depths: Tensor, truth: Tensor) -> Tensor:
    """[B]: how far depths [B, 1, rows, columns], resized to those known [B, H, W], where 0 is not
    known, are from a multiple of them that is the same at all pixels of an image."""
    resized = F.interpolate(depths.float(), truth.shape[-2:], mode="bilinear")[:, 0]
    known = truth > 0
    ratio = (resized.clamp(min=1e-6).log() - truth.clamp(min=1e-6).log()) * known
    count = known.sum((1, 2)).clamp(min=2)
    mean = ratio.sum((1, 2)) / count
    spread = ((ratio - mean[:, None, None]) * known).square().sum((1, 2)) / (count - 1)
    return (spread + _OF_MEAN * mean.square() + 1e-12).sqrt()  # the root of 0 has no gradient
