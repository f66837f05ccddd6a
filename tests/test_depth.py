"""Monocular depth: heads, loss, metrics against closed forms, and runs; segmentation by nearest patches,
and pictures of features."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import processes
from PIL import Image
from test_maps import saved
from test_segmentation import card_of_sides
from test_train import rows, train

import prepretrain
from prepretrain.data.dense.maps import Fitted, Jitter, Scaled, pair
from prepretrain.data.drawing import heights, principal_colours
from prepretrain.data.random import Random
from prepretrain.data.transforms import BadImage
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.evaluators.base import build
from prepretrain.evaluation.evaluators.depth import errors, inside
from prepretrain.losses.depth import of_depths
from prepretrain.models.dense.depth import ToDepth
from prepretrain.models.model import Model
from prepretrain.reports import features


def test_errors_of_depths_are_those_of_closed_forms():
    truth = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert errors(truth, truth) == (0.0, 0.0, 1.0)
    rmse, relative, near = errors(truth, 1.2 * truth)
    assert relative == pytest.approx(0.2) and near == 1.0
    assert rmse == pytest.approx(0.2 * math.sqrt((1 + 4 + 16 + 64) / 4))
    assert errors(truth, 1.25 * truth)[2] == 0.0  # below, not at
    assert errors(truth, truth / 1.26)[2] == 0.0
    assert errors(truth, truth + torch.tensor([1.0, 0, 0, 0]))[:2] == (0.5, 0.25)


def test_the_part_that_is_measured_is_that_of_each_protocol():
    assert inside("all", (4, 5)).all()
    nyu = inside("nyu", (480, 640))
    assert nyu.sum() == (471 - 45) * (601 - 41) and nyu[45, 41] and not nyu[44, 41]
    garg, eigen = (inside(region, (375, 1242)) for region in ("garg", "eigen"))
    assert garg.nonzero().amin(0).tolist() == [153, 44]
    assert garg.nonzero().amax(0).tolist() == [370, 1196]
    assert eigen.nonzero().amin(0).tolist() == [124, 44]
    with pytest.raises(ValueError, match="'nyu' is of 480 x 640 pixels, not 100 x 200"):
        inside("nyu", (100, 200))


def test_pictures_are_cut_to_kittis_benchmark_with_their_maps():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (375, 1242, 3)).astype("uint8")
    depth = rng.uniform(1, 80, (375, 1242)).astype("float32")
    sample = {"image": png(pixels), "depth": depth, "random": Random(0, 0, 0)}
    row = Scaled("depth", short=352, canvas=(352, 352), cut=(352, 1216))(sample)
    assert torch.equal(row["depth"].tensor, torch.from_numpy(depth[23:, 13:1229].copy()))
    assert torch.equal(
        row["image_0"].tensor.permute(1, 2, 0), torch.from_numpy(pixels[23:, 13:1229].copy())
    )
    part = Jitter("depth", (352, 704), short=352, scale=(1, 1), cut=(352, 1216))(sample)
    columns = np.unique(part["depth"].numpy()[:1])
    assert part["size"].tolist() == [352, 704] and np.isin(columns, depth[23, 13:1229]).all()
    assert Fitted("depth", (88, 304), (352, 1216))(sample)["size"].tolist() == [88, 304]
    with pytest.raises(BadImage, match="1242 x 375 pixels, of which 1216 x 400 are to be cut out"):
        pair(sample, "depth", (400, 1216))


def test_the_loss_is_that_of_a_ratio_and_leaves_out_what_is_not_known():
    truth = torch.tensor([[1.0, 2.0, 0.0], [4.0, 8.0, 0.0]])[None].repeat(3, 1, 1)
    said = truth.clone() + 5 * (truth == 0)
    said[1] *= 2  # another scale: only its mean counts
    said[2, 0, 0] *= 3
    found = of_depths(said[:, None], truth)
    spread = torch.tensor([3.0, 1, 1, 1]).log()
    expected = (spread.var() + 0.15 * spread.mean() ** 2).sqrt()
    assert found[0] < 1e-5 and found[1] == pytest.approx(math.sqrt(0.15) * math.log(2), rel=1e-5)
    assert found[2] == pytest.approx(float(expected), rel=1e-5)
    assert of_depths(said[:1, None].requires_grad_(), torch.zeros(1, 2, 3)).isfinite()


@pytest.mark.parametrize("bins", [0, 16])
def test_depths_lie_within_their_range(bins):
    part = ToDepth(4, bins, (0.5, 10.0))
    maps = 30 * torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    found = part(maps)
    assert found.shape == (2, 1, 3, 5) and found.min() >= 0.5 and found.max() <= 10
    if bins:
        with torch.no_grad():
            part.values.weight.zero_(), part.values.bias.fill_(-1)
            part.values.bias[3] = 1e6
        assert torch.allclose(part(maps), torch.tensor(0.5 + 9.5 * 3 / 15), atol=1e-3)


def card_of_rooms(folder: Path, count: int = 6) -> None:
    """A card `rooms` of pictures that are the darker, the farther they are; millimetres, some unknown."""
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = 40 + i, 56 - i
        metres = 1 + 7 * np.linspace(0, 1, width)[None].repeat(height, 0)
        metres = metres if i % 2 else metres[:, ::-1]
        shade = (255 - 28 * metres + rng.normal(size=metres.shape)).clip(0, 255)
        saved(folder / f"data/rooms/images/{i}.png", shade[..., None].repeat(3, 2).astype("uint8"))
        stored = (1000 * metres).astype("uint16")
        stored[:3] = 0
        saved(folder / f"data/rooms/depths/{i}.png", stored)
    split = "{source: depth_maps, path: rooms/images, maps: rooms/depths}"
    said = f"values: {{scale: 0.001, range: [0.5, 10]}}\ntrain: {split}\nval: {split}\n"
    (folder / "datasets/rooms.yaml").write_text(said)


RUN = [
    "objective={name: depth, freeze: true}",
    "data.train=rooms",
    "model={depth: 4, final_norm: true, positions: learned}",
    "optim={lr: 2.0, schedule: poly, power: 0.9, warmup: 2it}",
    "batch_size=4",
    "length=20it",
    "checkpoint.every=10it",
    "evaluators=[{name: depth, every: 50%, pictures: 2, cap: [0.5, 10], flip: true}]",
]


@pytest.mark.parametrize(
    "head",
    [
        "{name: linear_depth, range: [0.5, 10], bins: 32, layers: [2, 4]}",
        "{name: dpt_depth, range: [0.5, 10], bins: 0, channels: 8, widths: [4, 4, 8, 8]}",
    ],
)
def test_depth_on_frozen_features_is_learnt_and_measured_and_resumes(place, group, head):
    card_of_rooms(place)
    train("runs/mae", "length=3it", "model.depth=4")
    train("runs/depth", *RUN, f"model.head={head}", init="runs/mae:encoder")
    losses = [row["loss"] for row in rows("runs/depth") if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    model = prepretrain.load("runs/depth")
    before = prepretrain.load("runs/mae").state_dict()
    kept = {name: value for name, value in model.state_dict().items() if name in before}
    assert kept and all(torch.equal(value, before[name]) for name, value in kept.items())
    found = json.loads(Path("runs/depth/results.json").read_text())["depth/rooms"]
    assert 0 < found["AbsRel"] < 1 and 0 < found["delta1"] <= 100 and found["measured"] == 6
    (sheet,) = Path("runs/depth/predictions").glob("*/sheet.png")
    assert Image.open(sheet).width > 3 * 320
    alone = prepretrain.evaluate(
        model, "depth", data="rooms", pictures=0, cap=[0.5, 10], flip=True, feature_batch=1
    )
    assert alone == pytest.approx(found, rel=1e-4)
    how = {"data": "rooms", "cap": [0.5, 10], "flip": True, "pictures": 1}
    cut = prepretrain.evaluate(model, "depth", **how, cut=[24, 32])
    assert cut["measured"] == 6 and cut["AbsRel"] != found["AbsRel"]
    with pytest.raises(ValueError, match="no depth of val lies within depth.cap"):
        prepretrain.evaluate(model, "depth", data="rooms", pictures=0, cap=[20, 30])
    with pytest.raises(ValueError, match="this model says no depths"):
        build("depth", cache=False, data="rooms").check(prepretrain.load("runs/mae"))


def png(pixels: np.ndarray) -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=0)
    return file.getvalue()


def _neighbours(rank: int, folder: str) -> None:
    distributed.init()
    found = neighbours()
    Path(folder, f"found_{rank}.json").write_text(json.dumps(found))
    distributed.shutdown()


def neighbours() -> dict[str, float]:
    torch.manual_seed(0)
    model = Model(encoder="vit_test8")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else None
    return prepretrain.evaluate(
        model.eval(), "segmentation_knn", data="sides", k=3, layer=1, feature_batch=2, pictures=1
    )


def test_the_classes_of_the_nearest_patches_are_known_without_training(place):
    card_of_sides(place)
    distributed.init()
    found = neighbours()
    distributed.shutdown()
    assert found["mIoU"] > 75 and found["images"] == 6 and found["patches"] > 60
    processes(2, _neighbours, str(place))
    assert json.loads((place / "found_1.json").read_text()) == found


def test_the_evaluator_of_patches_is_due_in_a_pretraining(place, group):
    card_of_sides(place)
    monitor = "evaluators=[{name: segmentation_knn, data: sides, every: 50%, k: 3}]"
    train("runs/watched", "length=4it", monitor)
    train("runs/plain", "length=4it")
    measured = [row for row in rows("runs/watched") if "segmentation_knn/sides/mIoU" in row]
    assert [row["step"] for row in measured] == [2, 4]
    losses = [
        [row["loss"] for row in rows(run) if "loss" in row]
        for run in ("runs/watched", "runs/plain")
    ]
    assert losses[0] == losses[1]
    features.colour(["runs/plain", "runs/watched"], "sides", 3, "drawn.png", ["a", "b"], size=48)
    assert Image.open("drawn.png").width > 100
    with pytest.raises(ValueError, match="--images: 9 does not fit; 'sides' has 6 images"):
        features.colour(["runs/plain"], "sides", 9, "drawn.png")


def test_features_are_drawn_by_their_three_main_directions_and_depths_by_colours():
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(2, 3, 8, 8, generator=generator) * torch.tensor([9.0, 5, 2])[:, None, None]
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0][:, :3]
    maps = torch.einsum("nchw,dc->ndhw", shown, turn) + 4
    colours = principal_colours(maps).float()
    assert colours.shape == (2, 3, 8, 8) and colours.min() == 0 and colours.max() == 255
    for channel in range(3):
        pair = torch.stack([colours[:, channel].flatten(), shown[:, channel].flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) > 0.9
    depths = torch.tensor([[1.0, 10.0], [0.0, 5.0]])
    red, _, blue = heights(depths, 1.0, 10.0, side=2).int()
    assert blue[0, 0] > red[0, 0] and red[0, 1] > blue[0, 1] and red[1, 0] == blue[1, 0] == 0
