"""The plain Vision Transformer, on timm's blocks and with timm's (so MAWS's and MAE's) key names.

B images, N patches, K kept patches, D channels, P pixels along a patch.
"""

import itertools
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from prepretrain.data.transforms import Size, plain_size, sides
from prepretrain.models import clips
from prepretrain.models.dense.windows import (
    DISTANCES,
    GridAttention,
    WindowBlock,
    resize_distances,
    resize_positions,
)
from prepretrain.models.encoders.base import Encoder, resample_positions, whole_cells

SIZES = {
    # MAWS's five (recipes of arXiv 2303.13496): patch, width, depth, heads.
    "vit_b16": dict(patch_size=16, width=768, depth=12, heads=12),
    "vit_l16": dict(patch_size=16, width=1024, depth=24, heads=16),
    "vit_h14": dict(patch_size=14, width=1280, depth=32, heads=16),
    "vit_2b14": dict(patch_size=14, width=2560, depth=24, heads=32),
    "vit_6.5b14": dict(patch_size=14, width=4096, depth=32, heads=32),
    # "Delving Deeper into Data Scaling in Masked Image Modeling", section 3.2
    "vit_h16": dict(patch_size=16, width=1280, depth=32, heads=16),
    # For CPUs, demonstrations and tests: # not from the paper
    "vit_s16": dict(patch_size=16, width=384, depth=12, heads=6),
    "vit_ti16": dict(patch_size=16, width=192, depth=12, heads=3),
    "vit_mini4": dict(patch_size=4, width=96, depth=4, heads=3, image_size=32),
    "vit_mini8": dict(patch_size=8, width=96, depth=4, heads=3, image_size=64),
    "vit_test8": dict(patch_size=8, width=32, depth=2, heads=2, image_size=32),
}

_LACKING = {  # parts of others' ViTs without which the same weights compute something else
    r"blocks\.\d+\.(ls[12]\.|gamma_[12])": "LayerScale",
    r"reg(ister)?_tokens?$": "register tokens",
    r"(norm_pre|ln_pre)\.": "a norm before the blocks",
    r"blocks\.\d+\.attn\.[qk]_norm\.": "norms of queries and keys",
    r"blocks\.\d+\.(attn\.norm|mlp\.norm)\.": "norms within a block",
}


class ViT(Encoder):
    """A pre-norm ViT with a class token and one position table; the constructor's defaults are
    MAWS's.

    With `window` it is the backbone of ViTDet (arXiv 2203.16527) of the same weights: it takes images
    of any whole number of patches, and has no class token, which would be in no window. With `frames`
    it takes clips, [B, 3, frames, H, W], and attends over all of their patches (MAE-ST, arXiv 2205.09113).
    """

    prefix = 1
    takes = ("keep", "hide", "layer", "maps")

    def __init__(
        self,
        *,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        image_size: Size = 224,
        drop_path: float = 0.0,
        positions: Literal["fixed", "learned"] = "learned",
        final_norm: bool = True,
        window: int | None = None,
        global_blocks: int | tuple[int, ...] = 4,
        relative_positions: bool = False,
        position_size: Size | None = None,
        frames: int | None = None,
        tube: int = 2,
        inflate: clips.Inflation = "average",
        time_positions: clips.TimePositions = "zero",
        class_token: bool = True,
    ):
        """positions: the table starts as 2-d sines and cosines; "fixed" (MAE) keeps it so.

        final_norm: SimMIM leaves out a ViT's last norm; with it, the features that it learns cannot
        be read by a linear probe (microsoft/SimMIM, issue 14).

        relative_positions: added to the logits, zero at first; with window or frames only.

        window: patches along a side of the windows within which blocks attend. Only with it:
        global_blocks, which attend to the whole image: how many, at equal distances, the last block
        among them, or their numbers from 1; position_size: the image size of the position table, which
        is resampled for each image's; None: that of the weights that the model starts from (`follow`),
        or 224.

        frames: of the clips that it takes; None takes images. Only with it: tube, the frames of a
        patch; inflate: an image's patches become a clip's by "average", divided among the frames of a
        patch, or by "centre", all of it on the middle one; time_positions: beside the table of an image
        one in time, at first "zero" or drawn from N(0, 0.02) ("normal"), or "joint", one table of all
        places and times, at first the image's for each time, or "sinusoid", fixed ones that no weights
        replace; class_token: false has none, nor takes that of weights.
        """
        super().__init__()
        if width % heads or width % 4:
            raise ValueError(
                f"model.width: {width} must be a multiple of model.heads ({heads}) and of 4."
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"model.drop_path: {drop_path} must lie in [0, 1).")
        self.image_size = whole_cells(image_size, patch_size, f"model.patch_size {patch_size}")
        self.width, self.stride = width, patch_size
        self.patch, self.patch_width = patch_size, width
        self.depth, self.heads, self.final_norm = depth, heads, final_norm
        self.window, self.table_grid = window, self.grid
        self.frames, self.clip = frames, None
        if frames is not None:
            self.takes, self.clip = ("layer",), clips.Clip(frames, tube, inflate, time_positions)
        if window is not None:
            self.prefix, self.takes = 0, ("layer", "maps")
            rows, columns = sides(position_size or 224)
            self.table_grid = rows // patch_size, columns // patch_size
        elif not class_token:
            self.prefix = 0
        _check_together(window, frames, relative_positions, class_token)
        self._add_embedding(positions == "learned")
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        norm = partial(nn.LayerNorm, eps=1e-6)
        if window is None and not relative_positions:
            block = partial(Block, width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm)
            blocks = [block(drop_path=rate) for rate in rates]
        elif window is None:
            grid = (self.clip.times, *self.grid)
            attend = partial(clips.ClipAttention, width, heads, grid, self.prefix)
            blocks = [WindowBlock(width, attend(), window=None, drop_path=rate) for rate in rates]
        else:
            everywhere = _global(global_blocks, depth)
            blocks = []
            for number, rate in enumerate(rates, 1):
                within = None if number in everywhere else window
                reach = self.grid if within is None else (window, window)
                table = reach if relative_positions else None
                attention = GridAttention(width, heads, table)
                blocks.append(WindowBlock(width, attention, window=within, drop_path=rate))
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(width) if final_norm else nn.Identity()

    def _add_embedding(self, learned: bool) -> None:
        """Adds the class token, the tables of positions and the projection of patches."""
        width, side, clip = self.width, self.stride, self.clip
        if self.prefix:
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        places = self.table_grid[0] * self.table_grid[1] * (1 if clip is None else clip.held)
        learned = learned and not (clip is not None and clip.fixed)
        table = torch.empty(1, self.prefix + places, width)
        self.pos_embed = nn.Parameter(table, requires_grad=learned)
        if clip is not None and clip.apart:
            self.pos_embed_temporal = nn.Parameter(torch.empty(1, clip.times, width))
        self.patch_embed = nn.Module()
        if clip is None:
            self.patch_embed.proj = nn.Conv2d(3, width, side, side)
        else:
            sizes = (clip.tube, side, side)
            self.patch_embed.proj = nn.Conv3d(3, width, sizes, sizes)

    def forward(
        self,
        image: Tensor,
        *,
        keep: Tensor | None = None,
        hide: tuple[Tensor, Tensor] | None = None,
        layer: int | None = None,
        maps: Sequence[int] = (),
    ) -> Any:
        """See Encoder.forward. Raises ValueError for an image of another size, or a layer that
        there is not."""
        for number in [*maps, *([] if layer is None else [layer])]:
            if not 1 <= number <= self.depth:
                raise ValueError(f"layer: {number} is none of this encoder's {self.depth} blocks.")
        if self.window is None:
            tokens = self._tokens(image, keep, hide)
        else:
            tokens = self._cells(image, keep, hide)
        seen = []
        for number, block in enumerate(self.blocks[: max(maps, default=layer)], 1):
            tokens = block(tokens)
            if number in maps:
                seen.append(self.norm(tokens) if number == self.depth else tokens)
        if maps:
            rows, columns = (side // self.stride for side in image.shape[-2:])
            flat = [t if self.window else t[:, 1:].unflatten(1, (rows, columns)) for t in seen]
            return [cells.permute(0, 3, 1, 2) for cells in flat]
        tokens = self.norm(tokens) if layer is None else tokens
        return tokens if self.window is None else tokens.flatten(1, 2)

    def _tokens(
        self, image: Tensor, keep: Tensor | None, hide: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The class token and the embedded patches with their positions, [B, prefix + N, D]."""
        self.check(image, keep=keep, hide=hide)
        positions = self.pos_embed[:, self.prefix :]
        if self.clip is None:
            patches = patchify(image, self.stride)
        else:
            patches = clips.tubes(image, self.clip.tube, self.stride)
            if self.clip.apart:
                positions = (positions[:, None] + self.pos_embed_temporal[:, :, None]).flatten(1, 2)
        if keep is not None:  # gather before embedding: the hidden patches cost nothing
            patches = take(patches, keep)
            positions = positions[0][keep]
        projection = self.patch_embed.proj
        tokens = F.linear(patches, projection.weight.flatten(1), projection.bias)
        if hide is not None:
            mask, token = hide
            tokens = torch.where(mask[..., None], token.to(tokens.dtype), tokens)
        if not self.prefix:
            return tokens + positions
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(image), -1, -1)
        return torch.cat([first, tokens + positions], 1)

    def _cells(
        self, image: Tensor, keep: Tensor | None, hide: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The embedded patches with their positions, [B, rows, columns, D], of an image of any size."""
        ways = {"keep": keep, "hide": hide}
        self.require([name for name, value in ways.items() if value is not None], "model.window")
        whole_cells(image.shape[-2:], self.stride, f"model.patch_size {self.stride}")
        cells = self.patch_embed.proj(image).permute(0, 2, 3, 1)
        return cells + resize_positions(self.pos_embed, self.table_grid, cells.shape[1:3])

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """MAE's initialisation (its section 4 and code): the projection as a linear layer, sin-cos
        positions."""
        if name == "cls_token":
            tensor.normal_(std=0.02, generator=generator)
        elif name == "pos_embed":
            tensor.copy_(self._first_positions())
        elif name == "pos_embed_temporal" and self.clip.time_positions == "normal":
            nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
        elif name == "pos_embed_temporal" or name.rpartition(".")[2] in DISTANCES:
            tensor.zero_()
        elif name == "patch_embed.proj.weight":
            nn.init.xavier_uniform_(tensor.view(len(tensor), -1), generator=generator)
        elif name == "patch_embed.proj.bias":
            tensor.zero_()
        else:
            return False
        return True

    def _first_positions(self) -> Tensor:
        """Sines and cosines, [1, prefix + places, D]."""
        if self.clip is not None and self.clip.fixed:
            table = clips.sinusoids(self.width, self.pos_embed.shape[1] - self.prefix)
            return F.pad(table, (0, 0, self.prefix, 0))
        table = sincos(self.width, self.table_grid)[None]
        held = 1 if self.clip is None else self.clip.held
        return torch.cat([table[:, : self.prefix], table[:, 1:].repeat(1, held, 1)], 1)

    def adapt(self, name: str, tensor: Tensor, before: dict[str, Any]) -> Tensor:
        """Resamples the position table for another image size; SWAG's lies as [1 + N, 1, D]. With
        windows also its patches for another patch size, and the tables of relative positions. Of clips
        also an image's patches and positions, and those of another number of frames."""
        if name == "pos_embed":
            if tensor.ndim == 3 and tensor.shape[1] == 1 < tensor.shape[0]:
                tensor = tensor.transpose(0, 1)
            if self.clip is not None:
                how = self.grid, self.clip.held, self.prefix, self.stride
                return clips.adapted_positions(tensor, *how, before)
            if self.window is None:
                return resample_positions(tensor, self.grid, 1, self.stride, before)
            return self._adapted_table(tensor, before)
        if self.window is not None and name == "patch_embed.proj.weight" and tensor.ndim == 4:
            return _resized_patch(tensor, self.stride)
        if self.clip is not None and name == "patch_embed.proj.weight" and tensor.ndim == 4:
            return clips.inflated(tensor, self.clip.tube, self.clip.inflate)
        if name == "pos_embed_temporal" and tensor.ndim == 3:
            return clips.resized_times(tensor, self.clip.times)
        if name.rpartition(".")[2] in DISTANCES and tensor.ndim == 2:
            return resize_distances(tensor, len(self.get_parameter(name)))
        return tensor

    def _adapted_table(self, table: Tensor, before: dict[str, Any]) -> Tensor:
        """The positions of another ViT's patches, on the grid of this one's table."""
        if before.get("window") is None:
            table = table[:, 1:]  # a class token's
        elif "position_size" in before:
            before = {"image_size": before["position_size"]}
        if table.shape[1] == self.pos_embed.shape[1]:
            return table
        return resample_positions(table, self.table_grid, 0, self.stride, before)

    @staticmethod
    def follow(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """See Encoder.follow: with windows the position table stays that of the images before."""
        if after["window"] is None or before["window"] or after["position_size"]:
            return {}
        cells = (side // before["patch_size"] for side in sides(before["image_size"]))
        rows, columns = (count * after["patch_size"] for count in cells)
        return {"position_size": plain_size((rows, columns))}

    def released(self, names: list[str]) -> dict[str, str | None]:
        """See Encoder.released. Raises ValueError for weights of a ViT that computes something else."""
        for name, (pattern, called) in itertools.product(names, _LACKING.items()):
            if re.match(pattern, name):
                raise ValueError(
                    f"{name}: these weights are of a ViT with {called}, and this one has none; without, "
                    f"they compute something else. timm's ViTs are measured as timm/NAME."
                )
        lost = set() if self.prefix else {"cls_token"}
        lost |= {"pos_embed"} if self.clip is not None and self.clip.fixed else set()
        return {name: None if name in lost else name for name in names}

    def may_be_missing(self) -> list[set[str]]:
        """See contracts.MayBeMissing."""
        distances = {name for name in self.state_dict() if name.rpartition(".")[2] in DISTANCES}
        if self.clip is None:
            return [distances]
        if self.clip.apart:
            return [distances, {"pos_embed_temporal"}]
        return [distances, {"pos_embed"} if self.clip.fixed else set()]

    def no_weight_decay(self) -> set[str]:
        """timm's name for the parameters without weight decay, beside all 1-d ones."""
        return {"pos_embed", "pos_embed_temporal", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of which layer a parameter belongs to, for layer-wise decay. The last
        norm belongs to the head (MAE's util/lr_decay.py)."""
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": r"^blocks\.(\d+)"}

    def _require_plain(self, library: str) -> None:
        """Raises ValueError for a ViT that another library does not have."""
        if self.window is not None:
            raise ValueError(f"{library} has no ViT with ViTDet's windows (model.window).")
        if self.frames is not None:
            raise ValueError(f"{library} has no ViT that takes clips (model.frames).")

    def timm(self) -> dict[str, Any]:
        """See Encoder.timm."""
        self._require_plain("timm")
        return {
            "architecture": "vit_base_patch16_224",
            "model_args": {
                "img_size": plain_size(self.image_size),
                "patch_size": self.stride,
                "embed_dim": self.width,
                "depth": self.depth,
                "num_heads": self.heads,
                **({} if self.final_norm else {"final_norm": False}),
            },
        }

    def open_clip(self, state: dict[str, Tensor], pool: str) -> tuple[dict[str, Any], dict]:
        """See Encoder.open_clip. Its ViT embeds patches without a bias, so that is added to their
        positions, which is the same."""
        if not self.final_norm:
            raise ValueError(
                "open_clip's image towers end with a norm, and this one does not (model.final_norm=false)."
            )
        self._require_plain("open_clip")
        config = {
            "image_size": plain_size(self.image_size),
            "patch_size": self.stride,
            "width": self.width,
            "layers": self.depth,
            "head_width": self.width // self.heads,
            "no_ln_pre": True,
            "norm_kwargs": {"eps": 1e-6},
            "pool_type": "tok" if pool == "class" else "avg",
        }
        positions = state["pos_embed"][0].clone()
        positions[1:] += state["patch_embed.proj.bias"]
        renamed = {
            "class_embedding": state["cls_token"].flatten(),
            "positional_embedding": positions,
            "conv1.weight": state["patch_embed.proj.weight"],
            "ln_post.weight": state["norm.weight"],
            "ln_post.bias": state["norm.bias"],
        }
        for key, value in state.items():
            if key.startswith("blocks."):
                _, number, rest = key.split(".", 2)
                renamed[f"transformer.resblocks.{number}.{_open_clips(rest)}"] = value
        return config, renamed


def _check_together(
    window: int | None, frames: int | None, relative_positions: bool, class_token: bool
) -> None:
    """Raises ValueError for options of which one excludes or needs another."""
    if window is not None and frames is not None:
        raise ValueError("model.frames: a ViT with model.window takes images. Leave one out.")
    if relative_positions and window is None and frames is None:
        raise ValueError(
            "model.relative_positions: only with model.window or model.frames, as in window=14."
        )
    if not class_token and frames is None:
        raise ValueError("model.class_token: only with model.frames can it be left out.")


def _global(blocks: int | tuple[int, ...], depth: int) -> set[int]:
    """The numbers, from 1, of the blocks that attend to the whole image."""
    if isinstance(blocks, int):
        if not blocks:
            return set()
        if depth % blocks:
            raise ValueError(
                f"model.global_blocks: {blocks} does not divide the {depth} blocks. Name them, as in "
                f"[{depth // 2}, {depth}]."
            )
        return {(i + 1) * (depth // blocks) for i in range(blocks)}
    if not all(1 <= number <= depth for number in blocks):
        raise ValueError(f"model.global_blocks: {list(blocks)} are not all within 1 to {depth}.")
    return set(blocks)


def _resized_patch(kernel: Tensor, side: int) -> Tensor:
    """The kernel [D, 3, P, P] of another patch size, by timm's pseudo-inverse of resizing (how the
    papers convert 14 to 16 is not known)."""
    if kernel.shape[-2:] == (side, side):
        return kernel
    if kernel.is_meta:
        return kernel.new_empty(*kernel.shape[:2], side, side)
    return resample_patch_embed(kernel, [side, side])


def _open_clips(name: str) -> str:
    """open_clip's name for a parameter of a block."""
    for ours, theirs in (
        ("norm", "ln_"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"open_clip's blocks have nothing like {name}.")


def patchify(image: Tensor, size: int) -> Tensor:
    """[B, C, H, W] to [B, N, C P P]: each patch flattened as a convolution's weight is."""
    B, C, H, W = image.shape
    cells = image.reshape(B, C, H // size, size, W // size, size)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * size * size)


def unpatchify(patches: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """[B, N, C P P] of a grid (rows, columns) back to [B, C, H, W]."""
    rows, columns = grid
    cells = patches.reshape(len(patches), rows, columns, -1, size, size)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, rows * size, columns * size)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """[B, N, D] tokens and int64 [B, K] indices to [B, K, D]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def sincos(width: int, grid: tuple[int, int]) -> Tensor:
    """[1 + N, width] fixed 2-d positions of a grid (rows, columns), a row of zeros for the class
    token (MAE, section 4)."""
    frequency = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(max(grid), dtype=torch.float64)[:, None] * frequency
    one = torch.cat([angle.sin(), angle.cos()], 1)  # [longest side, width / 2]
    columns = one[None, : grid[1]].expand(grid[0], -1, -1)
    rows = one[: grid[0], None].expand(-1, grid[1], -1)
    table = torch.cat([columns, rows], 2).reshape(-1, width)
    return torch.cat([table.new_zeros(1, width), table]).float()
