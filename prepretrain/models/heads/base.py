"""What a Model may end with: from its encoder's tokens to what is asked of an image. B images, N
patches, D channels, C classes."""

from typing import Any, Literal

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

    def forward(self, tokens: Tensor) -> Any:
        """[B, prefix + N, D] tokens of the encoder's last layer to what this head gives."""
        raise NotImplementedError


class Scores(Head):
    """A head that gives each of an image's classes a score."""

    def __init__(self, encoder: Encoder, classes: int, pool: Literal["class", "mean"]):
        """pool: how an image's tokens become one feature."""
        super().__init__()
        self.classes, self.pool, self.prefix = classes, pool, encoder.prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, prefix + N, D] to [B, C]."""
        return self.scores(encoders.pool(tokens, self.prefix, self.pool))

    def scores(self, feature: Tensor) -> Tensor:
        """[B, D] to [B, C]."""
        raise NotImplementedError


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
