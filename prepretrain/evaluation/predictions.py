"""What a detector finds in each image of a source, once on any number of processes, kept part by part
so that a kill costs one part."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prepretrain.data.dense import masks
from prepretrain.data.dense.boxes import Change, fit, fit_sides, seen_whole
from prepretrain.data.loader import evaluation_batches, to_device
from prepretrain.data.sources.base import Source
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.features import frozen
from prepretrain.evaluation.parts import by_parts
from prepretrain.models.dense.masks import restored
from prepretrain.models.heads.base import Detections


def predict(
    model: nn.Module,
    source: Source,
    *,
    batch_size: int,
    workers: int,
    sides: tuple[int, int] | None = None,
    parts: Path | None = None,
    change: Change | None = None,
    **how: Any,
) -> tuple[list[dict], float]:
    """(what is found, in COCO's form of results; images a second of one process). Called on every
    process; only process 0 gets the list, the others an empty one.

    Boxes and masks are those of the images as they are in the source. The rate is of the model
    alone: reading images and drawing masks at full size are not in it. sides: the short and the long
    one that an image is resized to at most; None: as large as the model's canvas takes it. parts: a folder that all
    processes see, where what is found is kept, to go on from after a kill; it is the caller's to say
    that model, data and `how` are those of before. change: is done to each picture. how: see
    Detector.detect.
    """
    if sides is None:
        placed = partial(fit, canvas=model.encoder.image_size)
    else:
        placed = partial(fit_sides, most=sides, stride=model.encoder.stride)
    numbers = [one["id"] for one in source.categories]
    ids = source.only(["image_id"])
    images, seconds, found = 0, 0.0, []

    def measure(some: Source) -> dict[str, Any]:
        reader = evaluation_batches(
            some.only(["image", "size"]),
            partial(seen_whole, place=placed, change=change),
            batch_size=batch_size,
            workers=workers,
        )
        return _part(model, reader, len(some), numbers, how)

    with frozen(model):
        for first, part in by_parts(source, parts, measure, _whole):
            images, seconds = images + part.get("timed", 0), seconds + part.get("seconds", 0.0)
            for place, rows in enumerate(part.get("found", ())):
                number = ids[first + place]["image_id"]
                found += [{"image_id": number, **row} for row in rows]
    rate = images / seconds if seconds else 0.0
    return found, distributed.from_main(rate)


def _whole(part: dict[str, Any], count: int) -> bool:
    """Whether this is what `_part` gives of so many images."""
    return len(part["found"]) == count and part["seconds"] >= 0 and part["timed"] >= 0


def _part(
    model: nn.Module, batches: Any, count: int, numbers: list[int], how: dict[str, Any]
) -> dict[str, Any]:
    """{"found": the rows of each image, on process 0; "timed" and "seconds": images and the time that
    they took, of all batches of this process but the first, which is slower}."""
    rows: dict[int, list[dict]] = {}
    seen, clock = 0, _Clock()
    for batch in batches:
        on_device = to_device({key: batch[key] for key in ("image", "size")})
        detections = clock(lambda: model.detect(on_device["image"], on_device["size"], **how))
        mine = [
            (place, _rows(one, *sizes, numbers))
            for one, place, *sizes in zip(
                detections, batch["position"], batch["size"].tolist(), batch["original"].tolist()
            )
            if place >= 0
        ]
        for part in distributed.all_gather_object(mine):
            seen += len(part)
            if distributed.is_main():
                rows |= dict(part)
    if seen != count or distributed.is_main() and sorted(rows) != list(range(count)):
        raise RuntimeError(f"of {count} images {seen} were evaluated; a result would be wrong.")
    found = [rows[place] for place in range(count)] if distributed.is_main() else []
    return {"found": found, "timed": clock.images, "seconds": clock.seconds}


def _rows(
    found: Detections, size: list[int], original: list[int], numbers: list[int]
) -> list[dict]:
    """The detections of an image in COCO's form, in the image as it was."""
    found = restored(found, tuple(size), tuple(original))
    shapes = None if found.masks is None else masks.encode(found.masks)
    rows = []
    for i, (left, top, right, bottom) in enumerate(found.boxes.tolist()):
        row = {
            "category_id": numbers[int(found.classes[i])],
            "bbox": [left, top, right - left, bottom - top],
            "score": float(found.scores[i]),
        }
        rows.append(row if shapes is None else row | {"segmentation": shapes[i]})
    return rows


class _Clock:
    """Counts images, and the time that they took the device, after the first batch."""

    def __init__(self) -> None:
        self.images, self.seconds, self.warm = 0, 0.0, False

    def __call__(self, function: Callable[[], list[Detections]]) -> list[Detections]:
        start = self._now()
        found = function()
        if self.warm:
            self.images += len(found)
            self.seconds += self._now() - start
        self.warm = True
        return found

    def _now(self) -> float:
        if distributed.on_gpu():
            torch.cuda.synchronize()
        return time.perf_counter()
