"""Average precision of a detector, on the images of a card with objects."""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from prepretrain import plugin
from prepretrain.data.census.objects import draw_truth, require_objects
from prepretrain.data.dense import masks
from prepretrain.data.dense.boxes import upright
from prepretrain.data.drawing import draw_objects, sheet
from prepretrain.data.sources.base import Source
from prepretrain.data.subset import evenly
from prepretrain.distributed import group as distributed
from prepretrain.evaluation import corruptions as makers
from prepretrain.evaluation.detection_metrics import average_precision, ground_truth, some_of
from prepretrain.evaluation.pictures import PictureEvaluator
from prepretrain.evaluation.predictions import predict
from prepretrain.files import write_json

_SURE = 0.5  # not from the paper: the least score of what is drawn
_COCO = {"threshold": 0.05, "most": 100}  # ViTDet's, by detectron2's configs of COCO and LVIS
_LVIS = {"threshold": 0.02, "most": 300}


class Detection(PictureEvaluator):
    """Boxes, and masks where the head draws them, against those of a card's split: COCO's average
    precision, or LVIS's where its files say which classes are not in an image.

    data           the card
    split          its split, of which each image is counted once
    sides          [800, 1333]: an image is resized to a short side of 800, unless the long one would
                   exceed 1333; null fits it in the model's image size. Then it is padded
    threshold      the least score; null is 0.05, or 0.02 by LVIS's rules
    overlap        from which overlap the less sure of two boxes of a class is suppressed
    most           detections of an image; null is 100, or 300 by LVIS's rules
    soft           {linear: …} or {gaussian: …}: Soft-NMS instead of suppression
    images         so many, spread evenly over the split; null takes all
    pictures       of so many of them a sheet is drawn: what is found, beside what is annotated
    corruptions    of evaluation/corruptions.py, done to the images as they are; [all] takes all 19
    severities     theirs
    frost          the folder of the published textures, which corruption frost needs
    feature_batch  images at once a process;  workers: as data.workers

    Results are `box_AP`, `box_AP50`, `box_AP75`, `box_APs`, … and the same of `mask`, in percent;
    `fps`, images a second of one process, but not within a training; of corruptions
    `corruption/fog/3/box_AP`, the mean over the severities `corruption/fog/box_AP`, that over all
    `box_mPC`, and `box_rPC`, its share of the clean `box_AP` in percent. The folder `predictions/` of the run gets detections.json, in COCO's form of
    results, classes.json, with the AP of each class, and the sheet.
    """

    headline, averaged = "box_AP", {"box_AP": "box_", "mask_AP": "mask_"}
    version = 1

    def __init__(
        self,
        *,
        data: str,
        split: str = "val",
        sides: tuple[int, int] | None = None,
        threshold: float | None = None,
        overlap: float = 0.5,
        most: int | None = None,
        soft: dict[str, Any] | None = None,
        images: int | None = None,
        pictures: int = 8,
        corruptions: tuple[str, ...] = (),
        severities: tuple[int, ...] = makers.SEVERITIES,
        frost: str | None = None,
        feature_batch: int = 1,
        workers: int | None = None,
    ):
        super().__init__(
            data=data,
            split=split,
            images=images,
            pictures=pictures,
            corruptions=corruptions,
            severities=severities,
            frost=frost,
            feature_batch=feature_batch,
            workers=workers,
        )
        soft = None if soft is None else _checked(soft)
        self.sides = sides
        self.how = {"threshold": threshold, "overlap": overlap, "most": most, "soft": soft}

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: a head that finds objects of the card's classes is needed."""
        model.require_detector(f"detection/{self.data}")
        masks.require_coder(f"detection/{self.data}")
        if self.card.classes and len(self.card.classes) != model.head.classes:
            self._refuse(len(self.card.classes), model.head.classes)

    def open(self, split: str) -> Source:
        """See Evaluator.open: a split must have objects."""
        source = super().open(split)
        require_objects(source, f"{self.card.name}:{split}")
        return source

    def prepare(self, model: nn.Module, sources: dict[str, Source]) -> None:
        """See PictureEvaluator.prepare: the ground truth, on process 0."""
        source = sources[self.split]
        if len(source.classes) != model.head.classes:
            self._refuse(len(source.classes), model.head.classes)
        self.truth = ground_truth(source) if distributed.is_main() else {}

    def _refuse(self, classes: int, known: int) -> None:
        raise ValueError(
            f"detection/{self.data}: the data has {classes} classes, and the model's head {known}."
        )

    def asked(self) -> list[Any]:
        """See PictureEvaluator.asked."""
        return [list(self.how.items()), self.sides]

    def measured(
        self, model: nn.Module, source: Source, leaked: Tensor, place: Path, change: Any
    ) -> dict[str, float]:
        """See PictureEvaluator.measured; ground truth and detections are compared on process 0."""
        lvis = "negative" in source.fields
        how = {
            k: v if v is not None else (_LVIS if lvis else _COCO).get(k)
            for k, v in self.how.items()
        }
        with self.parts(place) as parts:
            found, rate = predict(
                model,
                source,
                batch_size=self.feature_batch,
                workers=self.workers,
                sides=self.sides,
                parts=parts,
                change=change,
                **how,
            )
            metrics: dict[str, float] = {}
            if distributed.is_main():
                place.mkdir(parents=True, exist_ok=True)
                kinds = (
                    ("box", "mask") if model.head.draws and "masks" in source.fields else ("box",)
                )
                metrics, classes = self._compared(found, kinds, leaked)
                write_json(place / "detections.json", found, indent=None)
                write_json(place / "classes.json", classes)
                if self.pictures:
                    draw(source, found, self.pictures, change).save(place / "sheet.png")
            metrics = distributed.from_main(metrics)
        # not of a model that is training: a resumed run has the same log
        speed = {"fps": rate} if rate and self.cache else {}
        return metrics | {"images": len(source)} | speed

    def _compared(
        self, found: list[dict], kinds: tuple[Literal["box", "mask"], ...], leaked: Tensor
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """(metrics, {"box": {class: AP}, …}) of what was found in all images."""
        classes = {}

        def measure(kept: Tensor) -> dict[str, float]:
            metrics, some = {}, some_of(self.truth, found, kept.tolist())
            for kind in kinds:
                scored, each = average_precision(*some, kind)
                classes.setdefault(kind, each)  # of all images, which come first
                metrics |= scored
            return metrics

        return self.certify(measure, leaked), classes


def _checked(soft: dict[str, Any]) -> dict[str, float]:
    """The options of Soft-NMS. Raises ValueError for others."""
    if len(soft) != 1 or set(soft) - {"linear", "gaussian"}:
        raise ValueError(f"detection.soft: {soft!r} must be {{linear: …}} or {{gaussian: …}}.")
    ((name, value),) = soft.items()
    value = plugin.coerce(value, float, f"detection.soft.{name}")
    if not 0 < value < math.inf:
        raise ValueError(f"detection.soft.{name}: {value} must be finite and above 0.")
    return {name: value}


def draw(source: Source, found: list[dict], count: int, change: Any = None):
    """A sheet of some images, the same each time: what is found, beside what is annotated."""
    numbers = {one["id"]: label for label, one in enumerate(source.categories)}
    samples = [source[index] for index in evenly(len(source), count)]
    sure_of: dict[int, list[dict]] = {sample["image_id"]: [] for sample in samples}
    for one in found:
        if one["image_id"] in sure_of and one["score"] >= _SURE:
            sure_of[one["image_id"]].append(one)
    rows = []
    for sample in samples:
        picture, sure = upright(sample["image"], sample["size"]), sure_of[sample["image_id"]]
        labels = torch.tensor([numbers[one["category_id"]] for one in sure], dtype=torch.int64)
        texts = [f"{source.classes[label]} {one['score']:.2f}" for label, one in zip(labels, sure)]
        boxes = torch.tensor([one["bbox"] for one in sure]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        shapes = None
        if sure and "segmentation" in sure[0]:
            drawn = [masks.bitmap(one["segmentation"], *sample["size"]) for one in sure]
            shapes = torch.from_numpy(np.array(drawn))
        rows.append(
            [
                draw_objects(picture, boxes, labels, texts, shapes),
                draw_truth(sample, source.classes),
            ]
        )
    return sheet(rows, [f"found, score {_SURE} and above", "annotated"])
