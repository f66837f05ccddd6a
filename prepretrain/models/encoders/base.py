"""What every image encoder offers, and how one is found by the name of its size."""

import importlib
import math
from collections.abc import Sequence
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from prepretrain import plugin
from prepretrain.data.transforms import Size, sides

_WAYS = {  # of encoding, beside a whole image's
    "keep": "leave patches out (objective mae)",
    "hide": "hide patches (objective simmim)",
    "layer": "stop at a layer",
    "maps": "give maps (heads of dense tasks)",
}


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
    image_size: tuple[int, int]  # pixels: height, width
    frames: int | None = None  # of the clips [B, 3, frames, H, W] that it takes; None: images
    takes: tuple[str, ...] = ()  # what of keep, hide, layer and maps `forward` offers
    blocks: nn.ModuleList  # what is recomputed, compiled and sharded as a unit
    # (channels, pixels per cell) of each stage of a hierarchical encoder, whose `maps` counts stages,
    # not blocks; a plain one has none: all its maps are of `width` and `stride`
    scales: tuple[tuple[int, int], ...] = ()
    trains: bool = (
        True  # an objective can train it; else it is a teacher or is measured beside ours
    )
    final_norm: bool = True  # the tokens' last operation is a norm
    mean: Sequence[float] | None = None  # of each colour, 0 to 1; None: ImageNet's
    std: Sequence[float] | None = None
    timm_head = "head"  # what timm calls the last linear layer of such a model

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells that an image has."""
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride

    @property
    def cells(self) -> int:
        """N, the cells of the grid."""
        return math.prod(self.grid)

    def forward(
        self,
        image: Tensor,
        *,
        keep: Tensor | None = None,
        hide: tuple[Tensor, Tensor] | None = None,
        layer: int | None = None,
        maps: Sequence[int] = (),
    ) -> Any:
        """[B, 3, H, W] normalised images to [B, prefix + N, D] tokens after the final norm.

        keep: int64 [B, K], encode those patches only (MAE); the result is [B, prefix + K, D] in
        that order. hide: (bool mask [B, P], token [patch_width]), put the token in the place of the
        masked ones of the P embedded patches (SimMIM). layer: the tokens after that many blocks,
        without the final norm. maps: numbers of blocks, or of stages where there are
        `scales`, from 1, in rising order; the result is a list of what comes after each, [B, D, rows,
        columns] without the prefix, and after the final norm for the last alone.
        """
        raise NotImplementedError

    def check(self, image: Tensor, **how: Any) -> None:
        """Raises ValueError for images of another size than the encoder's, and for what of keep,
        hide and layer is given and not offered."""
        if tuple(image.shape[-2:]) != self.image_size:
            raise ValueError(
                f"model.image_size is {' x '.join(map(str, self.image_size))} and an image is "
                f"{' x '.join(map(str, image.shape[-2:]))} pixels."
            )
        wanted = [3] if self.frames is None else [3, self.frames]
        if list(image.shape[1:-2]) != wanted:
            raise ValueError(
                f"model.frames: {self.frames} takes [B, {', '.join(map(str, wanted))}, H, W], and what it "
                f"is given is {list(image.shape)}."
            )
        self.require([name for name, value in how.items() if value is not None], "model.encoder")

    def require(self, ways: Sequence[str], who: str) -> None:
        """Raises ValueError if `takes` lacks one of these."""
        lacking = [_WAYS[way] for way in ways if way not in self.takes]
        if lacking:
            raise ValueError(
                f"{who}: a {type(self).__name__} cannot {' and '.join(lacking)}. Take one of the ViT "
                f"sizes, as vit_b16."
            )

    def initialise(self, name: str, tensor: Tensor, generator: Any) -> bool:
        """Fills one parameter by its name; False leaves it to the rule of its layer's type."""
        return False

    def adapt(self, name: str, tensor: Tensor, before: dict[str, Any]) -> Tensor:
        """A checkpoint's tensor made to fit this encoder's image size, where that has a meaning.

        before: the options of the model that the tensor is of, as far as they are known.
        """
        return tensor

    @staticmethod
    def follow(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Options to add to those of a model (`after`) that starts from the weights of another
        (`before`), both complete."""
        return {}

    def released(self, names: list[str]) -> dict[str, str | None]:
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

    def timm(self) -> dict[str, Any]:
        """{"architecture": …, "model_args": …} with which timm builds the same encoder. Raises
        ValueError where timm has no such encoder under the same key names."""
        raise ValueError(f"timm has no encoder like {type(self).__name__}.")

    def open_clip(self, state: dict[str, Tensor], pool: str) -> tuple[dict[str, Any], dict]:
        """open_clip's `vision_cfg` of the same encoder, pooled by `pool`, and the state under its
        names, without a projection. Raises ValueError where open_clip has no such tower."""
        raise ValueError(f"open_clip has no image tower like {type(self).__name__}.")


def resample_positions(
    table: Tensor, grid: tuple[int, int], prefix: int, stride: int, before: dict[str, Any]
) -> Tensor:
    """Positions [1, prefix + N, D] of another grid resampled to this one as timm and open_clip do,
    bicubic with antialiasing; MAE's and DINO's own code has none. What is no table of positions stays
    as it is.

    The other grid is that of the image size in `before`, at this stride. A file of others does not say
    it and is taken for a square, as by timm: 16 cells are 4 x 4, were they 2 x 8.
    """
    cells = table.shape[1] - prefix if table.ndim == 3 else 0
    stated = before.get("image_size")
    old = tuple(side // stride for side in sides(stated)) if stated is not None else (0, 0)
    if math.prod(old) != cells:
        old = (math.isqrt(max(cells, 0)),) * 2
    if old == grid or cells < 1 or math.prod(old) != cells:
        return table
    return resample_abs_pos_embed(table, list(grid), list(old), num_prefix_tokens=prefix)


def whole_cells(image_size: Size, stride: int, what: str) -> tuple[int, int]:
    """An image size as (height, width). Raises ValueError if a side is no multiple of the stride,
    which `what` explains."""
    height, width = sides(image_size)
    if height % stride or width % stride or min(height, width) < stride:
        raise ValueError(f"model.image_size: {image_size} is no multiple of {what}.")
    return height, width


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
    if not isinstance(encoder, str):
        raise ValueError(
            f"model.encoder: {encoder!r} is no name. There are: {', '.join(sorted(known))}."
        )
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
    if options.get("frames") is not None and "frames" not in plugin.options(family):
        raise ValueError(
            f"model.frames: a {family.__name__} takes images, not clips. Take one of the ViT sizes, as "
            f"vit_b16. --stage eval/video_linear probes any encoder of images on the frames of clips."
        )
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
