"""What every objective offers: it turns batches into a loss, and owns the transform that makes
them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prepretrain.data.transforms import decode, flip, random_resized_crop, resize_center_crop
from prepretrain.models.encoders.vit import ViT
from prepretrain.models.model import Model
from prepretrain.models.weights import Weights


class Objective(nn.Module):
    """A model and what it is trained for. The training loop knows `objective(batch)["loss"]` and
    nothing else.

    One file of this folder holds one subclass; its constructor's keywords are its options.
    Parameters hang on its children, never on itself (`shard` refuses them).
    """

    fields: tuple[str, ...] = ("image",)  # what it needs from a sample
    whole_batch = False  # compares all images of a batch, so a process must take its share at once
    needs_init = False  # makes no sense without weights to start from
    takes_text = False  # trains a text tower beside the encoder
    takes_head = False  # trains a classifier on top of the encoder

    def __init__(self, model: Model):
        super().__init__()
        if (model.head is not None) != self.takes_head:
            name = type(self).__module__.rpartition(".")[2]
            raise ValueError(
                f"model.head: is missing; objective '{name}' trains a classifier. Give its number of "
                f"classes, as in model.head.classes=1000."
                if self.takes_head
                else f"model.head: objective '{name}' does not train a classifier. Start from the "
                f"encoder alone, as in --init runs/finetune:encoder."
            )
        if (model.text is not None) != self.takes_text:
            name = type(self).__module__.rpartition(".")[2]
            raise ValueError(
                f"model.text: is missing; objective '{name}' trains a text tower. Name one, as in "
                f"model.text={{name: open_clip, architecture: ViT-B-32}}."
                if self.takes_text
                else f"model.text: objective '{name}' does not train a text tower. Start from the "
                f"image tower alone, as in --init runs/wsp_clip:encoder."
            )
        self.model = model

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


class Masked(Objective):
    """An objective whose encoder sees a random part of the patches, and only that. N patches, K
    kept, M masked."""

    def __init__(
        self, model: Model, *, mask_ratio: float, crop_scale: tuple[float, float] = (0.2, 1.0)
    ):
        super().__init__(model)
        encoder = model.encoder
        if encoder.prefix != 1 or not isinstance(encoder, ViT):
            raise ValueError(
                f"model.encoder: a {type(encoder).__name__} cannot encode a part of the patches. Take "
                f"a vit_…, or objective 'simmim', which encodes all."
            )
        self.patches = encoder.grid**2
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
        order = noise.argsort(1)
        return order[:, : self.kept], order[:, self.kept :]


class Masking:
    """A sample to {"image": uint8 [3, S, S], "noise": float32 [places]}, by the sample's own
    randomness; the noise's order says what is masked."""

    def __init__(self, size: int, places: int, crop_scale: tuple[float, float] | None):
        """crop_scale None: the fixed centre crop of validation."""
        self.size, self.places, self.crop_scale = size, places, crop_scale

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        noise = sample["random"]("mask").random(self.places, dtype="float32")
        image = picture(sample, self.size, self.crop_scale)
        return {"image": image, "noise": torch.from_numpy(noise)}
