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
    count = max(len(said.classes), 1)
    if sigmoid:
        classes = _sigmoid(said, drawn) / count
    else:
        classes = F.cross_entropy(said.logits, said.classes, reduction="sum") / count
    deltas = said.deltas.unflatten(1, (-1, 4))
    shown, rows = (
        said.classes < said.logits.shape[1] - 1,
        torch.arange(len(deltas), device=deltas.device),
    )
    own = said.classes.clamp(max=deltas.shape[1] - 1) if deltas.shape[1] > 1 else said.classes * 0
    where = (deltas[rows, own] - said.targets).abs().sum(-1)
    return classes, (where * shown).sum() / count


def _sigmoid(said: BoxOutputs, drawn: Tensor | None) -> Tensor:
    logits = said.logits[:, :-1]
    target = F.one_hot(said.classes, said.logits.shape[1])[:, :-1].to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return each.sum() if drawn is None else (each * drawn).sum()


def federated(classes: Tensor, weights: Tensor, count: int, seed: Tensor) -> Tensor:
    """bool [K], the classes whose scores are trained: those of the regions [R], and others drawn by
    their weights [K], without replacement, until there are `count` (LVIS's federated loss).

    As in detectron2 the background is one of the count where a region shows none.
    """
    if boxes.without_numbers(classes):
        return torch.ones(len(weights), dtype=torch.bool, device=classes.device)
    present = torch.zeros(len(weights) + 1, dtype=torch.bool, device=classes.device)
    present[classes] = True
    more = max(count - int(present.sum()), 0)
    uniform = (boxes.priority(seed, "federated", len(weights)) >> 11).double() / 2**53 + 0.5
    # the smallest exponential times are a draw without replacement by their rates
    time = -uniform.clamp(1e-12, 1 - 1e-12).log() / weights
    time[present[:-1] | (weights <= 0)] = torch.inf
    more = min(more, int(time.isfinite().sum()))
    present[time.topk(more, largest=False).indices] = True
    return present[:-1]


def of_masks(said: MaskOutputs) -> Tensor:
    """The mean over all cells of the masks of regions that show an object; 0 if none does."""
    count = max(said.targets.numel(), 1)
    target = said.targets.to(said.logits.dtype)
    return F.binary_cross_entropy_with_logits(said.logits, target, reduction="sum") / count
