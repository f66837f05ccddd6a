"""Detection: the objective that trains on images with objects, and heads in a run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import processes
from PIL import Image, ImageDraw
from test_train import rows, train
from torch.utils.flop_counter import FlopCounterMode

import prepretrain
from prepretrain.data.batch import collate
from prepretrain.data.random import Random
from prepretrain.data.sources.coco import Coco
from prepretrain.data.subset import Subset
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.evaluation.detection_metrics import average_precision, ground_truth
from prepretrain.evaluation.evaluators.detection import Detection as DetectionEvaluator
from prepretrain.models.dense import boxes
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


STAGES = {"encoder": "swinv2_test8", "depths": [1, 2, 1, 1], "heads": [1, 1, 2, 2], "window": 5}
STAGES |= {"any_size": True, "final_norm": False}


def made(name: str = "mask_rcnn", classes: int = 2, encoder: dict | None = None, **head) -> Model:
    """A small detector, on the meta device."""
    with torch.device("meta"):
        head = {"name": name, "classes": classes, **HEAD, **head}
        encoder = encoder or {"encoder": "vit_test8", **ENCODER}
        return Model(image_size=64, **encoder, head=head)


def batch_of(objective: Detection, source: Coco, *places: int, train: bool = False) -> dict:
    transform = objective.transform(train)
    rows = [transform(source[i] | {"random": Random(0, 0, i)}) for i in places]
    return collate(rows)


@pytest.mark.parametrize(
    "name, encoder",
    [("mask_rcnn", None), ("cascade_mask_rcnn", None), ("cascade_mask_rcnn", STAGES)],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_detector_is_trained_on_a_batch_with_and_without_objects(
    tmp_path, name, encoder, precision
):
    pytest.importorskip("faster_coco_eval")
    objective = Detection(made(name, encoder=encoder))
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


def computed(objective: Detection, batch: dict) -> dict[str, torch.Tensor]:
    """The losses of a batch, and the gradient of each parameter, whole."""
    said = objective(batch)
    said["loss"].backward()
    found = {name: one.detach() for name, one in said.items()}
    for name, parameter in objective.named_parameters():
        gradient, parameter.grad = parameter.grad, None
        name = name.replace("_checkpoint_wrapped_module.", "")
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


@pytest.mark.parametrize("head", ["cascade_mask_rcnn", "mask_rcnn"])
def test_losses_and_gradients_are_the_same_where_sizes_follow_no_values_as_on_a_gpu(
    tmp_path, head, monkeypatch
):
    pytest.importorskip("faster_coco_eval")
    sigmoid = {"loss": "sigmoid"} if head == "mask_rcnn" else {}
    objective = Detection(made(head, **sigmoid), federated=1 if sigmoid else None)
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    batch = batch_of(objective, opened(tmp_path), 0, 1, 5)
    expected = computed(objective, batch)
    monkeypatch.setattr(boxes, "counts_freely", lambda tensor: False)
    torch.testing.assert_close(computed(objective, batch), expected)
    none = computed(objective, batch_of(objective, opened(tmp_path), 5))
    assert all(one.isfinite().all() for one in none.values()) and none["mask"] == 0


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
    assert "masks" not in source.fields
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


def test_an_image_of_two_hundred_objects_trains_and_a_hundred_detections_of_it_are_counted(
    tmp_path,
):
    pytest.importorskip("faster_coco_eval")

    def crowd(said: dict) -> None:
        """The first image, of 64 x 40 pixels, shows 200 objects of 3 x 2 pixels."""
        del said["annotations"][:2]
        for i in range(200):
            left, top = i % 10 * 4, i // 10 * 3
            corners = [left, top, left + 3, top, left + 3, top + 2, left, top + 2]
            one = {"id": 100 + i, "image_id": 0, "category_id": 3, "bbox": [left, top, 3, 2]}
            said["annotations"].append(one | {"area": 6, "segmentation": [corners]})

    source = opened(tmp_path, crowd)
    objective = Detection(made())
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    batch = batch_of(objective, source, 0, 1)
    assert batch["boxes"].shape == (2, 200, 4) and batch["bits"].shape == (2, 200, 64, 8)
    assert all(one.isfinite().all() for one in computed(objective, batch).values())
    found = objective.model.eval().detect(batch["image"], batch["size"], threshold=0.0, most=30)
    assert len(found[0].boxes) <= 30
    truth = ground_truth(Subset(source, [0]))
    results = [{**one, "score": 0.9 - 0.001 * i} for i, one in enumerate(truth["annotations"])]
    assert average_precision(truth, results, "box")[0]["box_AP"] == pytest.approx(50, abs=1)


PLACES = (0, 1), (5, 5)  # of the images of two processes; one has no objects


def _one_without_objects(rank: int, folder: str) -> None:
    distributed.init()
    source = Coco(path=f"{folder}/images", listing=f"{folder}/objects.json")
    for name, encoder in (("vit", None), ("stages", STAGES)):
        objective = Detection(made("cascade_mask_rcnn", encoder=encoder))
        shard.shard(objective, precision="fp32")
        shard.initialise(objective, 0)
        batch = batch_of(objective, source, *PLACES[rank])
        found = computed(objective, batch)
        losses = {n: distributed.all_sum(one) / 2 for n, one in found.items() if one.dim() == 0}
        if rank == 0:
            torch.save({**found, **losses}, f"{folder}/{name}.pt")
    found = objective.model.eval().detect(batch["image"], batch["size"], threshold=0.0)
    assert len(found) == 2
    distributed.shutdown()


def test_a_process_without_objects_trains_with_one_that_has_some_as_one_process_would(tmp_path):
    pytest.importorskip("faster_coco_eval")
    source = opened(tmp_path)
    processes(2, _one_without_objects, str(tmp_path))
    for name, encoder in (("vit", None), ("stages", STAGES)):
        objective = Detection(made("cascade_mask_rcnn", encoder=encoder))
        shard.shard(objective, precision="fp32")
        shard.initialise(objective, 0)
        one, other = (computed(objective, batch_of(objective, source, *some)) for some in PLACES)
        mean = {name: (value + other[name]) / 2 for name, value in one.items()}
        found = torch.load(f"{tmp_path}/{name}.pt")
        torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-5)


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
    del alone["fps"]
    assert alone == pytest.approx(measured)
    processes(2, _measured, str(place), "runs/tuned")
    for rank in range(2):
        found = json.loads(Path(f"found_{rank}.json").read_text())
        assert {name: found[name] for name in alone} == pytest.approx(alone)
    files = [next(Path(one).glob("predictions/*/detections.json")) for one in ("alone", "at_0")]
    rows_of = [json.loads(file.read_text()) for file in files]
    assert rows_of[0] == rows_of[1] and not Path("at_1").exists()
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert len(exported.detect(image, torch.tensor([[64, 64]]), threshold=0.0)) == 1
    with pytest.raises(ValueError, match="detect: this model finds no objects"):
        prepretrain.load("runs/mae").detect(image, torch.tensor([[64, 64]]))


def card_of_shapes(place: Path) -> Coco:
    source = opened(place / "data/shapes")
    split = "{source: coco, path: shapes/images, listing: shapes/objects.json}"
    (place / "datasets/shapes.yaml").write_text(f"train: {split}\nval: {split}\n")
    return source


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


def of_places(encoder) -> float:
    """GMACs of the channels that stand for relative positions, in logits and in what is mixed, where
    ViTDet's code adds a tensor of all pairs: of an image of 1024 x 1024."""
    total = 0
    for block in encoder.blocks:
        side, windows = (64, 1) if block.window is None else (14, 25)
        total += 2 * windows * block.attn.heads * side**4 * 2 * side
    return total / 1e9


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
        found = counter.get_total_flops() / 2e9 - of_places(model.encoder)
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "size, peer, millions",
    [
        ("swinv2_b", "swin_base_patch4_window7_224", 139.312),
        ("swinv2_l", "swin_large_patch4_window7_224", 247.811),
    ],
)
def test_the_pyramid_and_heads_on_stages_have_the_parameters_of_detectron2s(size, peer, millions):
    """Which has Swin's first version below them."""
    with torch.device("meta"):
        stages = {"encoder": size, "window": 14, "any_size": True, "final_norm": False}
        head = {"name": "cascade_mask_rcnn", "classes": 80}
        model = Model(**stages, image_size=1024, head=head)
        swin = timm.create_model(peer, num_classes=0)
    count = sum(p.numel() for part in (model.head, swin) for p in part.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=1e-4)


def test_a_step_of_training_is_planned_without_data_and_without_memory():
    pytest.importorskip("faster_coco_eval")
    build = lambda: Detection(made())
    assert forward_flops(build()) > 1e7
    step = memory.simulate(build, images=2, world=4, precision="fp32")
    assert step.peak > step.bytes["parameters"] > 0
