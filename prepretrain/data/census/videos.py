"""Counts what a source of videos holds, finds what cannot be used of it, and draws some."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from prepretrain.data.drawing import sheet
from prepretrain.data.sources.base import Source
from prepretrain.data.subset import evenly
from prepretrain.data.transforms import BadImage
from prepretrain.data.video.clips import short_side
from prepretrain.distributed import heartbeat

_SIDE = 128  # pixels of the short side of a frame that is drawn
_AT_ONCE = 16  # not from the paper: frames that are decoded together where all are


@dataclass
class Census:
    """What videos hold: of each that can be used its seconds, frames, rate and short side; `bad`:
    those that cannot be used."""

    seconds: list[float] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """What to print of it."""
        for what, values in (
            ("seconds", self.seconds),
            ("frames", self.frames),
            ("frames a second", self.rates),
            ("pixels of the short side", self.sides),
        ):
            if values:
                low, middle, high = np.percentile(values, [0, 50, 100])
                yield f"{low:g} to {high:g} {what}, {middle:g} in the median"
        for cause, count in Counter(bad.cause for bad in self.bad).most_common():
            yield f"{count:,} bad: {cause}"


def count(source: Source, *, decode: bool = False) -> Census:
    """Opens all videos of a source, and decodes the first, the middle and the last frame of each, or
    all frames if `decode`. Raises ValueError for a source without videos."""
    if "video" not in source.fields:
        raise ValueError(
            f"these data have no videos (their fields: {', '.join(source.fields)}). Source video reads "
            f"them: see datasets/videos.yaml."
        )
    census, narrowed = Census(), source.only(["video"])
    for index in range(len(source)):
        heartbeat.beat(f"video {index}")
        try:
            video = narrowed[index]["video"]
            height, width = _checked(video, decode)
        except BadImage as error:
            key = error.key or source.key(index)
            census.bad.append(BadImage(error.cause, error.detail, key))
            continue
        census.seconds.append(video.seconds)
        census.frames.append(video.frames)
        census.rates.append(video.rate)
        census.sides.append(min(height, width))
    return census


def _checked(video, decode: bool) -> tuple[int, int]:
    """The size of a video's frames, once they have been decoded."""
    if not decode:
        return tuple(video.read(sorted({0, video.frames // 2, video.frames - 1})).shape[-2:])
    for first in range(0, video.frames, _AT_ONCE):
        clip = video.read(range(first, min(first + _AT_ONCE, video.frames)))
    return tuple(clip.shape[-2:])


def draw(source: Source, indexes: Sequence[int], frames: int = 6) -> Image.Image:
    """A row of frames, spread evenly, of each of these videos."""
    rows = []
    for index in indexes:
        video = source[index]["video"]
        rows.append(list(short_side(video.read(evenly(video.frames, frames)), _SIDE)))
    return sheet(rows, [f"{len(rows)} videos, {frames} frames of each"])
