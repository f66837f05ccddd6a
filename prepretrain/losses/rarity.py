"""Weights of labels by how rare they are, counted while a run trains."""

import torch
from torch import Tensor, nn

from prepretrain.distributed import group as distributed


class InverseFrequency(nn.Module):
    """Weighs a label by ln((n + 1) / (f + 1)), where f of the n images seen so far had it, those of
    this batch, on all processes, included. A label that every image had weighs 0.

    This is the online IDF of SuperClass's code, whose counters are shares of batches, at a constant
    batch size. The counts are part of a run's checkpoint.
    """

    def __init__(self, labels: int):
        super().__init__()
        self.register_buffer("seen", torch.empty((), dtype=torch.int64))
        self.register_buffer("having", torch.empty(labels, dtype=torch.int64))
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Counts from nothing; a checkpoint's counts are read afterwards."""
        self.seen.zero_()
        self.having.zero_()

    @torch.no_grad()
    def forward(self, tags: Tensor) -> Tensor:
        """int64 [B, T], different in each row and padded with -1, to float32 [B, T]; in training they
        are counted first. All processes call it together."""
        if self.training:
            self._count(tags)
        weights = ((self.seen + 1).double() / (self.having + 1)).log().float()
        return weights[tags.clamp(min=0)] * (tags >= 0)

    def _count(self, tags: Tensor) -> None:
        known = (tags >= 0).long().flatten()
        counts = tags.new_zeros(1 + len(self.having))  # of images, then of each label
        counts.scatter_add_(0, 1 + tags.clamp(min=0).flatten(), known)
        counts[0] = len(tags)
        if not tags.is_meta:  # a plan that counts, for which one process is enough
            counts = distributed.all_sum(counts)
        self.seen += counts[0]
        self.having += counts[1:]
