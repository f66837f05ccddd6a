"""What every image encoder offers, and how one is found by the name of its size."""

import importlib
from typing import Any

from torch import Tensor, nn

from prepretrain import plugin


class Encoder(nn.Module):
    """An image encoder. B images, N patches (cells of the grid), D channels.

    A family is one file of this folder: one subclass, and a table SIZES that maps the name of a
    size to the constructor options it stands for.
    """

    width: int  # D
    stride: int  # pixels per cell of the grid
    prefix: int  # tokens before the grid (a ViT's class token: 1)
    image_size: int  # pixels, square
    blocks: nn.ModuleList  # what is recomputed, compiled and sharded as a unit

    @property
    def grid(self) -> int:
        """Cells along one side of the image."""
        return self.image_size // self.stride

    def forward(
        self,
        image: Tensor,
        *,
        keep: Tensor | None = None,
        hide: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, 3, H, W] normalised images to [B, prefix + N, D] tokens after the final norm.

        keep: int64 [B, K], encode those patches only (MAE); the result is [B, prefix + K, D] in
        that order. hide: (bool mask [B, N], token [D]), put the token in the place of the masked
        patches (SimMIM).
        """
        raise NotImplementedError

    def initialise(self, name: str, tensor: Tensor, generator: Any) -> bool:
        """Fills one parameter by its name; False leaves it to the rule of its layer's type."""
        return False

    def adapt(self, name: str, tensor: Tensor) -> Tensor:
        """A checkpoint's tensor made to fit this encoder's image size, where that has a meaning."""
        return tensor

    def timm(self) -> dict[str, Any]:
        """{"architecture": …, "model_args": …} with which timm builds the same encoder."""
        raise NotImplementedError

    def open_clip(self, state: dict[str, Tensor], pool: str) -> tuple[dict[str, Any], dict]:
        """open_clip's `vision_cfg` of the same encoder, pooled by `pool`, and the state under its
        names, without a projection. Raises ValueError where open_clip has no such tower."""
        raise ValueError(f"open_clip has no image tower like {type(self).__name__}.")


def pool(tokens: Tensor, prefix: int, how: str) -> Tensor:
    """[B, prefix + N, D] tokens to [B, D]: the class token, or the mean over the grid."""
    if how == "class":
        if prefix < 1:
            raise ValueError("pool: this encoder has no class token. Use pool=mean.")
        return tokens[:, 0]
    if how == "mean":
        return tokens[:, prefix:].mean(1)
    raise ValueError(plugin.unknown("no pool", how, ["class", "mean"], quote=True))


def sizes() -> dict[str, tuple[type[Encoder], dict[str, Any]]]:
    """Every size by name: (family, the options it stands for)."""
    found = {}
    for family in plugin.names("encoders"):
        table = importlib.import_module(f"prepretrain.encoders.{family}").SIZES
        found.update(
            {name: (plugin.find("encoders", family), preset) for name, preset in table.items()}
        )
    return found


def build(encoder: str, **options: Any) -> Encoder:
    """The encoder of a size's name (`vit_l16`), or of a dotted module outside the package.

    Raises ValueError for an unknown size or option.
    """
    if "." in encoder and encoder not in sizes():
        family, preset = plugin.find("encoders", encoder), {}
    elif encoder in sizes():
        family, preset = sizes()[encoder]
    else:
        raise ValueError(
            "model.encoder: " + plugin.unknown("no encoder", encoder, sorted(sizes()), quote=True)
        )
    return family(**plugin.check(family, {**preset, **options}, "model"))
