"""Losses of scores for each place, against label maps."""

import torch.nn.functional as F
from torch import Tensor


def of_scores(scores: Tensor, labels: Tensor, void: int) -> Tensor:
    """[B]: cross-entropy of scores [B, C, rows, columns], resized to label maps [B, H, W], summed over
    the pixels that have a class and divided by all, as mmsegmentation does."""
    resized = F.interpolate(scores.float(), labels.shape[-2:], mode="bilinear")
    each = F.cross_entropy(resized, labels.long(), ignore_index=void, reduction="none")
    return each.mean((1, 2))
