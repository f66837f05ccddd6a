"""What every image encoder offers, and how one is found by the name of its size."""

import importlib
from collections.abc import Sequence
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from prepretrain import plugin


class Encoder(nn.Module):
    """An image encoder. B images, N patches (cells of the grid), D channels.

    A family is one file of this folder: one subclass, and a table SIZES that maps the name of a
    size to the constructor options it stands for.
    """

    width: int  # D
    stride: int  # pixels per cell of the grid
    patch: int  # pixels per embedded patch, at most `stride`: what `hide` hides
    patch_width: int  # channels of an embedded patch
    prefix: int  # tokens before the grid (a ViT's class token: 1)
    image_size: int  # pixels, square
    blocks: nn.ModuleList  # what is recomputed, compiled and sharded as a unit
    final_norm: bool = True  # the tokens' last operation is a norm
    mean: Sequence[float] | None = None  # of each colour, 0 to 1; None: ImageNet's
    std: Sequence[float] | None = None
    timm_head = "head"  # what timm calls the last linear layer of such a model

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
        layer: int | None = None,
    ) -> Tensor:
        """[B, 3, H, W] normalised images to [B, prefix + N, D] tokens after the final norm.

        keep: int64 [B, K], encode those patches only (MAE); the result is [B, prefix + K, D] in
        that order. hide: (bool mask [B, P], token [patch_width]), put the token in the place of the
        masked ones of the P embedded patches (SimMIM). layer: the tokens after that many blocks,
        without the final norm.
        """
        raise NotImplementedError

    def check(self, image: Tensor) -> None:
        """Raises ValueError for images of another size than the encoder's."""
        if tuple(image.shape[-2:]) != (self.image_size,) * 2:
            raise ValueError(
                f"model.image_size is {self.image_size} and an image is {tuple(image.shape[-2:])}."
            )

    def initialise(self, name: str, tensor: Tensor, generator: Any) -> bool:
        """Fills one parameter by its name; False leaves it to the rule of its layer's type."""
        return False

    def adapt(self, name: str, tensor: Tensor) -> Tensor:
        """A checkpoint's tensor made to fit this encoder's image size, where that has a meaning."""
        return tensor

    @staticmethod
    def follow(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Options to add to those of a model (`after`) that starts from the weights of another
        (`before`), both complete."""
        return {}

    @staticmethod
    def released(names: list[str]) -> dict[str, str | None]:
        """Our name of each tensor of a file, which others may have released under their own; None
        for one that this encoder has no use for (tables derived from its options, a text tower)."""
        return {n: n for n in names}

    @staticmethod
    def offered(name: str) -> dict[str, Any]:
        """The options of a Model for weights that another library offers by name. Raises ValueError
        if it does not."""
        raise NotImplementedError

    @staticmethod
    def fetch(name: str) -> dict[str, Tensor]:
        """Those weights, through the library's own hub and cache."""
        raise NotImplementedError

    def refuse(self, **given: Any) -> None:
        """Raises ValueError for arguments of `forward` that this encoder does not offer, if they are
        given."""
        what = {
            "keep": "leave patches out (objective mae)",
            "hide": "hide patches (objective simmim)",
            "layer": "stop at a layer",
        }
        asked = [what[name] for name, value in given.items() if value is not None]
        if asked:
            raise ValueError(
                f"model.encoder: a {type(self).__name__} cannot {' and '.join(asked)}. Take one of the "
                f"ViT sizes, as vit_b16."
            )

    def timm(self) -> dict[str, Any]:
        """{"architecture": …, "model_args": …} with which timm builds the same encoder."""
        raise NotImplementedError

    def open_clip(self, state: dict[str, Tensor], pool: str) -> tuple[dict[str, Any], dict]:
        """open_clip's `vision_cfg` of the same encoder, pooled by `pool`, and the state under its
        names, without a projection. Raises ValueError where open_clip has no such tower."""
        raise ValueError(f"open_clip has no image tower like {type(self).__name__}.")


def resample_positions(table: Tensor, grid: int, prefix: int) -> Tensor:
    """Positions [1, prefix + N, D] of a square grid resampled to another (bicubic, as timm and MAE's
    users do); anything else as it is."""
    old = round(max(table.shape[1] - prefix, 0) ** 0.5) if table.ndim == 3 else 0
    if old in (0, grid) or old**2 + prefix != table.shape[1]:
        return table
    return resample_abs_pos_embed(table, [grid] * 2, [old] * 2, num_prefix_tokens=prefix)


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
        table = importlib.import_module(f"prepretrain.models.encoders.{family}").SIZES
        found.update(
            {name: (plugin.find("encoders", family), preset) for name, preset in table.items()}
        )
    return found


def find(encoder: str) -> tuple[type[Encoder], dict[str, Any]]:
    """(family, the options it stands for) of a size's name (`vit_l16`), or of a dotted module
    outside the package. Raises ValueError for an unknown one."""
    known = sizes()
    if encoder in known:
        return known[encoder]
    if "." in encoder:
        return plugin.find("encoders", encoder), {}
    raise ValueError(
        "model.encoder: " + plugin.unknown("no encoder", encoder, sorted(known), quote=True)
    )


def build(encoder: str, **options: Any) -> Encoder:
    """The encoder of a size's name. Raises ValueError for an unknown size or option."""
    family, preset = find(encoder)
    return family(**plugin.check(family, {**preset, **options}, "model"))


def follow(before: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The options of a Model that starts from one with the options `before`, with `changes`."""
    after = {**before, **changes}
    if "encoder" not in before or "encoder" not in after:
        return after
    family, preset = find(after["encoder"])
    defaults = {k: p.default for k, p in plugin.options(family).items() if p.default is not p.empty}
    whole = {**defaults, **preset}
    return {**after, **family.follow({**whole, **before}, {**whole, **after})}
