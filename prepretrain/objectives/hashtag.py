"""Weakly supervised pretraining by labels: stage two (MAWS, arXiv 2303.13496, section 3; SWAG's
recipe), with captions as labels, too (CatLIP, arXiv 2404.15653; SuperClass)."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from prepretrain.data.batch import Ragged
from prepretrain.data.card import data_folder
from prepretrain.data.sampling.weights import Weights
from prepretrain.data.sources.base import fingerprint_of
from prepretrain.data.tags import rarest
from prepretrain.data.tags.vocabulary import Vocabulary, tags_in
from prepretrain.data.transforms import BadImage, Size
from prepretrain.distributed import group as distributed
from prepretrain.losses.rarity import InverseFrequency
from prepretrain.losses.sparse import sparse_binary_cross_entropy, sparse_cross_entropy
from prepretrain.models import tagger
from prepretrain.models.heads import base as heads
from prepretrain.models.model import Model
from prepretrain.models.text.base import Tokenizer
from prepretrain.models.text.open_clip import CLIP_TOKENS, OpenClipTokenizer
from prepretrain.objectives.base import Objective, blank_images, cropped_image
from prepretrain.objectives.captions import drawn_caption

logger = logging.getLogger(__name__)


class Hashtag(Objective):
    """Softmax cross-entropy against the image's tags, each with weight 1 / number of tags (SWAG
    issue 15), or by how rare each is; or a binary cross-entropy for each label.

    Tags travel as ids padded with -1, never as a [B, vocabulary] target.
    """

    fields = ("image", "hashtags")

    def __init__(
        self,
        model: Model,
        *,
        labels: Literal["hashtags", "captions", "tokens"] = "hashtags",
        vocabulary: str | None = None,
        tags: int | None = None,
        loss: Literal["softmax", "binary"] = "softmax",
        idf: bool = False,
        context: int = 77,
        head: Literal["linear", "mlp"] = "mlp",
        pool: Literal["class", "mean"] = "class",
        crop_scale: tuple[float, float] = (0.08, 1.0),
    ):
        """labels: hashtags; captions, the nouns of an image's captions, as CatLIP; tokens, the different
        tokens of one of its captions, by CLIP's tokenizer, as SuperClass.
        vocabulary: the file that datasets/hashtags.py wrote, under the data folder; of tokens none.
        tags: how many it must hold, which is then known before it is opened; None takes what it holds.
        loss: softmax over all labels, or binary, each by itself. idf: weigh an image's labels by how
        rare they are so far (of softmax), see losses/rarity.py. context: tokens that are read of a
        caption, with its start and end."""
        super().__init__(model)
        self.labels, self.loss, self.context = labels, loss, context
        self.crop_scale = crop_scale
        self._check_options(vocabulary, tags, idf)
        if labels != "hashtags":
            self.fields = ("image", "text", "captions")
        self._vocabulary: Vocabulary | None = None
        self.path = None if vocabulary is None else data_folder() / vocabulary
        self.tags = tags
        if tags is None:
            self.tags = CLIP_TOKENS if labels == "tokens" else len(self.vocabulary.tags)
        self.head_options = {"name": head, "classes": self.tags, "pool": pool}
        self.head = heads.build(model.encoder, self.head_options, "objective.head")
        self.weights = InverseFrequency(self.tags) if idf else None
        self.whole_batch = idf

    def _check_options(self, vocabulary: str | None, tags: int | None, idf: bool) -> None:
        if idf and self.loss == "binary":
            raise ValueError(
                "objective.idf: weighs an image's labels against each other, which the binary loss does "
                "not do. Take objective.loss=softmax, or idf=false."
            )
        if self.labels != "tokens" and vocabulary is None:
            raise ValueError(
                "objective.vocabulary: is missing. It is the file, under the data folder, that "
                "datasets/hashtags.py CARD --min-count 100 --out FILE writes."
            )
        for name, value in {"vocabulary": vocabulary, "tags": tags}.items():
            if self.labels == "tokens" and value is not None:
                raise ValueError(
                    f"objective.{name}: {value!r} is not for labels=tokens, which are the tokenizer's "
                    f"{CLIP_TOKENS:,}. Leave it out."
                )

    @property
    def vocabulary(self) -> Vocabulary:
        """The tags, read when first needed. Raises ValueError if the file is missing, not of the
        stated size, or of other labels."""
        if self._vocabulary is None:
            found = Vocabulary.load(self.path)
            if self.tags is not None and self.tags != len(found.tags):
                raise ValueError(
                    f"objective.tags: {self.tags}, and {self.path} holds {len(found.tags)}. With "
                    f"objective.tags=null it may hold any number."
                )
            if found.of != self.labels:
                raise ValueError(
                    f"objective.labels: {self.labels}, and {self.path} was counted from {found.of}. Take "
                    f"objective.labels={found.of}, or another vocabulary."
                )
            self._vocabulary = found
        return self._vocabulary

    def check(self, card: Any, source: Any) -> None:
        """Also refuses a vocabulary that was built from other data."""
        if self.labels == "hashtags":
            super().check(card, source)
        elif not {"text", "captions"} & set(source.fields):
            raise ValueError(
                f"data.train={card.name}: has no text or captions, which objective.labels={self.labels} "
                f"needs. It has: {', '.join(source.fields)}."
            )
        if self.labels != "tokens":
            self.vocabulary.check(source)

    def repeats(self, source: Any) -> Weights | None:
        """Never for an image without a known tag; of tokens once each. The tags are read from the data
        once."""
        if self.labels == "tokens":
            return None
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
        tags. Of tokens, one of the captions, and no flip: left and right are words."""
        size, crop_scale = self.model.encoder.image_size, self.crop_scale if train else None
        if self.labels == "tokens":
            tokenizer = OpenClipTokenizer("ViT-B-32", {}, self.context, None)
            return Transform(size, TokensOf(tokenizer, train), crop_scale, mirrored=False)
        return Transform(size, TagsOf(self.vocabulary), crop_scale, mirrored=True)

    def example(self, images: int) -> dict[str, Tensor]:
        """See Objective.example."""
        return {
            "image": blank_images(images, self.model.encoder.image_size),
            "tags": torch.empty(images, 3, dtype=torch.int64, device="meta"),
        }

    def export(self, folder: Path) -> None:
        """See Objective.export: the head with its vocabulary (models/tagger.py); of tokens, which have no
        names, none."""
        if self.labels == "tokens":
            return
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.head, options=whole)
        if distributed.is_main():
            tagger.write(folder, self.head_options, self.loss, state, self.vocabulary)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"image": uint8 [B, 3, H, W], "tags": int64 [B, T] padded with -1} to the loss and top-1
        accuracy."""
        logits, tags = self.head(self.model(batch["image"])), batch["tags"]
        best = logits.detach().argmax(1, keepdim=True)
        if self.loss == "binary":
            losses = sparse_binary_cross_entropy(logits, tags)
        else:
            weight = None if self.weights is None else self.weights(tags)
            losses = sparse_cross_entropy(logits, tags, weight)
        return {"loss": losses.mean(), "accuracy": (best == tags).any(1).float().mean()}


class TagsOf:
    """The ids of a sample's known tags; of all its captions, where the vocabulary is of captions."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary

    def __call__(self, sample: dict[str, Any]) -> list[int]:
        """Raises BadImage("no known tag")."""
        ids = self.vocabulary.ids(tags_in(sample, self.vocabulary.of))
        if not ids:
            raise BadImage("no known tag")
        return ids


class TokensOf:
    """The ids of the different tokens of one of a sample's captions; as in SuperClass's code, the start,
    the end and what fills the context are labels, too: nearly all captions have them, so they weigh
    next to nothing."""

    def __init__(self, tokenizer: Tokenizer, train: bool):
        self.tokenizer, self.train = tokenizer, train

    def __call__(self, sample: dict[str, Any]) -> list[int]:
        """Raises BadImage for a caption without a token."""
        caption = drawn_caption(sample, self.train)
        if self.tokenizer.count(caption) == 0:
            raise BadImage("no caption", f"{caption[:40]!r} has no token")
        return self.tokenizer([caption])[0].unique().tolist()


class Transform:
    """A sample to {"image": uint8 [3, H, W], "tags": ids}. A sample without a label is a bad one."""

    def __init__(
        self,
        size: Size,
        ids: Callable[[dict[str, Any]], list[int]],
        crop_scale: tuple[float, float] | None,
        mirrored: bool,
    ):
        """crop_scale None: validation's centre crop."""
        self.size, self.ids, self.crop_scale, self.mirrored = size, ids, crop_scale, mirrored

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Raises BadImage, which the loader substitutes and counts."""
        tags = Ragged(torch.tensor(self.ids(sample)), fill=-1)
        image = cropped_image(sample, self.size, self.crop_scale, self.mirrored)
        return {"image": image, "tags": tags}
