"""Cross-entropy against a few of very many classes."""

from typing import Any

import torch
from torch import Tensor


def sparse_cross_entropy(logits: Tensor, tags: Tensor) -> Tensor:
    """[B] losses of [B, C] logits against int64 [B, T] tags padded with -1, each of weight 1 /
    number of tags.

    Equal to the cross-entropy with a multi-hot target divided by its sum, without building it.
    """
    known = tags >= 0
    weight = known / known.sum(1, keepdim=True)
    return _SparseCrossEntropy.apply(logits, tags.clamp(min=0), weight)


class _SparseCrossEntropy(torch.autograd.Function):
    """logsumexp(logits) - sum(weight x logit), whose gradient needs one [B, C] buffer: the
    softmax."""

    @staticmethod
    def forward(context: Any, logits: Tensor, tags: Tensor, weight: Tensor) -> Tensor:
        wide = logits.float()
        total = wide.logsumexp(1)
        context.save_for_backward(logits, total, tags, weight)
        return total - (wide.gather(1, tags) * weight).sum(1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, total, tags, weight = context.saved_tensors
        buffer = (logits.float() - total[:, None]).exp_()
        buffer.scatter_add_(1, tags, -weight.to(buffer.dtype))
        return buffer.mul_(gradient[:, None]).to(logits.dtype), None, None
