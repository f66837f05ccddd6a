"""Images with their objects, resized, cropped and mirrored together: large-scale jitter for training,
a whole image for evaluation.

G objects; masks are packed bits, [G, H, ceil(W / 8)].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prepretrain.data.transforms import BadImage


@dataclass(frozen=True)
class View:
    """What is seen of an image: mirrored or not, resized to a height and width, and of that a part of
    `size` from the corner (top, left) on."""

    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    mirrored: bool = False


def whole(image: tuple[int, int], canvas: tuple[int, int]) -> View:
    """The whole image (height, width), as large as fits into the canvas, its aspect kept."""
    scale = min(side / own for side, own in zip(canvas, image))
    resized = tuple(max(1, int(own * scale + 0.5)) for own in image)
    return View(resized, (0, 0), resized)


def jitter(
    image: tuple[int, int], canvas: tuple[int, int], scale: float, place: float, mirrored: bool
) -> View:
    """An image (height, width) resized to fit into `scale` times the canvas, its aspect kept, and a
    part of it as large as the canvas at most; place: where along both sides, from 0 to 1 (large-scale
    jitter as in detectron2)."""
    factor = min(side * scale / own for side, own in zip(canvas, image))
    resized = tuple(max(1, round(own * factor)) for own in image)
    spare = [max(own - side, 0) for own, side in zip(resized, canvas)]
    corner = tuple(round(place * side) for side in spare)
    size = tuple(min(own, side) for own, side in zip(resized, canvas))
    return View(resized, corner, size, mirrored)


def see(image: Tensor, view: View, canvas: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] as a view shows it, in the upper left of a black canvas; bilinear."""
    image = image.flip(-1) if view.mirrored else image
    pixels = image[None].contiguous(memory_format=torch.channels_last)
    if pixels.shape[-2:] != view.resized:
        pixels = F.interpolate(pixels, view.resized, mode="bilinear", antialias=True)
    (top, left), (height, width) = view.corner, view.size
    seen = torch.zeros(3, *canvas, dtype=torch.uint8)
    seen[:, :height, :width] = pixels[0, :, top : top + height, left : left + width]
    return seen


def see_boxes(boxes: np.ndarray, image: tuple[int, int], view: View) -> np.ndarray:
    """Boxes [G, 4] as a view shows them, those outside of it without an area."""
    boxes = boxes.astype(np.float64)
    if view.mirrored:
        boxes = np.stack(
            [image[1] - boxes[:, 2], boxes[:, 1], image[1] - boxes[:, 0], boxes[:, 3]], 1
        )
    scale = [view.resized[1] / image[1], view.resized[0] / image[0]] * 2
    moved = boxes * scale - np.tile(view.corner[::-1], 2)
    return np.clip(moved, 0, np.tile(view.size[::-1], 2)).astype(np.float32)


def see_mask(mask: Any, image: tuple[int, int], view: View) -> np.ndarray:
    """An object's polygons or run lengths as a view shows them, bool [height, width]: polygons are
    moved and then drawn, run lengths resized by the nearest pixel. Raises BadImage for run lengths of
    an image of another size."""
    from faster_coco_eval.core import mask as coco

    if isinstance(mask, list):
        moved = [_moved(np.asarray(points, dtype=np.float64), image, view) for points in mask]
        return coco.decode(coco.merge(coco.frPyObjects(moved, *view.size))).astype(bool)
    if tuple(mask["size"]) != image:
        raise BadImage("mask of another size", f"of {mask['size']}, and the image is {list(image)}")
    runs = coco.frPyObjects(mask, *image) if isinstance(mask["counts"], list) else mask
    drawn = coco.decode(runs).astype(bool)
    drawn = drawn[:, ::-1] if view.mirrored else drawn
    rows, columns = (
        ((first + np.arange(count) + 0.5) * own / resized).astype(np.int64)
        for first, count, own, resized in zip(view.corner, view.size, image, view.resized)
    )
    return drawn[rows[:, None], columns]


def _moved(points: np.ndarray, image: tuple[int, int], view: View) -> list[float]:
    x, y = points[0::2], points[1::2]
    x = image[1] - x if view.mirrored else x
    x = x * (view.resized[1] / image[1]) - view.corner[1]
    y = y * (view.resized[0] / image[0]) - view.corner[0]
    return np.stack([x, y], 1).ravel().tolist()


def around(masks: np.ndarray) -> np.ndarray:
    """The box of each mask bool [G, H, W], without an area for one that is empty."""
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
