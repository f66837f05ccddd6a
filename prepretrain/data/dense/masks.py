"""Masks of objects as COCO's files write them, polygons or run lengths, and as pixels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prepretrain import plugin

Segmentation = list[list[float]] | dict[str, Any]


def check(segmentation: Any, height: int, width: int) -> None:
    """Raises ValueError, with the reason, for what is no mask of an image of this size.

    A mask is a list of polygons [x, y, x, y, …] of three points or more, or the run lengths
    {"size": [height, width], "counts": …} down its columns, plain or compressed.
    """
    if isinstance(segmentation, dict):
        _runs(segmentation, height, width)
    elif not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"{_short(segmentation)} is no mask: no polygons, no run lengths")
    else:
        for polygon in segmentation:
            _check_polygon(polygon, 2 * max(height, width))


def bitmap(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """A checked mask as pixels, bool [height, width].

    Polygons may go past the image; their pixels are those that COCO's own tools give them.
    """
    if isinstance(segmentation, dict):
        runs = _runs(segmentation, height, width)
        values = np.arange(len(runs)) % 2 == 1
        return np.repeat(values, runs).reshape(width, height).T
    coder = _coder()
    parts = coder.frPyObjects(segmentation, height, width)
    return coder.decode(coder.merge(parts)).astype(bool)


def encode(bitmaps: Tensor) -> list[dict]:
    """Run lengths, compressed, of masks bool [n, H, W], as they stand in a file of results."""
    if not len(bitmaps):
        return []
    columns = np.asfortranarray(bitmaps.permute(1, 2, 0).cpu().to(torch.uint8).numpy())
    coded = _coder().encode(columns)
    return [{"size": list(map(int, one["size"])), "counts": _text(one["counts"])} for one in coded]


def require_coder(where: str) -> None:
    """Raises ValueError where polygons cannot be made pixels, for want of a package."""
    plugin.require("faster_coco_eval", "detection", where)


def _coder():
    from faster_coco_eval.core import mask

    return mask


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def _check_polygon(polygon: Any, farthest: int) -> None:
    try:
        points = np.asarray(polygon)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{_short(polygon)} is no polygon: {error}") from error
    if points.ndim != 1 or len(points) % 2 or points.dtype.kind not in "iuf":
        raise ValueError(f"{_short(polygon)} is no polygon [x, y, x, y, …]")
    if len(points) < 6:
        raise ValueError(f"a polygon has {len(points) // 2} points, and needs three")
    if not np.abs(points).max() <= farthest:  # drawing takes memory by the length of its edges
        raise ValueError(f"a polygon goes far beyond its image, to {np.abs(points).max()}")


def _runs(coded: dict, height: int, width: int) -> Sequence[int]:
    """The lengths of the runs of 0 and 1 in turn; their sum is the number of pixels."""
    size, counts = coded.get("size"), coded.get("counts")
    if size != [height, width]:
        raise ValueError(f"the mask is of size {_short(size)}, and the image of {[height, width]}")
    if isinstance(counts, str):
        counts = _decompressed(counts)
    plain = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
    if not plain or sum(counts) != height * width:
        said = sum(counts) if plain else _short(counts)
        raise ValueError(f"the run lengths count {said} pixels, and {height * width} are there")
    return counts


def _decompressed(text: str) -> list[int]:
    """COCO's run lengths of a text: numbers in digits of 5 bits, the lowest first, each from the
    third on less the one two before it."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 60:
            raise ValueError(f"{_short(text)} are no run lengths")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
