"""Average precision of boxes and masks, by COCO's rules and by LVIS's."""

from collections import defaultdict
from typing import Any, Literal

import numpy as np

from prepretrain import plugin
from prepretrain.data.sources.base import Source

_COCO_MOST, _LVIS_MOST = 100, 300  # detections of an image that are counted
_IOU = {"box": "bbox", "mask": "segm"}
_NAMES = {  # of what is reported, in faster-coco-eval's words
    "AP": "AP_all",
    "AP50": "AP_50",
    "AP75": "AP_75",
    "APs": "AP_small",
    "APm": "AP_medium",
    "APl": "AP_large",
    "APr": "APr",
    "APc": "APc",
    "APf": "APf",
}


def ground_truth(source: Source) -> dict[str, list[dict]]:
    """The images, annotations and categories of a source with objects, in COCO's form and with its
    own ids of images and categories; in LVIS's, where the source says which classes are not there."""
    numbers = [one["id"] for one in source.categories]
    judged = "negative" in source.fields
    if judged and any("frequency" not in one for one in source.categories):
        raise ValueError("LVIS's metrics need the frequency of each category: r, c or f.")
    source = source.only(field for field in source.fields if field != "image")
    images, annotations = [], []
    for index in range(len(source)):
        sample = source[index]
        height, width = sample["size"]
        image = {"id": sample["image_id"], "height": height, "width": width}
        if judged:
            for key, field in (("neg", "negative"), ("not_exhaustive", "not_exhaustive")):
                image[f"{key}_category_ids"] = [numbers[label] for label in sample[field].tolist()]
        images.append(image)
        for i, (left, top, right, bottom) in enumerate(sample["boxes"].tolist()):
            one = {
                "id": len(annotations) + 1,  # 0 would stand for no match
                "image_id": sample["image_id"],
                "category_id": numbers[int(sample["classes"][i])],
                "bbox": [left, top, right - left, bottom - top],
                "area": float(sample["areas"][i]),
                "iscrowd": int(sample["crowds"][i]),
            }
            annotations.append(one)
            if "masks" in sample:
                one["segmentation"] = sample["masks"][i]
    return {"images": images, "annotations": annotations, "categories": source.categories}


def some_of(
    truth: dict[str, list[dict]], detections: list[dict], kept: list[bool]
) -> tuple[dict[str, list[dict]], list[dict]]:
    """The ground truth and the detections of some images; kept: whether each of the ground truth's."""
    images = [image for image, keep in zip(truth["images"], kept, strict=True) if keep]
    ids = {image["id"] for image in images}
    annotations = [one for one in truth["annotations"] if one["image_id"] in ids]
    found = [one for one in detections if one["image_id"] in ids]
    return truth | {"images": images, "annotations": annotations}, found


def average_precision(
    truth: dict[str, list[dict]], detections: list[dict], kind: Literal["box", "mask"]
) -> tuple[dict[str, float], dict[str, float]]:
    """({"box_AP": …, "box_AP50", "box_AP75", "box_APs", …}, AP of each category's name), in percent,
    of detections in COCO's form of results.

    By LVIS's rules, with "box_APr", "box_APc" and "box_APf" of rare, common and frequent categories,
    where the ground truth is in its form: then the best 300 detections of an image are counted. What
    no object of the ground truth stands for has no entry.
    """
    plugin.require("faster_coco_eval", "detection", "average precision")
    from faster_coco_eval import COCO, COCOeval_faster

    judged = any("neg_category_ids" in image for image in truth["images"])
    if judged:
        detections = _best(detections, _LVIS_MOST)
    wanted = "bbox" if kind == "box" else "segmentation"
    # of masks without boxes, so that their own area tells small from large
    kept = ("image_id", "category_id", "score", wanted)
    detections = [{key: one[key] for key in kept} for one in detections]
    objects = COCO({key: [dict(one) for one in rows] for key, rows in truth.items()})
    options = {"lvis_style": judged, "print_function": _silent}
    scorer = COCOeval_faster(objects, objects.loadRes(detections), _IOU[kind], **options)
    scorer.params.maxDets = [_LVIS_MOST] if judged else [1, 10, _COCO_MOST]
    scorer.run()
    said = scorer.stats_as_dict
    found = {f"{kind}_{name}": said.get(theirs, -1) for name, theirs in _NAMES.items()}
    named = {one["id"]: str(one["name"]) for one in truth["categories"]}
    precision = scorer.eval["precision"][:, :, :, 0, -1]  # [thresholds, recalls, categories]
    each = {
        named[number]: _mean(precision[:, :, i]) for i, number in enumerate(scorer.params.catIds)
    }
    return _percent(found), _percent(each)


def _best(detections: list[dict], most: int) -> list[dict]:
    """The surest detections of each image, over all categories together."""
    of_image: dict[Any, list[dict]] = defaultdict(list)
    for one in detections:
        of_image[one["image_id"]].append(one)
    return [
        one
        for rows in of_image.values()
        for one in sorted(rows, key=lambda row: -row["score"])[:most]
    ]


def _mean(values: np.ndarray) -> float:
    """The mean of what is defined; -1 where nothing is."""
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0


def _percent(values: dict[str, float]) -> dict[str, float]:
    return {name: 100.0 * float(value) for name, value in values.items() if value > -1}


def _silent(*_: object) -> None:
    pass
