"""What objectives over labels have in common: cross-entropy with mixup, cutmix, label smoothing and
random erasing, on images or clips."""

from typing import Any

import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from prepretrain.data.randaugment import RandAugment
from prepretrain.models.heads.base import Scores
from prepretrain.models.model import Model
from prepretrain.objectives.base import Objective


class Supervised(Objective):
    """Cross-entropy over the classes of a card (`model.head.classes`), with RandAugment, mixup, cutmix,
    label smoothing and random erasing."""

    needs = {"head": Scores}

    def __init__(
        self,
        model: Model,
        *,
        mixup: float,
        cutmix: float,
        smoothing: float,
        erasing: float,
        augment: str | None,
    ):
        """mixup, cutmix: alpha of the beta distribution, 0 for none; one of the two is drawn for a
        batch. smoothing: label smoothing. erasing: probability of erasing a rectangle. augment:
        timm's RandAugment by its description, as rand-m9-mstd0.5-inc1."""
        super().__init__(model)
        for name, value in (("smoothing", smoothing), ("erasing", erasing)):
            if not 0 <= value < 1:
                raise ValueError(f"objective.{name}: {value} must lie in [0, 1).")
        if min(mixup, cutmix) < 0:
            raise ValueError(
                f"objective.mixup, objective.cutmix: {mixup}, {cutmix} must not be negative."
            )
        self.classes, self.smoothing = model.head.classes, smoothing
        self.mix = (
            Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=self.classes)
            if mixup or cutmix
            else None
        )
        self.multiple = 2 if self.mix else 1  # it mixes pairs
        self.erasing = RandomErasing(erasing, mode="pixel", device="cpu") if erasing else None
        self.augment = None
        if augment is not None:
            self.augment = RandAugment(augment, model.mean, model.encoder.image_size)

    def check(self, card: Any, source: Any) -> None:
        """Also refuses a number of classes that is not the card's."""
        super().check(card, source)
        if card.classes and len(card.classes) != self.classes:
            raise ValueError(
                f"model.head.classes: {self.classes}, and the card '{card.name}' has {len(card.classes)}."
            )

    def loss_of(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Normalised images [B, 3, H, W] or clips [B, 3, T, H, W], and their classes [B], to the loss,
        and in evaluation the accuracy."""
        if not self.training:
            logits = self.logits(image)
            return {
                "loss": F.cross_entropy(logits, label),
                "accuracy": (logits.argmax(1) == label).float().mean(),
            }
        shape = image.shape
        if image.ndim == 5:  # frames as channels: a rectangle is the same in all of them
            image = image.flatten(1, 2)
        if self.erasing is not None:
            self.erasing.device = image.device
            image = self.erasing(image)
        if self.mix is None:
            logits = self.logits(image.view(shape))
            return {"loss": F.cross_entropy(logits, label, label_smoothing=self.smoothing)}
        if len(image) % 2:
            raise ValueError(
                f"objective.mixup: mixes pairs, and a process has {len(image)} images at a time."
            )
        image, target = self.mix(image, label)
        return {"loss": F.cross_entropy(self.logits(image.view(shape)), target)}

    def logits(self, image: Tensor) -> Tensor:
        """Normalised images or clips to float32 [B, classes]."""
        return self.model.head(self.model.encode(image)).float()


def class_of(sample: dict[str, Any], classes: int) -> int:
    """The class of a sample. Raises ValueError for a label that is none."""
    if not 0 <= sample["label"] < classes:
        raise ValueError(
            f"{sample['key']}: label {sample['label']} is none of the {classes} classes."
        )
    return sample["label"]
