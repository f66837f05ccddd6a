"""Supervised classification: what fine-tuning trains (MAE, appendix A.1, Table 9)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prepretrain.data.randaugment import RandAugment
from prepretrain.data.transforms import Size
from prepretrain.models.model import Model
from prepretrain.objectives.base import blank_images, cropped_image
from prepretrain.objectives.supervised import Supervised, class_of


class Classify(Supervised):
    """Cross-entropy over the classes of a card (`model.head.classes`), with RandAugment, mixup, cutmix,
    label smoothing and random erasing."""

    fields = ("image", "label")

    def __init__(
        self,
        model: Model,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.0,
        erasing: float = 0.0,
        augment: str | None = None,
        crop_scale: tuple[float, float] = (0.08, 1.0),
    ):
        """mixup, cutmix: alpha of the beta distribution, 0 for none; one of the two is drawn for a
        batch. smoothing: label smoothing. erasing: probability of erasing a rectangle. augment:
        timm's RandAugment by its description, as rand-m9-mstd0.5-inc1."""
        options = {"mixup": mixup, "cutmix": cutmix, "smoothing": smoothing, "erasing": erasing}
        super().__init__(model, augment=augment, **options)
        self.crop_scale = crop_scale

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A random resized crop and flip and RandAugment, or the centre crop of validation, and the
        label."""
        size = self.model.encoder.image_size
        if not train:
            return Transform(size, self.classes, None, None)
        return Transform(size, self.classes, self.crop_scale, self.augment)

    def example(self, images: int) -> dict[str, Tensor]:
        """See Objective.example."""
        return {
            "image": blank_images(images, self.model.encoder.image_size),
            "label": torch.empty(images, dtype=torch.int64, device="meta"),
        }

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"image": uint8 [B, 3, H, W], "label": int64 [B]} to the loss, and in evaluation the
        accuracy."""
        return self.loss_of(self.model.normalise(batch["image"]), batch["label"])


class Transform:
    """A sample to {"image": uint8 [3, H, W], "label": int}."""

    def __init__(
        self,
        size: Size,
        classes: int,
        crop_scale: tuple[float, float] | None,
        augment: RandAugment | None,
    ):
        self.size, self.classes = size, classes
        self.crop_scale, self.augment = crop_scale, augment

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Raises ValueError for a label that is no class."""
        label = class_of(sample, self.classes)
        image = cropped_image(sample, self.size, self.crop_scale)
        if self.augment is not None:
            image = self.augment(image, sample["random"]("augment"))
        return {"image": image, "label": label}
