"""Evaluators that look at pictures as they are and corrupted."""

import pytest
import test_detection_evaluator as detectors
import test_segmentation_evaluator as segmenters

KINDS = {  # who makes the card, who measures, the metric, and what stands before the means
    "detection": (detectors.furnish, detectors.evaluated, "box_AP", "box_"),
    "segmentation": (segmenters.card_of, segmenters.evaluated, "mIoU", ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupted_image_is_harder_and_its_mean_is_over_all_corruptions(kind, tmp_path, group):
    furnish, evaluated, metric, before = KINDS[kind]
    options = {"corruptions": ["contrast", "brightness"], "severities": [1, 5], "pictures": 1}
    found = evaluated(tmp_path, furnish(tmp_path, 2), **options)
    assert found["images"] == 2
    assert (
        min(found[f"corruption/{name}/5/{metric}"] for name in options["corruptions"])
        < found[metric]
    )
    for name in options["corruptions"]:
        each = [found[f"corruption/{name}/{severity}/{metric}"] for severity in (1, 5)]
        assert found[f"corruption/{name}/{metric}"] == pytest.approx(sum(each) / 2)
    each = [found[f"corruption/{name}/{metric}"] for name in options["corruptions"]]
    assert found[f"{before}mPC"] == pytest.approx(sum(each) / 2)
    assert found[f"{before}rPC"] == pytest.approx(100 * found[f"{before}mPC"] / found[metric])
    (place,) = (tmp_path / "predictions").iterdir()
    assert (place / "corruption/contrast/5/sheet.png").exists()
