"""Semantic segmentation: what a model with a segmenter's head is trained for, as BEiT, MAE and Swin are
fine-tuned."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prepretrain.data.dense import maps
from prepretrain.losses.segmentation import of_scores
from prepretrain.models.heads.base import Segmenter
from prepretrain.models.model import Model
from prepretrain.objectives.base import DenseObjective, blank_images


class Segmentation(DenseObjective):
    """Cross-entropy over the classes of each pixel, on random parts of resized pictures. Pixels without a
    class count in the mean, as 0 (mmsegmentation's default)."""

    fields = ("image", "label_map")
    needs = {"head": Segmenter}

    def __init__(
        self,
        model: Model,
        *,
        scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
        most: float = 0.75,
        distort: bool = True,
        freeze: bool = False,
    ):
        """scale: of the size that a picture is resized to, whose short side is `short_side`; null: the
        smaller one of model.image_size, the size of the part that is taken. most: the largest share
        that one class may have of a part; ten parts are tried. distort: brightness, contrast,
        saturation and hue. freeze: the encoder keeps its weights, and the head alone is trained.
        """
        super().__init__(model, freeze=freeze)
        canvas = model.encoder.image_size
        self.jitter = maps.Jitter(
            "label_map",
            canvas,
            short=short_side or min(canvas),
            scale=scale,
            most=most,
            distort=distort,
        )

    def check(self, card: Any, source: Any) -> None:
        """Also refuses a number of classes that is not the card's, and maps that are not as it says."""
        super().check(card, source)
        if len(source.classes) != self.model.head.classes:
            raise ValueError(
                f"model.head.classes: {self.model.head.classes}, and the card '{card.name}' has "
                f"{len(source.classes)}."
            )
        source.check_maps()

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A random part of picture and map, or all of both."""
        return self.jitter if train else maps.Fitted("label_map", self.jitter.canvas)

    def example(self, images: int) -> dict[str, Tensor]:
        """See Objective.example."""
        size = self.model.encoder.image_size
        return {
            "image": blank_images(images, size),
            "size": torch.empty(images, 2, dtype=torch.int64, device="meta"),
            "label_map": torch.empty(images, *size, dtype=torch.uint8, device="meta"),
        }

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"image", "size", "label_map"} of data/dense/maps.py to the loss, and what it is the sum of."""
        parts = [one.mean() for one in self._parts(batch)]
        found = {"loss": torch.stack(parts).sum()}
        if len(parts) > 1:
            found |= {"scores": parts[0].detach(), "auxiliary": parts[1].detach()}
        return found

    def losses(self, batch: dict[str, Any]) -> Tensor:
        """See Objective.losses."""
        return torch.stack(self._parts(batch)).sum(0)

    def _parts(self, batch: dict[str, Any]) -> list[Tensor]:
        """The losses [B] of each map of scores, weighted."""
        model = self.model
        scores = model.head(model.read(model.normalise_padded(batch["image"], batch["size"])))
        each = [of_scores(one, batch["label_map"], maps.VOID) for one in scores]
        return [weight * loss for weight, loss in zip(model.head.weights, each)]
