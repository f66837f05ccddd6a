"""What makes a ViT of images take clips: patches that reach over several frames, positions in time, and
how both come of an image model's weights.

B clips, T frames, times (tubes along T), N patches of a frame, D channels.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prepretrain.models.dense.windows import RelativeAttention
from prepretrain.models.encoders.base import resample_positions

Inflation = Literal["average", "centre"]
TimePositions = Literal["zero", "normal", "joint", "sinusoid"]


@dataclass(frozen=True)
class Clip:
    """The options of a ViT that say which clips it takes, and how; see its constructor."""

    frames: int
    tube: int
    inflate: Inflation
    time_positions: TimePositions

    def __post_init__(self) -> None:
        if self.frames % self.tube:
            raise ValueError(
                f"model.frames: {self.frames} is no multiple of model.tube ({self.tube}), the frames of a "
                f"patch."
            )

    @property
    def times(self) -> int:
        """The patches along time."""
        return self.frames // self.tube

    @property
    def apart(self) -> bool:
        """Whether positions in time have a table to themselves."""
        return self.time_positions in ("zero", "normal")

    @property
    def held(self) -> int:
        """The times that the table of places holds."""
        return 1 if self.apart else self.times

    @property
    def fixed(self) -> bool:
        """Whether positions are neither trained nor taken from weights."""
        return self.time_positions == "sinusoid"


class ClipAttention(RelativeAttention):
    """Attention over all times, rows and columns of a clip, with relative positions along each
    (MViT's); the class token has none."""

    def __init__(self, width: int, heads: int, grid: tuple[int, int, int], prefix: int):
        super().__init__(width, heads, grid)
        self.prefix = prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, prefix + N, D] to the same shape."""
        return self.attend(tokens, self.reach, self.prefix)


def tubes(clip: Tensor, tube: int, size: int) -> Tensor:
    """[B, C, T, H, W] to [B, times N, C tube P P]: each patch flattened as a 3-d convolution's weight
    is, frame by frame and row by row."""
    B, C, T, H, W = clip.shape
    cells = clip.reshape(B, C, T // tube, tube, H // size, size, W // size, size)
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, -1, C * tube * size * size)


def inflated(kernel: Tensor, tube: int, how: Inflation) -> Tensor:
    """An image's patch kernel [D, C, P, P] as a clip's [D, C, tube, P, P], which computes the same of a
    still clip.

    how: "average" divides it among the frames of a patch (MAE-ST, OmniMAE), "centre" puts it on the
    frame tube // 2.
    """
    if how == "average":
        return kernel[:, :, None].repeat(1, 1, tube, 1, 1) / tube
    whole = kernel.new_zeros(*kernel.shape[:2], tube, *kernel.shape[2:])
    whole[:, :, tube // 2] = kernel
    return whole


def sinusoids(width: int, count: int) -> Tensor:
    """[1, count, width], fixed positions by a token's number alone (OmniMAE)."""
    channel = torch.arange(width, dtype=torch.float64)
    rate = 10000 ** (-2 * (channel // 2) / width)
    angle = torch.arange(count, dtype=torch.float64)[:, None] * rate
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())[None].float()


def resized_times(table: Tensor, times: int) -> Tensor:
    """Positions in time [1, times', D] as those of another number of times, linearly."""
    if table.shape[1] == times:
        return table
    resized = F.interpolate(table.float().transpose(1, 2), times, mode="linear")
    return resized.transpose(1, 2).to(table.dtype)


def adapted_positions(
    table: Tensor,
    grid: tuple[int, int],
    times: int,
    prefix: int,
    stride: int,
    before: dict[str, Any],
) -> Tensor:
    """The positions [1, prefix + times N, D] that come of the table of another ViT, of images or of
    clips, on a grid of its own; times: 1 where those in time have a table to themselves."""
    theirs = int(before.get("window") is None and before.get("class_token", True))
    first, places = table[:, : min(prefix, theirs)], table[:, theirs:]
    held = 1
    if before.get("frames") and before.get("time_positions") == "joint":
        held = before["frames"] // before.get("tube", 2)
    if places.shape[1] % held:
        return table
    # all times side by side as channels of one frame's patches
    frame = places.unflatten(1, (held, -1)).transpose(1, 2).flatten(2)
    frame = resample_positions(frame, grid, 0, stride, before)
    by_time = frame.unflatten(2, (held, -1)).transpose(1, 2)  # [1, times', N, D]
    if held != times:
        by_time = resized_times(by_time.flatten(2), times).unflatten(2, (math.prod(grid), -1))
    return torch.cat([first, by_time.flatten(1, 2)], 1)
