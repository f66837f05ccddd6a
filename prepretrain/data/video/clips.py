"""Which frames of a video make a clip, and crops that are the same for all frames of one.

Frames are numbered from 0 in the order in which they are shown. A clip is uint8 [T, 3, H, W].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from prepretrain.data.transforms import Size, resized, sides
from prepretrain.data.video.handles import Clip

_BASE = 30  # frames a second, of which a stride counts (Kinetics')


class Sampling(Protocol):
    """A way to choose a clip's frames."""

    def train(self, video: Clip, rng: np.random.Generator) -> list[int]:
        """The numbers of the frames of a random clip."""
        ...

    def test(self, video: Clip, clips: int) -> list[list[int]]:
        """The numbers of the frames of each of the clips of a test."""
        ...


@dataclass(frozen=True)
class Strided:
    """`length` frames, each `stride` thirtieths of a second after the one before, from a random place
    (Kinetics; MAE-ST, SlowFast). A video that is shorter repeats its last frame."""

    length: int = 16
    stride: int = 4

    def train(self, video: Clip, rng: np.random.Generator) -> list[int]:
        """See Sampling."""
        start = rng.uniform(0, slack(video.frames, video.rate, self.length, self.stride))
        return self._at(video, start)

    def test(self, video: Clip, clips: int) -> list[list[int]]:
        """See Sampling; from the first frame to the last."""
        starts = view_starts(video.frames, video.rate, self.length, self.stride, clips)
        return [self._at(video, start) for start in starts]

    def _at(self, video: Clip, start: float) -> list[int]:
        numbers = strided(video.frames, video.rate, self.length, self.stride, start)
        return on_the_clock(video.times, video.seconds, numbers)


@dataclass(frozen=True)
class Segments:
    """One frame of each of `length` equal parts of the video: a random one, or the middle one
    (Something-Something v2; SlowFast). All clips of a test are the same."""

    length: int = 16

    def train(self, video: Clip, rng: np.random.Generator) -> list[int]:
        """See Sampling."""
        low, high = segments(video.frames, self.length)
        numbers = [int(rng.integers(a, b + 1)) for a, b in zip(low, high)]
        return on_the_clock(video.times, video.seconds, numbers)

    def test(self, video: Clip, clips: int) -> list[list[int]]:
        """See Sampling."""
        low, high = segments(video.frames, self.length)
        numbers = [(a + b) // 2 for a, b in zip(low, high)]
        return [on_the_clock(video.times, video.seconds, numbers)] * clips


@dataclass(frozen=True)
class Window:
    """`length` frames spread evenly over `span` seconds (Something-Something v2; OmniMAE)."""

    length: int = 16
    span: float = 2.7

    def train(self, video: Clip, rng: np.random.Generator) -> list[int]:
        """See Sampling."""
        start = rng.uniform(0, max(video.seconds - self.span, 0))
        return between(video.times, start, start + self.span, self.length)

    def test(self, video: Clip, clips: int) -> list[list[int]]:
        """See Sampling."""
        spans = windows(video.seconds, self.span, clips)
        return [between(video.times, start, end, self.length) for start, end in spans]


def slack(frames: int, rate: float, length: int, stride: int) -> float:
    """How many frames later than at the first a clip may start."""
    return max(frames - _extent(rate, length, stride), 0)


def view_starts(frames: int, rate: float, length: int, stride: int, clips: int) -> list[int]:
    """Where each of a test's clips starts: spread evenly, one alone in the middle."""
    free = slack(frames, rate, length, stride)
    if clips == 1:
        return [math.floor(free / 2)]
    return [i * math.floor(free / (clips - 1)) for i in range(clips)]


def strided(frames: int, rate: float, length: int, stride: int, start: float) -> list[int]:
    """The frames of a clip that starts at a place between frames; the last frame is repeated."""
    end = start + _extent(rate, length, stride) - 1
    places = torch.linspace(start, end, length)  # in float32, as the papers' code
    return places.clamp(0, frames - 1).long().tolist()


def _extent(rate: float, length: int, stride: int) -> float:
    """The length of a clip in frames, a real number: 64 thirtieths of a second for 16 x 4."""
    return stride * length / _BASE * rate


def segments(frames: int, length: int) -> tuple[list[int], list[int]]:
    """The first and the last frame of each part; neighbours share a frame."""
    ends = np.round(np.arange(length + 1) * ((frames - 1) / length)).astype(int).tolist()
    return ends[:-1], ends[1:]


def windows(seconds: float, span: float, clips: int) -> list[tuple[float, float]]:
    """(start, end) in seconds of each of a test's windows; the last starts one step before it would
    end with the video."""
    length = Fraction(span)
    # exact in the duration's own unit, as a container states it
    step = max(Fraction(seconds).limit_denominator(1_000_000) - length, Fraction(0)) / clips
    return [(float(step * i), float(step * i + length)) for i in range(clips)]


def between(times: np.ndarray, start: float, end: float, length: int) -> list[int]:
    """`length` of the frames that begin in a window, spread evenly, some twice if they are few."""
    first, last = np.searchsorted(times, [start, end])
    first = min(first, len(times) - 1)
    last = max(last, first + 1)
    return torch.linspace(float(first), float(last - 1), length).long().tolist()


def on_the_clock(times: np.ndarray, seconds: float, numbers: Sequence[int]) -> list[int]:
    """The frames that are shown when those of these numbers would be, if all lasted equally long.

    The same numbers, where the frames do, up to half of their time; else those of a video of variable
    rate.
    """
    even = np.arange(len(times)) * (seconds / len(times))
    if np.abs(times - even).max() < seconds / len(times) / 2:
        return list(numbers)
    shown = np.searchsorted(times, even[list(numbers)] + 1e-9, side="right") - 1
    return shown.tolist()


def view_corners(height: int, width: int, crop: int, views: int) -> list[tuple[int, int]]:
    """(top, left) of the square crops along the long side of a frame: 1, the middle, or 3."""
    if views not in (1, 3):
        raise ValueError(f"{views} crops of a frame: there are 1, in the middle, or 3.")
    free = (height - crop, width - crop)
    middle = tuple(math.ceil(side / 2) for side in free)
    if views == 1:
        return [middle]
    if height > width:
        return [(top, middle[1]) for top in (0, middle[0], free[0])]
    return [(middle[0], left) for left in (0, middle[1], free[1])]


def short_side(clip: Tensor, short: int, mode: str = "bilinear") -> Tensor:
    """A clip whose short side is so many pixels, its aspect kept."""
    return resized(clip, *scaled_size(*clip.shape[-2:], short), mode=mode)


def scaled_size(height: int, width: int, short: int) -> tuple[int, int]:
    """(height, width) of a frame whose short side is so many pixels; the long one is rounded down."""
    if height < width:
        return short, math.floor(width / height * short)
    return math.floor(height / width * short), short


def view_crops(clip: Tensor, crop: int, views: int, short: int | None = None) -> list[Tensor]:
    """The crops of a test, uint8 [T, 3, crop, crop], of a clip whose short side becomes `short`, or
    `crop`."""
    scaled = short_side(clip, crop if short is None else short)
    corners = view_corners(*scaled.shape[-2:], crop, views)
    return [scaled[..., top : top + crop, left : left + crop] for top, left in corners]


def jittered_crop(
    clip: Tensor, size: Size, rng: np.random.Generator, *, short: tuple[int, int]
) -> Tensor:
    """A random crop of a clip whose short side becomes a random number of pixels of `short`."""
    H, W = sides(size)
    side = max(int(rng.integers(short[0], short[1] + 1)), H, W)
    clip = short_side(clip, side)
    top, left = (int(rng.integers(a - b + 1)) for a, b in zip(clip.shape[-2:], (H, W)))
    return clip[..., top : top + H, left : left + W]
