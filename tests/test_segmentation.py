"""Segmentation: heads, the objective that trains them, and runs."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import processes
from test_maps import furnish, seen
from test_train import rows, train
from torch.utils.flop_counter import FlopCounterMode

import prepretrain
from prepretrain.data.batch import collate
from prepretrain.data.card import load_card
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.models.dense.norms import BatchNorm
from prepretrain.models.model import Model
from prepretrain.objectives.segmentation import Segmentation


def millions(*modules: torch.nn.Module) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def macs(function, *arguments) -> float:
    """Billions of multiply-adds, attention included."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    "encoder, channels, parameters, operations",
    [  # of backbone with its deconvolutions, head, auxiliary head; those of the original code
        ("vit_b16", 768, (93.51, 67.96, 1.81), (121.5, 483.4)),
        ("vit_b16", 512, (93.51, 32.33, 1.81), (121.5, 218.4)),
        ("vit_l16", 1024, (316.74, 120.76, 2.40), (387.8, 858.6)),
        ("vit_l16", 512, (316.74, 34.43, 2.40), (387.8, 221.5)),
    ],
)
def test_upernet_has_the_parameters_and_operations_of_its_authors(
    encoder, channels, parameters, operations
):
    with torch.device("meta"):
        head = {"name": "upernet", "classes": 150, "channels": channels}
        model = Model(encoder=encoder, image_size=512, final_norm=False, head=head).eval()
        image = torch.empty(1, 3, 512, 512)
    head = model.head
    parts = ((model.encoder, head.levels), (head.pyramid, head.scores), (head.helper,))
    assert [millions(*part) for part in parts] == pytest.approx(parameters, abs=0.006)
    shard.fuse_attention(model, False)
    maps = model.read(image)
    levels = macs(head.levels, maps)
    found = macs(model.read, image) + levels, macs(head, maps) - levels
    assert found == pytest.approx(operations, rel=1e-3)


@pytest.mark.parametrize("size, published", [("swinv2_b", 33.32), ("swinv2_l", 36.95)])
def test_upernet_on_the_stages_of_a_swinv2_has_the_published_size(size, published):
    with torch.device("meta"):
        head = {"name": "upernet", "classes": 150}
        options = {"image_size": 640, "window": 20, "any_size": True, "final_norm": False}
        model = Model(encoder=size, **options, head=head)
    assert model.head.layers == (1, 2, 3, 4)
    assert millions(model.head.pyramid, model.head.scores) == pytest.approx(published, abs=0.006)


def _together(rank: int, folder: str) -> None:
    distributed.init()
    _normed(rank, folder)
    os.chdir(folder)
    Path(f"losses_{rank}.json").write_text(json.dumps(losses()))
    distributed.shutdown()


def losses() -> list[float]:
    """Of five steps on four images, over all processes."""
    objective, source = Segmentation(made(dropout=0.0)), load_card("sides").open("train")
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    optimizer, found = torch.optim.AdamW(objective.parameters(), 1e-2), []
    mine = torch.arange(4).tensor_split(distributed.world())[distributed.rank()]
    batch = collate([seen(source, objective.transform(True), i) for i in mine.tolist()])
    for _ in range(5):
        loss = objective(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(distributed.all_sum(loss.detach())) / distributed.world())
    return found


def _normed(rank: int, folder: str) -> None:
    norm, maps, weights = batch(folder)
    mine = maps.tensor_split(distributed.world())[distributed.rank()].requires_grad_()
    share = weights.tensor_split(distributed.world())[distributed.rank()]
    found = norm(mine)
    (found * share).sum().backward()
    grads = [distributed.all_sum(p.grad) for p in (norm.weight, norm.bias)]
    rows = [torch.cat(distributed.all_gather_object(t)) for t in (found.detach(), mine.grad)]
    torch.save([*rows, *grads, norm.running_mean, norm.running_var], f"{folder}/{rank}.pt")


def batch(folder: str) -> tuple[BatchNorm, torch.Tensor, torch.Tensor]:
    """A norm in training, maps of four images, and what their outputs are weighted by."""
    norm, generator = BatchNorm(5), torch.Generator().manual_seed(0)
    norm.init_non_persistent_buffers()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=generator)
        norm.bias.normal_(generator=generator)
    maps = torch.randn(4, 5, 3, 2, generator=generator) * 3 + 1
    return norm, maps, torch.randn(4, 5, 3, 2, generator=generator)


def test_batch_norm_is_torchs_and_that_of_all_processes_images(place, group):
    card_of_sides(place)
    norm, maps, weights = batch(str(place))
    known = torch.nn.BatchNorm2d(5)
    known.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
    inputs = [maps.clone().requires_grad_() for _ in range(2)]
    for module, one in zip((norm, known), inputs):
        (module(one) * weights).sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-5)
    assert torch.allclose(norm.weight.grad, known.weight.grad, atol=1e-5)
    assert torch.allclose(norm.running_var, known.running_var)
    assert torch.allclose(norm.eval()(maps), known.eval()(maps), atol=1e-6)
    expected = [known.train()(maps).detach(), inputs[1].grad, known.weight.grad, known.bias.grad]
    known.running_mean.zero_(), known.running_var.fill_(1)
    known(maps)
    expected += [known.running_mean, known.running_var]
    alone = losses()
    processes(2, _together, str(place))
    for rank in range(2):
        for one, two in zip(torch.load(place / f"{rank}.pt"), expected):
            assert torch.allclose(one, two, atol=1e-5)
        sharded = json.loads(Path(f"losses_{rank}.json").read_text())
        assert sharded == pytest.approx(alone, rel=1e-5)


def test_batch_norm_keeps_its_running_values_where_a_batch_is_not_finite_and_refuses_one_value(
    group,
):
    norm, maps, _ = batch("")
    maps[0, 0, 0, 0] = torch.nan
    norm(maps)
    assert not norm.running_mean.any() and (norm.running_var == 1).all()
    with pytest.raises(ValueError, match="sees one value a channel.*Take at least 2 images"):
        norm(torch.zeros(1, 5, 1, 1))


def made(name: str = "upernet", classes: int = 2, final_norm: bool = False, **head) -> Model:
    """A small segmenter, on the meta device."""
    small = {"channels": 8, "auxiliary_channels": 6} if name == "upernet" else {}
    with torch.device("meta"):
        head = {"name": name, "classes": classes, **small, **head}
        return Model(encoder="vit_test8", depth=4, final_norm=final_norm, head=head)


def card_of_sides(folder: Path, count: int = 6) -> None:
    """A card `sides` of pictures that are dark at the left and bright at the right."""
    furnish(folder / "data/sides", count)
    split = "{source: label_maps, path: sides/images, maps: sides/maps}"
    said = (
        f"classes: [left, right]\nvalues: {{offset: 1, void: [0]}}\ntrain: {split}\nval: {split}\n"
    )
    (folder / "datasets/sides.yaml").write_text(said)


@pytest.mark.parametrize("name", ["upernet", "linear_segmentation"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_segmenter_learns_what_is_bright(place, group, name, precision):
    card_of_sides(place)
    card = load_card("sides")
    source = card.open("train")
    objective = Segmentation(made(name), distort=False)
    objective.check(card, source)
    shard.shard(objective, precision=precision)
    shard.initialise(objective, 0)
    optimizer, first = torch.optim.AdamW(objective.parameters(), 1e-2), None
    batch = collate([seen(source, objective.transform(True), i) for i in range(4)])
    for _ in range(20):
        said = objective(batch)
        said["loss"].backward()
        assert all(p.grad is not None for p in objective.parameters())
        optimizer.step()
        optimizer.zero_grad()
        first = first or float(said["loss"].detach())
    assert float(said["loss"].detach()) < 0.8 * first
    assert ("auxiliary" in said) == (name == "upernet")
    objective.eval()
    each = objective.losses(batch)
    assert each.shape == (4,) and torch.allclose(each.mean(), objective(batch)["loss"])


def test_pixels_without_a_class_teach_nothing_and_other_classes_than_the_cards_are_refused(place):
    card_of_sides(place)
    card = load_card("sides")
    with pytest.raises(ValueError, match="model.head.classes: 3, and the card 'sides' has 2"):
        Segmentation(made(classes=3)).check(card, card.open("train"))
    objective = Segmentation(made("linear_segmentation", final_norm=True), freeze=True)
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    batch = collate([seen(card.open("train"), objective.transform(False), i) for i in range(2)])
    batch["label_map"][:] = 255
    objective(batch)["loss"].backward()
    assert objective(batch)["loss"] == 0
    assert not objective.train().model.encoder.training and objective.model.head.training
    assert all(p.grad is None for p in objective.model.encoder.parameters())
    assert all(not p.grad.any() for p in objective.model.head.parameters())


RUN = [
    "objective={name: segmentation}",
    "data.train=sides",
    "model={depth: 4, final_norm: false, positions: learned, drop_path: 0.1}",
    "model.head={name: upernet, classes: 2, channels: 8, auxiliary_channels: 6}",
    "optim={layer_decay: 0.7, schedule: poly, warmup: 2it}",
    "batch_size=4",
    "length=6it",
    "checkpoint.every=3it",
    "evaluators=[{name: segmentation, every: 50%, pictures: 1}]",
]


def test_a_run_starts_from_stage_one_resumes_bitwise_and_saves_a_segmenter(place, group):
    card_of_sides(place)
    train("runs/mae", "length=4it", "model.depth=4")
    train("runs/tuned", *RUN, init="runs/mae")
    whole = rows("runs/tuned")
    assert {"loss", "scores", "auxiliary"} <= set(whole[0])
    exported = prepretrain.load("runs/tuned").state_dict()
    assert any("running_var" in name for name in exported)
    shutil.rmtree("runs/tuned/checkpoints/000000006")
    shutil.rmtree("runs/tuned/export")
    train("runs/tuned", *RUN, init="runs/mae")
    assert rows("runs/tuned") == whole
    again = prepretrain.load("runs/tuned")
    assert all(torch.equal(again.state_dict()[name], one) for name, one in exported.items())
    measured = json.loads(Path("runs/tuned/results.json").read_text())["segmentation/sides"]
    assert Path("runs/tuned/predictions").exists()
    alone = prepretrain.evaluate(again, "segmentation", data="sides", pictures=0)
    assert alone == measured


def test_blocks_that_an_encoder_has_not_are_refused_before_anything_is_computed():
    for layers, said in [
        ([1, 2, 3, 9], "this encoder has 4 blocks.*layers=null"),
        ([1, 3, 2, 4], "must be different blocks, in rising order"),
        ([2, 4], "must be 4 blocks"),
    ]:
        with pytest.raises(ValueError, match=f"model.head.layers: .*{said}"):
            made(layers=layers)


@pytest.mark.parametrize(
    "name, at", [("upernet", 4), ("linear_segmentation", 32), ("dpt_segmentation", 2)]
)
def test_each_head_reads_the_stages_of_a_hierarchical_encoder_at_any_size(name, at):
    stages = {"depths": [1, 1, 1, 1], "heads": [1, 1, 1, 1], "base_width": 8, "window": 4}
    small = {"channels": 8} if name != "linear_segmentation" else {}
    head = {"name": name, "classes": 3, **small}
    options = {"image_size": 64, "any_size": True, "final_norm": False, **stages}
    with torch.device("meta"):
        model = Model(encoder="swinv2_s", **options, head=head)
    shard.shard(model, precision="fp32")
    shard.initialise(model, 0)
    image = torch.zeros(2, 3, 64, 96)
    assert model.eval().head(model.read(image))[0].shape == (2, 3, 64 // at, 96 // at)
