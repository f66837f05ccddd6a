"""Average precision against the published numbers of COCO's and LVIS's own tools."""

import json
import os
from pathlib import Path

import pytest

from prepretrain import plugin
from prepretrain.data.subset import Subset
from prepretrain.evaluation.detection_metrics import average_precision, ground_truth

pytest.importorskip("faster_coco_eval")
_SHARED = os.environ.get("PREPRETRAIN_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data"
SHARED = Path(_SHARED)
needs_oracles = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs published detections: PREPRETRAIN_SHARED_DATA is not there"
)


def opened(annotations: Path, folder: Path):
    """A source of a json file whose images are not looked at."""
    for one in json.loads(annotations.read_text())["images"]:
        (folder / one["file_name"]).touch()
    return plugin.build("sources", "coco", path=str(folder), listing=str(annotations))


@needs_oracles
@pytest.mark.parametrize("kind, file", [("box", "bbox"), ("mask", "segm")])
def test_cocos_example_has_its_published_numbers(tmp_path, kind, file):
    folder = SHARED / "oracle_coco_ap"
    truth = ground_truth(opened(folder / "instances_val2014_100.json", tmp_path))
    results = json.loads((folder / f"instances_val2014_fake{file}100_results.json").read_text())
    found, each = average_precision(truth, results, kind)
    published = json.loads((folder / "published_stats.json").read_text())[file][:6]
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert [found[f"{kind}_{name}"] for name in names] == pytest.approx(
        [100 * value for value in published], abs=1e-4
    )
    assert found.keys() == {f"{kind}_{name}" for name in names}
    assert sum(each.values()) / len(each) == pytest.approx(found[f"{kind}_AP"])
    turned = average_precision(truth, sorted(results, key=lambda one: -one["image_id"]), kind)
    assert turned[0] == pytest.approx(found, abs=1e-6)


@needs_oracles
@pytest.mark.parametrize("kind, file", [("box", "bbox"), ("mask", "segm")])
def test_lvis_numbers_are_those_of_lvis_api(tmp_path, kind, file):
    folder = SHARED / "lvis_synth"
    truth = ground_truth(opened(folder / "gt.json", tmp_path))
    results = json.loads((folder / f"results_{file}.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    found, each = average_precision(truth, results, kind)
    theirs = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
    assert list(found.values()) == pytest.approx(
        [100 * expected[file][name] for name in theirs], abs=1e-4
    )
    names = {str(one["id"]): one["name"] for one in truth["categories"]}
    for number, value in expected[f"{file}_per_category_AP"].items():
        if value is None:
            assert names[number] not in each
        else:
            assert each[names[number]] == pytest.approx(100 * value, abs=1e-4)


def made(folder: Path):
    """Three images with an object each, of two classes."""
    square = [[2, 2, 12, 2, 12, 12, 2, 12]]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": 24, "width": 32} for i in (4, 5, 6)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": i + 4, "category_id": (3, 8, 8)[i], "bbox": [2, 2, 10, 10]}
            | {"segmentation": square, "area": 100}
            for i in range(3)
        ],
    }
    path = folder / "objects.json"
    path.write_text(json.dumps(content))
    return opened(path, folder)


def test_no_detection_is_nothing_and_all_of_them_is_everything(tmp_path):
    source = made(tmp_path)
    truth = ground_truth(source)
    assert [one["id"] for one in truth["annotations"]] == [1, 2, 3]
    for kind in ("box", "mask"):
        found, each = average_precision(truth, [], kind)
        assert set(found.values()) == {0} and each == {"cat": 0, "dog": 0}
    perfect = [one | {"score": 0.5} for one in truth["annotations"]]
    found, each = average_precision(truth, perfect, "box")
    assert found["box_AP"] == pytest.approx(100) and "box_APl" not in found
    found, each = average_precision(truth, perfect[1:], "box")
    assert found["box_AP"] == pytest.approx(50)
    part = ground_truth(Subset(source, [0]))
    found, each = average_precision(part, perfect[:1], "box")
    assert found["box_AP"] == pytest.approx(100) and each == {"cat": pytest.approx(100)}
