"""The evaluator of segmenters: what is said by a head that knows bright from dark, on any number of
processes, again after a kill, and on corrupted images."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import listed, processes
from PIL import Image
from test_maps import furnish

from prepretrain.data.card import load_card
from prepretrain.distributed import group as distributed
from prepretrain.evaluation import dense, parts, segmentation_metrics
from prepretrain.evaluation.evaluators.base import build
from prepretrain.models.heads.base import Segmenter
from prepretrain.models.model import Model

_SHARED = os.environ.get("PREPRETRAIN_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data"


def card_of(folder: Path, count: int = 7) -> str:
    furnish(folder, count)
    split = f"{{source: label_maps, path: {folder}/images, maps: {folder}/maps}}"
    said = "classes: [left, right]\nvalues: {offset: 1, void: [0], palette: [[255, 0, 0], [0, 0, 255]]}"
    (folder / "sides.yaml").write_text(f"{said}\ntrain: {split}\nval: {split}\n")
    return str(folder / "sides.yaml")


class Bright(Segmenter):
    """Says of each pixel whether it is bright; reads the image itself."""

    def forward(self, maps):
        value = maps[0].mean(1, keepdim=True)
        return [torch.cat([-value, value], 1)]


def knowing() -> Model:
    """A model without training that knows the classes of the pictures."""
    model = Model(encoder="vit_test8", final_norm=False)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.head = Bright(model.encoder, 2, (1,))
    model.read = lambda image: [image]
    return model


def evaluated(folder: Path, card: str, **options) -> dict[str, float]:
    evaluator = build("segmentation", cache=True, data=card, **options)
    model = knowing()
    evaluator.check(model)
    evaluator.open_data()
    return evaluator.run(model, folder)


def place(folder: Path) -> Path:
    (found,) = (folder / "predictions").iterdir()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"whole": True},
        {"short_side": 40, "stride": 9, "feature_batch": 3},
        {"flip": True, "scales": [0.7, 1.0, 1.6]},
    ],
)
def test_pixels_are_right_however_the_picture_is_seen(tmp_path, group, options):
    card = card_of(tmp_path)
    found = evaluated(tmp_path, card, pictures=2, **options)
    assert found["mIoU"] > 93 and found["aAcc"] > 97 and found["mAcc"] > 97
    assert found["images"] == 7 and found["classes"] == 2
    counts = np.array(json.loads((place(tmp_path) / "confusion.json").read_text()))
    pixels = sum((31 + i - 4) * (47 - i) for i in range(7))  # those that have a class, once each
    assert counts.sum() == pixels
    each = json.loads((place(tmp_path) / "classes.json").read_text())
    assert each["IoU"].keys() == {"left", "right"}
    assert Image.open(place(tmp_path) / "sheet.png").width > 3 * 320


def in_process(rank: int, folder: str, card: str) -> None:
    distributed.init()
    options = {"flip": True, "stride": 11, "feature_batch": 2, "pictures": 1}
    found = evaluated(Path(folder), card, **options, leaks=str(Path(folder).parent))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.shutdown()


def test_any_number_of_processes_counts_the_same_pixels(tmp_path):
    card, said = card_of(tmp_path), {}
    listed(tmp_path, {"sides:val": (load_card(card).open("val"), [1, 5])})
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        if count == 1:
            in_process(0, str(folder), card)
        else:
            processes(count, in_process, str(folder), card)
        each = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
        assert all(one == each[0] for one in each)
        said[count] = each[0], (place(folder) / "confusion.json").read_text()
    assert said[1] == said[2] == said[3]
    assert said[1][0]["leaked_images"] == 2 and "mIoU_without_leaks" in said[1][0]


def test_an_evaluation_that_was_cut_off_goes_on(tmp_path, monkeypatch, group):
    card = card_of(tmp_path)
    whole = evaluated(tmp_path / "whole", card, pictures=0)
    monkeypatch.setattr(parts, "_PART", 3)
    computed, original = [], dense.DenseEvaluator._part

    def interrupted(self, *how):
        computed.append(len(how[-1]))
        if len(computed) == 3:
            raise KeyboardInterrupt
        return original(self, *how)

    monkeypatch.setattr(dense.DenseEvaluator, "_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "cut", card, pictures=0)
    kept = sorted((place(tmp_path / "cut") / "parts").iterdir())
    kept[1].write_text('{"images": 2, "counts": [[1, 0], [0, 1]]}')  # of other images
    assert evaluated(tmp_path / "cut", card, pictures=0) == whole
    assert computed == [3, 3, 1, 3, 1] and not kept[0].exists()


def test_what_does_not_fit_is_refused_before_anything_is_computed(tmp_path, group):
    card = card_of(tmp_path)
    evaluator = build("segmentation", cache=False, data=card)
    with pytest.raises(ValueError, match="says no class of a pixel"):
        evaluator.check(Model(encoder="vit_test8"))
    model = knowing()
    model.head.classes = 3
    with pytest.raises(ValueError, match="the data has 2 classes, and the model's head 3"):
        evaluator.check(model)
    with pytest.raises(ValueError, match="segmentation.whole: .*Leave them out"):
        build("segmentation", cache=False, data=card, whole=True, stride=9)
    with pytest.raises(
        ValueError, match=r"segmentation.stride: \[33, 33\] leaves gaps between windows"
    ):
        build("segmentation", cache=False, data=card, stride=33).check(knowing())
    (tmp_path / "flat.yaml").write_text("val: {source: synthetic, images: 4, size: 32, seed: 0}\n")
    with pytest.raises(ValueError, match="flat:val has no label_map"):
        build("segmentation", cache=False, data=str(tmp_path / "flat.yaml")).open_data()


def test_the_sample_of_ade20k_has_its_authors_mean_and_accuracy():
    folder = Path(_SHARED, "ade20k_sample")
    if not folder.exists():
        pytest.skip(
            f"{folder} is not there: set PREPRETRAIN_SHARED_DATA to the folder that holds it"
        )
    counts, inside = torch.zeros(150, 150, dtype=torch.int64), folder / "sampleData"
    for file in sorted((inside / "annotations").iterdir()):
        pair = [
            np.array(Image.open(inside / kind / file.name))
            for kind in ("annotations", "predictions")
        ]
        truth, said = (torch.from_numpy(one) for one in pair)
        said[truth == 0] = 1  # not counted
        counts += segmentation_metrics.confusion(truth - 1, said - 1, 150)  # 0, void, becomes 255
    found = segmentation_metrics.metrics(counts)
    expected = json.loads((folder / "expected.json").read_text())
    assert round(found["mIoU_absent_0"] / 100, 4) == expected["mean_iou_over_150_absent_as_0"]
    assert found["aAcc"] == 100 * expected["pixel_accuracy"]
    assert found["mIoU"] == pytest.approx(100) and found["classes"] == 15
