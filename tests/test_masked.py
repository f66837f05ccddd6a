"""SwinV2, SimMIM, feature targets, the validation loss, and branches off a trunk."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import processes
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import rows, train
from torch.testing import assert_close

from prepretrain import config
from prepretrain.data.sources.synthetic import Synthetic
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.evaluation import validation
from prepretrain.models.encoders import base as encoders
from prepretrain.models.export import save
from prepretrain.models.load import load
from prepretrain.models.model import Model
from prepretrain.objectives.feature_mae import FeatureMAE
from prepretrain.objectives.mae import MAE
from prepretrain.objectives.simmim import SimMIM, window_statistics
from prepretrain.reports import reconstructions
from prepretrain.runs import plan
from prepretrain.runs.export import load_objective
from prepretrain.runs.launch import launch

MILLIONS = {"swinv2_s": 49, "swinv2_b": 87, "swinv2_l": 195, "swinv2_h": 655, "swinv2_g": 1061}
SWIN = [
    "model={encoder: swinv2_test8}",
    "objective={name: simmim, cell: 8, target_window: 15}",
]
SIMMIM = [
    "model={encoder: vit_test8, final_norm: false}",
    "objective={name: simmim, cell: 16, target_window: null, decoder_depth: 1, loss: l2}",
]
STEP = ["optim.schedule=step", "optim.milestones=[87.5%]", "model.drop_path=0.1"]


def photos(count: int = 2, size: int = 32) -> torch.Tensor:
    """Random uint8 images."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture
def teacher(tmp_path) -> str:
    """An exported ViT with other values than a student of seed 0 has."""
    model = Model(encoder="vit_test8", mean=(0.2, 0.3, 0.4), width=16)
    shard.initialise(model, 7)
    save(model, tmp_path / "teacher", "made by the tests")
    return str(tmp_path / "teacher" / "model.safetensors")


@pytest.mark.parametrize("size", MILLIONS)
def test_swinv2_sizes_have_the_papers_parameters_and_timms_key_names(size):
    with torch.device("meta"):
        encoder = encoders.build(size)
        peer = timm.models.SwinTransformerV2(**encoder.arguments, num_classes=0)
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == MILLIONS[size]
    own, theirs = encoder.state_dict(), peer.state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in theirs.items()}


def test_swinv2_gives_timms_tokens_and_exports_to_timm(tmp_path):
    model = Model(encoder="swinv2_test8")
    shard.initialise(model, 0)
    for name, parameter in model.named_parameters():
        if ".norm1." in name or ".norm2." in name:  # they start at zero, and blocks do nothing
            torch.nn.init.ones_(parameter)
    save(model, tmp_path, "test")
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = photos()
    with torch.no_grad():
        theirs = peer.forward_features(model.normalise(image)).flatten(1, 2)
        assert_close(model.eval()(image), theirs, rtol=0, atol=1e-6)
        assert_close(load(str(tmp_path / "model.safetensors"))(image), theirs, rtol=0, atol=1e-6)


def test_swinv2s_position_bias_keeps_its_scale_at_another_window_and_image_size(tmp_path):
    model = Model(encoder="swinv2_test8", depths=[1, 1, 1], heads=[1, 2, 2], image_size=64)
    shard.initialise(model, 0)
    save(model, tmp_path, "test")
    larger = load(str(tmp_path / "model.safetensors"), image_size=96, window=6)
    assert larger.options["pretrained_windows"] == [4, 4, 4]
    old, new = (m.encoder.layers[0].blocks[0].attn.relative_coords_table for m in (model, larger))
    # offsets in cells, scaled by the window that the bias was trained with: equal where both are
    assert_close(new[:, 2:-2, 2:-2], old, rtol=1e-6, atol=1e-6)
    assert new.abs().max() > old.abs().max()
    assert larger(photos(1, 96)).shape == (1, 36, 64)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(image_size=36), "36 is no multiple of 8"),
        (dict(image_size=48, window=5), "window: 5 does not divide a stage's grid of 12"),
        (dict(heads=[1]), "must name one number a stage"),
        (dict(pretrained_windows=[4]), "must name one a stage"),
        (dict(drop_path=1.0), "must lie in"),
    ],
)
def test_a_swinv2_that_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Model(encoder="swinv2_test8", **options)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(cell=12), "objective.cell: 12 pixels must be a multiple"),
        (dict(cell=24), "objective.cell: 24 pixels must be a multiple of the encoder's stride"),
        (dict(cell=8, mask_ratio=0.0), "masks 0 of 16 cells"),
        (dict(cell=8, mask_ratio=0.99), "masks 16 of 16 cells"),
        (dict(cell=8, target_window=46), "46 must be odd"),
    ],
)
def test_a_simmim_that_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SimMIM(Model(encoder="swinv2_test8"), **options)


def test_mae_is_refused_for_an_encoder_that_cannot_leave_patches_out():
    with pytest.raises(
        ValueError, match="cannot leave patches out .objective mae.. Take one of the ViT"
    ):
        MAE(Model(encoder="swinv2_test8"))


def test_window_statistics_are_those_of_each_pixels_own_window():
    image = torch.randn(1, 3, 9, 11)
    mean, deviation = window_statistics(image, 5)
    for y, x in ((0, 0), (4, 5), (8, 3)):
        window = image[0, :, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].flatten(1)
        assert_close(mean[0, :, y, x], window.mean(1), rtol=1e-4, atol=1e-5)
        assert_close(deviation[0, :, y, x], (window.var(1) + 1e-6).sqrt(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("encoder", ["swinv2_test8", "vit_test8"])
def test_simmim_hides_whole_cells_and_reads_nothing_under_them(encoder):
    objective = SimMIM(Model(encoder=encoder), cell=16, mask_ratio=0.5, target_window=None)
    shard.initialise(objective, 0)
    image, noise = photos(), torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.9, 0.1, 0.8, 0.2]])
    other = image.clone()
    other[0, :, :, :16] = 255 - other[0, :, :, :16]  # the cells 0 and 2, which are masked
    objective.eval()
    places, one = objective.predict(objective.model.normalise(image), noise)
    _, two = objective.predict(objective.model.normalise(other), noise)
    assert sorted(places[0].tolist()) == [0, 1, 4, 5, 8, 9, 12, 13]
    assert torch.equal(one[0], two[0])
    drawn = objective.reconstruct({"image": image, "noise": noise})
    assert torch.equal(drawn["reconstructed"][0, :, :, 16:], image[0, :, :, 16:])
    assert not torch.equal(drawn["reconstructed"][0, :, :, :16], image[0, :, :, :16])
    assert torch.equal(drawn["original"], image)


def test_a_vit_for_simmim_leaves_out_its_final_norm_and_exports_so(tmp_path, caplog):
    model = Model(encoder="vit_test8", final_norm=False)
    shard.initialise(model, 0)
    assert not any(k.startswith("encoder.norm") for k in model.state_dict())
    save(model, tmp_path, "test")
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = photos()
    with torch.no_grad():
        theirs = peer.forward_features(model.normalise(image))
        assert_close(model.eval()(image), theirs, rtol=1e-5, atol=1e-5)
    SimMIM(Model(encoder="vit_test8"), cell=8)
    assert "model.final_norm=false" in caplog.text


def test_the_tokens_of_a_layer_are_those_after_that_many_blocks():
    model = Model(encoder="vit_test8")
    shard.initialise(model, 0)
    seen = []
    hook = model.encoder.blocks[0].register_forward_hook(lambda m, i, out: seen.append(out))
    image = photos()
    model.eval()(image)
    hook.remove()
    assert torch.equal(model(image, layer=1), seen[0])
    with pytest.raises(ValueError, match="layer: 3 is none of this encoder's 2 blocks"):
        model(image, layer=3)


def test_feature_mae_is_twice_one_less_the_cosine_over_all_tokens(teacher):
    objective = FeatureMAE(
        Model(encoder="vit_test8"),
        teacher=teacher,
        decoder_depth=1,
        decoder_width=32,
        decoder_heads=2,
    )
    shard.initialise(objective, 0)
    _ready(objective)
    batch = {"image": photos(), "noise": torch.rand(2, 16)}
    keep, masked = objective.split(batch["noise"])
    latent = objective.model.encoder(objective.model.normalise(batch["image"]), keep=keep)
    said = objective.decoder(latent, keep, masked, everything=True)
    features = load(teacher)(batch["image"])
    order = torch.cat([torch.zeros(2, 1, dtype=torch.long), keep + 1, masked + 1], 1)
    target = features.gather(1, order[..., None].expand(-1, -1, 16))
    expected = (2 - 2 * F.cosine_similarity(said, target, dim=-1)).mean(1)
    assert_close(objective.losses(batch), expected, rtol=1e-5, atol=1e-6)
    assert not any("teacher" in name for name in objective.state_dict())
    objective(batch)["loss"].backward()
    assert all(p.grad is None for p in objective.teacher.parameters())


def _ready(objective: FeatureMAE) -> None:
    """What a run does: here without sharding."""
    objective.prepare(lambda module: module.to_empty(device="cpu"))


@pytest.mark.parametrize("size, resample", [(64, True), (32, False), (48, True)])
def test_a_teacher_of_another_grid_is_refused_unless_its_features_are_resampled(
    teacher, size, resample
):
    options = dict(
        teacher=teacher,
        teacher_options={"image_size": size},
        decoder_depth=1,
        decoder_width=32,
        decoder_heads=2,
    )
    student = Model(encoder="vit_test8")
    if resample:
        with pytest.raises(ValueError, match="image_size=32, which gives equal grids"):
            FeatureMAE(student, **options)
    objective = FeatureMAE(student, resample=resample, **options)
    shard.initialise(objective, 0)
    _ready(objective)
    order = torch.arange(16).expand(2, -1)
    assert objective.target(photos(), order).shape == (2, 17, 16)
    if not resample:
        assert_close(objective.target(photos(), order), load(teacher)(photos()))


def test_a_teacher_without_a_class_token_missing_or_pickled_is_refused(tmp_path):
    swin = Model(encoder="swinv2_test8")
    shard.initialise(swin, 0)
    save(swin, tmp_path / "swin", "test")
    student = Model(encoder="vit_test8")
    with pytest.raises(ValueError, match="has no class token"):
        FeatureMAE(student, teacher=str(tmp_path / "swin" / "model.safetensors"))
    with pytest.raises(ValueError, match="no such run or file"):
        FeatureMAE(student, teacher="runs/nothing")
    torch.save({"model": {"x": torch.ones(1)}, "args": shutil.rmtree}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="cannot be read with weights_only"):
        FeatureMAE(student, teacher=str(tmp_path / "bomb.pt"))
    save_file({"x": torch.ones(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="does not say which encoder it is"):
        FeatureMAE(student, teacher=str(tmp_path / "bare.safetensors"))


@pytest.mark.parametrize("source", ["timm/vit_base_patch16_224.mae", "open_clip/ViT-B-16/nothing"])
def test_a_teacher_that_cannot_be_fetched_says_so(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"{source}: "):
        load(source)


def test_a_step_schedules_branch_is_bitwise_the_run_trained_straight_to_that_length(place, group):
    train("runs/straight", *STEP, "length=16it")
    train("runs/trunk", *STEP, "length=24it", "branches=[16it]", "checkpoint.keep=1")
    kept = sorted(int(p.name) for p in Path("runs/trunk/checkpoints").iterdir())
    assert kept == [14, 24]
    launch("small.yaml", [*STEP, "length=16it"], branch="runs/trunk")
    one, two = (load_file(f"runs/{n}/export/model.safetensors") for n in ("straight", "trunk_16it"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert rows("runs/trunk_16it") == rows("runs/straight")[14:]
    assert rows("runs/trunk")[:14] == rows("runs/straight")[:14]


def test_a_branch_that_is_not_the_trunks_is_refused(place):
    launch("small.yaml", [*STEP, "length=24it", "branches=[16it]"], out="runs/trunk")
    for wrong, said in [
        (["length=32it"], "would leave at step 28, and the trunk ends at step 24"),
        (["length=20it"], "holds no checkpoint of step 18.*It holds"),
        (["length=16it", "optim.lr=1e-3"], "optim.lr: 0.01 -> 0.001"),
        (["length=16it", "optim.schedule=cosine", "optim.milestones=[]"], "optim.schedule: step"),
        (["length=16it", "data.train=scenes"], "data.train: colours -> scenes"),
    ]:
        with pytest.raises(ValueError, match=said):
            launch("small.yaml", [*STEP, *wrong], branch="runs/trunk", dry_run=True)


def test_a_trunk_whose_warm_up_is_a_share_of_its_length_has_no_branches(place):
    with pytest.raises(ValueError, match="Give optim.warmup in steps"):
        launch(
            "small.yaml",
            [*STEP, "length=64it", "optim.warmup=10%", "branches=[32it]"],
            dry_run=True,
        )
    with pytest.raises(ValueError, match="only optim.schedule=step has a constant part"):
        launch("small.yaml", ["length=64it", "branches=[32it]"], dry_run=True)


VALIDATED = ["validation={data: 'colours:val', every: 6it, images: 20}"]


def test_the_validation_loss_is_logged_beside_the_training_loss(place, group):
    train("runs/one", *VALIDATED)
    found = [r for r in rows("runs/one") if "val_loss" in r]
    assert [r["step"] for r in found] == [6, 12] and found[1]["val_loss"] < found[0]["val_loss"]
    assert all(r["val_images"] == 20 and abs(r["val_gap"]) < 0.5 for r in found)
    results = json.loads(Path("runs/one/results.json").read_text())
    assert results["val_loss"] == found[1]["val_loss"]
    train("runs/two")  # measuring changes nothing
    assert rows("runs/two") == [r for r in rows("runs/one") if "val_loss" not in r]
    # the same number by hand: the run's last weights on the same images, crops and masks
    objective = load_objective(Path("runs/one"))
    source = plan.Plan(config.load("small.yaml", VALIDATED), 1).open_validation()
    again, images = validation.measure(objective, source, batch_size=7)
    assert images == 20
    assert_close(again, results["val_loss"], rtol=1e-6, atol=1e-7)


def test_an_image_that_cannot_be_read_is_left_out_of_the_validation_loss_and_counted(
    place, group, caplog
):
    train("runs/one")
    objective = load_objective(Path("runs/one"))
    source = plan.Plan(config.load("small.yaml", VALIDATED), 1).open_validation()
    whole, _ = validation.measure(objective, source, batch_size=8)
    Path("data/photos/blue/000.png").write_bytes(b"no picture")
    Path("data/photos/red/059.png").write_bytes(b"no picture")
    source = plan.Plan(config.load("small.yaml", ["validation.data=colours:val"]), 1)
    loss, images = validation.measure(objective, source.open_validation(), batch_size=8)
    assert images == 58 and "2 of 60 images could not be read" in caplog.text
    assert np.isfinite(loss) and abs(loss - whole) < 0.2
    for photo in Path("data/photos").rglob("*.png"):
        photo.write_bytes(b"no picture")
    for workers in (0, 1):
        with pytest.raises(ValueError, match="none of the 60 images can be read"):
            validation.measure(objective, source.open_validation(), batch_size=8, workers=workers)


def test_the_validation_loss_is_measured_without_drop_path_and_training_goes_on_with_it():
    options = {"decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2}
    objective = MAE(Model(encoder="vit_test8", drop_path=0.5), **options)
    shard.initialise(objective, 0)
    source = Synthetic(images=8, size=32, seed=0)
    measured = {validation.measure(objective.train(), source, batch_size=8) for _ in range(3)}
    assert len(measured) == 1 and objective.training
    batch = {"image": photos(8), "noise": torch.rand(8, 16)}
    assert len({float(objective(batch)["loss"].detach()) for _ in range(3)}) > 1


def test_an_objective_without_a_loss_per_image_has_no_validation_loss(place):
    with pytest.raises(ValueError, match="objective 'classify' has no validation loss"):
        launch(
            "small.yaml",
            ["objective={name: classify}", "model.head={classes: 3}", *VALIDATED],
            dry_run=True,
        )


SHORT = [*VALIDATED, "length=8it"]
KINDS = {"swin": SWIN, "vit": SIMMIM}


def _feature(teacher: str) -> list[str]:
    decoder = "decoder_depth: 1, decoder_width: 32, decoder_heads: 2"
    return [f"objective={{name: feature_mae, teacher: {teacher}, {decoder}}}"]


def test_each_masked_objective_trains_in_bf16_as_in_float32_but_for_rounding(place, group, teacher):
    stage = Path("small.yaml")
    stage.write_text(stage.read_text().replace(", positions: fixed", ""))
    for name, overrides in (KINDS | {"feature": _feature(teacher)}).items():
        train(f"runs/fp32_{name}", *overrides, "length=3it")
        train(f"runs/bf16_{name}", *overrides, "length=3it", "shard.precision=bf16")
        losses = [[r["loss"] for r in rows(f"runs/{p}_{name}")] for p in ("fp32", "bf16")]
        assert losses[0] != losses[1]
        assert_close(losses[1], losses[0], rtol=0.03, atol=0)


def _in_two(rank: int, where: str, teacher: str) -> None:
    os.chdir(where)
    distributed.init()
    for mode, group in (("sharded", "null"), ("replicated", "1")):
        for name, overrides in (KINDS | {"feature": _feature(teacher)}).items():
            train(f"runs/{mode}_{name}", f"shard.group={group}", *overrides, *SHORT)
    distributed.shutdown()


def test_each_masked_objective_gives_equal_losses_on_one_process_two_sharded_and_two_replicated(
    place, group, teacher
):
    stage = Path("small.yaml")  # a SwinV2 has no such option
    stage.write_text(stage.read_text().replace(", positions: fixed", ""))
    kinds = KINDS | {"feature": _feature(teacher)}
    for name, overrides in kinds.items():
        train(f"runs/one_{name}", *overrides, *SHORT)
    processes(2, _in_two, str(place), teacher)
    for name in kinds:
        for key in ("loss", "val_loss", "val_gap"):
            want = [row[key] for row in rows(f"runs/one_{name}") if key in row]
            assert len(want) == (8 if key == "loss" else 2)
            for mode in ("sharded", "replicated"):
                got = [row[key] for row in rows(f"runs/{mode}_{name}") if key in row]
                assert_close(got, want, rtol=1e-5, atol=2e-6)
    for name, overrides in kinds.items():
        first, *others = [row["loss"] for row in rows(f"runs/one_{name}") if "loss" in row]
        assert min(others) < first
        shutil.copytree(f"runs/one_{name}", f"runs/again_{name}")
        shutil.rmtree(f"runs/again_{name}/checkpoints/000000008")
        train(f"runs/again_{name}", *overrides, *SHORT)
        assert rows(f"runs/again_{name}") == rows(f"runs/one_{name}")


def test_several_runs_are_drawn_side_by_side_on_the_same_images(place, group, teacher):
    stage = Path("small.yaml")
    stage.write_text(stage.read_text().replace(", positions: fixed", ""))
    train("runs/mae", "length=2it", "optim.warmup=0it")
    train("runs/swin", *SWIN, "length=2it", "optim.warmup=0it")
    train("runs/feature", *_feature(teacher), "length=2it", "optim.warmup=0it")
    reconstructions.reconstruct(["runs/mae", "runs/swin"], "colours:val", 3, "both.png", ["a", "b"])
    reconstructions.reconstruct(["runs/mae"], "colours:val", 3, "one.png")
    both, one = (np.asarray(Image.open(f"{name}.png")).shape for name in ("both", "one"))
    assert both[0] == one[0] and both[1] > 1.5 * one[1]  # two masks and two reconstructions
    with pytest.raises(ValueError, match="predicts no pixels"):
        reconstructions.reconstruct(["runs/feature"], "colours:val", 3, "none.png")
    with pytest.raises(ValueError, match="--names: 1 names for 2 runs"):
        reconstructions.reconstruct(["runs/mae", "runs/swin"], "colours:val", 3, "no.png", ["a"])
