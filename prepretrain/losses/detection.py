"""The losses of Mask R-CNN and Cascade Mask R-CNN, normalised as detectron2's are.

R regions of a batch, K classes, of which number K is none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prepretrain.models.dense import boxes
from prepretrain.models.dense.proposals import Anchors
from prepretrain.models.dense.rcnn import BoxOutputs, MaskOutputs


def of_anchors(said: Anchors) -> tuple[Tensor, Tensor]:
    """The proposal network's losses of objectness and boxes, both sums over the anchors that are
    trained, divided by as many as could be."""
    normaliser = said.sampled * len(said.labels)
    trained, shown = said.labels >= 0, said.labels == 1
    target = shown.to(said.objectness.dtype)
    objectness = F.binary_cross_entropy_with_logits(said.objectness, target, reduction="none")
    where = (said.deltas - said.targets).abs().sum(-1)
    return (objectness * trained).sum() / normaliser, (where * shown).sum() / normaliser


def of_boxes(said: BoxOutputs, sigmoid: bool, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A stage's losses of classes and boxes. That of boxes is L1, summed over the regions that show an
    object and divided by all.

    sigmoid: each class by itself; drawn: bool [K], only these (`federated`).
    """
    count = (said.classes >= 0).sum().clamp(min=1)
    if sigmoid:
        total = _sigmoid(said, drawn)
    else:
        total = F.cross_entropy(said.logits, said.classes, reduction="sum", ignore_index=-1)
    deltas = said.deltas.unflatten(1, (-1, 4))
    shown = (said.classes >= 0) & (said.classes < said.logits.shape[1] - 1)
    rows = torch.arange(len(deltas), device=deltas.device)
    own = said.classes.clamp(0, deltas.shape[1] - 1)
    where = (deltas[rows, own] - said.targets).abs().sum(-1)
    return total / count, (where * shown).sum() / count


def _sigmoid(said: BoxOutputs, drawn: Tensor | None) -> Tensor:
    logits = said.logits[:, :-1]
    numbers = torch.arange(logits.shape[1], device=logits.device)
    target = (said.classes[:, None] == numbers).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    trained = (said.classes >= 0)[:, None]
    return (each * trained).sum() if drawn is None else (each * (trained & drawn)).sum()


def federated(classes: Tensor, weights: Tensor, count: int, seed: Tensor) -> Tensor:
    """bool [K], the classes whose scores are trained: those of the regions [R], and others drawn by
    their weights [K], without replacement, until there are `count` (LVIS's federated loss).

    As in detectron2 the background is one of the count where a region shows none.
    """
    count = min(count, len(weights))
    present = torch.zeros(len(weights) + 2, dtype=torch.bool, device=classes.device)
    # the last is of regions that are not trained, -1; assigned by index, True would come from the host
    present.scatter_(0, classes % len(present), True)
    more = count - present[:-1].sum()
    present = present[: len(weights)]
    uniform = (boxes.priority(seed, "federated", len(weights)) >> 11).double() / 2**53 + 0.5
    # the smallest exponential times are a draw without replacement by their rates
    time = -uniform.clamp(1e-12, 1 - 1e-12).log() / weights
    soonest = time.masked_fill(present | (weights <= 0), torch.inf).topk(count, largest=False)
    taken = torch.arange(count, device=classes.device) < more
    drawn = torch.zeros_like(present).scatter(0, soonest.indices, taken & soonest.values.isfinite())
    return present | drawn


def of_masks(said: MaskOutputs) -> Tensor:
    """The mean over all cells of the masks of regions that show an object; 0 if none does."""
    count = (said.shown.sum() * said.targets[:1].numel()).clamp(min=1)
    target = said.targets.to(said.logits.dtype)
    shown = said.shown[:, None, None].to(target.dtype)
    total = F.binary_cross_entropy_with_logits(said.logits, target, shown, reduction="sum")
    return total / count
