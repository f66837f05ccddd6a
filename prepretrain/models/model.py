"""`Model`, the noun that travels: an image encoder, and a text tower if it has one, that knows the
options that made it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from prepretrain import plugin, ranges
from prepretrain.data import transforms
from prepretrain.models.encoders import base as encoders
from prepretrain.models.heads import base as heads
from prepretrain.models.heads.base import Detections, Detector, Scores
from prepretrain.models.joint import Joint
from prepretrain.models.text.base import Tower

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Model(nn.Module):
    """An image encoder, its preprocessing and its options; fine-tuned, also a head; with captions,
    also a text tower and the space that both share. B images or texts, N patches, D channels, C
    classes, L tokens, J shared channels."""

    container = True  # its children are sharded, not it (see shard.find_roots)
    precision = "fp32"  # of what it computes itself: normalised images

    def __init__(
        self,
        *,
        encoder: str,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        text: dict[str, Any] | None = None,
        joint: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        **options: Any,
    ):
        """encoder: a size's name, as in `vit_l16`; options: those of its family (image_size,
        drop_path, …). mean, std: of each colour, 0 to 1; by default those that the encoder states
        (of another library's weights), else ImageNet's. text: {name: open_clip | xlmr, options of
        that class in text/}, and joint: the options of joint.Joint; a model without `text` has
        neither. head: {name: linear, options of that class in heads/}."""
        super().__init__()
        self.encoder = encoders.build(encoder, **options)
        self.mean = _colour(mean or self.encoder.mean or IMAGENET_MEAN, "mean")
        self.std = _colour(std or self.encoder.std or IMAGENET_STD, "std")
        for name in ("shift", "scale"):
            self.register_buffer(name, torch.empty(3, 1, 1), persistent=False)
        self.init_non_persistent_buffers()
        colours = {"mean": list(self.mean), "std": list(self.std)}
        self.options = {"encoder": encoder, **colours, **options}
        self.text = self.joint = self.head = None
        if head is not None:
            self.head = heads.build(self.encoder, head)
            self.options |= {"head": dict(head)}
            if self.head.normed and self.encoder.final_norm:
                raise ValueError(
                    "model.head.norm: the encoder ends with a norm already; with model.final_norm=false "
                    "the one of the head takes its place."
                )
        if text is not None:
            self.text = _tower(text)
            self.options |= {"text": dict(text), "joint": dict(joint or {})}
            asked = plugin.check(Joint, dict(joint or {}), "model.joint")
            self.joint = Joint(self.encoder.width, self.text.width, **asked)
        elif joint is not None:
            raise ValueError(
                "model.joint: there is nothing to join without a text tower. Give model.text, as in "
                "model.text={name: open_clip, architecture: ViT-B-32}."
            )

    def init_non_persistent_buffers(self) -> None:
        """Fills what normalising takes, which lies on the model's device: a copy from the host in
        each step would be a wait."""
        for buffer, colour in ((self.shift, self.mean), (self.scale, self.std)):
            buffer.copy_((torch.tensor(colour, device="cpu") * 255).view(3, 1, 1))

    def normalise(self, image: Tensor) -> Tensor:
        """[B, 3, H, W], or clips [B, 3, T, H, W], of 0 to 255 to float32, by mean and std, on the
        model's device."""
        shift, scale = self.shift, self.scale
        if image.ndim == 5:
            shift, scale = shift[:, None], scale[:, None]
        return (image.float() - shift) / scale

    def denormalise(self, image: Tensor) -> Tensor:
        """float [B, 3, H, W] back to uint8, clipped to what a picture can show."""
        return (image.float() * self.scale + self.shift).round().clamp(0, 255).to(torch.uint8)

    def forward(self, image: Tensor, **how: Any) -> Tensor:
        """uint8 [B, 3, H, W], of clips [B, 3, T, H, W], to tokens [B, prefix + N, D]; how: keep, hide
        and layer, as Encoder.forward's."""
        return self.encode(self.normalise(image), **how)

    def encode(self, image: Tensor, **how: Any) -> Tensor:
        """Normalised float [B, 3, H, W] to tokens [B, prefix + N, D]; how: as `forward`'s."""
        return self.encoder(image, **how)

    def normalise_padded(self, image: Tensor, sizes: Tensor) -> Tensor:
        """As `normalise`, of images padded at the right and below; int64 [B, 2]: the height and width
        of each within. What is padded is 0 afterwards, as if by the mean colour."""
        rows, columns = (torch.arange(side, device=image.device) for side in image.shape[-2:])
        inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]
        return self.normalise(image) * inside[:, None]

    def read(self, image: Tensor) -> Any:
        """Normalised float [B, 3, H, W] to what the head reads: see heads/base.py."""
        return self.encode(image, maps=self.head.layers) if self.head.layers else self.encode(image)

    def preprocess(self, image: Image.Image | str | Path, share: float = 0.875) -> Tensor:
        """A PIL image, or the path of an image file, to uint8 [3, H, W] for `features`, cropped as the
        evaluators do; share: of the image's short side that the centre crop shows."""
        pixels = transforms.pixels(image)
        return transforms.resize_center_crop(pixels, self.encoder.image_size, share=share)

    def features(self, image: Tensor, pool: str = "class", layer: int | None = None) -> Tensor:
        """uint8 [B, 3, H, W] to one float32 feature [B, D] an image; pool "joint": [B, J] of length
        1, in the space of the texts; "scores": [B, C] of its classifier. Raises ValueError for images
        of another type, whose range nobody knows."""
        if image.dtype != torch.uint8:
            raise ValueError(
                f"images are uint8, 0 to 255, and these are {image.dtype}. `preprocess` makes them of a "
                f"file or a PIL image; of float images in 0 to 1 make "
                f"(255 * image).round().to(torch.uint8). `encode` takes those that are normalised."
            )
        if pool == "scores":
            return self.scores(image)
        if pool == "joint":
            self.require_text("features")
            return self.joint(self._pooled(image, self.joint.pool), None)[0]
        return encoders.pool(self(image, layer=layer), self.encoder.prefix, pool).float()

    def scores(self, image: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, C], by the classifier of a fine-tuned model."""
        self.require_scores("scores")
        return self.head(self(image)).float()

    def detect(self, image: Tensor, sizes: Tensor, **how: Any) -> list[Detections]:
        """uint8 [B, 3, H, W], padded as for `normalise_padded`, and int64 [B, 2] to what is found in
        each; how: as Detector.detect's."""
        self.require_detector("detect")
        maps = self.read(self.normalise_padded(image, sizes))
        return self.head.detect(maps, sizes, **how)

    def text_features(self, tokens: Tensor) -> Tensor:
        """int64 [B, L] to float32 [B, J] of length 1, in the space of the images."""
        self.require_text("text_features")
        return self.joint(None, self.text(tokens))[1]

    def pairs(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """uint8 [B, 3, H, W] and int64 [B, L] to the features of both, [B, J] each of length 1, the
        scale [1] and the bias [1] of their products."""
        return self.joint(self._pooled(image, self.joint.pool), self.text(tokens))

    def _pooled(self, image: Tensor, pool: str) -> Tensor:
        return encoders.pool(self(image), self.encoder.prefix, pool)

    def require_scores(self, who: str) -> None:
        """Raises ValueError, saying which stage makes one, if there is no classifier."""
        if not isinstance(self.head, Scores):
            raise ValueError(
                f"{who}: this model has no classifier. Fine-tuning makes one: --stage finetune, from "
                f"this model with --init."
            )

    def require_detector(self, who: str) -> None:
        """Raises ValueError, saying which stage makes one, if the head finds no objects."""
        if not isinstance(self.head, Detector):
            raise ValueError(
                f"{who}: this model finds no objects. Fine-tuning on boxes makes one that does: --stage "
                f"finetune/coco_vitdet_b, from this model with --init."
            )

    def require_text(self, who: str) -> None:
        """Raises ValueError, saying which stage makes one, if there is no text tower."""
        if self.text is None:
            raise ValueError(
                f"{who}: this model has no text tower. Stage two with captions makes one: "
                f"--stage wsp_clip or --stage wsp_lit, from this model with --init. One trained on hashtags "
                f"is measured by --stage eval/zeroshot_tags."
            )


def _tower(given: Any) -> Tower:
    if not isinstance(given, dict):
        raise ValueError(
            f"model.text: {given!r} is no section. It has a name, as in {{name: xlmr}}."
        )
    given = dict(given)
    try:
        family = plugin.find("towers", str(given.pop("name", None)))
    except ValueError as error:
        raise ValueError(f"model.text.name: {error}") from error
    return family(**plugin.check(family, given, "model.text"))


def _colour(values: Any, name: str) -> tuple[float, float, float]:
    colours = plugin.coerce(values, tuple[float, float, float], f"model.{name}")
    ranges.check("model", name, colours, f"model.{name}")
    return colours
