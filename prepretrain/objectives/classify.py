"""Supervised classification: what fine-tuning trains (MAE, appendix A.1, Table 9)."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from prepretrain.data.transforms import Size
from prepretrain.models.heads.base import Scores
from prepretrain.models.model import Model
from prepretrain.objectives.base import Objective, blank_images, cropped_image


class Classify(Objective):
    """Cross-entropy over the classes of a card (`model.head.classes`), with RandAugment, mixup, cutmix,
    label smoothing and random erasing."""

    fields = ("image", "label")
    needs = {"head": Scores}

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
        super().__init__(model)
        for name, value in (("smoothing", smoothing), ("erasing", erasing)):
            if not 0 <= value < 1:
                raise ValueError(f"objective.{name}: {value} must lie in [0, 1).")
        if min(mixup, cutmix) < 0:
            raise ValueError(
                f"objective.mixup, objective.cutmix: {mixup}, {cutmix} must not be negative."
            )
        self.classes, self.smoothing, self.crop_scale = model.head.classes, smoothing, crop_scale
        self.mix = (
            Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=self.classes)
            if mixup or cutmix
            else None
        )
        self.multiple = 2 if self.mix else 1  # it mixes pairs
        self.erasing = RandomErasing(erasing, mode="pixel", device="cpu") if erasing else None
        self.augment = RandAugment(augment, model) if augment is not None else None

    def check(self, card: Any, source: Any) -> None:
        """Also refuses a number of classes that is not the card's."""
        super().check(card, source)
        if card.classes and len(card.classes) != self.classes:
            raise ValueError(
                f"model.head.classes: {self.classes}, and the card '{card.name}' has {len(card.classes)}."
            )

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
        if len(image) % self.multiple:
            raise ValueError(
                f"objective.mixup: mixes pairs, and a process has {len(image)} images at a time."
            )
        image, target = self.mix(image, label)
        return {"loss": F.cross_entropy(self.logits(image), target)}

    def logits(self, image: Tensor) -> Tensor:
        """Normalised [B, 3, H, W] to float32 [B, classes]."""
        return self.model.head(self.model.encode(image)).float()


class RandAugment:
    """timm's RandAugment (Cubuk et al. 2020), drawn by the sample's own randomness."""

    def __init__(self, description: str, model: Model):
        """Raises ValueError for a description that timm does not read."""
        if not description.startswith("rand"):
            raise ValueError(
                f"objective.augment: {description!r} must be a RandAugment, as rand-m9-mstd0.5-inc1."
            )
        # what moves out of the picture is filled with the mean colour, as MAE's and SimMIM's do
        grey = tuple(round(255 * value) for value in model.mean)
        given = {"translate_const": int(min(model.encoder.image_size) * 0.45), "img_mean": grey}
        try:
            self.apply = rand_augment_transform(
                description, {**given, "interpolation": Image.BICUBIC}
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f"objective.augment: {description!r} is not understood ({error})."
            ) from error
        for operation in self.apply.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize

    def __call__(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """uint8 [3, H, W] to uint8 [3, H, W]."""
        # timm draws from the two global generators, which other parts of the process also use
        before = random.getstate(), np.random.get_state()
        random.seed(int(generator.integers(2**32)))
        np.random.seed(int(generator.integers(2**32)))
        try:
            changed = self.apply(Image.fromarray(image.permute(1, 2, 0).numpy()))
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """The image with `bits` bits of each colour, 0 to 8. timm asks for 0 at its largest magnitude,
    which gives black, as in Pillow up to 12; later ones refuse it."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


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
        if not 0 <= sample["label"] < self.classes:
            raise ValueError(
                f"{sample['key']}: label {sample['label']} is none of the {self.classes} classes."
            )
        image = cropped_image(sample, self.size, self.crop_scale)
        if self.augment is not None:
            image = self.augment(image, sample["random"]("augment"))
        return {"image": image, "label": sample["label"]}
