"""Small heads on top of a pooled feature."""

import math

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """[B, D] features to [B, C] logits."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, feature: Tensor) -> Tensor:
        """[B, D] to [B, C]."""
        return self.linear(feature)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """MAE's fine-tuning head: weights N(0, 2e-5), no bias (its FINETUNE code)."""
        if name.endswith("weight"):
            tensor.normal_(std=2e-5, generator=generator)
            return True
        return False


class TwoLayer(nn.Module):
    """Linear, tanh, linear, the last one starting at zero: SWAG's head for hashtags."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.pre_logits = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, feature: Tensor) -> Tensor:
        """[B, D] to [B, C]."""
        return self.head(self.pre_logits(feature).tanh())

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """`pre_logits` is LeCun-normal, the last layer zero (SWAG's code)."""
        if name == "pre_logits.weight":
            tensor.normal_(std=math.sqrt(1 / tensor.shape[1]), generator=generator)
        else:
            tensor.zero_()
        return True


HEADS = {"linear": Linear, "mlp": TwoLayer}
