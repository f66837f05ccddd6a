"""What every objective offers: it turns batches into a loss, and owns the transform that makes
them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prepretrain.model import Model
from prepretrain.transforms import decode, flip, random_resized_crop, resize_center_crop


class Objective(nn.Module):
    """A model and what it is trained for. The training loop knows `objective(batch)["loss"]` and
    nothing else.

    One file of this folder holds one subclass; its constructor's keywords are its options.
    Parameters hang on its children, never on itself (`shard` refuses them).
    """

    fields: tuple[str, ...] = ("image",)  # what it needs from a sample

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What makes a batch's row of a sample, in a worker; all randomness from
        `sample["random"]`."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A batch to {"loss": scalar, …}; all but the loss is only logged."""
        raise NotImplementedError

    def example(self, images: int) -> dict[str, Tensor]:
        """A batch of the shapes that `forward` takes, on the meta device, to count its FLOPs
        without data."""
        raise NotImplementedError

    def check(self, card: Any, source: Any) -> None:
        """Raises ValueError if the data cannot serve this objective, before any time is spent."""
        lacking = [f for f in self.fields if f not in source.fields]
        if lacking:
            raise ValueError(
                f"data.train={card.name}: has no {', '.join(lacking)}, which objective "
                f"'{type(self).__module__.rpartition('.')[2]}' needs. It has: {', '.join(source.fields)}."
            )

    def reconstruct(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"original", "masked", "reconstructed"} uint8 [B, 3, H, W], where the objective predicts
        pixels."""
        raise ValueError(
            f"objective '{type(self).__name__}' predicts no pixels: there is nothing to draw."
        )


def blank_images(count: int, size: int) -> Tensor:
    """uint8 [count, 3, size, size] without storage."""
    return torch.empty(count, 3, size, size, dtype=torch.uint8, device="meta")


def picture(sample: dict[str, Any], size: int, crop_scale: tuple[float, float] | None) -> Tensor:
    """A sample's image as uint8 [3, size, size]: a random resized crop and flip, by the sample's own
    randomness; with crop_scale None the fixed centre crop of validation."""
    random, image = sample["random"], decode(sample["image"])
    if crop_scale is None:
        return resize_center_crop(image, size)
    return flip(random_resized_crop(image, size, random("crop"), scale=crop_scale), random("flip"))
