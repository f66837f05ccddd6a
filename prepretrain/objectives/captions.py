"""What objectives over images and captions have in common: the transform that makes their batches, and
the loss over all pairs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prepretrain import plugin
from prepretrain.data.batch import Ragged
from prepretrain.data.tags.spelling import canonical
from prepretrain.data.transforms import BadImage, Size
from prepretrain.losses.contrastive import BIASED, LOSSES
from prepretrain.models.load import open_text
from prepretrain.models.model import Model
from prepretrain.models.text.base import Tokenizer, Tower
from prepretrain.models.weights import Weights
from prepretrain.objectives.base import Objective, blank_images, cropped_image

MULTIPLE = 16  # of texts' lengths in tokens: where blocks are compiled, each length is a graph


class Captioned:
    """A sample to {"image": uint8 [3, H, W], "tokens": int64 [L], "cut": 1 if the caption was longer
    than the tower reads, else 0}; with padding, the tokens are as many as the batch's longest needs."""

    def __init__(
        self,
        size: Size,
        tokenizer: Tokenizer,
        crop_scale: tuple[float, float] | None,
        hashtags: bool,
        padding: int | None = None,
    ):
        """crop_scale None: validation's centre crop, and always the first caption. hashtags: they
        are the caption of a sample that has none. padding: Tower.padding."""
        self.size, self.tokenizer = size, tokenizer
        self.crop_scale, self.hashtags, self.padding = crop_scale, hashtags, padding

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Raises BadImage("no caption"), or "bad metadata" for one that is no Unicode text, which the
        loader substitutes and counts."""
        caption = drawn_caption(sample, self.crop_scale is not None, self.hashtags)
        count = self.tokenizer.count(caption)
        if count == 0:
            raise BadImage("no caption", f"{caption[:40]!r} has no token")
        # not mirrored: left and right are words
        image = cropped_image(sample, self.size, self.crop_scale, mirrored=False)
        cut = int(count > self.tokenizer.room)
        tokens = self.tokenizer([caption])[0]
        if self.padding is not None:
            tokens = Ragged(_trimmed(tokens, self.padding), fill=self.padding)
        return {"image": image, "tokens": tokens, "cut": cut}


def _trimmed(tokens: Tensor, padding: int) -> Tensor:
    """Tokens [L] without the padding at their end, but for what makes their number a MULTIPLE."""
    length = int((tokens != padding).nonzero()[-1]) + 1
    return tokens[: -(-length // MULTIPLE) * MULTIPLE]


def drawn_caption(sample: dict[str, Any], train: bool, hashtags: bool = False) -> str:
    """One of a sample's captions by its own randomness, in validation the first. Raises
    BadImage("no caption"), or "bad metadata" for one that is no Unicode text."""
    found = captions(sample, hashtags)
    if not found:
        raise BadImage("no caption")
    caption = found[int(sample["random"]("caption").integers(len(found))) if train else 0]
    try:
        caption.encode()  # json may hold halves of a sign, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise BadImage("bad metadata", f"caption: {error}") from error
    return caption


def captions(sample: dict[str, Any], hashtags: bool = False) -> list[str]:
    """A sample's captions that are not blank, or its text, or, if asked for, its hashtags as one."""
    several = [c for c in sample.get("captions", []) if c.strip()]
    text = sample.get("text", "")
    if several or text.strip():
        return several or [text]
    tags = " ".join(filter(None, map(canonical, sample.get("hashtags", []) if hashtags else [])))
    return [tags] if tags else []


class Contrastive(Objective):
    """What training on captions has in common: a Model with a text tower, and a loss that compares
    every image with every caption of the whole batch, over all processes.

    A process's texts end with the longest of its batch, up to a multiple of 16 tokens, where that
    changes no feature: in open_clip's causal towers with its own BPE, and in XLM-R (whose dropout
    draws other values, as for any other shape). Other towers always read model.text.context tokens.
    """

    fields = ("image", "text", "captions", "hashtags")
    whole_batch = True
    needs = {"text": Tower}
    locked = False  # the image tower learns nothing

    def __init__(
        self,
        model: Model,
        *,
        loss: str = "softmax",
        chunk: int | None = 1024,
        hashtags: bool = False,
        text_weights: str | None = None,
        crop_scale: tuple[float, float] = (0.9, 1.0),
    ):
        """loss: one of losses/contrastive.py: softmax (CLIP) or sigmoid (SigLIP; needs model.joint.bias). chunk: images whose
        products with all captions are held at once in a process; null holds all. hashtags: where a
        sample has no caption, its hashtags are one. text_weights: where the text tower starts from:
        a run, or a checkpoint of open_clip's or Hugging Face's; null starts it from scratch."""
        super().__init__(model)
        if loss not in LOSSES:
            known = plugin.unknown("no loss", loss, list(LOSSES), quote=True)
            raise ValueError(f"objective.loss: {known}")
        if (loss in BIASED) != (model.joint.logit_bias is not None):
            raise ValueError(
                f"objective.loss: {loss} and model.joint.bias={model.joint.logit_bias is not None} do "
                f"not go together: {', '.join(BIASED)} needs model.joint.bias=true, others have no use for one."
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"objective.chunk: {chunk} must be at least 1, or null.")
        self.loss, self.chunk, self.hashtags = loss, chunk, hashtags
        if not hashtags:
            self.fields = ("image", "text", "captions")
        self.text_weights, self.crop_scale = text_weights, crop_scale
        if self.locked:
            model.encoder.requires_grad_(False)

    def check(self, card: Any, source: Any) -> None:
        """Refuses data without captions (or hashtags, where those will do), and a text tower whose
        tokenizer is missing."""
        wanted = ("text", "captions", "hashtags") if self.hashtags else ("text", "captions")
        if not set(wanted) & set(source.fields):
            raise ValueError(
                f"data.train={card.name}: has no {' or '.join(wanted)}, which this objective needs. It "
                f"has: {', '.join(source.fields)}."
                + ("" if self.hashtags else " objective.hashtags=true takes hashtags as captions.")
            )
        self.model.text.tokenizer()

    def starting(self) -> list[tuple[nn.Module, Weights]]:
        """See Objective.starting."""
        if self.text_weights is None:
            return []
        return [(self.model.text, open_text(self.text_weights, self.model.text))]

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A random crop, not mirrored, and one of the captions; in validation the centre and the
        first."""
        return Captioned(
            self.model.encoder.image_size,
            self.model.text.tokenizer(),
            self.crop_scale if train else None,
            self.hashtags,
            self.model.text.padding,
        )

    def example(self, images: int) -> dict[str, Tensor]:
        """See Objective.example; texts of the full length, which no batch is longer than."""
        length = self.model.text.context
        return {
            "image": blank_images(images, self.model.encoder.image_size),
            "tokens": torch.zeros(images, length, dtype=torch.int64, device="meta"),
            "cut": torch.zeros(images, dtype=torch.int64, device="meta"),
        }

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"image": uint8 [B, 3, H, W], "tokens": int64 [B, L], "cut": int64 [B]} to the loss of this
        process's rows, the share of images whose caption is the likeliest of the whole batch, the
        scale, and the share of captions that were longer than the tower reads."""
        image, text, scale, bias = self.model.pairs(batch["image"], batch["tokens"])
        loss, accuracy = LOSSES[self.loss](image, text, scale, bias, self.chunk)
        return {
            "loss": loss,
            "accuracy": accuracy,
            "scale": scale.detach()[0],
            "cut_captions": batch["cut"].float().mean(),
        }
