"""Counts what a source of images with objects holds, finds what cannot be used of it, and draws some
of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from prepretrain.data.dense import masks
from prepretrain.data.dense.boxes import upright
from prepretrain.data.drawing import draw_objects, sheet
from prepretrain.data.sources.base import Source
from prepretrain.data.transforms import BadImage

SIZES = {"small": 32**2, "medium": 96**2, "large": float("inf")}  # COCO's: areas below, in pixels


@dataclass(frozen=True)
class Census:
    """What a source holds. `objects` and `images_of`: of each class, its objects that are no crowd,
    and the images that it is in; `of_image`: the objects of each image; `bad`: images that cannot be
    used."""

    objects: np.ndarray
    images_of: np.ndarray
    of_image: np.ndarray
    crowds: int
    without_area: int
    sizes: dict[str, int]
    bad: list[BadImage]


def count(source: Source, *, decode: bool = False) -> Census:
    """Counts all images of a source; every mask is looked at, and every pixel if `decode`."""
    require_objects(source)
    fields = [name for name in source.fields if decode or name != "image"]
    plain = source.only(name for name in fields if name not in ("image", "masks"))
    whole, classes = source.only(fields), len(source.classes or ())
    objects, images_of = np.zeros((2, classes), dtype=np.int64)
    of_image, areas, crowds, without_area, bad = [], [], 0, 0, []
    for index in range(len(source)):
        sample = plain[index]
        single, (height, width) = ~sample["crowds"], sample["size"]
        labels = sample["classes"][single]
        objects += np.bincount(labels, minlength=classes)
        images_of[np.unique(labels)] += 1
        of_image.append(len(labels))
        areas.append(sample["areas"][single])
        crowds += int((~single).sum())
        inside = np.clip(sample["boxes"], 0, [width, height, width, height])
        without_area += int((inside[:, 2:] <= inside[:, :2]).any(axis=1).sum())
        try:
            sample = whole[index]
            if decode:
                upright(sample["image"], sample["size"])
        except BadImage as error:
            bad.append(BadImage(error.cause, error.detail, error.key or source.key(index)))
    place = np.searchsorted(list(SIZES.values()), np.concatenate(areas), side="right")
    sizes = np.bincount(place, minlength=len(SIZES)).tolist()
    return Census(
        objects, images_of, np.array(of_image), crowds, without_area, dict(zip(SIZES, sizes)), bad
    )


def ground_truth_sheet(source: Source, indexes: Sequence[int], columns: int = 3) -> Image.Image:
    """The images of these numbers with all their objects drawn over them."""
    drawn = [draw_truth(source[index], source.classes) for index in indexes]
    rows = [drawn[first : first + columns] for first in range(0, len(drawn), columns)]
    return sheet(rows, [f"{len(drawn)} images, their objects as annotated"])


def draw_truth(sample: dict, names: Sequence[str]) -> torch.Tensor:
    """A sample's picture, uint8 [3, H, W], with its objects; a crowd is called one."""
    shapes = None
    if "masks" in sample:
        drawn = [masks.bitmap(mask, *sample["size"]) for mask in sample["masks"]]
        shapes = torch.from_numpy(np.array(drawn).reshape(-1, *sample["size"]))
    texts = [
        names[label] + (", crowd" if crowd else "")
        for label, crowd in zip(sample["classes"], sample["crowds"])
    ]
    picture, boxes = upright(sample["image"], sample["size"]), torch.from_numpy(sample["boxes"])
    return draw_objects(picture, boxes, torch.from_numpy(sample["classes"]), texts, shapes)


def require_objects(source: Source, where: str = "these data") -> None:
    """Raises ValueError for a source whose images have no objects."""
    if "boxes" not in source.fields or source.categories is None:
        raise ValueError(
            f"{where}: have no objects (their fields: {', '.join(source.fields)}). Source coco reads "
            "them of a folder and a json file: see datasets/objects.yaml."
        )
