"""What a test sees of a video: several clips of it, and several crops of each."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from prepretrain.data.transforms import BadImage
from prepretrain.data.video.clips import Sampling, Segments, Strided, Window, view_crops

Way = Literal["strided", "segments", "window"]


def sampling_of(name: Way, length: int, *, stride: int, span: float) -> Sampling:
    """A way to choose `length` frames: "strided", `stride` thirtieths of a second apart; "segments", one
    of each of equal parts of the video; "window", spread over `span` seconds."""
    ways = {
        "strided": lambda: Strided(length, stride),
        "segments": lambda: Segments(length),
        "window": lambda: Window(length, span),
    }
    return ways[name]()


class Views:
    """clips x crops of a video, each of which a model sees by itself.

    sampling, stride, span: as objective video's. clips: spread over the video. crops: of each, 3 along
    its long side, or 1 in the middle. short_side: pixels of a frame's; null is the crop's. frames: of a
    clip; null is the model's, or 8 of a model of images.
    """

    def __init__(
        self,
        *,
        sampling: Way = "strided",
        stride: int = 4,
        span: float = 2.7,
        clips: int = 1,
        crops: Literal[1, 3] = 1,
        short_side: int | None = None,
        frames: int | None = None,
    ):
        self.clips, self.crops, self.short_side, self.frames = clips, crops, short_side, frames
        self.way = {"name": sampling, "stride": stride, "span": span}

    def length(self, encoder: Any) -> int:
        """The frames of a clip for an encoder."""
        return self.frames or encoder.frames or 8  # not from the paper

    @property
    def count(self) -> int:
        """How many views a video has."""
        return self.clips * self.crops

    def of(self, encoder: Any, labelled: bool = True) -> Callable[[dict], dict]:
        """The transform of a sample to {"clip": uint8 [views, 3, T, S, S], "label": int} for an
        encoder. Raises ValueError if the encoder sees other frames, or no squares."""
        height, width = encoder.image_size
        frames = self.length(encoder)
        if encoder.frames not in (None, frames):
            raise ValueError(f"views.frames: {frames}, and the model takes {encoder.frames}.")
        if height != width:
            raise ValueError(
                f"model.image_size: {height} x {width}: the crops of a video are squares. Give one number."
            )
        if self.short_side is not None and self.short_side < height:
            raise ValueError(
                f"views.short_side: {self.short_side} is less than model.image_size, {height}."
            )
        how = {k: v for k, v in self.way.items() if k != "name"}
        return _Seen(self, sampling_of(self.way["name"], frames, **how), height, labelled)

    def asked(self) -> list[Any]:
        """What of it changes what is seen."""
        return [*self.way.values(), self.clips, self.crops, self.short_side, self.frames]


class _Seen:
    """The transform of `Views.of`; a class, so that workers can pickle it."""

    def __init__(self, views: Views, sampling: Sampling, side: int, labelled: bool):
        self.views, self.sampling, self.side, self.labelled = views, sampling, side, labelled

    def __call__(self, sample: dict) -> dict:
        if self.labelled and sample.get("label") is None:
            raise BadImage("no label")
        views = self.views
        clips = self.sampling.test(sample["video"], views.clips)
        frames = sample["video"].read([number for clip in clips for number in clip])
        seen = view_crops(frames, self.side, views.crops, views.short_side)
        each = torch.stack([crop.unflatten(0, (views.clips, -1)) for crop in seen], 1)
        label = int(sample["label"]) if self.labelled else 0
        return {"clip": each.flatten(0, 1).transpose(1, 2), "label": label}


def middle_frames(sample: dict, views: Views, frames: int) -> Tensor:
    """The frames of a video's middle clip, uncropped, uint8 [T, 3, H, W], to be looked at."""
    how = {k: v for k, v in views.way.items() if k != "name"}
    sampling = sampling_of(views.way["name"], frames, **how)
    clips = sampling.test(sample["video"], views.clips)
    return sample["video"].read(clips[len(clips) // 2])
