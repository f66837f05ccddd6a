"""A classifier of two layers: SWAG's head for hashtags."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from prepretrain.models.encoders.base import Encoder
from prepretrain.models.heads.base import Scores


class TwoLayer(Scores):
    """Linear, tanh, linear on one pooled feature; the last one starts at zero."""

    def __init__(self, encoder: Encoder, *, classes: int, pool: Literal["class", "mean"] = "class"):
        """pool: how an image's tokens become one feature."""
        super().__init__(encoder, classes, pool)
        self.pre_logits = nn.Linear(encoder.width, encoder.width)
        self.head = nn.Linear(encoder.width, classes)

    def scores(self, feature: Tensor) -> Tensor:
        """[B, D] to [B, C]."""
        return self.head(self.pre_logits(feature).tanh())

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """`pre_logits` is LeCun-normal, the last layer zero (SWAG's code)."""
        if name == "pre_logits.weight":
            tensor.normal_(std=math.sqrt(1 / tensor.shape[1]), generator=generator)
        else:
            tensor.zero_()
        return True
