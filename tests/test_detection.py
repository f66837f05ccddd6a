"""Detection: sets of annotated images, the objective that trains on them, heads in a run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import processes
from PIL import Image, ImageDraw
from test_train import rows, train
from torch.utils.flop_counter import FlopCounterMode

import prepretrain
from prepretrain.data import objects
from prepretrain.data.batch import collate
from prepretrain.data.random import Random
from prepretrain.data.sources.coco import Coco
from prepretrain.data.transforms import BadImage, decode
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.evaluation.average_precision import LVIS_MOST, average_precision
from prepretrain.evaluation.evaluators.detection import Detection as DetectionEvaluator
from prepretrain.models.heads.base import Detections
from prepretrain.models.model import Model
from prepretrain.objectives.detection import Detection
from prepretrain.runs import memory
from prepretrain.runs.plan import forward_flops

CLASSES = ((3, "square"), (7, "disc"))  # ids with gaps


def drawn(folder: Path, count: int = 6) -> dict:
    """Pictures of squares and discs, and what COCO would say of them; the last shows nothing."""
    rng, images, annotations = np.random.default_rng(0), [], []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        height, width = (48, 64) if i % 2 else (64, 40)
        picture = Image.fromarray(rng.integers(0, 60, (height, width, 3)).astype("uint8"))
        images.append({"id": 10 * i, "file_name": f"{i}.png", "height": height, "width": width})
        for category, _ in CLASSES if i < count - 1 else ():
            side = int(rng.integers(14, 24))
            left, top = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
            box = [left, top, left + side, top + side]
            draw = ImageDraw.Draw(picture)
            (draw.rectangle if category == 3 else draw.ellipse)(box, fill=(255, 40 * i, 90))
            angle = np.linspace(0, 2 * np.pi, 5 if category == 3 else 24, endpoint=False)
            corners = [left, top, left + side, top, left + side, top + side, left, top + side]
            circle = np.stack([np.cos(angle), np.sin(angle)], 1) * side / 2 + side / 2 + (left, top)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 * i,
                    "category_id": category,
                    "bbox": [left, top, side, side],
                    "area": side**2,
                    "iscrowd": 0,
                    "segmentation": [corners if category == 3 else circle.ravel().tolist()],
                }
            )
        picture.save(folder / "images" / f"{i}.png")
    categories = [{"id": one, "name": name} for one, name in reversed(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def opened(folder: Path, change: Callable[[dict], object] = lambda content: None) -> Coco:
    """The set, after a change of what is said of it."""
    content = drawn(folder)
    change(content)
    (folder / "objects.json").write_text(json.dumps(content))
    return Coco(path=str(folder / "images"), listing=str(folder / "objects.json"))


def test_a_set_in_cocos_format_gives_each_image_its_objects(tmp_path):
    source = opened(tmp_path)
    assert source.classes == ["square", "disc"] and len(source) == 6
    assert source.fields == ("image", "boxes", "classes", "crowds", "masks")
    sample, content = source[1], drawn(tmp_path)
    assert sample["key"] == "1.png" and sample["classes"].tolist() == [0, 1]
    left, top, width, height = content["annotations"][2]["bbox"]
    assert sample["boxes"][0].tolist() == [left, top, left + width, top + height]
    assert sample["masks"][1] == content["annotations"][3]["segmentation"]
    assert source[5]["boxes"].shape == (0, 4) and source[5]["masks"] == []
    assert source.classes_shown(5) == [] and source.classes_shown(0) == [0, 1]
    assert "boxes" not in source.only(["image"])[0]
    other = opened(tmp_path, lambda c: c["annotations"][0].update(bbox=[1, 1, 5, 5]))
    assert other.fingerprint != source.fingerprint


def first(**changes) -> Callable[[dict], None]:
    """Changes the first object."""
    return lambda content: content["annotations"][0].update(changes)


@pytest.mark.parametrize(
    "change, said",
    [
        (first(bbox=[1, 1, float("nan"), 5]), r"object 1 of image 0 has the bbox \[1, 1, nan, 5\]"),
        (first(bbox=[5, 5, -2, 5]), "must be four finite numbers: left, top, width"),
        (first(category_id=4), "1 objects are of categories that it does not have: 4"),
        (first(image_id=999), "1 objects are of images that it does not have: 999"),
        (first(image_id="a"), "'a' must be a whole number"),
        (lambda c: c["images"][1].update(id=0), "ids of images that come twice: 0"),
        (lambda c: c["images"][1].update(file_name="0.png"), "files of images that come twice"),
        (lambda c: c["images"][1].update(file_name="no.png"), "1 of its 6 images are not below"),
        (lambda c: c["categories"][1].update(id=7), "ids of categories that come twice: 7"),
        (lambda c: c.pop("categories"), "has no list categories"),
        (lambda c: c["images"][0].pop("height"), "not as COCO's files are: KeyError: 'height'"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, change, said):
    with pytest.raises(ValueError, match=f"objects.json: .*{said}"):
        opened(tmp_path, change)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    opened(tmp_path)
    file = tmp_path / "objects.json"
    file.write_text(file.read_text()[:-100])
    with pytest.raises(ValueError, match="objects.json: not readable as JSON"):
        Coco(path=str(tmp_path / "images"), listing=str(file))


def test_objects_that_cannot_be_trained_are_left_out_and_counted(tmp_path):
    def change(content):
        a, b, c, d = content["annotations"][:4]
        a["bbox"] = [5, 5, 0, 9]
        b["bbox"] = [200, 5, 9, 9]
        c["segmentation"] = [[1, 1, 5, 5]]
        d["segmentation"].append([1, 2, 3])
        d["bbox"] = [50, 30, 30, 30]

    source = opened(tmp_path, change)
    assert source.left_out == {
        "objects without an area": 1,
        "objects outside of their image": 1,
        "objects of polygons with fewer than three points": 1,
    }
    assert len(source[0]["classes"]) == 0 and len(source[1]["masks"][0]) == 1
    assert source[1]["boxes"].tolist() == [[50, 30, 64, 48]]  # cut at the image's edge


def test_an_image_of_another_size_than_annotated_is_a_bad_one(tmp_path):
    def turned(content):
        one = content["images"][0]
        one["height"], one["width"] = one["width"], one["height"]

    with pytest.raises(BadImage, match="0.png: size is not as annotated: 40 x 64 .*EXIF"):
        opened(tmp_path, turned)[0]
    with pytest.raises(BadImage, match="annotations are of 41 x 64"):
        opened(tmp_path, lambda c: c["images"][0].update(width=41))[0]
    (tmp_path / "images/0.png").write_bytes(b"no picture")
    source = Coco(path=str(tmp_path / "images"), listing=str(tmp_path / "objects.json"))
    with pytest.raises(BadImage, match="unreadable"):
        decode(source[0]["image"])


def runs(mask: np.ndarray, compressed: bool) -> dict:
    """A mask bool [H, W] as COCO's run lengths."""
    coco = pytest.importorskip("faster_coco_eval.core.mask")
    if compressed:
        found = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": list(mask.shape), "counts": found["counts"].decode()}
    flat = mask.T.ravel().astype(int)
    counts = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


@pytest.mark.parametrize("mirrored", [False, True])
def test_polygons_and_run_lengths_are_seen_alike_and_with_their_image(mirrored):
    pytest.importorskip("faster_coco_eval")
    own, canvas = (60, 80), (64, 64)
    corners = [10, 20, 50, 20, 50, 50, 10, 50]
    mask = np.zeros(own, dtype=bool)
    mask[20:50, 10:50] = True
    image = torch.from_numpy(mask[None].repeat(3, 0).astype(np.uint8) * 255)
    for scale in (0.3, 1.0, 1.7):
        view = objects.jitter(own, canvas, scale, 0.4, mirrored)
        seen = objects.see(image, view, canvas)
        assert not seen[:, view.size[0] :].any() and not seen[:, :, view.size[1] :].any()
        pixels = seen[0, : view.size[0], : view.size[1]].numpy() > 127
        polygon = objects.see_mask([corners], own, view)
        packed, plain = (objects.see_mask(runs(mask, c), own, view) for c in (True, False))
        assert (packed == plain).all()
        for one in (polygon, packed):
            assert (one != pixels).mean() < 0.06
        box = objects.see_boxes(np.array([[10, 20, 50, 50]]), own, view)[0]
        np.testing.assert_allclose(objects.around(polygon[None])[0], box, atol=1.01)
    with pytest.raises(BadImage, match="mask of another size: of .61, 80."):
        objects.see_mask({**runs(mask, True), "size": [61, 80]}, own, view)


HEAD = {
    "channels": 16,
    "hidden": 32,
    "anchors": [8, 16, 24, 32, 48],
    "candidates": [100, 50],
    "proposals": [60, 40],
    "sampled_anchors": 64,
    "sampled_regions": 32,
}


def inline(options: dict) -> str:
    """Options as an override writes them."""
    return ", ".join(f"{key}: {value}" for key, value in options.items())


ENCODER = {"window": 2, "global_blocks": 1, "relative_positions": True, "final_norm": False}


def made(name: str = "mask_rcnn", classes: int = 2, **head) -> Model:
    """A small detector, on the meta device."""
    with torch.device("meta"):
        head = {"name": name, "classes": classes, **HEAD, **head}
        return Model(encoder="vit_test8", image_size=64, **ENCODER, head=head)


def batch_of(objective: Detection, source: Coco, *places: int, train: bool = False) -> dict:
    transform = objective.transform(train)
    rows = [transform(source[i] | {"random": Random(0, 0, i)}) for i in places]
    return collate(rows)


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_detector_is_trained_on_a_batch_with_and_without_objects(tmp_path, name, precision):
    pytest.importorskip("faster_coco_eval")
    objective = Detection(made(name))
    source = opened(tmp_path)
    objective.check(card := type("Card", (), {"classes": None, "name": "shapes"}), source)
    shard.shard(objective, precision=precision)
    shard.initialise(objective, 0)
    optimizer = torch.optim.AdamW(objective.parameters(), 3e-3)
    batch, first = batch_of(objective, source, 0, 1, 5), None
    for _ in range(10):
        said = objective(batch)
        said["loss"].backward()
        assert all(p.grad is not None for p in objective.parameters())
        optimizer.step()
        optimizer.zero_grad()
        first = first or float(said["loss"].detach())
    assert float(said["loss"].detach()) < 0.95 * first
    assert card and objective(batch_of(objective, source, 5))["mask"] == 0
    found = objective.model.eval().detect(batch["image"], batch["size"], threshold=0.0)
    assert len(found) == 3 and found[0].masks.shape[1:] == (28, 28)
    assert (found[1].boxes <= torch.tensor([64, 48, 64, 48])).all()


def test_what_is_drawn_for_an_image_is_its_own_whatever_else_is_in_the_batch(tmp_path):
    pytest.importorskip("faster_coco_eval")
    objective, source = Detection(made()), opened(tmp_path)
    one = batch_of(objective, source, 2, train=True)
    both = batch_of(objective, source, 2, 3, train=True)
    again = batch_of(objective, source, 2, train=True)
    for name in one:
        assert torch.equal(one[name], again[name])
        part = both[name][:1]
        assert torch.equal(part[tuple(slice(s) for s in one[name].shape)], one[name])


def test_images_without_objects_are_not_trained_on_and_rare_classes_come_more_often(tmp_path):
    pytest.importorskip("faster_coco_eval")
    source = opened(tmp_path, lambda c: c["annotations"][1].update(iscrowd=1))
    assert Detection(made()).repeats(source).tolist() == [1, 1, 1, 1, 1, 0]
    rare = Detection(made(), repeat=0.9).repeats(source)
    assert rare[5] == 0 and rare[0] < rare[1]
    shown = opened(tmp_path, lambda c: c["images"].pop())
    assert Detection(made()).repeats(shown) is None


def test_boxes_alone_are_trained_where_there_are_no_masks(tmp_path):
    source = opened(tmp_path, lambda c: [a.pop("segmentation") for a in c["annotations"]])
    assert source.fields == ("image", "boxes", "classes", "crowds")
    card = type("Card", (), {"classes": None, "name": "shapes"})
    objective = Detection(made(masks=False))
    objective.check(card, source)
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    assert set(objective(batch_of(objective, source, 0, 1, train=True))) == {
        *("loss", "anchor_class", "anchor_box", "class", "box")
    }
    pytest.importorskip("faster_coco_eval")
    with pytest.raises(ValueError, match="not every object has a mask. Set model.head.masks=false"):
        Detection(made()).check(card, source)
    with pytest.raises(ValueError, match="model.head.classes: 3, and the card 'shapes' has 2"):
        Detection(made(classes=3, masks=False)).check(card, source)


def test_a_frozen_encoder_keeps_its_weights_while_its_head_is_trained(tmp_path):
    source = opened(tmp_path, lambda c: [a.pop("segmentation") for a in c["annotations"]])
    objective = Detection(made(masks=False), freeze=True)
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    assert not objective.train().model.encoder.training and objective.model.head.training
    objective(batch_of(objective, source, 0))["loss"].backward()
    assert all(p.grad is None for p in objective.model.encoder.parameters())
    assert all(p.grad is not None for p in objective.model.head.parameters())


def test_lviss_losses_draw_classes_by_how_many_images_show_them(tmp_path):
    pytest.importorskip("faster_coco_eval")
    with pytest.raises(ValueError, match="set model.head.loss=sigmoid"):
        Detection(made(), federated=1)
    objective = Detection(made(loss="sigmoid"), federated=2)
    source = opened(tmp_path, lambda c: c["annotations"][0].update(category_id=7))
    objective.check(type("Card", (), {"classes": None, "name": "shapes"}), source)
    torch.testing.assert_close(objective.weights.square(), torch.tensor([4.0, 5.0]))
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    assert objective(batch_of(objective, source, 0, 1))["loss"].isfinite()


def _one_without_objects(rank: int, folder: str) -> None:
    distributed.init()
    objective = Detection(made("cascade_mask_rcnn"))
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    source = Coco(path=f"{folder}/images", listing=f"{folder}/objects.json")
    batch = batch_of(objective, source, *((0, 1) if rank == 0 else (5, 5)))
    objective(batch)["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters())
    found = objective.model.eval().detect(batch["image"], batch["size"], threshold=0.0)
    assert len(found) == 2
    distributed.shutdown()


def test_a_process_without_objects_trains_with_one_that_has_some(tmp_path):
    pytest.importorskip("faster_coco_eval")
    opened(tmp_path)
    processes(2, _one_without_objects, str(tmp_path))


RUN = [
    "objective={name: detection, scale: [0.5, 1.5]}",
    "data.train=shapes",
    "model={window: 2, global_blocks: 1, final_norm: false, positions: learned}",
    f"model.head={{name: mask_rcnn, classes: 2, {inline(HEAD)}}}",
    "model.image_size=64",
    "model.drop_path=0.1",
    "optim.layer_decay=0.7",
    "batch_size=4",
    "length=6it",
    "checkpoint.every=3it",
    "evaluators=[{name: detection, every: 50%, threshold: 0.0}]",
]


def test_a_run_starts_from_stage_one_resumes_bitwise_and_saves_a_detector(place, group):
    pytest.importorskip("faster_coco_eval")
    card_of_shapes(place)
    train("runs/mae", "length=4it")
    train("runs/tuned", *RUN, init="runs/mae")
    whole = rows("runs/tuned")
    assert {"anchor_class", "anchor_box", "class", "box", "mask"} <= set(whole[0])
    exported = prepretrain.load("runs/tuned")
    assert exported.encoder.prefix == 0 and exported.encoder.table_grid == (4, 4)
    shutil.rmtree("runs/tuned/checkpoints/000000006")
    shutil.rmtree("runs/tuned/export")
    train("runs/tuned", *RUN, init="runs/mae")
    assert rows("runs/tuned") == whole
    again = prepretrain.load("runs/tuned").state_dict()
    assert all(torch.equal(again[name], one) for name, one in exported.state_dict().items())
    measured = json.loads(Path("runs/tuned/results.json").read_text())["detection/shapes"]
    alone = DetectionEvaluator(data="shapes", threshold=0.0).run(exported, Path("alone"))
    assert alone == pytest.approx(measured)
    processes(2, _measured, str(place), "runs/tuned")
    for rank in range(2):
        assert json.loads(Path(f"found_{rank}.json").read_text()) == pytest.approx(alone)
    rows_of = [
        json.loads(Path(one, "detections/shapes_val.json").read_text()) for one in ("alone", "at_0")
    ]
    assert rows_of[0] == rows_of[1] and not Path("at_1").exists()
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert len(exported.detect(image, torch.tensor([[64, 64]]), threshold=0.0)) == 1
    with pytest.raises(ValueError, match="detect: this model finds no objects"):
        prepretrain.load("runs/mae").detect(image, torch.tensor([[64, 64]]))


SHARED = Path(
    os.environ.get("PREPRETRAIN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
)


def said(name: str) -> dict:
    """A .json file of the folder of shared data; skips where it is not there."""
    pytest.importorskip("faster_coco_eval")
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not there: set PREPRETRAIN_SHARED_DATA")
    return json.loads((SHARED / name).read_text())


@pytest.mark.parametrize("kind, file", [("box", "fakebbox100"), ("mask", "fakesegm100")])
def test_average_precision_is_cocos_own(kind, file):
    published = said("oracle_coco_ap/published_stats.json")
    results = said(f"oracle_coco_ap/instances_val2014_{file}_results.json")
    listing = str(SHARED / "oracle_coco_ap/instances_val2014_100.json")
    found = average_precision(listing, results, kind, lvis=False)
    expected = published["bbox" if kind == "box" else "segm"][:6]
    names = [n for n in published["order"] if n.startswith("AP")]
    assert found == pytest.approx({n: 100 * v for n, v in zip(names, expected)}, abs=1e-6)


@pytest.mark.parametrize("kind, name", [("box", "bbox"), ("mask", "segm")])
def test_average_precision_by_lviss_rules_is_lviss_own(kind, name):
    expected = said("lvis_synth/expected.json")[name]
    results = said(f"lvis_synth/results_{name}.json")
    assert said("lvis_synth/expected.json")["detections_per_image_max"] > LVIS_MOST
    found = average_precision(str(SHARED / "lvis_synth/gt.json"), results, kind, lvis=True)
    assert len(found) == 9
    assert found == pytest.approx({n: 100 * expected[n] for n in found}, abs=1e-6)


class Knowing(torch.nn.Module):
    """Stands in for a model: finds what is annotated."""

    def __init__(self, source: Coco, canvas: tuple[int, int]):
        super().__init__()
        self.source, self.next = source, iter(range(len(source)))
        self.head = made().head
        self.encoder = type("Sized", (), {"image_size": canvas})

    def detect(self, image: torch.Tensor, sizes: torch.Tensor, **_: object) -> list[Detections]:
        found = []
        for size, place in zip(sizes, self.next):
            sample, own = self.source[place], self.source.annotations.sizes[place]
            view = objects.whole(own, self.encoder.image_size)
            assert size.tolist() == list(view.size)
            boxes = torch.from_numpy(objects.see_boxes(sample["boxes"], own, view))
            masks = torch.ones(len(boxes), 28, 28)
            classes = torch.from_numpy(sample["classes"])
            found.append(Detections(boxes, torch.ones(len(boxes)), classes, masks))
        return found


def card_of_shapes(place: Path) -> Coco:
    source = opened(place / "data/shapes")
    split = "{source: coco, path: shapes/images, listing: shapes/objects.json}"
    (place / "datasets/shapes.yaml").write_text(f"train: {split}\nval: {split}\n")
    return source


def test_a_model_that_finds_what_is_annotated_has_an_average_precision_of_100(place, group):
    pytest.importorskip("faster_coco_eval")
    source = card_of_shapes(place)
    evaluator = DetectionEvaluator(data="shapes", feature_batch=1)
    found = evaluator.run(Knowing(source, (48, 80)), Path("runs/known"))
    assert found["box_AP"] == pytest.approx(100) and found["images"] == 6
    assert found["mask_AP50"] > 50  # full boxes are the squares' masks, and not the discs'
    rows = json.loads(Path("runs/known/detections/shapes_val.json").read_text())
    content = drawn(place / "data/shapes")["annotations"]
    assert [one["category_id"] for one in rows] == [one["category_id"] for one in content]
    for one, annotated in zip(rows, content):
        assert one["bbox"] == pytest.approx(annotated["bbox"], abs=1e-3)


def test_a_model_without_a_detector_or_of_other_classes_is_not_measured(place, group):
    pytest.importorskip("faster_coco_eval")
    card_of_shapes(place)
    evaluator = DetectionEvaluator(data="shapes")
    with pytest.raises(ValueError, match="detection/shapes: this model finds no objects"):
        evaluator.check(Model(encoder="vit_test8"))
    with pytest.raises(ValueError, match="has 2 classes, and the model's head 5"):
        evaluator.run(made(classes=5), Path("runs"))
    with pytest.raises(ValueError, match="colours:val: is read as Folder, and detection is"):
        DetectionEvaluator(data="colours").run(made(), Path("runs"))
    with pytest.raises(ValueError, match="detection.soft: {'hard': 1} must be"):
        DetectionEvaluator(data="shapes", soft={"hard": 1})
    with pytest.raises(ValueError, match="detection.soft.linear: 0.0 must be finite and above 0"):
        DetectionEvaluator(data="shapes", soft={"linear": 0})


def _measured(rank: int, place: str, folder: str) -> None:
    os.chdir(place)
    distributed.init()
    found = DetectionEvaluator(data="shapes", threshold=0.0).run(
        prepretrain.load(folder), Path(f"at_{rank}")
    )
    Path(f"found_{rank}.json").write_text(json.dumps(found))
    distributed.shutdown()


FULL = {  # ViTDet's code, instantiated: millions of parameters, and GMACs at 1024 x 1024
    ("vit_b16", "mask_rcnn", 80): (110.896, 839.7),
    ("vit_b16", "cascade_mask_rcnn", 80): (141.161, 1096.4),
    ("vit_b16", "mask_rcnn", 1203): (116.940, None),
    ("vit_b16", "cascade_mask_rcnn", 1203): (144.903, None),
    ("vit_l16", "mask_rcnn", 80): (330.685, 1859.4),
    ("vit_l16", "cascade_mask_rcnn", 80): (360.950, None),
    ("vit_h16", "mask_rcnn", 80): (661.204, 3363.3),
    ("vit_h16", "cascade_mask_rcnn", 80): (691.469, None),
}


@pytest.mark.parametrize("size, name, classes", FULL)
def test_vitdets_sizes_have_its_parameters_and_operations(size, name, classes):
    head = {"name": name, "classes": classes}
    windows = {"window": 14, "relative_positions": True, "final_norm": False}
    with torch.device("meta"):
        model = Model(encoder=size, image_size=1024, **windows, head=head).eval()
    millions, expected = FULL[size, name, classes]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-4)
    if expected is not None:
        shard.fuse_attention(model, False)
        image = torch.empty(1, 3, 1024, 1024, dtype=torch.uint8, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.detect(image, torch.empty(1, 2, dtype=torch.int64, device="meta"))
        assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=1e-3)


def test_a_step_of_training_is_planned_without_data_and_without_memory():
    pytest.importorskip("faster_coco_eval")
    build = lambda: Detection(made())
    assert forward_flops(build()) > 1e7
    step = memory.simulate(build, images=2, world=4, precision="fp32")
    assert step.peak > step.bytes["parameters"] > 0
