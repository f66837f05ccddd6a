"""Swin Transformer V2 (arXiv 2111.09883), on timm's, with timm's key names; and the names of the
released SimMIM files.

B images, N cells of the last grid, D its channels.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

from prepretrain.data.transforms import Size, plain_size, sides
from prepretrain.models.dense.windows import shifted_windows
from prepretrain.models.encoders.base import Encoder, whole_cells

_DEPTHS = (2, 2, 18, 2)
SIZES = {
    # arXiv 2206.04664, Table 1
    "swinv2_s": dict(base_width=96, depths=_DEPTHS, heads=(3, 6, 12, 24)),
    "swinv2_b": dict(base_width=128, depths=_DEPTHS, heads=(4, 8, 16, 32)),
    "swinv2_l": dict(base_width=192, depths=_DEPTHS, heads=(6, 12, 24, 48)),
    "swinv2_h": dict(base_width=352, depths=_DEPTHS, heads=(11, 22, 44, 88)),
    "swinv2_g": dict(base_width=448, depths=_DEPTHS, heads=(14, 28, 56, 112)),
    # For CPUs and tests: # not from the paper
    "swinv2_mini8": dict(base_width=48, depths=(2, 4), heads=(2, 4), window=4, image_size=32),
    "swinv2_test8": dict(base_width=16, depths=(1, 2), heads=(1, 2), window=4, image_size=32),
}


class _Net(SwinTransformerV2):
    """Draws no initial values on the meta device, where that takes most of the time and is in vain."""

    def init_weights(self, needs_reset: bool = True) -> None:
        """See timm's."""
        if not next(self.parameters()).is_meta:
            super().init_weights(needs_reset)


class _AnySize(SwinTransformerV2Block):
    """timm's block on a grid of any size. Cells that pad it to whole windows are attended by none;
    timm's attend to them, and where it shifts windows, to the other side's of the image."""

    def _attn(self, cells: Tensor) -> Tensor:
        shifts = [
            size // 2 if by else 0 for size, by in zip(self.window_size, self.target_shift_size)
        ]
        return shifted_windows(cells, self.window_size, shifts, self.attn)


class SwinV2(Encoder):
    """A hierarchical encoder with shifted windows, cosine attention and a continuous position bias.

    It has no class token; its tokens are the cells of the last stage, its maps those of each. The
    defaults are the pre-training's of arXiv 2206.04664, Table 1.
    """

    prefix = 0
    takes = ("hide", "maps")
    timm_head = "head.fc"

    def __init__(
        self,
        *,
        base_width: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        patch_size: int = 4,
        window: int = 12,
        pretrained_windows: tuple[Size, ...] = (),
        image_size: Size = 192,
        drop_path: float = 0.0,
        final_norm: bool = True,
        any_size: bool = False,
    ):
        """base_width: channels of the first stage, doubled by each that follows.

        pretrained_windows: the windows (one a stage) that the position bias was trained with, by
        which its coordinates are scaled; empty: the windows of now. `follow` fills them in for a
        model that starts from another.

        final_norm: false leaves out the last norm, whose place those of a head on maps take. any_size:
        takes images of any whole number of patches, and pads the grid of a stage to whole windows,
        as dense tasks need; false refuses a window that does not divide it.
        """
        super().__init__()
        self.scales = tuple(
            (base_width * 2**stage, patch_size * 2**stage) for stage in range(len(depths))
        )
        if len(heads) != len(depths) or not depths:
            raise ValueError(f"model.heads: {heads} must name one number a stage, as {depths}.")
        if pretrained_windows and len(pretrained_windows) != len(depths):
            raise ValueError(
                f"model.pretrained_windows: {pretrained_windows} must name one a stage, as {depths}."
            )
        self.width, self.stride = self.scales[-1]
        stages = f"{self.stride}, the stride of {len(depths)} stages on patches of {patch_size}"
        self.image_size = whole_cells(image_size, self.stride, stages)
        for stage in range(len(depths) if not any_size else 0):
            for cells in (side // patch_size // 2**stage for side in self.image_size):
                if cells > window and cells % window:
                    raise ValueError(
                        f"model.window: {window} does not divide a stage's grid of {cells} cells; at "
                        f"model.image_size={image_size} take a window that does, or "
                        f"model.any_size=true, which pads the grid."
                    )
        if not 0 <= drop_path < 1:
            raise ValueError(f"model.drop_path: {drop_path} must lie in [0, 1).")
        self.patch, self.patch_width = patch_size, base_width
        self.final_norm, self.any_size = final_norm, any_size
        self.arguments = {
            "img_size": image_size,
            "patch_size": patch_size,
            "embed_dim": base_width,
            "depths": depths,
            "num_heads": heads,
            "window_size": window,
            "pretrained_window_sizes": pretrained_windows or (0,) * len(depths),
        }
        options = {"num_classes": 0, "drop_path_rate": drop_path, "strict_img_size": not any_size}
        net = _Net(**self.arguments, **options)
        self.patch_embed, self.layers = net.patch_embed, net.layers
        self.norm = net.norm if final_norm else nn.Identity()
        if any_size:
            for stage in self.layers:
                for block in stage.blocks:
                    block.__class__ = _AnySize  # timm's stages make timm's blocks

    def forward(
        self,
        image: Tensor,
        *,
        keep: Tensor | None = None,
        hide: tuple[Tensor, Tensor] | None = None,
        layer: int | None = None,
        maps: Sequence[int] = (),
    ) -> Any:
        """See Encoder.forward. Raises ValueError for `keep`, which windows do not allow."""
        ways = {"keep": keep, "hide": hide, "layer": layer}
        if self.any_size:
            whole_cells(image.shape[-2:], self.patch, f"model.patch_size {self.patch}")
            self.require(
                [name for name, value in ways.items() if value is not None], "model.encoder"
            )
        else:
            self.check(image, **ways)
        tokens = self.patch_embed(image)
        if hide is not None:
            mask, token = hide
            cells = mask.unflatten(1, tokens.shape[1:3])[..., None]
            tokens = torch.where(cells, token.to(tokens.dtype), tokens)
        seen = []
        for number, stage in enumerate(self.layers, 1):
            tokens = stage(tokens)
            seen.append(self.norm(tokens) if number == len(self.layers) else tokens)
        if maps:
            return [seen[number - 1].permute(0, 3, 1, 2) for number in maps]
        return seen[-1].flatten(1, 2)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """As SwinV2's code: linear layers N(0, 0.02) truncated, both norms of a block at zero, the
        temperature ln 10."""
        leaf = name.rpartition(".")[2]
        if re.search(r"blocks\.\d+\.norm[12]\.", name):
            tensor.zero_()
        elif leaf == "logit_scale":
            tensor.fill_(torch.log(torch.tensor(10.0)))
        elif leaf in ("q_bias", "v_bias") or name == "patch_embed.proj.bias":
            tensor.zero_()
        elif name == "patch_embed.proj.weight":
            # as a linear layer's: # not from the paper, whose code leaves torch's default
            nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
        elif leaf == "weight" and "norm" not in name:
            nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
        else:
            return False
        return True

    @staticmethod
    def follow(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """See Encoder.follow: at another window or image size the position bias keeps the scale
        that it was trained with (arXiv 2111.09883, section 3.3)."""
        if after.get("pretrained_windows") or before.get("pretrained_windows"):
            return {}
        if all(after.get(k) == before.get(k) for k in ("window", "image_size")):
            return {}
        patch, window = before.get("patch_size", 4), before.get("window", 12)
        rows, columns = (side // patch for side in sides(before.get("image_size", 192)))
        windows: list[int | list[int]] = []
        for stage in range(len(before["depths"])):
            one = min(window, rows // 2**stage), min(window, columns // 2**stage)
            windows.append(plain_size(one))
        return {"pretrained_windows": windows}

    def released(self, names: list[str]) -> dict[str, str | None]:
        """See Encoder.released: the files of SimMIM and SwinV2 name a stage's merging of patches with
        the stage before it, and hold tables that follow from the options."""
        theirs = any(n.startswith("layers.0.downsample.") for n in names)
        return {n: _ours(n) if theirs else n for n in names}

    def release(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of ours under the released files' names, their tables included."""
        tables = {n: b for n, b in self.named_buffers() if not n.endswith("k_bias")}
        return {_theirs(n): t for n, t in {**state, **tables}.items()}

    def no_weight_decay(self) -> set[str]:
        """As SwinV2's code, beside all 1-d parameters: the position bias and the temperatures."""
        return {n for n, _ in self.named_parameters() if "cpb_mlp" in n or "logit_scale" in n}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """See ViT.group_matcher. A merging of patches belongs to the last block before it, the last
        norm to the head (SimMIM's optimizer.py)."""
        before = (-1, 99999)  # sorted before the stage's first block; 99999 joins what precedes it
        return {
            "stem": r"^patch_embed",
            "blocks": [
                (r"^layers\.(\d+)\.downsample", before),
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            ],
        }

    def timm(self) -> dict[str, Any]:
        """See Encoder.timm."""
        if self.any_size or not self.final_norm:
            raise ValueError(
                "timm has no SwinV2 without a last norm (model.final_norm), nor one that pads its "
                "windows as this one does (model.any_size)."
            )
        arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in self.arguments.items()}
        return {"architecture": "swinv2_tiny_window8_256", "model_args": arguments}


def _ours(name: str) -> str | None:
    if name.endswith(("relative_position_index", "relative_coords_table", "attn_mask")):
        return None
    if name == "mask_token":
        return None
    return _moved(name.replace(".rpe_mlp.", ".cpb_mlp."), 1)


def _theirs(name: str) -> str:
    return _moved(name, -1)


def _moved(name: str, by: int) -> str:
    """The stage of a merging of patches, counted as the other side does."""
    return re.sub(
        r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + by}.downsample.", name
    )
