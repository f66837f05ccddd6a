"""MAE whose target is a frozen teacher's features ("Delving Deeper into Data Scaling in Masked Image
Modeling", section 3.1).

B images, N patches, K kept and M masked ones, T channels of the teacher.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prepretrain.data.transforms import plain_size
from prepretrain.models import weights
from prepretrain.models.decoder import Decoder
from prepretrain.models.encoders import base as encoders
from prepretrain.models.load import open_weights, options_of
from prepretrain.models.model import Model
from prepretrain.objectives.base import MaskedObjective


class FeatureMAE(MaskedObjective):
    """Encodes a random quarter of the patches and predicts the teacher's features of all.

    Target and prediction have length 1 in each token; the loss is the squared distance, averaged
    over the class token and all N patches, visible and masked (Eq. 1). The teacher sees the whole
    image, normalised as it was trained; it is not trained, not saved, and runs in the precision and
    sharding of the run.
    """

    def __init__(
        self,
        model: Model,
        *,
        teacher: str,
        teacher_options: dict[str, Any] | None = None,
        resample: bool = False,
        mask_ratio: float = 0.75,
        decoder_depth: int = 4,
        decoder_width: int = 512,
        decoder_heads: int = 16,
        crop_scale: tuple[float, float] = (0.2, 1.0),
    ):
        """teacher: a run's folder or a file (`runs/wsp:encoder`), `timm/NAME` or
        `open_clip/ARCHITECTURE/TAG`.

        teacher_options: those of its Model, where it does not say them or other ones are wanted: a
        file of DINO's is {encoder: timm, architecture: vit_base_patch16_224.dino}; image_size is
        what pictures are resized to for it. resample: interpolate a teacher's features to the
        student's grid where theirs differs; without, another grid is refused.
        """
        super().__init__(model, mask_ratio=mask_ratio, crop_scale=crop_scale)
        self.source = teacher
        options = encoders.follow(options_of(teacher), teacher_options or {})
        if "encoder" not in options:
            raise ValueError(
                f"objective.teacher: {teacher} does not say which encoder it is. Add "
                f"objective.teacher_options={{encoder: vit_b16}}, or the like."
            )
        with torch.device("meta"):
            found = Model(**options)
        # in a tuple, so that it is no part of this module: neither initialised, trained nor saved
        self._teacher = (found.requires_grad_(False).eval(),)
        encoder = found.encoder
        if encoder.prefix < 1:
            raise ValueError(
                f"objective.teacher: {teacher} has no class token, which Eq. 1 needs. Take a ViT with "
                f"one."
            )
        self.grid, self.teacher_grid = model.encoder.grid, encoder.grid
        if self.grid != self.teacher_grid and not resample:
            rows, columns = self.grid
            size = plain_size((rows * encoder.stride, columns * encoder.stride))
            raise ValueError(
                f"objective.teacher: {teacher} sees {_by(encoder.grid)} patches of an image of "
                f"{_by(encoder.image_size)} pixels, and the student {_by(self.grid)}. Set "
                f"objective.teacher_options.image_size={size}, which gives equal grids, or "
                f"objective.resample=true, which interpolates its features."
            )
        self.decoder = Decoder(
            model.encoder.width,
            self.grid,
            encoder.width,
            depth=decoder_depth,
            width=decoder_width,
            heads=decoder_heads,
        )

    @property
    def teacher(self) -> Model:
        """The teacher; without weights until `prepare`."""
        return self._teacher[0]

    def frozen(self) -> list[nn.Module]:
        """See Objective.frozen."""
        return [self.teacher]

    def prepare(self, shard: Callable[[nn.Module], None]) -> None:
        """See Objective.prepare: shards the teacher and loads its weights."""
        shard(self.teacher)
        weights.fill(self.teacher, open_weights(self.source))
        self.teacher.eval()

    def losses(self, batch: dict[str, Any]) -> Tensor:
        """{"image": uint8 [B, 3, H, W], "noise": float [B, N]} to each image's loss [B]."""
        keep, masked = self.split(batch["noise"])
        latent = self.model(batch["image"], keep=keep)
        predicted = self.decoder(latent, keep, masked, everything=True).float()
        target = self.target(batch["image"], torch.cat([keep, masked], 1))
        distance = F.normalize(predicted, dim=-1) - F.normalize(target, dim=-1)
        return distance.square().sum(-1).mean(1)

    @torch.no_grad()
    def target(self, image: Tensor, order: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] and int64 [B, N] patches to the teacher's features [B, 1 + N, T]: the
        class token's, and the patches' in that order."""
        encoder = self.teacher.encoder
        if encoder.image_size != tuple(image.shape[-2:]):
            image = F.interpolate(image.float(), encoder.image_size, mode="bicubic", antialias=True)
            image = image.round().clamp(0, 255).to(torch.uint8)
        tokens = self.teacher(image).float()
        grid = tokens[:, encoder.prefix :]
        if self.teacher_grid != self.grid:
            maps = grid.transpose(1, 2).unflatten(2, self.teacher_grid)
            maps = F.interpolate(maps, self.grid, mode="bilinear", antialias=True)
            grid = maps.flatten(2).transpose(1, 2)
        index = order[..., None].expand(-1, -1, grid.shape[-1])
        return torch.cat([tokens[:, :1], grid.gather(1, index)], 1)


def _by(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"
