"""Pictures with objects on a canvas of one size: image, boxes and masks moved together, by the
sample's key. A box is left, top, right, bottom; a size is height, width; both in pixels."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prepretrain.data.batch import Ragged
from prepretrain.data.dense import masks
from prepretrain.data.transforms import BadImage, Size, decode, orientation, resized, sides

# A picture uint8 [3, H, W], and its generators by purpose, to another like it.
Change = Callable[[Tensor, Callable], Tensor]


@dataclass(frozen=True)
class Placement:
    """Where a picture comes to lie: mirrored or not, resized as a whole to `scaled`, of which what
    begins at `corner` (top, left) lies at the canvas's top left, `extent` large; the rest is padding."""

    size: tuple[int, int]
    canvas: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int] = (0, 0)
    mirrored: bool = False

    @property
    def extent(self) -> tuple[int, int]:
        """(height, width) of what is seen of the picture."""
        return min(self.scaled[0], self.canvas[0]), min(self.scaled[1], self.canvas[1])

    def image(self, picture: Tensor) -> Tensor:
        """uint8 [3, *size] to uint8 [3, *canvas], padded with zeros at the right and below."""
        (top, left), (height, width) = self.corner, self.extent
        picture = picture.flip(-1) if self.mirrored else picture
        picture = resized(picture, *self.scaled, mode="bilinear")
        canvas = torch.zeros(3, *self.canvas, dtype=torch.uint8)
        canvas[:, :height, :width] = picture[:, top : top + height, left : left + width]
        return canvas

    def seen(self, values: np.ndarray) -> np.ndarray:
        """A map [*size] to what is seen of it [*extent]: the value at the nearest pixel."""
        return values[np.ix_(*self._nearest())]

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """float [n, 4] on the picture to those on the canvas, cut off where the picture is."""
        left, top, right, bottom = boxes.T
        x, y = self._points(np.stack([left, right]), np.stack([top, bottom]))
        height, width = self.extent
        x, y = np.sort(x.clip(0, width), axis=0), y.clip(0, height)
        return np.stack([x[0], y[0], x[1], y[1]], axis=1)

    def mask(self, mask: masks.Segmentation) -> tuple[np.ndarray, int, int]:
        """A mask of the picture to (bool [rows, columns], top, left): the part of the extent that it
        touches, polygons drawn at the resolution of the canvas. left is a multiple of 8."""
        if isinstance(mask, dict):
            return self.seen(masks.bitmap(mask, *self.size)), 0, 0
        parts = [self._points(np.array(part[0::2]), np.array(part[1::2])) for part in mask]
        x, y = (np.concatenate(axis) for axis in zip(*parts))
        height, width = self.extent
        left, right = _span(x, width)
        top, bottom = _span(y, height)
        left -= left % 8
        if right <= left or bottom <= top:
            return np.zeros((0, 0), dtype=bool), 0, 0
        moved = [np.stack([x - left, y - top], axis=1).ravel().tolist() for x, y in parts]
        return masks.bitmap(moved, bottom - top, right - left), top, left

    def _points(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = self.size[1] - x if self.mirrored else x
        x = x * (self.scaled[1] / self.size[1]) - self.corner[1]
        return x, y * (self.scaled[0] / self.size[0]) - self.corner[0]

    def _nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """The row and the column of the picture that each of the extent shows."""
        rows, columns = (
            ((np.arange(seen) + first + 0.5) * (whole / scaled)).astype(np.int64)
            for seen, first, whole, scaled in zip(self.extent, self.corner, self.size, self.scaled)
        )
        return rows, self.size[1] - 1 - columns if self.mirrored else columns


def jitter(
    size: tuple[int, int], canvas: Size, rng: np.random.Generator, scale: tuple[float, float]
) -> Placement:
    """Large-scale jitter (arXiv 2012.07177): mirrored in half of the cases, resized to fit in a
    random `scale` of the canvas, and cut to it where it is larger, at one random place for both
    axes, as detectron2 does."""
    mirrored, factor, place = rng.random() < 0.5, rng.uniform(*scale), rng.random()
    return jittered_by(size, canvas, factor, place, mirrored)


def jittered_by(
    size: tuple[int, int], canvas: Size, factor: float, place: float, mirrored: bool = False
) -> Placement:
    """The jitter of a factor and a place, 0 to 1, that were drawn."""
    canvas = sides(canvas)
    ratio = factor * min(canvas[0] / size[0], canvas[1] / size[1])
    height, width = (max(1, int(np.round(side * ratio))) for side in size)
    corner = [int(np.round(place * max(0, a - b))) for a, b in zip((height, width), canvas)]
    return Placement(size, canvas, (height, width), (corner[0], corner[1]), mirrored)


def fit(size: tuple[int, int], canvas: Size) -> Placement:
    """The whole picture, as large as the canvas takes it, its aspect kept: how a test sees it. On a
    square this is detectron2's short side of S, of at most S for the long one."""
    canvas = sides(canvas)
    return Placement(size, canvas, _times(size, min(canvas[0] / size[0], canvas[1] / size[1])))


def fit_sides(size: tuple[int, int], most: tuple[int, int], stride: int) -> Placement:
    """The whole picture with a short side of most[0], unless the long one would then exceed most[1];
    on the least canvas of whole multiples of the stride."""
    scaled = _times(size, min(most[0] / min(size), most[1] / max(size)))
    canvas = (scaled[0] + -scaled[0] % stride, scaled[1] + -scaled[1] % stride)
    return Placement(size, canvas, scaled)


def _times(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    height, width = (max(1, math.floor(side * ratio + 0.5)) for side in size)
    return height, width


def jittered(sample: dict, canvas: Size, scale: tuple[float, float] = (0.1, 2.0)) -> dict:
    """A sample with objects under large-scale jitter, as `_row` has it. Raises BadImage."""
    return _row(sample, jitter(sample["size"], canvas, sample["random"]("jitter"), scale))


def fitted(sample: dict, canvas: Size) -> dict:
    """A sample with objects, whole, as `_row` has it. Raises BadImage."""
    return _row(sample, fit(sample["size"], canvas))


def seen_whole(
    sample: dict, place: Callable[[tuple[int, int]], Placement], change: Change | None = None
) -> dict:
    """A sample without its objects, whole: "image", Ragged, and "size" as in `_row`, and "original"
    int64 [2], the size of the picture itself. place: of a size, `fit` or `fit_sides`. change: is done
    to the picture before. Raises BadImage."""
    placement = place(sample["size"])
    picture = upright(sample["image"], sample["size"])
    if change is not None:
        picture = change(picture, sample["random"])
    size, original = torch.tensor(placement.extent), torch.tensor(sample["size"])
    return {"image": Ragged(placement.image(picture), 0), "size": size, "original": original}


def _row(sample: dict, placement: Placement) -> dict:
    """A row of a batch.

    "image": uint8 [3, *canvas]; "size": int64 [2], (height, width) of the picture within it. Ragged,
    a row an object: "boxes" float32 [n, 4]; "classes" int64 [n], -1 where there is none; and of a sample
    with masks "bits" uint8 [n, height, ceil(width / 8)] of the canvas, numpy's packbits of each row.
    Boxes then enclose what is seen of the mask. Crowds, and objects of which nothing is seen, are
    left out.
    """
    picture = placement.image(upright(sample["image"], sample["size"]))
    row = {"image": picture, "size": torch.tensor(placement.extent)}
    single = np.flatnonzero(~sample["crowds"])
    found = placement.boxes(sample["boxes"][single])
    if "masks" in sample:
        drawn = [placement.mask(sample["masks"][i]) for i in single]
        found = np.array([_around(*part) for part in drawn]).reshape(-1, 4)
    seen = np.flatnonzero((found[:, 2:] > found[:, :2]).all(axis=1))
    if "masks" in sample:
        row["bits"] = Ragged(_packed([drawn[i] for i in seen], placement), 0)
    row["boxes"] = Ragged(torch.from_numpy(found[seen]).float(), 0)
    row["classes"] = Ragged(torch.from_numpy(sample["classes"][single][seen]), -1)
    return row


def upright(data: bytes, size: tuple[int, int]) -> Tensor:
    """The pixels of an image file, uint8 [3, *size], turned as its boxes were drawn.

    Labelling tools show a photo upright, as its EXIF block says; where only the stored pixels are of
    the size that the annotations give, these were labelled. Raises BadImage for any other size.
    """
    stored = decode(data)
    for picture in (_turned(stored, orientation(data)), stored):
        if tuple(picture.shape[-2:]) == tuple(size):
            return picture
    height, width = stored.shape[-2:]
    detail = f"{width} x {height} pixels, and its annotations are of {size[1]} x {size[0]}"
    raise BadImage("other size", detail)


def _turned(image: Tensor, turn: int) -> Tensor:
    """As EXIF's orientation says: 2 to 4 mirrored and turned by half, 5 to 8 on their side."""
    if turn > 4:
        image = image.transpose(-1, -2)
    axes = {2: (-1,), 3: (-1, -2), 4: (-2,), 6: (-1,), 7: (-1, -2), 8: (-2,)}.get(turn, ())
    return image.flip(axes)


def _span(values: np.ndarray, side: int) -> tuple[int, int]:
    """The whole pixels from the least of some values to the largest, as far as a side goes."""
    return max(0, math.floor(values.min()) - 1), min(side, math.ceil(values.max()) + 1)


def _around(mask: np.ndarray, top: int, left: int) -> tuple[int, int, int, int]:
    """The box around the pixels of a mask; one without area around none."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return 0, 0, 0, 0
    return left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1


def _packed(drawn: list[tuple[np.ndarray, int, int]], placement: Placement) -> Tensor:
    height, width = placement.canvas
    bits = np.zeros((len(drawn), height, -(-width // 8)), dtype=np.uint8)
    for one, (mask, top, left) in zip(bits, drawn):
        packed = np.packbits(np.ascontiguousarray(mask), axis=1)
        first = left // 8
        one[top : top + len(packed), first : first + packed.shape[1]] = packed
    return torch.from_numpy(bits)
