"""UPerNet, its maps of a ViT, sliding windows and mIoU against numbers computed with mmsegmentation's and
BEiT's code, and DPT's against its own."""

import json

import pytest
import torch
from test_detection_golden import error, fill, read, under
from torch.testing import assert_close

from prepretrain.data.dense.maps import VOID
from prepretrain.evaluation import segmentation_metrics
from prepretrain.evaluation.sliding import slide
from prepretrain.losses.segmentation import of_scores
from prepretrain.models.heads.dpt_depth import DPTDepth
from prepretrain.models.heads.dpt_segmentation import DPTSegmentation
from prepretrain.models.heads.upernet import UPerNet
from prepretrain.models.model import Model
from prepretrain.training import optim
from prepretrain.training.schedule import Schedule

NAMES = {  # our parts, by mmsegmentation's names
    **{f"pyramid.pooled.{i}": f"decode_head.psp_modules.{i}.1" for i in range(4)},
    "pyramid.coarsest": "decode_head.bottleneck",
    **{f"pyramid.laterals.{i}": f"decode_head.lateral_convs.{i}" for i in range(3)},
    **{f"pyramid.smooth.{i}": f"decode_head.fpn_convs.{i}" for i in range(3)},
    "pyramid.fusion": "decode_head.fpn_bottleneck",
    "helper.0": "auxiliary_head.convs.0",
}
PLAIN = {"scores": "decode_head.conv_seg", "helper.2": "auxiliary_head.conv_seg"}
LEVELS = {
    "fourfold.0": "fpn1.0",
    "fourfold.1": "fpn1.1",
    "fourfold.3": "fpn1.3",
    "twofold": "fpn2.0",
}


def theirs(name: str) -> str:
    """mmsegmentation's name of one of our parameters."""
    place, _, leaf = name.rpartition(".")
    if place in PLAIN:
        return f"{PLAIN[place]}.{leaf}"
    place, _, part = place.rpartition(".")
    return f"{NAMES[place]}.{('conv', 'bn')[int(part)]}.{leaf}"


def encoder(width: int, depth: int = 4, **options):
    """A small ViT of patches of 16."""
    options = {"patch_size": 16, "heads": 3, "image_size": 64, "final_norm": False, **options}
    return Model(encoder="vit_test8", width=width, depth=depth, **options).encoder


@pytest.fixture(scope="module")
def golden():
    """(dims, tensors) of the file."""
    return read("upernet_reference")


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_upernet_gives_the_same_scores_losses_gradients_and_running_values(golden, mode):
    dims, tensors = golden
    head = UPerNet(encoder(12), classes=7, channels=8, auxiliary_channels=6, dropout=0.0)
    head.levels = torch.nn.Identity()  # the file's maps are of all resolutions already
    state = under(tensors, "state.")
    fill(head, {name: state[theirs(name)] for name in head.state_dict()})
    head.train(mode == "train")
    expected, label = under(tensors, f"{mode}."), tensors["label"]
    maps = [tensors[f"features.{i}"].clone().requires_grad_() for i in range(4)]
    scores, helped = head.scores(head.pyramid(maps)), head.helper(maps[2])
    assert_close(scores, expected["logits"], rtol=1e-5, atol=1e-5)
    assert_close(helped, expected["aux_logits"], rtol=1e-5, atol=1e-5)
    assert len(head(maps)) == (2 if mode == "train" else 1) and head.weights == (1.0, 0.4)
    losses = [of_scores(one, label, VOID).mean() for one in (scores, helped)]
    assert_close(losses[0], expected["loss_seg"], rtol=1e-5, atol=1e-6)
    assert_close(0.4 * losses[1], expected["aux_loss_seg"], rtol=1e-5, atol=1e-6)
    (losses[0] + 0.4 * losses[1]).backward()
    found = {theirs(name): p.grad for name, p in head.named_parameters()}
    found |= {f"features.{i}": one.grad for i, one in enumerate(maps)}
    for name, gradient in under(expected, "grad.").items():
        assert error(found[name], gradient) < 1e-4, name


def test_running_values_follow_a_batch_in_the_same_way(golden):
    dims, tensors = golden
    head = UPerNet(encoder(12), classes=7, channels=8, auxiliary_channels=6, dropout=0.0).train()
    state, after = under(tensors, "state."), under(tensors, "train.after.")
    fill(head.pyramid, {
        name: state[theirs(f"pyramid.{name}")] for name in head.pyramid.state_dict()
    })  # fmt: skip
    head.pyramid([tensors[f"features.{i}"] for i in range(4)])
    names = {theirs(f"pyramid.{name}"): value for name, value in head.pyramid.state_dict().items()}
    assert len(after) > 10
    for name, expected in after.items():
        assert_close(names[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_vits_four_maps_and_their_gradients_are_the_same(golden):
    dims, tensors = golden
    vit = encoder(24)
    head = UPerNet(vit, classes=7, channels=8)
    assert head.layers == (1, 2, 3, 4)
    state = under(tensors, "vit.state.")
    fill(vit, {name: state[name] for name in vit.state_dict()})
    names = {name: name.rpartition(".") for name in head.levels.state_dict()}
    names = {name: f"{LEVELS[place]}.{leaf}" for name, (place, _, leaf) in names.items()}
    fill(head.levels, {name: state[their] for name, their in names.items()})
    head.levels.eval()  # as the file was made
    maps = head.levels(vit(tensors["vit.images"], maps=head.layers))
    for number, found in enumerate(maps):
        assert_close(found, tensors[f"vit.map.{number}"], rtol=1e-5, atol=1e-5)
    loss = sum(one.square().mean() for one in maps)
    assert_close(loss, tensors["vit.loss"], rtol=1e-5, atol=1e-6)
    loss.backward()
    found = {name: p.grad for name, p in vit.named_parameters()}
    found |= {names[name]: p.grad for name, p in head.levels.named_parameters()}
    for name, gradient in under(tensors, "vit.grad.").items():
        assert error(found[name], gradient) < 1e-4, name


def test_rates_decay_by_layer_and_the_schedule_falls_in_the_same_way(golden):
    dims, _ = golden
    expected = json.loads(dims["layer_decay"])
    model = Model(
        encoder="vit_test8",
        patch_size=16,
        width=24,
        depth=4,
        heads=3,
        final_norm=False,
        head={"name": "upernet", "classes": 7, "channels": 8},
    )
    groups = optim.groups(model, lr=1.0, weight_decay=0.05, layer_decay=expected["rate"])
    said = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    ours = {f"backbone.{n}": said[id(p)] for n, p in model.encoder.named_parameters()}
    for name, parameter in model.head.named_parameters():
        place, _, leaf = name.removeprefix("levels.").rpartition(".")
        their = f"backbone.{LEVELS[place]}.{leaf}" if place in LEVELS else theirs(name)
        ours[their] = said[id(parameter)]
    for name, (rate, decay) in expected["factors_and_wd"].items():
        # a slip in their code decays these two
        decay = 0.0 if name in ("backbone.pos_embed", "backbone.cls_token") else decay
        assert ours[name] == pytest.approx((rate, decay)), name
    poly = json.loads(dims["poly_schedule"])
    schedule = Schedule(poly["base_lr"], poly["max_iters"], poly["warmup_iters"], "poly")
    for step, rate in poly["lr"].items():
        assert schedule.lr(int(step)) == pytest.approx(rate, rel=1e-5, abs=2e-10)


def test_windows_slide_in_the_same_way_and_one_that_is_too_large_is_padded(golden):
    dims, tensors = golden
    how = json.loads(dims["slide"])
    network = lambda parts: torch.nn.functional.conv2d(parts, tensors["slide.weight"], padding=1)
    (image,) = tensors["slide.images"]
    crop, stride, large = how["crop"], how["stride"], tuple(how["large_crop"])
    found = slide(network, image, (crop, crop), (stride, stride))
    assert_close(found[None], tensors["slide.a.logits"], rtol=1e-5, atol=1e-5)
    found = slide(network, image, large, large)
    assert_close(found[None], tensors["slide.large_crop.logits"], rtol=1e-5, atol=1e-5)


def test_means_over_classes_are_the_same_and_both_conventions_for_absent_ones_are_said(golden):
    dims, tensors = golden
    expected = json.loads(dims["metric"])
    counts = segmentation_metrics.confusion(
        tensors["metric.label"], tensors["metric.prediction"], 7
    )
    found = segmentation_metrics.metrics(counts)
    for name in ("aAcc", "mIoU", "mAcc"):
        assert found[name] == pytest.approx(100 * expected[name], abs=1e-4)
    assert found["classes"] == 6
    assert found["mIoU_absent_0"] == pytest.approx(found["mIoU"] * 6 / 7)
    each = segmentation_metrics.of_classes(counts, [str(i) for i in range(7)])
    for key in ("IoU", "Acc"):
        said = {str(i): 100 * v for i, v in enumerate(expected[key]) if v is not None}
        assert each[key] == pytest.approx(said, abs=1e-4)


def test_dpts_decoder_and_heads_have_the_values_and_the_size_of_its_authors_code():
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.dpt.modeling_dpt")
    config = transformers.DPTConfig(
        hidden_size=24,
        neck_hidden_sizes=[3, 6, 12, 24],
        fusion_hidden_size=8,
        readout_type="ignore",
        num_labels=5,
        head_in_index=-1,
    )
    torch.manual_seed(0)
    neck, known = (
        modeling.DPTNeck(config).eval(),
        modeling.DPTSemanticSegmentationHead(config).eval(),
    )
    depths = modeling.DPTDepthEstimationHead(config).eval()
    vit = encoder(24)
    ours = DPTSegmentation(vit, classes=5, channels=8).eval()
    names = {name: dpts(name) for name in ours.decoder.state_dict()}
    fill(ours.decoder, {name: neck.state_dict()[their] for name, their in names.items()})
    left = set(neck.state_dict()) - set(names.values())
    assert all(name.startswith("fusion_stage.layers.0.residual_layer1") for name in left)  # unused
    state = known.head.state_dict()
    pairs = {"joined.0.weight": "0.weight", "scores.weight": "4.weight", "scores.bias": "4.bias"}
    parts = ("weight", "bias", "running_mean", "running_var")
    pairs |= {f"joined.1.{part}": f"1.{part}" for part in parts}
    pairs = {name: state[their] for name, their in pairs.items()}
    fill(ours, pairs | {f"decoder.{k}": v for k, v in ours.decoder.state_dict().items()})
    maps = [torch.randn(2, 24, 4, 6) for _ in range(4)]
    tokens = [torch.cat([torch.zeros(2, 1, 24), one.flatten(2).mT], 1) for one in maps]
    with torch.no_grad():
        fused = neck(tokens, 4, 6)
        assert_close(ours.decoder(maps), fused[-1], rtol=1e-5, atol=1e-5)
        upsample = lambda one: torch.nn.functional.interpolate(
            one, scale_factor=2, mode="bilinear", align_corners=True
        )
        assert_close(upsample(ours(maps)[0]), known(fused), rtol=1e-5, atol=1e-5)
        far = DPTDepth(vit, channels=8, bins=0, range=(0.0, 1.0)).eval()
        state = {f"decoder.{k}": v for k, v in ours.decoder.state_dict().items()}
        for name, place in (("halved", 0), ("narrow", 2), ("depth.values", 4)):
            state |= {f"{name}.{k}": v for k, v in depths.head[place].state_dict().items()}
        fill(far, state)
        found = torch.logit(far(maps)[:, 0]).relu()  # theirs ends with a ReLU
        assert_close(found, depths(fused), rtol=1e-4, atol=1e-5)
    size = {"hidden_size": 1024, "neck_hidden_sizes": [256, 512, 1024, 1024]}
    large = transformers.DPTConfig(**size, readout_type="ignore", num_labels=150)
    with torch.device("meta"):
        whole = modeling.DPTNeck(large), modeling.DPTSemanticSegmentationHead(large)
        vit = Model(encoder="vit_l16", image_size=384, final_norm=False).encoder
        mine = DPTSegmentation(vit, classes=150, widths=tuple(large.neck_hidden_sizes))
    count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
    unused = count(whole[0].fusion_stage.layers[0].residual_layer1)
    assert count(mine) == count(*whole) - unused


def dpts(name: str) -> str:
    """Its name of a parameter of our decoder."""
    part, number, rest = name.split(".", 2)
    if part == "narrowed":
        return f"convs.{number}.{rest}"
    if part == "reassembled":
        kind, leaf = rest.split(".")
        return f"reassemble_stage.layers.{number}.{('projection', 'resize')[int(kind)]}.{leaf}"
    for ours, theirs in (
        ("own.first", "residual_layer1.convolution1"),
        ("own.second", "residual_layer1.convolution2"),
        ("both.first", "residual_layer2.convolution1"),
        ("both.second", "residual_layer2.convolution2"),
        ("out", "projection"),
    ):
        rest = rest.replace(ours, theirs)
    return f"fusion_stage.layers.{number}.{rest}"
