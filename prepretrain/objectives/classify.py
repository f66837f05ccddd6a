"""Supervised classification: what fine-tuning trains (MAE, appendix A.1, Table 9)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from prepretrain.encoders.base import pool as pool_tokens
from prepretrain.heads import HEADS
from prepretrain.model import Model
from prepretrain.objectives.base import Objective, blank_images, picture


class Classify(Objective):
    """Cross-entropy over the classes of a card, with mixup, cutmix, label smoothing and random
    erasing."""

    fields = ("image", "label")

    def __init__(
        self,
        model: Model,
        *,
        classes: int,
        head: Literal["linear", "mlp"] = "linear",
        pool: Literal["class", "mean"] = "mean",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.0,
        erasing: float = 0.0,
        crop_scale: tuple[float, float] = (0.08, 1.0),
    ):
        """mixup, cutmix: alpha of the beta distribution, 0 for none; one of the two is drawn for a
        batch. smoothing: label smoothing. erasing: probability of erasing a rectangle."""
        super().__init__(model)
        for name, value in (("smoothing", smoothing), ("erasing", erasing)):
            if not 0 <= value < 1:
                raise ValueError(f"objective.{name}: {value} must lie in [0, 1).")
        if min(mixup, cutmix) < 0:
            raise ValueError(
                f"objective.mixup, objective.cutmix: {mixup}, {cutmix} must not be negative."
            )
        self.classes, self.pool, self.smoothing, self.crop_scale = (
            classes,
            pool,
            smoothing,
            crop_scale,
        )
        self.mix = (
            Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)
            if mixup or cutmix
            else None
        )
        self.erasing = RandomErasing(erasing, mode="pixel", device="cpu") if erasing else None
        self.head = HEADS[head](model.encoder.width, classes)

    def check(self, card: Any, source: Any) -> None:
        """Also refuses a number of classes that is not the card's."""
        super().check(card, source)
        if card.classes and len(card.classes) != self.classes:
            raise ValueError(
                f"objective.classes: {self.classes}, and the card '{card.name}' has {len(card.classes)}."
            )

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A random resized crop and flip, or the centre crop of validation, and the label."""
        return Transform(
            self.model.encoder.image_size, self.classes, self.crop_scale if train else None
        )

    def example(self, images: int) -> dict[str, Tensor]:
        """See Objective.example."""
        return {
            "image": blank_images(images, self.model.encoder.image_size),
            "label": torch.empty(images, dtype=torch.int64, device="meta"),
        }

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"image": uint8 [B, 3, H, W], "label": int64 [B]} to the loss, and in evaluation the
        accuracy."""
        image, label = self.model.normalise(batch["image"]), batch["label"]
        if not self.training:
            logits = self.logits(image)
            return {
                "loss": F.cross_entropy(logits, label),
                "accuracy": (logits.argmax(1) == label).float().mean(),
            }
        if self.erasing is not None:
            self.erasing.device = image.device
            image = self.erasing(image)
        if self.mix is None:
            return {
                "loss": F.cross_entropy(self.logits(image), label, label_smoothing=self.smoothing)
            }
        if len(image) % 2:
            raise ValueError(
                f"objective.mixup: mixes pairs, and a process has {len(image)} images at a time. "
                f"Choose batch_size and batch_per_process so that it is even."
            )
        image, target = self.mix(image, label)
        return {"loss": F.cross_entropy(self.logits(image), target)}

    def logits(self, image: Tensor) -> Tensor:
        """Normalised [B, 3, H, W] to float32 [B, classes]."""
        tokens = self.model.encoder(image)
        return self.head(pool_tokens(tokens, self.model.encoder.prefix, self.pool)).float()


class Transform:
    """A sample to {"image": uint8 [3, S, S], "label": int}."""

    def __init__(self, size: int, classes: int, crop_scale: tuple[float, float] | None):
        self.size, self.classes, self.crop_scale = size, classes, crop_scale

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Raises ValueError for a label that is no class."""
        if not 0 <= sample["label"] < self.classes:
            raise ValueError(
                f"{sample['key']}: label {sample['label']} is none of the {self.classes} classes."
            )
        image = picture(sample, self.size, self.crop_scale)
        return {"image": image, "label": sample["label"]}
