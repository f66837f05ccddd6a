"""How well label maps are predicted, from an exact count of pixels by class and prediction."""

import torch
from torch import Tensor

from prepretrain.data.dense.maps import VOID


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """int64 [C, C]: how many pixels of each class (rows) were predicted as each (columns). Those
    without a class are left out."""
    known = labels != VOID
    pairs = labels[known].long() * classes + predicted[known].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def metrics(counts: Tensor) -> dict[str, float]:
    """Means over classes, in percent, of a confusion matrix.

    `mIoU` leaves out classes that are neither in the labels nor predicted, and counts one that is only
    predicted as 0 (mmsegmentation); `mIoU_absent_0` counts the former as 0, too (CSAIL's of ADE20K).
    `mAcc` is over the classes of the labels; `aAcc` is the share of all pixels.
    """
    overlap, union, of_class = _parts(counts)
    iou = 100 * overlap / union  # nan for a class that is nowhere
    recall = 100 * overlap / of_class
    return {
        "mIoU": float(iou.nanmean()),
        "mIoU_absent_0": float(iou.nan_to_num().mean()),
        "mAcc": float(recall.nanmean()),
        "aAcc": float(100 * overlap.sum() / of_class.sum()),
        "classes": int((union > 0).sum()),
    }


def of_classes(counts: Tensor, names: list[str]) -> dict[str, dict[str, float]]:
    """{"IoU": {class: percent}, "Acc": …} of the classes that are in the labels, or predicted."""
    overlap, union, of_class = _parts(counts)
    found: dict[str, dict[str, float]] = {"IoU": {}, "Acc": {}}
    for name, *row in zip(names, overlap.tolist(), union.tolist(), of_class.tolist()):
        for key, whole in zip(found, row[1:]):
            if whole:
                found[key][name] = 100 * row[0] / whole
    return found


def _parts(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float64 [C] each: pixels that are right, in the labels or predicted, and in the labels."""
    counts = counts.double()
    overlap, of_class = counts.diagonal(), counts.sum(1)
    return overlap, of_class + counts.sum(0) - overlap, of_class
