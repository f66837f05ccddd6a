"""Detection: the average precision of the boxes and masks that a detector finds."""

import logging
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from prepretrain import plugin
from prepretrain.data import objects
from prepretrain.data.loader import evaluation_batches, to_device
from prepretrain.data.sources.coco import Coco
from prepretrain.data.transforms import decode
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.average_precision import average_precision
from prepretrain.evaluation.evaluators.base import Evaluator
from prepretrain.evaluation.features import frozen
from prepretrain.files import write_json
from prepretrain.models.dense.masks import restored
from prepretrain.models.heads.base import Detections

logger = logging.getLogger(__name__)


class Detection(Evaluator):
    """The box_AP, box_AP50, … and mask_AP, … in percent, of images resized to fit into the model's image
    size. What was found is written to the run's `detections/`, in COCO's format of results.

    data           the card, whose split is read by the source `coco`
    split          its split
    rules          coco, or lvis: with box_APr, box_APc, box_APf of rare, common, frequent classes
    threshold      the least score of a detection
    overlap        from which IoU of two detections of a class the less sure one is left out
    most           detections of an image
    soft           Soft-NMS instead: {linear: 0.3} or {gaussian: 0.5}
    feature_batch  images at once a process;  workers: decoding processes
    """

    headline = "box_AP"

    def __init__(
        self,
        *,
        data: str,
        split: str = "val",
        rules: Literal["coco", "lvis"] = "coco",
        threshold: float = 0.05,
        overlap: float = 0.5,
        most: int = 100,
        soft: dict[str, Any] | None = None,
        feature_batch: int = 8,
        workers: int = 0,
    ):
        super().__init__(data=data)
        plugin.require("faster_coco_eval", "detection", "evaluator 'detection'")
        if soft is not None:
            soft = _checked(soft)
        self.split, self.splits, self.rules = split, (split,), rules
        self.how = {"threshold": threshold, "overlap": overlap, "most": most, "soft": soft}
        self.feature_batch, self.workers = feature_batch, workers

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: a detector is needed."""
        model.require_detector(f"detection/{self.data}")

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """See Evaluator.run."""
        source = self._source(model)
        rows: list[dict[str, Any]] = []
        batches = evaluation_batches(
            source.only(("image", "boxes", "classes", "crowds")),
            Whole(model.encoder.image_size),
            batch_size=self.feature_batch,
            workers=self.workers,
        )
        with frozen(model):
            for batch in batches:
                given = to_device(batch)
                found = model.detect(given["image"], given["size"], **self.how)
                for place, size, one in zip(batch["position"], batch["size"].tolist(), found):
                    if place >= 0:  # others only fill the last batch
                        original = source.annotations.sizes[place]
                        rows += self._results(source, place, restored(one, tuple(size), original))
        every = sum(distributed.all_gather_object(rows), [])
        return distributed.from_main(self._scores(source, every, model, folder))

    def _source(self, model: nn.Module) -> Coco:
        source = self.card.open(self.split)
        if not isinstance(source, Coco):
            raise ValueError(
                f"{self.data}:{self.split}: is read as {type(source).__name__}, and detection is "
                f"measured on the source `coco`, a folder of images and a .json file."
            )
        if len(source.classes) != model.head.classes:
            raise ValueError(
                f"{self.data}:{self.split}: has {len(source.classes)} classes, and the model's head "
                f"{model.head.classes}."
            )
        return source

    def _results(self, source: Coco, place: int, found: Detections) -> list[dict[str, Any]]:
        """What was found in an image, in COCO's format of results."""
        from faster_coco_eval.core import mask as coco

        rows = []
        for i, (left, top, right, bottom) in enumerate(found.boxes.tolist()):
            row = {
                "image_id": source.annotations.image_ids[place],
                "category_id": source.annotations.category_ids[int(found.classes[i])],
                "bbox": [left, top, right - left, bottom - top],
                "score": float(found.scores[i]),
            }
            if found.masks is not None:
                drawn = np.asfortranarray(found.masks[i].cpu().numpy().astype(np.uint8))
                runs = coco.encode(drawn)
                row["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
            rows.append(row)
        return rows

    def _scores(
        self, source: Coco, rows: list[dict[str, Any]], model: nn.Module, folder: Path
    ) -> dict[str, float] | None:
        """The numbers, on the main process alone, which writes the rows."""
        if not distributed.is_main():
            return None
        path = folder / "detections" / f"{self.card.name}_{self.split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, rows)
        kinds = ["box"]
        if model.head.draws and source.annotations.has_masks:
            kinds.append("mask")
        scores = {"images": float(len(source))}
        for kind in kinds:
            given = source.annotations.path, rows, kind
            found = average_precision(*given, lvis=self.rules == "lvis")
            absent = [name for name, value in found.items() if math.isnan(value)]
            if absent:
                logger.info("%s: no objects to find for %s_%s", self.data, kind, ", ".join(absent))
            scores |= {f"{kind}_{name}": v for name, v in found.items() if name not in absent}
        return scores


def _checked(soft: dict[str, Any]) -> dict[str, float]:
    if len(soft) != 1 or set(soft) - {"linear", "gaussian"}:
        raise ValueError(f"detection.soft: {soft!r} must be {{linear: …}} or {{gaussian: …}}.")
    ((name, value),) = soft.items()
    value = plugin.coerce(value, float, f"detection.soft.{name}")
    if not 0 < value < math.inf:
        raise ValueError(f"detection.soft.{name}: {value} must be finite and above 0.")
    return {name: value}


class Whole:
    """A sample to {"image": uint8 [3, H, W], "size": of what is seen in it}, the whole image."""

    def __init__(self, canvas: tuple[int, int]):
        self.canvas = canvas

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = decode(sample["image"])
        view = objects.whole(tuple(image.shape[-2:]), self.canvas)
        return {
            "image": objects.see(image, view, self.canvas),
            "size": torch.tensor(view.size),
        }
