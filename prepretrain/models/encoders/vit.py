"""The plain Vision Transformer, on timm's blocks and with timm's (so MAWS's and MAE's) key names.

B images, N patches, K kept patches, D channels, P pixels along a patch.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from prepretrain.data.transforms import Size, plain_size
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


class ViT(Encoder):
    """A pre-norm ViT with a class token and one position table; the constructor's defaults are
    MAWS's."""

    prefix = 1
    takes = ("keep", "hide", "layer")

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
    ):
        """positions: the table starts as 2-d sines and cosines; "fixed" (MAE) keeps it so.

        final_norm: SimMIM leaves out a ViT's last norm; with it, the features that it learns cannot
        be read by a linear probe (microsoft/SimMIM, issue 14).
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
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(
            torch.empty(1, 1 + self.cells, width), requires_grad=positions == "learned"
        )
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch_size, patch_size)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=4, qkv_bias=True, drop_path=rate, norm_layer=norm)
            for rate in rates
        )
        self.norm = norm(width) if final_norm else nn.Identity()

    def forward(
        self,
        image: Tensor,
        *,
        keep: Tensor | None = None,
        hide: tuple[Tensor, Tensor] | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """See Encoder.forward. Raises ValueError for an image of another size, or a layer that
        there is not."""
        self.check(image)
        if layer is not None and not 1 <= layer <= self.depth:
            raise ValueError(f"layer: {layer} is none of this encoder's {self.depth} blocks.")
        patches, positions = patchify(image, self.stride), self.pos_embed[:, 1:]
        if keep is not None:  # gather before embedding: the hidden patches cost nothing
            patches = take(patches, keep)
            positions = positions[0][keep]
        projection = self.patch_embed.proj
        tokens = F.linear(patches, projection.weight.flatten(1), projection.bias)
        if hide is not None:
            mask, token = hide
            tokens = torch.where(mask[..., None], token.to(tokens.dtype), tokens)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(image), -1, -1)
        tokens = torch.cat([first, tokens + positions], 1)
        for block in self.blocks[:layer]:
            tokens = block(tokens)
        return self.norm(tokens) if layer is None else tokens

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """MAE's initialisation (its section 4 and code): the projection as a linear layer, sin-cos
        positions."""
        if name == "cls_token":
            tensor.normal_(std=0.02, generator=generator)
        elif name == "pos_embed":
            tensor.copy_(sincos(self.width, self.grid)[None])
        elif name == "patch_embed.proj.weight":
            nn.init.xavier_uniform_(tensor.view(len(tensor), -1), generator=generator)
        elif name == "patch_embed.proj.bias":
            tensor.zero_()
        else:
            return False
        return True

    def adapt(self, name: str, tensor: Tensor, before: dict[str, Any]) -> Tensor:
        """Resamples the position table for another image size; SWAG's lies as [1 + N, 1, D]."""
        if name != "pos_embed":
            return tensor
        if tensor.ndim == 3 and tensor.shape[1] == 1 < tensor.shape[0]:
            tensor = tensor.transpose(0, 1)
        return resample_positions(tensor, self.grid, 1, self.stride, before)

    def no_weight_decay(self) -> set[str]:
        """timm's name for the parameters without weight decay, beside all 1-d ones."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of which layer a parameter belongs to, for layer-wise decay. The last
        norm belongs to the head (MAE's util/lr_decay.py)."""
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": r"^blocks\.(\d+)"}

    def timm(self) -> dict[str, Any]:
        """See Encoder.timm."""
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
