"""Monocular depth: what a model with a head of depths is trained for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prepretrain.data.dense import maps
from prepretrain.losses.depth import of_depths
from prepretrain.models.heads.base import Depths
from prepretrain.models.model import Model
from prepretrain.objectives.base import DenseObjective, blank_images


class Depth(DenseObjective):
    """The scale-invariant loss of logarithms, each image by itself, on random parts of pictures that
    are mirrored in half of the cases. Pixels whose depth is not known, or outside of what the head
    says, are left out."""

    fields = ("image", "depth")
    needs = {"head": Depths}

    def __init__(
        self,
        model: Model,
        *,
        short_side: int | None = None,
        cut: tuple[int, int] | None = None,
        distort: bool = False,
        freeze: bool = False,
    ):
        """short_side: what a picture is resized to; null: the smaller one of model.image_size, the size
        of the part that is taken. cut: before that, so many rows, the lowest, and columns, those in
        the middle ([352, 1216] is KITTI's benchmark); null: all. distort: brightness, contrast,
        saturation and hue. freeze: the encoder keeps its weights, and the head alone is trained."""
        super().__init__(model, freeze=freeze)
        canvas = model.encoder.image_size
        short = short_side or min(canvas)
        # of one scale: a picture that is resized shows things nearer than they were
        self.jitter = maps.Jitter(
            "depth", canvas, short=short, scale=(1.0, 1.0), distort=distort, cut=cut
        )

    def check(self, card: Any, source: Any) -> None:
        """Also refuses maps that are not as the card says."""
        super().check(card, source)
        source.check_maps()

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A random part of picture and map, or all of both."""
        whole = maps.Fitted("depth", self.jitter.canvas, self.jitter.cut)
        return self.jitter if train else whole

    def example(self, images: int) -> dict[str, Tensor]:
        """See Objective.example."""
        size = self.model.encoder.image_size
        return {
            "image": blank_images(images, size),
            "size": torch.empty(images, 2, dtype=torch.int64, device="meta"),
            "depth": torch.empty(images, *size, device="meta"),
        }

    def losses(self, batch: dict[str, Any]) -> Tensor:
        """{"image", "size", "depth"} of data/dense/maps.py to [B]."""
        model, (low, high) = self.model, self.model.head.range
        said = model.head(model.read(model.normalise_padded(batch["image"], batch["size"])))
        inside = (batch["depth"] >= low) & (batch["depth"] <= high)
        return of_depths(said, batch["depth"] * inside)
