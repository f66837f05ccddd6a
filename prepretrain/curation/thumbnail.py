"""Decodes a picture small, which is all that its hashes and its histogram need."""

from typing import Any

import numpy as np
from torch import Tensor

from prepretrain.curation.hashes import SIDE
from prepretrain.data.sources.base import Source
from prepretrain.data.transforms import header, pixels

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_GREY = 2  # not from the paper: levels between the channels of a grey JPEG, by its rounding


def pictures(source: Source) -> Source:
    """A source of which only the images are read or, where it has none, the videos."""
    return source.only(("image",) if "image" in source.fields else ("video",))


def thumbnail_of(sample: dict[str, Any]) -> tuple[Tensor, float]:
    """The picture of a sample, as `thumbnail` gives it: its image, or the frame that its video shows
    halfway. Raises BadImage."""
    if "video" not in sample:
        return thumbnail(sample["image"])
    video = sample["video"]
    frame = video.read([int(np.searchsorted(video.times, video.seconds / 2, side="right")) - 1])[0]
    return frame, max(frame.shape[1:]) / min(frame.shape[1:])


def thumbnail(data: bytes) -> tuple[Tensor, float]:
    """An image file's picture, uint8 [3, H, W], and the longer side of the whole by the shorter.

    A JPEG is decoded at the least eighth of its size that gives each side the pixels of a hash, which
    is several times as fast as to decode all of it; other files as they are. Raises BadImage.
    """
    image = header(data)
    aspect = max(image.size) / min(image.size)
    image.draft("RGB", (SIDE, SIDE))
    return pixels(image), aspect


def entropy(picture: np.ndarray) -> float:
    """The entropy of the histogram of 256 grey levels of uint8 [H, W, 3], in bits: 0 for a blank, at
    most 8."""
    grey = (picture @ _LUMA + 0.5).astype(np.uint8)
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    share = share[share > 0]
    return float(max(0.0, -(share * np.log2(share)).sum()))


def is_grey(picture: np.ndarray) -> bool:
    """Whether uint8 [H, W, 3] has no colour."""
    red, green, blue = np.moveaxis(picture.astype(np.int16), 2, 0)
    return bool((np.abs(red - green) + np.abs(blue - green)).mean() < _GREY)
