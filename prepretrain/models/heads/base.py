"""What a Model may end with: from what its encoder gives to what is asked of an image.

A head reads its encoder in one of two ways, which `Head.layers` states, and an objective or evaluator
asks for a kind of head by its class:

* `Scores` reads tokens [B, prefix + N, D] of the last layer: of an image, or of a clip, of which N alone
  is larger (video). It gives `scores(feature)` [B, C].
* `Dense` reads maps, a list of [B, D, rows, columns], one for each of the encoder's `layers`: blocks of
  a plain encoder, or stages of one with `scales`, whose D and stride differ. It gives a value for each place, as [B, C, rows', columns'] of classes (segmentation) or depths.
* `Detector`, a `Dense`, takes the sizes of images within a padded batch, too. It gives what losses are
  made of in training, else `Detections`.

So a head never asks which encoder it is on: it is built on `encoder.width` and `encoder.stride`, and
what it needs of it is `maps` among `encoder.takes`. `Model.read` gives a head what it reads.

B images, N patches, D channels, C classes.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prepretrain import plugin
from prepretrain.models.encoders import base as encoders
from prepretrain.models.encoders.base import Encoder


class Head(nn.Module):
    """A part on top of an encoder that is trained with it and stays with it.

    A head is one file of this folder: one subclass, whose constructor takes the encoder, and whose
    keywords are its options.
    """

    normed = False  # begins with a norm, which takes the place of the encoder's last
    layers: tuple[int, ...] = ()  # of the encoder, whose maps it reads; none: the last one's tokens

    def forward(self, features: Any) -> Any:
        """What `layers` says of the encoder to what this head gives."""
        raise NotImplementedError


class Scores(Head):
    """A head that gives each of an image's classes a score."""

    def __init__(self, encoder: Encoder, classes: int, pool: Literal["class", "mean"]):
        """pool: how an image's tokens become one feature."""
        super().__init__()
        if classes < 2:
            raise ValueError(f"model.head.classes: {classes} leaves nothing to tell apart; take 2.")
        self.classes, self.pool, self.prefix = classes, pool, encoder.prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, prefix + N, D] to [B, C]."""
        return self.scores(encoders.pool(tokens, self.prefix, self.pool))

    def scores(self, feature: Tensor) -> Tensor:
        """[B, D] to [B, C]."""
        raise NotImplementedError


class Dense(Head):
    """A head that reads maps. Where the encoder has no last norm, it needs none: a norm of weights
    that the model starts from is left out."""

    def __init__(self, encoder: Encoder, layers: tuple[int, ...]):
        """layers: the numbers of the encoder's blocks or stages, from 1, whose maps it reads."""
        super().__init__()
        encoder.require(("maps",), "model.head")
        if not layers or list(layers) != sorted(set(layers)):
            raise ValueError(
                f"model.head.layers: {list(layers)} must be different blocks, in rising order."
            )
        if layers[-1] > last(encoder)[0]:
            raise ValueError(
                f"model.head.layers: {list(layers)}: this encoder has {last(encoder)[0]} blocks (or stages). "
                f"model.head.layers=null takes those that the head reads by default."
            )
        self.layers, self.normed = layers, not encoder.final_norm

    def width_of(self, encoder: Encoder) -> int:
        """The channels of its maps, side by side."""
        if encoder.scales:
            return sum(encoder.scales[number - 1][0] for number in self.layers)
        return len(self.layers) * encoder.width


class Segmenter(Dense):
    """A head that gives each place a score for each class."""

    weights: tuple[float, ...] = (1.0,)  # of the losses of what it gives in training

    def __init__(self, encoder: Encoder, classes: int, layers: tuple[int, ...]):
        super().__init__(encoder, layers)
        if classes < 2:
            raise ValueError(f"model.head.classes: {classes} leaves nothing to tell apart; take 2.")
        self.classes = classes

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps to scores [B, C, rows, columns]: first what it says; what follows, in training alone,
        only helps to train."""
        raise NotImplementedError


class Depths(Dense):
    """A head that gives each place a depth."""

    def __init__(self, encoder: Encoder, range: tuple[float, float], layers: tuple[int, ...]):
        """range: metres, of the nearest and the farthest depth that it gives."""
        super().__init__(encoder, layers)
        self.range = range

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps to depths in metres [B, 1, rows, columns]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Detections:
    """What a detector finds in one image, the surest first: boxes float [n, 4] in pixels (left, top,
    right, bottom), scores [n], classes int64 [n], masks float [n, S, S] of 0 to 1 within each box."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor | None


class Detector(Dense):
    """A head that finds objects. Images of a batch are padded to one size at the right and below."""

    def __init__(self, encoder: Encoder, classes: int, *, draws: bool, sigmoid: bool):
        """draws: says the masks of objects, too. sigmoid: scores each class by itself."""
        stages = range(1, len(encoder.scales) + 1)
        super().__init__(encoder, tuple(stages) or (len(encoder.blocks),))
        self.classes, self.draws, self.sigmoid = classes, draws, sigmoid

    def forward(self, maps: list[Tensor], sizes: Tensor, objects: Any, seeds: Tensor) -> Any:
        """In training: maps, each image's own height and width int64 [B, 2], its objects
        (models/dense/boxes.py), and numbers int64 [B] that what is drawn for each depends on, to what
        losses are made of."""
        raise NotImplementedError

    def detect(self, maps: list[Tensor], sizes: Tensor, **how: Any) -> list[Detections]:
        """What is found in each image.

        how: threshold, the least score; overlap, from which of two boxes of a class the less sure one
        is suppressed; most, of an image; soft, {"linear": …} or {"gaussian": …}: Soft-NMS instead.
        """
        raise NotImplementedError


def last(encoder: Encoder) -> tuple[int]:
    """The number of an encoder's last block, or stage."""
    return (len(encoder.scales or encoder.blocks),)


def quarters(encoder: Encoder) -> tuple[int, ...]:
    """The numbers of the blocks at the ends of an encoder's quarters, or of its stages."""
    if encoder.scales:
        return tuple(range(1, len(encoder.scales) + 1))
    depth = len(encoder.blocks)
    return tuple(depth * part // 4 for part in range(1, 5))


def joined(maps: list[Tensor]) -> Tensor:
    """Maps side by side, [B, sum of D, rows, columns] of the first's resolution."""
    size = maps[0].shape[-2:]
    return torch.cat([F.interpolate(one, size, mode="bilinear") for one in maps], 1)


def build(encoder: Encoder, given: dict[str, Any], where: str = "model.head") -> Head:
    """The head that {name: …, options} describes, `linear` where no name is given. Raises
    ValueError for an unknown name or option."""
    if not isinstance(given, dict):
        raise ValueError(
            f"{where}: {given!r} is no section. It has a name and options, as in "
            f"{{name: linear, classes: 1000}}."
        )
    options = {key: value for key, value in given.items() if key != "name"}
    try:
        family = plugin.find("heads", given.get("name", "linear"))
    except ValueError as error:
        raise ValueError(f"{where}.name: {error}") from error
    return family(encoder, **plugin.check(family, options, where))
