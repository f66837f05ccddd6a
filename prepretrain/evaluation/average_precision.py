"""Average precision of detections, as COCO and LVIS define it, by faster-coco-eval."""

from collections import defaultdict
from typing import Any, Literal

LVIS_MOST = 300  # detections of an image that count, of all classes together (its evaluation code)
_NAMES = {  # of the library's numbers, ours
    "AP_all": "AP",
    "AP_50": "AP50",
    "AP_75": "AP75",
    "AP_small": "APs",
    "AP_medium": "APm",
    "AP_large": "APl",
    "APr": "APr",
    "APc": "APc",
    "APf": "APf",
}


def average_precision(
    listing: str, results: list[dict[str, Any]], kind: Literal["box", "mask"], *, lvis: bool
) -> dict[str, float]:
    """{"AP": …, "AP50": …, …} in percent, NaN where there is nothing of the kind to find.

    listing: the file of the annotations. results: COCO's format of results, as
    {"image_id", "category_id", "score", "bbox" or "segmentation"}. lvis: by LVIS's rules, with APr, APc
    and APf of rare, common and frequent classes.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    name = "bbox" if kind == "box" else "segmentation"
    keys = ("image_id", "category_id", "score", name)
    # of a mask's result without a box the library takes the mask's area, not the box's
    rows = [{key: row[key] for key in keys} for row in results]
    truth = COCO(listing)
    if not rows:
        return {ours: 0.0 for ours in _NAMES.values() if lvis or ours[-1] not in "rcf"}
    found = truth.loadRes(_best(rows, LVIS_MOST) if lvis else rows)
    counted = COCOeval_faster(
        truth,
        found,
        iouType="bbox" if kind == "box" else "segm",
        lvis_style=lvis,
        print_function=lambda *_: None,
    )
    if lvis:
        counted.params.maxDets = [LVIS_MOST]
    counted.evaluate()
    counted.accumulate()
    counted.summarize()
    numbers = {ours: counted.stats_as_dict.get(theirs) for theirs, ours in _NAMES.items()}
    # the library says -1 where no object is of the kind
    return {k: 100 * v if v >= 0 else float("nan") for k, v in numbers.items() if v is not None}


def _best(results: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The surest results of each image, whatever their class."""
    counts: dict[int, int] = defaultdict(int)
    kept = []
    for row in sorted(results, key=lambda row: -row["score"]):
        counts[row["image_id"]] += 1
        if counts[row["image_id"]] <= most:
            kept.append(row)
    return kept
