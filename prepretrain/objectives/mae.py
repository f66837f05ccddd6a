"""Masked autoencoding (MAE, arXiv 2111.06377), as MAWS's stage one uses it (arXiv 2303.13496,
section 3).

B images, N patches, K kept and M masked ones, D channels of the encoder, E of the decoder, P pixels
along a patch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prepretrain.encoders.vit import Block, patchify, sincos, take, unpatchify
from prepretrain.model import Model
from prepretrain.objectives.base import Objective, blank_images, picture


class MAE(Objective):
    """Encodes a random quarter of the patches and predicts the pixels of the others.

    Only the kept patches are embedded and encoded; only the masked ones are predicted in training.
    The decoder sees [class, kept, masked] in that order, positions gathered alike: attention does
    not care about order, so nothing is shuffled back.
    """

    def __init__(
        self,
        model: Model,
        *,
        mask_ratio: float = 0.75,
        decoder_depth: int = 8,
        decoder_width: int = 512,
        decoder_heads: int = 16,
        normalise_target: bool = True,
        crop_scale: tuple[float, float] = (0.2, 1.0),
    ):
        """normalise_target: predict each patch less its mean, by its standard deviation (MAE,
        section 4.1)."""
        super().__init__(model)
        encoder = model.encoder
        self.patches = encoder.grid**2
        self.kept = int(self.patches * (1 - mask_ratio))
        if not 0 < self.kept < self.patches:
            raise ValueError(
                f"objective.mask_ratio: {mask_ratio} keeps {self.kept} of {self.patches} patches. "
                f"At least one must be kept and one masked."
            )
        self.normalise_target, self.crop_scale = normalise_target, crop_scale
        self.decoder = Decoder(
            encoder.width, encoder.grid, encoder.stride, decoder_depth, decoder_width, decoder_heads
        )

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A random resized crop and flip (a centre crop for validation), and the noise that orders
        the patches."""
        return Transform(
            self.model.encoder.image_size, self.patches, self.crop_scale if train else None
        )

    def example(self, images: int) -> dict[str, Tensor]:
        """See Objective.example."""
        return {
            "image": blank_images(images, self.model.encoder.image_size),
            "noise": torch.empty(images, self.patches, device="meta"),
        }

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"image": uint8 [B, 3, H, W], "noise": float [B, N]} to the mean squared error over
        masked patches."""
        image = self.model.normalise(batch["image"])
        keep, masked = self.split(batch["noise"])
        latent = self.model.encoder(image, keep=keep)
        predicted = self.decoder(latent, keep, masked)
        error = predicted.float() - self.target(image, masked)
        return {"loss": error.square().mean()}

    def split(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Noise [B, N] to the kept [B, K] and the masked [B, M] patches: the smallest noise is
        kept."""
        order = noise.argsort(1)
        return order[:, : self.kept], order[:, self.kept :]

    def target(self, image: Tensor, masked: Tensor) -> Tensor:
        """The masked patches' pixels [B, M, P P 3], normalised per patch if asked for."""
        target = pixels(image, self.model.encoder.stride, masked)
        if self.normalise_target:
            target = (target - target.mean(-1, keepdim=True)) / (
                target.var(-1, keepdim=True) + 1e-6
            ).sqrt()
        return target

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See Objective.reconstruct. Visible patches are shown as they are; a normalised prediction
        gets its own patch's mean and deviation back."""
        size = self.model.encoder.stride
        image = self.model.normalise(batch["image"])
        keep, masked = self.split(batch["noise"])
        predicted = self.decoder(self.model.encoder(image, keep=keep), keep, masked).float()
        if self.normalise_target:
            true = pixels(image, size, masked)
            predicted = predicted * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(
                -1, keepdim=True
            )
        place = masked[..., None].expand_as(predicted)
        original = pixels(image, size)
        shown = original.scatter(1, place, predicted)
        grey = original.scatter(1, place, torch.zeros_like(predicted))
        return {
            name: self.model.denormalise(assemble(rows, size))
            for name, rows in (("original", original), ("masked", grey), ("reconstructed", shown))
        }


class Transform:
    """A sample to {"image": uint8 [3, S, S], "noise": float32 [N]}, by the sample's own
    randomness."""

    def __init__(self, size: int, patches: int, crop_scale: tuple[float, float] | None):
        self.size, self.patches, self.crop_scale = size, patches, crop_scale

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """crop_scale None: the fixed centre crop of validation."""
        noise = sample["random"]("mask").random(self.patches, dtype="float32")
        image = picture(sample, self.size, self.crop_scale)
        return {"image": image, "noise": torch.from_numpy(noise)}


class Decoder(nn.Module):
    """A narrow ViT that sees all patches, the masked ones as one learned token, and predicts
    pixels."""

    def __init__(
        self, width_in: int, grid: int, patch_size: int, depth: int, width: int, heads: int
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
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid**2, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(width)
        self.pred = nn.Linear(width, patch_size**2 * 3)

    def forward(
        self, latent: Tensor, keep: Tensor, masked: Tensor, *, everything: bool = False
    ) -> Tensor:
        """[B, 1 + K, D] latent of the kept patches to the pixels [B, M, P P 3] of the masked ones.

        everything: to [B, 1 + N, P P 3], of the class token, the kept and the masked patches in
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


def pixels(image: Tensor, size: int, places: Tensor | None = None) -> Tensor:
    """[B, 3, H, W] to patches [B, N or M, P P 3], colour last, as MAE's released decoders predict
    them."""
    patches = patchify(image, size)
    patches = patches if places is None else take(patches, places)
    return patches.unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2)


def assemble(rows: Tensor, size: int) -> Tensor:
    """The inverse of `pixels`, for all patches of a square grid: [B, N, P P 3] to [B, 3, H, W]."""
    return unpatchify(rows.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2), size)
