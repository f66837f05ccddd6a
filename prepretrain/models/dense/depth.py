"""Channels of a map to depths in metres."""

import torch
from torch import Tensor, nn

_LEAST = 0.1  # weight of a bin (DINOv2's depth heads)


class ToDepth(nn.Module):
    """Depths within a range: of one number a place by a sigmoid, or as the mean of the centres of bins,
    which are at equal distances, each with a weight."""

    precision = "fp32"

    def __init__(self, channels: int, bins: int, range: tuple[float, float]):
        """bins: 0 for one number."""
        super().__init__()
        self.bins, self.range = bins, range
        self.values = nn.Conv2d(channels, bins or 1, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, rows, columns] to [B, 1, rows, columns]."""
        (low, high), said = self.range, self.values(maps)
        if not self.bins:
            return low + (high - low) * said.sigmoid()
        weights = said.relu() + _LEAST
        centres = torch.linspace(low, high, self.bins, device=said.device)[:, None, None]
        return (weights * centres).sum(1, keepdim=True) / weights.sum(1, keepdim=True)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """Weights N(0, 0.01), no bias."""
        tensor.normal_(std=0.01, generator=generator) if name.endswith("weight") else tensor.zero_()
        return True
