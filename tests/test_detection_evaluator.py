"""The evaluator of detectors: what is found by a detector that knows colours, on any number of
processes, again after a kill, and on corrupted images."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import listed, processes
from PIL import Image, ImageDraw
from test_detection import made

from prepretrain import plugin
from prepretrain.data.card import load_card
from prepretrain.distributed import group as distributed
from prepretrain.evaluation import parts, predictions
from prepretrain.evaluation.evaluators.base import build
from prepretrain.models.heads.base import Detections

pytest.importorskip("faster_coco_eval")
COLOURS = ((250, 20, 20), (20, 20, 250))


def furnish(folder: Path, count: int = 7) -> str:
    """A card of pictures of several sizes with a red and a blue rectangle each; one shows nothing."""
    rng, images, objects = np.random.default_rng(1), [], []
    for i in range(count):
        height, width = ((60, 90), (90, 48), (128, 128))[i % 3]
        picture = Image.new("RGB", (width, height), (90, 160, 90))
        images.append({"id": 3 * i + 1, "file_name": f"{i}.png", "height": height, "width": width})
        for label in range(2) if i != 4 else ():
            side = int(rng.integers(14, 20))
            left = int(rng.integers(0, width // 2 - 20)) + label * width // 2
            top = int(rng.integers(0, height - side))
            edge = (left, top, left + side, top + side)
            ImageDraw.Draw(picture).rectangle((*edge[:2], edge[2] - 1, edge[3] - 1), COLOURS[label])
            corners = [*edge[:2], edge[2], edge[1], *edge[2:], edge[0], edge[3]]
            one = {"id": len(objects) + 5, "image_id": 3 * i + 1, "category_id": (2, 9)[label]}
            one |= {"bbox": [left, top, side, side], "area": side**2, "segmentation": [corners]}
            objects.append(one)
        picture.save(folder / f"{i}.png")
    said = {"images": images, "annotations": objects}
    said["categories"] = [{"id": 2, "name": "red"}, {"id": 9, "name": "blue"}]
    (folder / "objects.json").write_text(json.dumps(said))
    split = f"{{source: coco, path: {folder}, listing: {folder}/objects.json}}"
    (folder / "colours.yaml").write_text(f"train: {split}\nval: {split}\n")
    return str(folder / "colours.yaml")


def knowing(model: torch.nn.Module, seen: list[int] | None = None) -> torch.nn.Module:
    """The model, whose detections are the boxes around what is red and what is blue."""

    def detect(image, sizes, **how):
        return [_found(one[:, : size[0], : size[1]]) for one, size in zip(image, sizes.tolist())]

    model.detect = detect
    return model


def _found(image: torch.Tensor) -> Detections:
    boxes, classes = [], []
    for label, colour in enumerate(COLOURS):
        near = (image.int() - torch.tensor(colour)[:, None, None]).abs().sum(0) < 150
        rows, columns = near.any(1).nonzero()[:, 0], near.any(0).nonzero()[:, 0]
        if len(rows):
            boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            classes.append(label)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    scores, whole = torch.linspace(0.9, 0.6, len(boxes)), torch.ones(len(boxes), 28, 28)
    return Detections(boxes, scores, torch.tensor(classes, dtype=torch.int64), whole)


def evaluated(folder: Path, card: str, **options) -> dict[str, float]:
    evaluator = build("detection", cache=True, data=card, **options)
    model = made().to_empty(device="cpu")
    torch.nn.Module.apply(model, _zero)
    model.init_non_persistent_buffers()
    evaluator.check(model)
    evaluator.open_data()
    return evaluator.run(knowing(model), folder)


def _zero(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.zeros_(parameter)


def place(folder: Path) -> Path:
    (found,) = (folder / "predictions").iterdir()
    return found


def test_boxes_and_masks_come_back_to_the_image_as_it_is(tmp_path, group):
    card = furnish(tmp_path)
    found = evaluated(tmp_path, card, feature_batch=2, pictures=3)
    assert found["box_AP50"] == pytest.approx(100) and found["mask_AP50"] == pytest.approx(100)
    assert found["box_AP"] > 70 and found["mask_AP"] > 70 and found["images"] == 7
    assert found["fps"] > 0
    results = json.loads((place(tmp_path) / "detections.json").read_text())
    said = json.loads((tmp_path / "objects.json").read_text())
    assert len(results) == len(said["annotations"]) == 12
    by_image = {(one["image_id"], one["category_id"]): one for one in said["annotations"]}
    for one in results:
        truth = by_image[one["image_id"], one["category_id"]]
        assert np.abs(np.subtract(one["bbox"], truth["bbox"])).max() < 2.5
        assert one["segmentation"]["size"] in ([60, 90], [90, 48], [128, 128])
    classes = json.loads((place(tmp_path) / "classes.json").read_text())
    assert classes["box"].keys() == {"red", "blue"} == classes["mask"].keys()
    sheet = Image.open(place(tmp_path) / "sheet.png")
    assert sheet.width > 2 * 480 and not (place(tmp_path) / "parts").exists()


def test_images_are_resized_to_a_short_and_a_long_side_and_batched_with_others(tmp_path, group):
    card, seen = furnish(tmp_path), []
    model = knowing(made())
    plain = model.detect

    def detect(image, sizes, **how):
        seen.append((tuple(image.shape[-2:]), sizes.tolist()))
        return plain(image, sizes, **how)

    model.detect = detect
    evaluator = build("detection", cache=False, data=card, feature_batch=2, sides=[48, 80])
    found = evaluator.run(model, tmp_path)
    assert found["box_AP50"] == pytest.approx(100) and found["mask_AP50"] == pytest.approx(100)
    assert seen[0] == ((80, 72), [[48, 72], [80, 43]]) and seen[1][0] == (48, 72)
    with pytest.raises(ValueError, match="evaluator.sides: .* must name the smaller number first"):
        build("detection", cache=False, data=card, sides=[80, 48])


def in_process(rank: int, folder: str, card: str) -> None:
    distributed.init()
    options = {"feature_batch": 2, "pictures": 0, "leaks": str(Path(folder).parent)}
    found = evaluated(Path(folder), card, **options)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.shutdown()


def test_any_number_of_processes_gives_the_same_numbers(tmp_path):
    card, said = furnish(tmp_path), {}
    listed(tmp_path, {"colours:val": (load_card(card).open("val"), [0, 6])})
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        if count == 1:
            in_process(0, str(folder), card)
        else:
            processes(count, in_process, str(folder), card)
        all_of_it = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
        assert all(one == all_of_it[0] for one in all_of_it)
        said[count] = {k: v for k, v in all_of_it[0].items() if k != "fps"}
        results = (place(folder) / "detections.json").read_text()
        said[count] |= {"results": json.loads(results)}
    assert said[1] == said[2] == said[3]
    assert said[1]["leaked_images"] == 2 and "mask_AP_without_leaks" in said[1]


def killed(folder: str, card: str) -> None:
    """In a process of its own: evaluates in parts of two images, and is killed in the third."""
    original = predictions._part
    parts._PART, numbers = 2, iter(range(9))

    def counted(*given):
        if next(numbers) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given)

    predictions._part = counted
    evaluated(Path(folder), card)


def test_an_evaluation_that_was_killed_goes_on(tmp_path, monkeypatch, group):
    card = furnish(tmp_path)
    whole = evaluated(tmp_path / "whole", card)
    code = f"import {__name__} as here; here.killed({str(tmp_path / 'cut')!r}, {card!r})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent)
    assert ended.returncode == -signal.SIGKILL
    kept = sorted((place(tmp_path / "cut") / "parts").iterdir())
    assert [path.name for path in kept] == ["000000000.json", "000000002.json"]
    kept[1].write_text('{"found": [], "timed": 0, "seconds": 0}')  # torn
    monkeypatch.setattr(parts, "_PART", 2)
    computed, original = [], predictions._part

    def counted(model, batches, count, *rest):
        computed.append(count)
        return original(model, batches, count, *rest)

    monkeypatch.setattr(predictions, "_part", counted)
    again = evaluated(tmp_path / "cut", card)
    assert computed == [2, 2, 1]  # all but the first part
    drop = lambda found: {k: v for k, v in found.items() if k != "fps"}
    assert drop(again) == drop(whole)
    files = [place(tmp_path / one) / "detections.json" for one in ("whole", "cut")]
    assert files[0].read_text() == files[1].read_text()


def test_what_does_not_fit_is_refused_before_anything_is_computed(tmp_path, group):
    card = furnish(tmp_path)
    evaluator = build("detection", cache=False, data=card)
    with pytest.raises(ValueError, match="finds no objects"):
        evaluator.check(made().encoder and plain())
    with pytest.raises(ValueError, match="the data has 2 classes, and the model's head 3"):
        evaluator.run(made(classes=3), tmp_path)
    for options, message in (
        ({"soft": {"hard": 1}}, "detection.soft: .*linear"),
        ({"corruptions": ["rain"]}, "no corruption 'rain'"),
        ({"corruptions": ["frost"]}, "detection.frost"),
        ({"overlap": 2}, "evaluator.overlap"),
        ({"soft": {"linear": 0}}, "detection.soft.linear: 0.0 must be finite and above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            plugin.build("evaluators", "detection", data=card, **options)
    (tmp_path / "flat.yaml").write_text("val: {source: synthetic, images: 4, size: 32, seed: 0}\n")
    evaluator = build("detection", cache=False, data=str(tmp_path / "flat.yaml"))
    with pytest.raises(ValueError, match="flat:val: have no objects"):
        evaluator.open_data()


def plain():
    """A model without a detector."""
    from test_features import tiny_model

    return tiny_model()
