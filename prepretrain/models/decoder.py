"""MAE's decoder (arXiv 2111.06377, section 3), for pixels and for features.

B images, N patches, K kept and M masked ones, D channels of the encoder, E of the decoder.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from prepretrain.models.encoders.vit import Block, sincos


class Decoder(nn.Module):
    """A narrow ViT that sees all patches, the masked ones as one learned token, and predicts P
    numbers of each: its pixels, or a teacher's features."""

    def __init__(
        self,
        width_in: int,
        grid: tuple[int, int],
        outputs: int,
        *,
        depth: int,
        width: int,
        heads: int,
    ):
        super().__init__()
        if width % heads or width % 4:
            raise ValueError(
                f"objective.decoder_width: {width} must be a multiple of objective.decoder_heads "
                f"({heads}) and of 4."
            )
        self.width, self.grid = width, grid
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(width_in, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(
            torch.empty(1, 1 + math.prod(grid), width), requires_grad=False
        )
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(width)
        self.pred = nn.Linear(width, outputs)

    def forward(
        self, latent: Tensor, keep: Tensor, masked: Tensor, *, everything: bool = False
    ) -> Tensor:
        """[B, 1 + K, D] latent of the kept patches to the predictions [B, M, P] of the masked ones.

        everything: to [B, 1 + N, P], of the class token, the kept and the masked patches in
        that order.
        """
        first, places = self.pos_embed[:, :1], self.pos_embed[0, 1:]
        seen = self.embed(latent)
        tokens = torch.cat(
            [seen[:, :1] + first, seen[:, 1:] + places[keep], self.mask_token + places[masked]], 1
        )
        for block in self.blocks:
            tokens = block(tokens)
        return self.pred(self.norm(tokens if everything else tokens[:, -masked.shape[1] :]))

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """The mask token N(0, 0.02), positions fixed sines and cosines (MAE's code)."""
        if name == "mask_token":
            tensor.normal_(std=0.02, generator=generator)
        elif name == "pos_embed":
            tensor.copy_(sincos(self.width, self.grid)[None])
        else:
            return False
        return True

    def no_weight_decay(self) -> set[str]:
        """As timm's."""
        return {"mask_token", "pos_embed"}
