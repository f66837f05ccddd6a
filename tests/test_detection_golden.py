"""ViTDet's backbone, heads and losses against numbers computed with its authors' code."""

import json
import math
import os
from ast import literal_eval
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from prepretrain import plugin
from prepretrain.losses import detection as losses
from prepretrain.models import weights
from prepretrain.models.dense import boxes, masks, regions, windows
from prepretrain.models.dense.boxes import Objects
from prepretrain.models.dense.proposals import ProposalHead, Proposer
from prepretrain.models.dense.pyramid import SimplePyramid
from prepretrain.models.dense.rcnn import RCNN, BoxOutputs, _best
from prepretrain.models.dense.regions import BoxHead, MaskHead
from prepretrain.models.model import Model
from prepretrain.objectives.detection import repeat_factors
from prepretrain.training import optim

GOLDEN = Path(os.environ.get("PREPRETRAIN_GOLDEN", Path(__file__).parent / "golden"))


def read(name: str) -> tuple[dict, dict]:
    """(dims, tensors) of a file of the folder; skips where it is not there."""
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not there: set PREPRETRAIN_GOLDEN to the folder that holds it")
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}


def under(tensors: dict, prefix: str) -> dict:
    """Those under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def fill(module: torch.nn.Module, state: dict) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    weights.fill(module, weights.Weights("golden", shapes, state.__getitem__))


@pytest.fixture(scope="module")
def vitdet():
    """(dims, tensors) of the backbone."""
    return read("vitdet_reference")


def backbone(dims: dict, tensors: dict, **options) -> Model:
    """The encoder that the file's dims describe, with its weights."""
    depth, windowed = int(dims["depth"]), literal_eval(dims["window_block_indexes"])
    model = Model(
        encoder="vit_test8",
        **{
            "patch_size": int(dims["patch_size"]),
            "width": int(dims["embed_dim"]),
            "depth": depth,
            "heads": int(dims["num_heads"]),
            "image_size": int(dims["img_size"]),
            "position_size": int(dims["pretrain_img_size"]),
            "window": int(dims["window_size"]),
            "global_blocks": [i + 1 for i in range(depth) if i not in windowed],
            "relative_positions": True,
            "final_norm": False,
            **options,
        },
    )
    fill(model.encoder, under(tensors, "state.net."))
    return model


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", ["divisible", "padded", "small"])
def test_the_backbone_gives_the_same_maps_after_every_block(vitdet, case, fused):
    dims, tensors = vitdet
    encoder = backbone(dims, tensors).encoder
    for block in encoder.blocks:
        block.attn.fused_attn = fused
    image = tensors[f"case.{case}.images"]
    maps = encoder(image, maps=range(1, encoder.depth + 1))
    for number, found in enumerate(maps):
        expected = tensors[f"case.{case}.block.{number}"].permute(0, 3, 1, 2)
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
    last = tensors[f"case.{case}.last_feat"]
    assert_close(maps[-1], last, rtol=1e-5, atol=1e-5)
    assert_close(encoder(image), last.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_positions_and_windows_are_resized_and_split_in_the_same_way(vitdet):
    _, tensors = vitdet
    for name, expected in under(tensors, "unit.abs_pos.").items():
        if name != "table":
            grid = tuple(map(int, name.split("x")))
            table = tensors["unit.abs_pos.table"][:, 1:]
            assert_close(windows.resize_positions(table, (4, 4), grid), expected)
    for name, expected in under(tensors, "unit.rel_pos.").items():
        if name != "table" and expected.shape[0] == expected.shape[1]:
            found = windows.relative(tensors["unit.rel_pos.table"], len(expected))
            assert_close(found, expected, rtol=1e-5, atol=1e-6)
    cells = tensors["unit.window.in"]
    split = windows.split_windows(cells, tensors["unit.window.out"].shape[1:3])
    assert torch.equal(split, tensors["unit.window.out"])
    assert torch.equal(windows.join_windows(split, cells.shape[1:3]), cells)


def test_rates_decay_by_layer_in_the_same_way(vitdet):
    dims, tensors = vitdet
    expected = json.loads(dims["lr_decay"])
    model = backbone(dims, tensors)
    groups = optim.groups(model, lr=1.0, weight_decay=0.1, layer_decay=expected["rate"])
    rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, parameter in model.encoder.named_parameters():
        assert rates[id(parameter)] == pytest.approx(expected["factors"][f"backbone.net.{name}"])


def test_relative_positions_are_added_to_the_logits_in_the_same_way(vitdet):
    unit = under(vitdet[1], "unit.decomposed.")
    rows = (len(unit["rel_pos_h"]) + 1) // 2
    columns = unit["q"].shape[1] // rows  # another number than its table is of
    tables = (
        windows.relative(unit["rel_pos_h"], rows),
        windows.relative(unit["rel_pos_w"], columns),
    )
    products = windows.by_distance(unit["q"][:, None], *tables)[:, 0]
    bias = products @ windows.places((rows, columns), products).T
    assert_close(unit["attn"] + bias, unit["out"], rtol=1e-5, atol=1e-5)


def unpacked(tensors: dict, name: str, size: tuple[int, int]) -> torch.Tensor:
    """bool [n, height, width] of numpy's packed bits."""
    bits = numpy.unpackbits(tensors[name].numpy())
    return (
        torch.from_numpy(bits[: len(bits) // math.prod(size) * math.prod(size)])
        .reshape(-1, *size)
        .bool()
    )


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative L2 distance."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


PYRAMID = {  # our layers, by ViTDet's names
    "fourfold.0": "simfp_2.0", "fourfold.1": "simfp_2.1", "fourfold.3": "simfp_2.3",
    "fourfold.4": "simfp_2.4", "fourfold.5": "simfp_2.5",
    "twofold.0": "simfp_3.0", "twofold.1": "simfp_3.1", "twofold.2": "simfp_3.2",
    "same.0": "simfp_4.0", "same.1": "simfp_4.1",
    "halved.1": "simfp_5.1", "halved.2": "simfp_5.2",
}  # fmt: skip
HEADS = {
    "proposals.convs.0": "rpn_head.conv.conv0", "proposals.convs.2": "rpn_head.conv.conv1",
    "proposals.objectness": "rpn_head.objectness_logits", "proposals.deltas": "rpn_head.anchor_deltas",
    **{f"masks.convs.{2 * i}": f"mask_head.mask_fcn{i + 1}" for i in range(4)},
    "masks.upscale": "mask_head.deconv", "masks.masks": "mask_head.predictor",
}  # fmt: skip


def box_names(stages: int) -> dict:
    """Our layers of the stages of boxes, by ViTDet's names."""
    names = {}
    for stage in range(stages):
        at = f".{stage}" if stages > 1 else ""
        for i in range(4):
            names[f"boxes.{stage}.convs.{2 * i}"] = f"box_head{at}.conv{i + 1}"
        names[f"boxes.{stage}.hidden"] = f"box_head{at}.fc1"
        names[f"boxes.{stage}.scores"] = f"box_predictor{at}.cls_score"
        names[f"boxes.{stage}.deltas"] = f"box_predictor{at}.bbox_pred"
    return names


def theirs(name: str, table: dict) -> str:
    """ViTDet's name of one of our parameters: a convolution holds its norm."""
    place, _, leaf = name.rpartition(".")
    if place in table:
        return f"{table[place]}.{leaf}"
    place, _, part = place.rpartition(".")
    return f"{table[place]}.{'norm.' if part == '1' else ''}{leaf}"


def filled(module: torch.nn.Module, state: dict, table: dict) -> dict:
    """Fills a module from theirs; returns their name of each of its parameters."""
    names = {name: theirs(name, table) for name in module.state_dict()}
    fill(module, {name: state[their] for name, their in names.items()})
    return names


@pytest.mark.parametrize("case", ["divisible", "padded", "small"])
def test_the_pyramid_gives_the_same_maps_and_gradients(vitdet, case):
    dims, tensors = vitdet
    model = backbone(dims, tensors)
    pyramid = SimplePyramid(model.encoder.width, int(dims["out_channels"]))
    names = filled(pyramid, under(tensors, "state."), PYRAMID)
    image = tensors[f"case.{case}.images"].clone().requires_grad_()
    scales = pyramid(model.encoder(image, maps=[model.encoder.depth]))
    for level, found in enumerate(scales, 2):
        assert_close(found, tensors[f"case.{case}.p{level}"], rtol=1e-4, atol=3e-5)
    loss = sum(one.square().mean() for one in scales)
    assert_close(loss, tensors[f"case.{case}.loss"], rtol=1e-5, atol=1e-6)
    loss.backward()
    grads = under(tensors, f"case.{case}.grad.")
    parameters = {f"net.{n}": p for n, p in model.encoder.named_parameters()}
    parameters |= {names[n]: p for n, p in pyramid.named_parameters()}
    for name, expected in grads.items():
        found = image.grad if name == "images" else parameters[name].grad
        expected = expected[:, 1:] if name == "net.pos_embed" else expected
        assert error(found, expected) < 1e-4, name


@pytest.fixture(scope="module")
def heads():
    """(dims, tensors) of the heads."""
    return read("roi_heads_reference")


def scalar(dims: dict, name: str):
    return json.loads(dims[name])


def head(dims: dict, tensors: dict, name: str) -> tuple[RCNN, dict]:
    """A detector whose stages of boxes and masks have the file's weights, and their names."""
    built = plugin.find("heads", name)(
        Model(encoder="vit_test8", patch_size=16, final_norm=False).encoder,
        classes=scalar(dims, "num_classes"),
        channels=scalar(dims, "channels"),
        sampled_regions=scalar(dims, "roi_batch"),
    )
    # the reference's maps have other channels than its heads' convolutions
    sides = scalar(dims, "channels"), scalar(dims, "conv_dim")
    count = 1 if built.shared_boxes else built.classes
    for i in range(len(built.stages)):
        built.boxes[i] = BoxHead(*sides, scalar(dims, "fc_dim"), built.classes, count)
    built.masks = MaskHead(*sides, built.classes)
    table = {**HEADS, **box_names(len(built.stages))}
    names = {}
    for place, part in [("boxes", built.boxes), ("masks", built.masks)]:
        inner = {k.removeprefix(f"{place}."): v for k, v in table.items() if k.startswith(place)}
        found = filled(part, under(tensors, f"{name.removesuffix('_mask_rcnn')}.state."), inner)
        names |= {f"{place}.{k}": v for k, v in found.items()}
    return built, names


def objects_of(dims: dict, tensors: dict, prefix: str = "gt") -> list[Objects]:
    """The annotated objects of each image."""
    size, found = tuple(scalar(dims, "image_size")), []
    for i in range(scalar(dims, "images")):
        drawn = unpacked(tensors, f"{prefix}.{i}.masks_packed", size)
        box, classes = tensors[f"{prefix}.{i}.boxes"], tensors[f"{prefix}.{i}.classes"]
        found.append(
            Objects(box, classes, torch.from_numpy(numpy.packbits(drawn.numpy(), axis=-1)))
        )
    return found


def maps_of(tensors: dict, prefix: str, count: int) -> list[torch.Tensor]:
    return [tensors[f"{prefix}.p{i}"].clone().requires_grad_() for i in range(2, 2 + count)]


SEEDS = torch.arange(3)


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
def test_regions_are_sampled_and_trained_with_the_same_losses_and_gradients(heads, name):
    dims, tensors = heads
    built, names = head(dims, tensors, name)
    expected = under(tensors, f"{name.removesuffix('_mask_rcnn')}.")
    annotated, scales = objects_of(dims, tensors), maps_of(tensors, "features", 4)
    sizes = torch.tensor([scalar(dims, "image_size")] * 3)
    sampled = []
    for i, one in enumerate(annotated):
        proposed = torch.cat([tensors[f"proposals.{i}.boxes"], one.boxes])
        sampled.append(built._sampled(proposed, one, SEEDS[i]))
        assert torch.equal(sampled[i].boxes, expected[f"sampled.{i}.boxes"])
        assert torch.equal(sampled[i].classes, expected[f"sampled.{i}.classes"])
    stages = built._stages(scales, sampled, annotated, sizes)
    drawn = built._masks(scales, sampled, annotated)
    assert torch.equal(drawn.targets, tensors["mask_target.bitmask"])
    loss = losses.of_masks(drawn).detach()
    if name == "mask_rcnn":
        assert_close(loss, tensors["mask_target.loss_bitmask"], rtol=1e-4, atol=1e-6)
    # the reference trained on polygons, of which half a percent of the cells differ
    total = losses.of_masks(replace(drawn, targets=tensors["mask_target.polygon"]))
    assert_close(total, expected["loss_mask"], rtol=1e-4, atol=1e-6)
    logits = expected["mask_logits_of_gt_class"]
    assert_close(drawn.logits, logits, rtol=1e-4, atol=1e-4)
    for number, said in enumerate(stages):
        stage, behind = ("", "") if name == "mask_rcnn" else (f"stage{number}.", f"_stage{number}")
        assert_close(said.logits, expected[f"{stage}scores"], rtol=1e-4, atol=1e-4)
        assert_close(said.deltas, expected[f"{stage}deltas"], rtol=1e-4, atol=1e-4)
        classes, where = losses.of_boxes(said, sigmoid=False)
        assert_close(classes, expected[f"loss_cls{behind}"], rtol=1e-4, atol=1e-6)
        assert_close(where, expected[f"loss_box_reg{behind}"], rtol=1e-4, atol=1e-6)
        total = total + classes + where
    assert_close(total, expected["total"], rtol=1e-4, atol=1e-6)
    total.backward()
    grads = under(expected, "grad.")
    found = {names[n]: p.grad for n, p in built.named_parameters() if n in names}
    found |= {f"features.p{level}": one.grad for level, one in enumerate(scales, 2)}
    compared = grads.keys() & found.keys()
    assert len(compared) >= 12
    for key in compared:
        assert error(found[key], grads[key]) < 1e-2, key  # behind a ReLU: a sign may differ


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
def test_the_same_objects_are_detected_with_the_same_masks(heads, name):
    dims, tensors = heads
    built, _ = head(dims, tensors, name)
    expected = under(tensors, f"{name.removesuffix('_mask_rcnn')}.detections.")
    scales = maps_of(tensors, "features", 4)
    sizes = torch.tensor([scalar(dims, "image_size")] * 3)
    proposed = [tensors[f"proposals.{i}.boxes"] for i in range(3)]
    with torch.no_grad():
        parts = zip(*built._likely(scales, proposed, sizes))
        options = scalar(dims, "score_thresh"), scalar(dims, "nms_thresh"), scalar(dims, "topk")
        chosen = [_best(*part, *options, None) for part in parts]
        found = built._with_masks(scales, chosen)
    for i, one in enumerate(found):
        assert torch.equal(one.classes, expected[f"{i}.classes"])
        assert_close(one.scores, expected[f"{i}.scores"], rtol=1e-4, atol=1e-4)
        assert_close(one.boxes, expected[f"{i}.boxes"], rtol=1e-4, atol=1e-3)
        drawn = expected[f"{i}.masks"]
        assert_close(one.masks[: len(drawn)], drawn, rtol=1e-4, atol=1e-4)


def test_regions_are_pooled_from_the_same_levels_to_the_same_values(heads):
    dims, tensors = heads
    scales = [one.detach() for one in maps_of(tensors, "features", 4)]
    found = [tensors[f"proposals.{i}.boxes"] for i in range(3)]
    assert torch.equal(2 + regions.levels(torch.cat(found), 4), tensors["pool.levels"])
    boxed = tensors["pool.level_boxes"]
    assert torch.equal(2 + regions.levels(boxed, 4), tensors["pool.level_of_boxes"])
    pooled = regions.pool(scales, found, [4, 8, 16, 32], 7)
    assert_close(pooled, tensors["pool.box"], rtol=1e-4, atol=1e-5)


def test_boxes_are_coded_in_the_same_way(heads):
    dims, tensors = heads
    for i, given in enumerate(scalar(dims, "coding_weights")):
        coder, one = boxes.Coder(given[0], given[2]), under(tensors, f"coding.{i}.")
        source, target = tensors["coding.source"], tensors["coding.target"]
        assert_close(coder.encode(target, source), one["deltas"], rtol=1e-4, atol=1e-5)
        moved = coder.decode(tensors["coding.random_deltas"], source)
        assert_close(moved.flatten(1), one["applied"], rtol=1e-4, atol=1e-3)


def test_the_proposal_network_has_the_same_losses_gradients_and_proposals(heads):
    dims, tensors = heads
    how, expected = scalar(dims, "rpn"), under(tensors, "rpn.")
    scales = maps_of(expected, "features", 5)
    network = ProposalHead(scales[0].shape[1])
    table = {
        k.removeprefix("proposals."): v for k, v in HEADS.items() if k.startswith("proposals.")
    }
    names = filled(network, under(expected, "state."), table)
    sizes = tuple(one[0] for one in how["anchor_sizes"])
    limits = how["pre_nms_topk"], how["post_nms_topk"]
    proposer = Proposer(sizes, how["strides"], *limits, how["batch_size_per_image"])
    anchors = proposer.anchors(scales)
    objectness, deltas = network(scales)
    for level, found in enumerate(anchors):
        assert_close(found, expected[f"{level}.anchors"])
        assert_close(objectness[level], expected[f"{level}.objectness"], rtol=1e-4, atol=1e-5)
        assert_close(deltas[level], expected[f"{level}.deltas"], rtol=1e-4, atol=1e-5)
    given = [expected[f"gt.{i}.boxes"] for i in range(3)]
    annotated = [Objects(one, torch.zeros(len(one))) for one in given]
    labels, targets = proposer.label(torch.cat(anchors), annotated, SEEDS)
    assert torch.equal(labels, torch.stack([expected[f"labels.{i}"].long() for i in range(3)]))
    said = proposer.outputs(objectness, deltas)
    for training, kept in ((True, "train"), (False, "test")):
        found = proposer.propose(said, anchors, torch.tensor([how["image"]] * 3), training)
        for i, one in enumerate(found):
            assert_close(one, expected[f"{kept}_proposals.{i}.boxes"], rtol=1e-4, atol=1e-3)
    said = replace(said, labels=labels, targets=targets, sampled=how["batch_size_per_image"])
    shown, where = losses.of_anchors(said)
    assert_close(shown, expected["loss_rpn_cls"], rtol=1e-4, atol=1e-7)
    assert_close(where, expected["loss_rpn_loc"], rtol=1e-4, atol=1e-7)
    (shown + where).backward()
    found = {names[n]: p.grad for n, p in network.named_parameters()}
    found |= {f"features.p{i}": one.grad for i, one in enumerate(scales, 2)}
    for key, gradient in under(expected, "grad.").items():
        if key in found:
            assert error(found[key], gradient) < 1e-2, key


@pytest.mark.parametrize("case", ["sampled", "all_present"])
def test_the_federated_loss_and_its_gradient_are_the_same(heads, case):
    dims, tensors = heads
    one = under(tensors, f"lvis.{case}.")
    scores = one["scores"].clone().requires_grad_()
    nothing = torch.zeros(len(scores), 4)
    said = BoxOutputs(scores, nothing, one["gt_classes"], nothing)
    assert_close(losses.of_boxes(said, True)[0], one["loss_cls_without_fed"], rtol=1e-4, atol=1e-6)
    classes = scores.shape[1] - 1
    drawn = torch.zeros(classes, dtype=torch.bool)
    drawn[one["fed_classes"][one["fed_classes"] < classes]] = True
    loss = losses.of_boxes(said, True, drawn)[0]
    assert_close(loss, one["loss_cls"], rtol=1e-4, atol=1e-6)
    loss.backward()
    assert error(scores.grad, one["grad.scores"]) < 1e-4
    how = scalar(dims, "lvis")
    weights = tensors["lvis.image_count"] ** how["weight_power"]
    assert_close(weights, tensors["lvis.class_weights"])
    count = how["fed_loss_num_classes"][case]
    present = one["gt_classes"].unique()
    for seed in range(5):
        found = losses.federated(one["gt_classes"], weights, count, torch.tensor(seed))
        assert found[present[present < classes]].all()
        # the background is one of the count where it is present
        wanted = max(count, len(present)) - int(classes in present)
        assert int(found.sum()) == wanted


def test_soft_suppression_keeps_the_same_boxes_with_the_same_scores(heads):
    one = under(heads[1], "soft_nms.")
    given = one["boxes"], one["scores"], one["classes"], 100
    for name, how in {
        "linear_0.3": {"linear": 0.3},
        "linear_0.6": {"linear": 0.6},
        "gaussian_0.5": {"gaussian": 0.5},
        "gaussian_0.5_prune_0.05": {"gaussian": 0.5, "prune": 0.05},
    }.items():
        kept, scores = boxes.suppress_softly(*given, **how)
        assert torch.equal(kept, one[f"{name}.keep"])
        assert_close(scores, one[f"{name}.scores"], rtol=1e-4, atol=1e-6)


def cut_polygons(polygons: list, place: torch.Tensor, at: torch.Tensor, cells: int) -> torch.Tensor:
    """As masks.cut, of each object's polygons: the reference draws them within the region."""
    mask = pytest.importorskip("faster_coco_eval.core.mask", reason="needs faster-coco-eval")
    drawn = []
    for one, (left, top, right, bottom) in zip(place.tolist(), at.tolist()):
        scale = numpy.array([cells / (right - left), cells / (bottom - top)])
        moved = [
            ((numpy.array(p).reshape(-1, 2) - (left, top)) * scale).ravel().tolist()
            for p in polygons[one]
        ]
        drawn.append(mask.decode(mask.merge(mask.frPyObjects(moved, cells, cells))))
    return torch.from_numpy(numpy.array(drawn).reshape(-1, cells, cells)).bool()


@pytest.fixture(scope="module")
def detectors():
    """(dims, tensors) of both detectors, whole."""
    return read("detector_reference")


def detector(dims: dict, tensors: dict, name: str) -> tuple[Model, dict]:
    """A whole model with the file's weights, and the names of its parameters there."""
    how, depth = scalar(dims, "rpn"), scalar(dims, "depth")
    model = Model(
        encoder="vit_test8",
        mean=[one / 255 for one in scalar(dims, "pixel_mean")],
        std=[one / 255 for one in scalar(dims, "pixel_std")],
        patch_size=scalar(dims, "patch"),
        width=scalar(dims, "dim"),
        depth=depth,
        heads=scalar(dims, "heads"),
        image_size=scalar(dims, "pad"),
        position_size=scalar(dims, "pretrain"),
        window=scalar(dims, "window"),
        global_blocks=[i + 1 for i in range(depth) if i not in scalar(dims, "wb")],
        relative_positions=True,
        final_norm=False,
        head={
            "name": name,
            "classes": scalar(dims, "K"),
            "channels": scalar(dims, "C"),
            "hidden": scalar(dims, "fc"),
            "anchors": how["anchor_sizes"],
            "candidates": how["pre_nms_topk"],
            "proposals": how["post_nms_topk"],
            "sampled_anchors": how["batch_size_per_image"],
            "sampled_regions": scalar(dims, "roi_batch"),
        },
    )
    state = under(tensors, f"{name.removesuffix('_mask_rcnn')}.state.")
    fill(model.encoder, under(state, "backbone.net."))
    roi = {k: f"roi_heads.{v}" for k, v in HEADS.items() if k.startswith("masks")}
    roi |= {k: f"roi_heads.{v}" for k, v in box_names(len(model.head.stages)).items()}
    roi |= {k: f"proposal_generator.{v}" for k, v in HEADS.items() if k.startswith("proposals")}
    roi |= {f"pyramid.{k}": f"backbone.{v}" for k, v in PYRAMID.items()}
    names = {f"head.{k}": v for k, v in filled(model.head, state, roi).items()}
    return model, names | {
        f"encoder.{n}": f"backbone.net.{n}" for n, _ in model.encoder.named_parameters()
    }


def padded(dims: dict, tensors: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The images side by side, and their sizes."""
    images = torch.zeros(2, 3, scalar(dims, "pad"), scalar(dims, "pad"), dtype=torch.uint8)
    for i, (height, width) in enumerate(scalar(dims, "sizes")):
        images[i, :, :height, :width] = tensors[f"image.{i}"]
    return images, torch.tensor(scalar(dims, "sizes"))


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
def test_a_detector_makes_the_same_losses_and_gradients_of_images(detectors, name, monkeypatch):
    dims, tensors = detectors
    model, names = detector(dims, tensors, name)
    expected = under(tensors, f"{name.removesuffix('_mask_rcnn')}.")
    images, sizes = padded(dims, tensors)
    read = model.normalise_padded(images, sizes)
    assert_close(read, tensors["padded"], rtol=1e-5, atol=1e-5)
    maps = model.read(read)
    assert_close(model.head.pyramid(maps)[2], expected["p4"], rtol=1e-4, atol=1e-4)
    polygons, annotated = scalar(dims, "gt_polygons"), []
    for i in range(2):
        box, classes = tensors[f"gt.{i}.boxes"], tensors[f"gt.{i}.classes"]
        annotated.append(Objects(box, classes, polygons[i]))
    monkeypatch.setattr(masks, "cut", cut_polygons)
    said = model.head(maps, sizes, annotated, torch.arange(2))
    found = dict(zip(("rpn_cls", "rpn_loc"), losses.of_anchors(said.anchors)))
    for number, one in enumerate(said.stages):
        behind = "" if name == "mask_rcnn" else f"_stage{number}"
        found |= zip((f"cls{behind}", f"box_reg{behind}"), losses.of_boxes(one, sigmoid=False))
    found["mask"] = losses.of_masks(said.masks)
    for key, loss in found.items():
        assert_close(loss, expected[f"loss_{key}"], rtol=1e-4, atol=1e-6)
    sum(found.values()).backward()
    parameters = {names[n]: p.grad for n, p in model.named_parameters()}
    for key, gradient in under(expected, "grad.").items():
        gradient = gradient[:, 1:] if key.endswith("pos_embed") else gradient
        assert error(parameters[key], gradient) < 1e-2, key


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
def test_a_detector_finds_the_same_objects_in_images_of_their_own_size(detectors, name):
    dims, tensors = detectors
    model, _ = detector(dims, tensors, name)
    images, sizes = padded(dims, tensors)
    with torch.no_grad():
        found = model.detect(images, sizes)
    for i, original in enumerate(scalar(dims, "original")):
        expected = under(tensors, f"{name.removesuffix('_mask_rcnn')}.detections.{i}.")
        one = masks.restored(found[i], tuple(scalar(dims, "sizes")[i]), tuple(original))
        assert torch.equal(one.classes, expected["classes"])
        assert_close(one.scores, expected["scores"], rtol=1e-4, atol=1e-4)
        assert_close(one.boxes, expected["boxes"], rtol=1e-4, atol=1e-2)
        drawn = unpacked(expected, "masks_packed", tuple(original))
        assert (one.masks[: len(drawn)] != drawn).float().mean() < 1e-4


def test_masks_are_pasted_into_the_image_in_the_same_way(heads):
    dims, tensors = heads
    size, count = scalar(dims, "postprocess_size"), scalar(dims, "postprocess_count")
    expected = unpacked(tensors, "postprocess.masks_packed", tuple(size))
    drawn = tensors["mask_rcnn.detections.0.masks"][:count]
    pasted = masks.paste(drawn, tensors["postprocess.boxes"], tuple(size))
    assert torch.equal(pasted, expected)


def test_images_of_rare_classes_come_as_often(heads):
    dims, tensors = heads
    categories = scalar(dims, "repeat_categories")
    for name, expected in under(tensors, "repeat.").items():
        found = torch.from_numpy(repeat_factors(categories, float(name)))
        assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)
