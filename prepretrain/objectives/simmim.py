"""SimMIM (arXiv 2111.09886), as arXiv 2206.04664 studies its scaling.

B images, C cells of the mask, N tokens and M masked ones, D their channels, S pixels along the part
of the image that a token stands for.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prepretrain import contracts
from prepretrain.models.encoders.vit import Block, patchify, sincos, take, unpatchify
from prepretrain.models.model import Model
from prepretrain.objectives.base import Masking, Objective, blank_images

logger = logging.getLogger(__name__)


class SimMIM(Objective):
    """Puts one learned token in the place of masked patches and predicts their pixels from the
    encoder's output.

    Masks are made of square cells; all patches are encoded. A masked cell's pixels are predicted by
    a linear layer from the token above it (with `decoder_depth` transformer blocks before: arXiv
    2206.04664, section 3.4).
    """

    needs = {"encoder": ("hide",)}

    def __init__(
        self,
        model: Model,
        *,
        mask_ratio: float = 0.6,
        cell: int = 32,
        decoder_depth: int = 0,
        loss: Literal["l1", "l2"] = "l1",
        target_window: int | None = 47,
        crop_scale: tuple[float, float] = (0.67, 1.0),
    ):
        """cell: pixels along a cell of the mask. loss: "l1" as the papers' code, "l2" as the text of
        arXiv 2206.04664.

        target_window: predict each pixel less the mean of the window of so many pixels around it,
        by its standard deviation; None predicts the pixels themselves.
        """
        super().__init__(model)
        encoder = model.encoder
        height, width = encoder.image_size
        if cell % encoder.stride or height % cell or width % cell:
            raise ValueError(
                f"objective.cell: {cell} pixels must be a multiple of the encoder's stride "
                f"({encoder.stride}) and divide model.image_size ({height} x {width})."
            )
        if target_window is not None and (target_window < 3 or target_window % 2 == 0):
            raise ValueError(
                f"objective.target_window: {target_window} must be odd, so that a pixel is in the "
                f"middle of its window, and at least 3."
            )
        self.mask_grid = height // cell, width // cell
        self.cells = math.prod(self.mask_grid)
        self.masked = math.ceil(self.cells * mask_ratio)
        if not 0 < self.masked < self.cells:
            raise ValueError(
                f"objective.mask_ratio: {mask_ratio} masks {self.masked} of {self.cells} cells. At "
                f"least one must be masked and one seen."
            )
        if encoder.prefix and encoder.final_norm:
            logger.warning(
                "simmim on a ViT with its final norm: a linear probe will hardly read its features; "
                "SimMIM leaves the norm out, with model.final_norm=false."
            )
        self.cell, self.loss, self.target_window = cell, loss, target_window
        self.crop_scale = crop_scale
        self.mask_token = MaskToken(encoder.patch_width)
        self.decoder = Decoder(encoder.width, encoder.grid, encoder.stride, decoder_depth)

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A random resized crop and flip (a centre crop for validation), and the noise that chooses
        the cells."""
        size = self.model.encoder.image_size
        return Masking(size, self.cells, self.crop_scale if train else None)

    def example(self, images: int) -> dict[str, Tensor]:
        """See Objective.example."""
        return {
            "image": blank_images(images, self.model.encoder.image_size),
            "noise": torch.empty(images, self.cells, device="meta"),
        }

    def losses(self, batch: dict[str, Any]) -> Tensor:
        """{"image": uint8 [B, 3, H, W], "noise": float [B, C]} to the mean error [B] over each
        image's masked pixels."""
        image = self.model.normalise(batch["image"])
        indices, predicted = self.predict(image, batch["noise"])
        size = self.model.encoder.stride
        error = predicted - take(patchify(self.target(image), size), indices)
        return (error.abs() if self.loss == "l1" else error.square()).mean((1, 2))

    def predict(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images and noise to the masked tokens' indices [B, M] and pixels [B, M, 3 S
        S]."""
        encoder = self.model.encoder
        cells = self.mask(noise)
        patches, grid = (
            self._enlarged(cells, self.cell // s) for s in (encoder.patch, encoder.stride)
        )
        tokens = self.model.encode(image, hide=(patches, self.mask_token()))[:, encoder.prefix :]
        indices = grid.long().argsort(dim=1, descending=True, stable=True)
        indices = indices[:, : self.masked * (self.cell // encoder.stride) ** 2]
        return indices, self.decoder(tokens, indices).float()

    def mask(self, noise: Tensor) -> Tensor:
        """Noise [B, C] to bool [B, C]: the cells of the smallest noise are masked."""
        chosen = noise.argsort(dim=1, stable=True)[:, : self.masked]
        return torch.zeros_like(noise, dtype=torch.bool).scatter(1, chosen, True)

    def _enlarged(self, cells: Tensor, times: int) -> Tensor:
        """A mask [B, C] of cells as one of the smaller squares that each is made of."""
        grid = cells.unflatten(1, self.mask_grid)
        return grid.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1)

    def target(self, image: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to what is predicted of them."""
        if self.target_window is None:
            return image
        mean, deviation = window_statistics(image, self.target_window)
        return (image - mean) / deviation

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See Objective.reconstruct. A normalised prediction gets its own windows' mean and
        deviation back."""
        size = self.model.encoder.stride
        image = self.model.normalise(batch["image"])
        indices, predicted = self.predict(image, batch["noise"])
        index = indices[..., None].expand_as(predicted)
        original = patchify(image, size)
        if self.target_window is not None:
            mean, deviation = (
                patchify(part, size).gather(1, index)
                for part in window_statistics(image, self.target_window)
            )
            predicted = predicted * deviation + mean
        versions = {
            "original": original,
            "masked": original.scatter(1, index, torch.zeros_like(predicted)),
            "reconstructed": original.scatter(1, index, predicted),
        }
        return {
            name: self.model.denormalise(unpatchify(patches, size, self.model.encoder.grid))
            for name, patches in versions.items()
        }

    def release(self) -> dict[str, Tensor]:
        """The trained tensors under the names of the released SimMIM files, decoder included.

        Raises ValueError for an encoder or a decoder that those files do not know.
        """
        encoder, size = self.model.encoder, self.model.encoder.stride
        if not isinstance(encoder, contracts.WritesReleased) or len(self.decoder.blocks):
            raise ValueError(
                "--released: SimMIM's files hold a SwinV2 and a linear decoder, and this run has a "
                f"{type(encoder).__name__} and {len(self.decoder.blocks)} decoder blocks."
            )
        state = {f"encoder.{k}": v for k, v in encoder.release(encoder.state_dict()).items()}
        weight, bias = self.decoder.pred.weight, self.decoder.pred.bias
        return {
            **state,
            "encoder.mask_token": self.mask_token.token.detach(),
            "decoder.0.weight": weight.detach().view(3 * size**2, -1, 1, 1),
            "decoder.0.bias": bias.detach(),
        }


class MaskToken(nn.Module):
    """The learned token, a module of its own so that it can be sharded."""

    def __init__(self, width: int):
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 1, width))

    def forward(self) -> Tensor:
        """[width]."""
        return self.token[0, 0]

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """Truncated N(0, 0.02) (SimMIM's code)."""
        nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
        return True

    def no_weight_decay(self) -> set[str]:
        """As SimMIM's code."""
        return {"token"}


class Decoder(nn.Module):
    """Transformer blocks as wide as the encoder, or none, and a linear layer to pixels.

    The linear layer is SimMIM's 1 x 1 convolution and pixel shuffle: its outputs are the pixels of
    a token's square in the order (colour, row, column).
    """

    def __init__(self, width: int, grid: tuple[int, int], size: int, depth: int):
        super().__init__()
        self.width, self.grid = width, grid
        if depth:
            # fixed sines and cosines: # not from the paper, which says "blocks" and no more
            self.pos_embed = nn.Parameter(
                torch.empty(1, math.prod(grid), width), requires_grad=False
            )
        norm = partial(nn.LayerNorm, eps=1e-6)
        heads = max(width // 64, 1)  # not from the paper
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.pred = nn.Linear(width, 3 * size**2)

    def forward(self, tokens: Tensor, indices: Tensor) -> Tensor:
        """[B, N, D] tokens to the pixels [B, M, 3 S S] of those at int64 [B, M] indices."""
        if len(self.blocks):
            tokens = tokens + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.pred(take(tokens, indices))

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """Linear layers truncated N(0, 0.02), as the encoder's."""
        if name == "pos_embed":
            tensor.copy_(sincos(self.width, self.grid)[None, 1:])
        elif name.endswith("weight") and "norm" not in name:
            nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
        else:
            return False
        return True


def window_statistics(image: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, 3, H, W] of the window x window pixels around each, those
    outside of the image left out.

    The variance is unbiased, at least 0, and 1e-6 larger (arXiv 2206.04664's code).
    """

    # rows, then columns: a mean over a rectangle, in 94 reads a pixel where a square takes 2,209
    def pool(values: Tensor, **how: Any) -> Tensor:
        for kernel in ((window, 1), (1, window)):
            margin = (kernel[0] // 2, kernel[1] // 2)
            values = F.avg_pool2d(values, kernel, stride=1, padding=margin, **how)
        return values

    image = image.float()
    inside = partial(pool, count_include_pad=False)
    count = pool(torch.ones_like(image[:1, :1])) * window**2
    mean = inside(image)
    variance = (inside(image.square()) - mean.square()) * count / (count - 1)
    return mean, (variance.clamp_min(0) + 1e-6).sqrt()
