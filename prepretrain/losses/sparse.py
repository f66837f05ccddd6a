"""Losses against a few of very many classes: ids, never a target for all of them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_cross_entropy(logits: Tensor, tags: Tensor, weight: Tensor | None = None) -> Tensor:
    """[B] losses of [B, C] logits against int64 [B, T] tags padded with -1, each of weight 1 /
    number of tags.

    Equal to the cross-entropy with a multi-hot target divided by its sum, without building it. weight:
    float [B, T] of the tags, instead, which are divided by their sum; where that is 0 so is the loss.
    """
    known = tags >= 0
    if weight is None:
        weight = known / known.sum(1, keepdim=True)
    else:
        weight = weight * known
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
    return _SparseCrossEntropy.apply(logits, tags.clamp(min=0), weight)


class _SparseCrossEntropy(torch.autograd.Function):
    """logsumexp(logits) - sum(weight x logit), whose gradient needs one [B, C] buffer: the
    softmax. Of a row without any weight both are 0."""

    @staticmethod
    def forward(context: Any, logits: Tensor, tags: Tensor, weight: Tensor) -> Tensor:
        wide = logits.float()
        total, counts = wide.logsumexp(1), weight.any(1)
        context.save_for_backward(logits, total, tags, weight, counts)
        return total * counts - (wide.gather(1, tags) * weight).sum(1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, total, tags, weight, counts = context.saved_tensors
        buffer = (logits.float() - total[:, None]).exp_()
        buffer.scatter_add_(1, tags, -weight.to(buffer.dtype))
        return buffer.mul_((gradient * counts)[:, None]).to(logits.dtype), None, None


def sparse_binary_cross_entropy(logits: Tensor, tags: Tensor) -> Tensor:
    """[B] losses of [B, C] logits against int64 [B, T] different tags padded with -1: the sum over all
    classes of the binary cross-entropy with a target of 1 for a tag and 0 for any other (CatLIP)."""
    return _SparseBinaryCrossEntropy.apply(logits, tags.clamp(min=0), tags >= 0)


class _SparseBinaryCrossEntropy(torch.autograd.Function):
    """sum(softplus(logits)) - sum(a tag's logit), whose gradient needs one [B, C] buffer: the sigmoid."""

    @staticmethod
    def forward(context: Any, logits: Tensor, tags: Tensor, known: Tensor) -> Tensor:
        context.save_for_backward(logits, tags, known)
        wide = logits.float()
        return F.softplus(wide).sum(1) - (wide.gather(1, tags) * known).sum(1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, tags, known = context.saved_tensors
        buffer = logits.float().sigmoid()
        buffer.scatter_add_(1, tags, -known.to(buffer.dtype))
        return buffer.mul_(gradient[:, None]).to(logits.dtype), None, None
