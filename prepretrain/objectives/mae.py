"""Masked autoencoding (MAE, arXiv 2111.06377), as MAWS's stage one uses it (arXiv 2303.13496,
section 3).

B images, N patches, K kept and M masked ones, D channels of the encoder, E of the decoder, P pixels
along a patch.
"""

from typing import Any

import torch
from torch import Tensor

from prepretrain.models.decoder import Decoder
from prepretrain.models.encoders.vit import patchify, take, unpatchify
from prepretrain.models.model import Model
from prepretrain.objectives.base import MaskedObjective


class MAE(MaskedObjective):
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
        super().__init__(model, mask_ratio=mask_ratio, crop_scale=crop_scale)
        encoder, self.normalise_target = model.encoder, normalise_target
        self.decoder = Decoder(
            encoder.width,
            encoder.grid,
            encoder.stride**2 * 3,
            depth=decoder_depth,
            width=decoder_width,
            heads=decoder_heads,
        )

    def losses(self, batch: dict[str, Any]) -> Tensor:
        """{"image": uint8 [B, 3, H, W], "noise": float [B, N]} to the mean squared error [B] over
        each image's masked patches."""
        image = self.model.normalise(batch["image"])
        keep, masked = self.split(batch["noise"])
        latent = self.model.encode(image, keep=keep)
        predicted = self.decoder(latent, keep, masked)
        error = predicted.float() - self.target(image, masked)
        return error.square().mean((1, 2))

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
        predicted = self.decoder(self.model.encode(image, keep=keep), keep, masked).float()
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
            name: self.model.denormalise(assemble(rows, size, self.model.encoder.grid))
            for name, rows in (("original", original), ("masked", grey), ("reconstructed", shown))
        }


def pixels(image: Tensor, size: int, indices: Tensor | None = None) -> Tensor:
    """[B, 3, H, W] to patches [B, N or M, P P 3], colour last, as MAE's released decoders predict
    them."""
    patches = patchify(image, size)
    patches = patches if indices is None else take(patches, indices)
    return patches.unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2)


def assemble(rows: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `pixels`, for all patches of a grid: [B, N, P P 3] to [B, 3, H, W]."""
    return unpatchify(rows.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2), size, grid)
