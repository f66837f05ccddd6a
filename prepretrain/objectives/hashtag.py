"""Weakly supervised pretraining by hashtags: stage two (MAWS, arXiv 2303.13496, section 3; SWAG's
recipe)."""

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from prepretrain.data import rarest
from prepretrain.data.batch import Ragged
from prepretrain.data.card import data_folder
from prepretrain.data.sources.base import fingerprint_of
from prepretrain.data.transforms import BadImage, Size
from prepretrain.data.vocabulary import Vocabulary
from prepretrain.data.weights import Weights
from prepretrain.losses.sparse import sparse_cross_entropy
from prepretrain.models.heads import base as heads
from prepretrain.models.model import Model
from prepretrain.objectives.base import Objective, blank_images, cropped_image

logger = logging.getLogger(__name__)


class Hashtag(Objective):
    """Softmax cross-entropy against the image's tags, each with weight 1 / number of tags (SWAG
    issue 15).

    Tags travel as ids padded with -1, never as a [B, vocabulary] target.
    """

    fields = ("image", "hashtags")

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: str,
        tags: int | None = None,
        head: Literal["linear", "mlp"] = "mlp",
        pool: Literal["class", "mean"] = "class",
        crop_scale: tuple[float, float] = (0.08, 1.0),
    ):
        """vocabulary: the file that datasets/hashtags.py wrote, under the data folder. tags: how
        many it must hold, which is then known before it is opened; None takes what it holds."""
        super().__init__(model)
        self.path, self.crop_scale = data_folder() / vocabulary, crop_scale
        self._vocabulary: Vocabulary | None = None
        self.tags = len(self.vocabulary.tags) if tags is None else tags
        options = {"name": head, "classes": self.tags, "pool": pool}
        self.head = heads.build(model.encoder, options, "objective.head")

    @property
    def vocabulary(self) -> Vocabulary:
        """The tags, read when first needed. Raises ValueError if the file is missing or not of the
        stated size."""
        if self._vocabulary is None:
            found = Vocabulary.load(self.path)
            if getattr(self, "tags", len(found.tags)) != len(found.tags):
                raise ValueError(
                    f"objective.tags: {self.tags}, and {self.path} holds {len(found.tags)}. With "
                    f"objective.tags=null it may hold any number."
                )
            self._vocabulary = found
        return self._vocabulary

    def check(self, card: Any, source: Any) -> None:
        """Also refuses a vocabulary that was built from other data."""
        super().check(card, source)
        self.vocabulary.check(source)

    def repeats(self, source: Any) -> Weights | None:
        """Never for an image without a known tag. The tags are read from the data once."""
        tags = rarest.read(self.path, self.vocabulary, source)
        known = Weights(
            len(tags),
            fingerprint_of(["known", *rarest.identity(self.vocabulary)]),
            lambda where: tags[where] >= 0,
        )
        untagged = len(tags) - int(sum(some.sum() for some in known.chunks()))
        if untagged == len(tags):
            raise ValueError(f"data.train: no image has a tag that is in {self.path}.")
        if not untagged:
            return None
        logger.info("%d of %d images have no known tag: left out", untagged, len(tags))
        return known

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A random resized crop and flip (a centre crop for validation), and the ids of the known
        tags."""
        return Transform(
            self.model.encoder.image_size, self.vocabulary, self.crop_scale if train else None
        )

    def example(self, images: int) -> dict[str, Tensor]:
        """See Objective.example."""
        return {
            "image": blank_images(images, self.model.encoder.image_size),
            "tags": torch.empty(images, 3, dtype=torch.int64, device="meta"),
        }

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"image": uint8 [B, 3, H, W], "tags": int64 [B, T] padded with -1} to the loss and top-1
        accuracy."""
        logits, tags = self.head(self.model(batch["image"])), batch["tags"]
        best = logits.detach().argmax(1, keepdim=True)
        return {
            "loss": sparse_cross_entropy(logits, tags).mean(),
            "accuracy": (best == tags).any(1).float().mean(),
        }


class Transform:
    """A sample to {"image": uint8 [3, H, W], "tags": ids}. A sample without a known tag is a bad
    one."""

    def __init__(self, size: Size, vocabulary: Vocabulary, crop_scale: tuple[float, float] | None):
        self.size, self.vocabulary, self.crop_scale = size, vocabulary, crop_scale

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Raises BadImage("no known tag"), which the loader substitutes and counts."""
        ids = self.vocabulary.ids(sample["hashtags"])
        if not ids:
            raise BadImage("no known tag")
        tags = Ragged(torch.tensor(ids), fill=-1)
        return {"image": cropped_image(sample, self.size, self.crop_scale), "tags": tags}
