"""Pictures with a map of what each pixel is: both resized, cut and mirrored together, by the sample's
key. A size is height, width, in pixels."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prepretrain.data.batch import Ragged
from prepretrain.data.dense.boxes import Change, Placement, fit, upright
from prepretrain.data.transforms import BadImage, resized

VOID = 255  # in a label map: a pixel without a class
FILL = {"label_map": VOID, "depth": 0}  # what a map says where there is no picture

_LONGEST = 4  # the long side is at most so often the short one, as in 2048 x 512 and 2560 x 640
_TRIES = 10  # of crops (mmsegmentation's RandomCrop)
# mmsegmentation's PhotoMetricDistortion: brightness of 255, times, times, degrees
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32, (0.5, 1.5), (0.5, 1.5), 36


class Jitter:
    """A sample to a row: resized to a random `scale` of a short side of `short`, a random part of the
    canvas's size, padded where it is smaller, and mirrored in half of the cases.

    most: the largest share that one class may have of a part's pixels; ten parts are tried. distort:
    also changes brightness, contrast, saturation and hue. cut: see `pair`.
    """

    def __init__(
        self,
        field: str,
        canvas: tuple[int, int],
        *,
        short: int,
        scale: tuple[float, float],
        most: float = 1.0,
        distort: bool = False,
        cut: tuple[int, int] | None = None,
    ):
        self.field, self.canvas, self.short = field, canvas, short
        self.scale, self.most, self.distort, self.cut = scale, most, distort, cut

    def __call__(self, sample: dict) -> dict:
        random = sample["random"]
        whole, found = pair(sample, self.field, self.cut)
        placement = self.placement(found, random)
        picture = placement.image(whole)
        if self.distort:
            height, width = placement.extent  # what pads stays as it is
            seen = picture[:, :height, :width]
            picture[:, :height, :width] = distorted(seen, random("colours"))
        return _row(self.field, picture, placement, found)

    def placement(self, found: np.ndarray, random: Callable) -> Placement:
        """Where the picture of a map comes to lie."""
        rng, size = random("jitter"), found.shape
        scaled = at_short_side(size, self.short, rng.uniform(*self.scale))
        whole = Placement(size, self.canvas, scaled, mirrored=rng.random() < 0.5)
        for _ in range(_TRIES):
            free = [max(0, a - b) for a, b in zip(scaled, self.canvas)]
            top, left = (int(rng.integers(side + 1)) for side in free)
            part = replace(whole, corner=(top, left))
            if self.most == 1 or free == [0, 0] or _mixed(part.seen(found), self.most):
                break
        return part


class Fitted:
    """A sample to a row: the whole picture, as large as the canvas takes it. cut: see `pair`."""

    def __init__(self, field: str, canvas: tuple[int, int], cut: tuple[int, int] | None = None):
        self.field, self.canvas, self.cut = field, canvas, cut

    def __call__(self, sample: dict) -> dict:
        picture, found = pair(sample, self.field, self.cut)
        placement = fit(found.shape, self.canvas)
        return _row(self.field, placement.image(picture), placement, found)


class Scaled:
    """A sample to a row for a test: the whole picture at several `scales` of a short side of `short`,
    "image_0", "image_1", … as Ragged uint8 [3, h, w] with "size_0", …; and the map as it is, Ragged.

    short None: as large as fits into `canvas`. change: is done to the picture before. cut: see `pair`.
    """

    def __init__(
        self,
        field: str,
        *,
        short: int | None,
        canvas: tuple[int, int],
        scales: tuple[float, ...] = (1.0,),
        change: Change | None = None,
        cut: tuple[int, int] | None = None,
    ):
        self.field, self.short, self.canvas = field, short, canvas
        self.scales, self.change, self.cut = scales, change, cut

    def __call__(self, sample: dict) -> dict:
        picture, found = pair(sample, self.field, self.cut)
        if self.change is not None:
            picture = self.change(picture, sample["random"])
        row = {
            self.field: Ragged(torch.from_numpy(found), FILL[self.field]),
            "original": torch.tensor(found.shape),
        }
        for number, scale in enumerate(self.scales):
            size = fit(found.shape, self.canvas).scaled
            if self.short is not None:
                size = at_short_side(found.shape, self.short, scale)
            row[f"image_{number}"] = Ragged(resized(picture, *size, mode="bilinear"), 0)
            row[f"size_{number}"] = torch.tensor(size)
        return row


def pair(sample: dict, field: str, cut: tuple[int, int] | None = None) -> tuple[Tensor, np.ndarray]:
    """The picture of a sample, uint8 [3, H, W], and its map [H, W].

    cut: of both so many rows, the lowest, and columns, those in the middle, as KITTI's benchmark has.
    Raises BadImage for a picture that has fewer.
    """
    found = sample[field]
    picture = upright(sample["image"], found.shape)
    if cut is None:
        return picture, found
    (height, width), (rows, columns) = found.shape, cut
    if height < rows or width < columns:
        detail = f"{width} x {height} pixels, of which {columns} x {rows} are to be cut out"
        raise BadImage("smaller than the cut", detail)
    left = (width - columns) // 2
    part = np.s_[..., height - rows :, left : left + columns]
    return picture[part], found[part]


def at_short_side(size: tuple[int, int], short: int, scale: float = 1.0) -> tuple[int, int]:
    """A size whose short side becomes `scale` times `short`, its aspect kept, unless the long one
    would be too long."""
    ratio = scale * min(short / min(size), _LONGEST * short / max(size))
    height, width = (max(1, int(side * ratio + 0.5)) for side in size)
    return height, width


def _row(field: str, picture: Tensor, placement: Placement, found: np.ndarray) -> dict:
    canvas = np.full(placement.canvas, FILL[field], dtype=found.dtype)
    height, width = placement.extent
    canvas[:height, :width] = placement.seen(found)
    size = torch.tensor(placement.extent)
    return {"image": picture, "size": size, field: torch.from_numpy(canvas)}


def _mixed(labels: np.ndarray, most: float) -> bool:
    """Whether several classes are seen, none of which has as much as `most` of the pixels."""
    counts = np.bincount(labels.ravel(), minlength=VOID + 1)[:VOID]
    return (counts > 0).sum() > 1 and counts.max() / counts.sum() < most


def distorted(image: Tensor, rng: np.random.Generator) -> Tensor:
    """uint8 [3, H, W] with another brightness, contrast, saturation and hue, each in half of the
    cases, contrast before or after the other two."""
    pixels = image.permute(1, 2, 0).numpy().astype(np.float32)
    if rng.random() < 0.5:
        pixels = (pixels + rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)).clip(0, 255)
    first = rng.random() < 0.5
    times = rng.uniform(*_CONTRAST) if rng.random() < 0.5 else 1.0
    pixels = (pixels * times).clip(0, 255) if first else pixels
    pixels = _recoloured(pixels.astype(np.uint8), rng)
    if not first:
        pixels = (pixels * np.float32(times)).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _recoloured(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3] with another saturation and hue."""
    saturation = rng.uniform(*_SATURATION) if rng.random() < 0.5 else 1.0
    turn = rng.uniform(-_HUE, _HUE) if rng.random() < 0.5 else 0.0
    if saturation == 1.0 and turn == 0.0:
        return pixels
    colours = np.array(Image.fromarray(pixels).convert("HSV"))
    colours[..., 0] += np.uint8(round(turn * 256 / 360) % 256)  # goes around
    colours[..., 1] = (colours[..., 1] * np.float32(saturation)).clip(0, 255)
    return np.array(Image.fromarray(colours, "HSV").convert("RGB"))
