"""What every objective offers: it turns batches into a loss, and owns the transform that makes
them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prepretrain import plugin
from prepretrain.data.sampling.weights import Weights as ImageWeights
from prepretrain.data.sources.base import check_fields
from prepretrain.data.transforms import (
    Size,
    decode,
    flip,
    random_resized_crop,
    resize_center_crop,
    sides,
)
from prepretrain.models.model import Model
from prepretrain.models.weights import Weights


class Objective(nn.Module):
    """A model and what it is trained for. The training loop knows `objective(batch)["loss"]` and
    nothing else.

    One file of this folder holds one subclass; its constructor's keywords are its options.
    Parameters hang on its children, never on itself (`shard` refuses them).
    """

    fields: tuple[str, ...] = ("image",)  # what it needs of a sample: see Source.FIELDS
    whole_batch = False  # looks at all images of a batch, so a process must take its share at once
    multiple = 1  # a process takes a multiple of so many images at a time
    needs_init = False  # makes no sense without weights to start from
    # what it asks of a Model: of "encoder" ways of encoding (Encoder.takes); of "head" and "text",
    # which a Model has only for an objective that names them, a class
    needs: Mapping[str, Any] = {}

    def __init__(self, model: Model):
        super().__init__()
        check_fields(self.fields, f"objective '{self.name()}'")
        if not model.encoder.trains:
            raise ValueError(
                f"model.encoder: a {type(model.encoder).__name__} is a teacher (objective.teacher of "
                f"feature_mae) or is measured (--stage eval/…), and is not trained. Take one of the "
                f"sizes of our own, as vit_b16; timm's plain ViTs load into them with --init FILE."
            )
        model.encoder.require(self.needs.get("encoder", ()), "model.encoder")
        for part in _PARTS:
            _check_part(part, getattr(model, part), self.needs.get(part), self.name())
        self.model = model

    @classmethod
    def name(cls) -> str:
        """What a config calls it."""
        return cls.__module__.rpartition(".")[2]

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What makes a batch's row of a sample, in a worker; all randomness from
        `sample["random"]`."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A batch to {"loss": scalar, …}; all but the loss is only logged."""
        return {"loss": self.losses(batch).mean()}

    def losses(self, batch: dict[str, Any]) -> Tensor:
        """A batch to each image's own loss [B], for objectives that have one; what a validation
        loss is measured with."""
        raise NotImplementedError

    def prepare(self, shard: Callable[[nn.Module], None]) -> None:
        """Makes ready what is neither trained nor saved, at each start of a run; `shard` puts a
        module that was built on the meta device on this run's devices."""

    def frozen(self) -> list[nn.Module]:
        """The modules that `prepare` makes ready: on the meta device until then."""
        return []

    def example(self, images: int) -> dict[str, Tensor]:
        """A batch of the shapes that `forward` takes, on the meta device, to count its FLOPs
        without data."""
        raise NotImplementedError

    def starting(self) -> list[tuple[nn.Module, Weights]]:
        """Weights that a fresh run starts parts of it from, beside and after those of --init."""
        return []

    def check(self, card: Any, source: Any) -> None:
        """Raises ValueError if the data cannot serve this objective, before any time is spent."""
        lacking = [f for f in self.fields if f not in source.fields]
        if lacking:
            raise ValueError(
                f"data.train={card.name}: has no {', '.join(lacking)}, which objective "
                f"'{self.name()}' needs. It has: {', '.join(source.fields)}. A folder has images and "
                f"labels; hashtags and captions are read from shards and Parquet (datasets/README.md)."
            )

    def repeats(self, source: Any) -> np.ndarray | ImageWeights | None:
        """How often each image of the training data comes in an epoch on average, float64
        [len(source)], 0 for never; None for once each. All processes call it together."""
        return None

    def export(self, folder: Path) -> None:
        """Writes what a finished run gives beside its model into the export's folder. All processes call
        it together."""

    def reconstruct(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"original", "masked", "reconstructed"} uint8 [B, 3, H, W], where the objective predicts
        pixels."""
        raise ValueError(
            f"objective '{type(self).__name__}' predicts no pixels: there is nothing to draw."
        )


_PARTS = {  # of a Model beside its encoder: what it is called, its kind, and one as an example
    "head": ("a head", "heads", "{name: linear, classes: 1000}"),
    "text": ("a text tower", "towers", "{name: open_clip, architecture: ViT-B-32}"),
}


def _check_part(part: str, given: nn.Module | None, needed: type | None, objective: str) -> None:
    """Raises ValueError if a Model lacks a part that an objective trains, has one that it does not,
    or one of another kind."""
    called, kind, example = _PARTS[part]
    if given is None and needed is not None:
        raise ValueError(
            f"model.{part}: is missing; objective '{objective}' trains {called}. Give one, as in "
            f"model.{part}={example}."
        )
    if given is not None and needed is None:
        raise ValueError(
            f"model.{part}: objective '{objective}' does not train {called}. Start from the encoder "
            f"alone, as in --init runs/other:encoder, without model.{part}."
        )
    if given is not None and not isinstance(given, needed):
        fitting = [n for n in plugin.names(kind) if issubclass(plugin.find(kind, n), needed)]
        raise ValueError(
            f"model.{part}: objective '{objective}' cannot train a {type(given).__name__}. Name one of "
            f"{', '.join(fitting)}."
        )


def blank_images(count: int, size: Size) -> Tensor:
    """uint8 [count, 3, H, W] of that size, without storage."""
    return torch.empty(count, 3, *sides(size), dtype=torch.uint8, device="meta")


def cropped_image(
    sample: dict[str, Any],
    size: Size,
    crop_scale: tuple[float, float] | None,
    mirrored: bool = True,
) -> Tensor:
    """A sample's image as uint8 [3, H, W] of that size: a random resized crop, mirrored or not, by the
    sample's own randomness; with crop_scale None the fixed centre crop of validation. mirrored: whether
    a crop may be."""
    random, image = sample["random"], decode(sample["image"])
    if crop_scale is None:
        return resize_center_crop(image, size)
    crop = random_resized_crop(image, size, random("crop"), scale=crop_scale)
    return flip(crop, random("flip")) if mirrored else crop


class MaskedObjective(Objective):
    """An objective whose encoder sees a random part of the patches, and only that. N patches, K
    kept, M masked."""

    needs = {"encoder": ("keep",)}

    def __init__(
        self, model: Model, *, mask_ratio: float, crop_scale: tuple[float, float] = (0.2, 1.0)
    ):
        super().__init__(model)
        encoder = model.encoder
        if encoder.prefix != 1:
            raise ValueError(
                f"model.encoder: a {type(encoder).__name__} puts {encoder.prefix} tokens before the "
                f"grid, and objective '{self.name()}' decodes after one, a class token. Take a vit_…."
            )
        self.patches = encoder.cells
        self.kept = int(self.patches * (1 - mask_ratio))
        if not 0 < self.kept < self.patches:
            raise ValueError(
                f"objective.mask_ratio: {mask_ratio} keeps {self.kept} of {self.patches} patches. "
                f"At least one must be kept and one masked."
            )
        self.crop_scale = crop_scale

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A random resized crop and flip (a centre crop for validation), and the noise that orders
        the patches."""
        size = self.model.encoder.image_size
        return Masking(size, self.patches, self.crop_scale if train else None)

    def example(self, images: int) -> dict[str, Tensor]:
        """See Objective.example."""
        return {
            "image": blank_images(images, self.model.encoder.image_size),
            "noise": torch.empty(images, self.patches, device="meta"),
        }

    def split(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Noise [B, N] to the kept [B, K] and the masked [B, M] patches: the smallest noise is
        kept."""
        order = noise.argsort(dim=1, stable=True)  # equal draws: the same patches on every device
        return order[:, : self.kept], order[:, self.kept :]


class DenseObjective(Objective):
    """An objective for a head on an encoder that may be frozen: then the head alone is trained."""

    def __init__(self, model: Model, *, freeze: bool):
        super().__init__(model)
        self.freeze = freeze
        if freeze:
            model.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "DenseObjective":
        """All but a frozen encoder, which drops no paths."""
        super().train(mode)
        if self.freeze:
            self.model.encoder.eval()
        return self


class Masking:
    """A sample to {"image": uint8 [3, H, W], "noise": float32 [places]}, by the sample's own
    randomness; the noise's order says what is masked."""

    def __init__(self, size: Size, places: int, crop_scale: tuple[float, float] | None):
        """crop_scale None: the fixed centre crop of validation."""
        self.size, self.places, self.crop_scale = size, places, crop_scale

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        noise = sample["random"]("mask").random(self.places, dtype="float32")
        image = cropped_image(sample, self.size, self.crop_scale)
        return {"image": image, "noise": torch.from_numpy(noise)}
