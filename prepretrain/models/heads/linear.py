"""A linear classifier: what fine-tuned models end with."""

from typing import Literal

import torch
from torch import Tensor, nn

from prepretrain.models.encoders.base import Encoder
from prepretrain.models.heads.base import Scores


class Linear(Scores):
    """One linear layer on one pooled feature, after a norm if asked for."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        classes: int,
        pool: Literal["class", "mean"] = "mean",
        norm: bool = False,
        dropout: float = 0.0,
    ):
        """pool: how an image's tokens become one feature. norm: after the mean (MAE's fine-tuned
        ViTs, whose encoder then has no final norm). dropout: of the feature, after the norm."""
        super().__init__(encoder, classes, pool)
        self.normed = norm
        self.linear = nn.Linear(encoder.width, classes)
        self.norm = nn.LayerNorm(encoder.width, eps=1e-6) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def scores(self, feature: Tensor) -> Tensor:
        """[B, D] to [B, C]."""
        return self.linear(self.dropout(self.norm(feature)))

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """MAE's fine-tuning head: weights N(0, 2e-5), no bias (its FINETUNE code)."""
        if name == "linear.weight":
            tensor.normal_(std=2e-5, generator=generator)
            return True
        return False
