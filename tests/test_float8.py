"""shard.precision=fp8: products of blocks' linear layers in 8 bits, emulated on the CPU."""

import json
import shutil
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from conftest import processes
from torch import nn

from prepretrain import config
from prepretrain.distributed import float8, shard
from prepretrain.distributed import group as distributed
from prepretrain.models.model import Model
from prepretrain.objectives.mae import MAE
from prepretrain.runs.launch import launch
from prepretrain.runs.plan import Plan

pytest.importorskip("torchao")


def build(depth: int = 2, width: int = 32) -> MAE:
    """An MAE on the meta device."""
    with torch.device("meta"):
        model = Model(encoder="vit_test8", positions="fixed", depth=depth, width=width)
        return MAE(model, decoder_depth=1, decoder_width=32, decoder_heads=2)


def step(float32: tuple[str, ...] = (), **how) -> tuple[MAE, float]:
    """An MAE after a forward and backward pass, and its loss."""
    objective = build()
    shard.keep_float32(objective, float32)
    shard.shard(objective, **how)
    shard.initialise(objective, 0)
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = {k: torch.rand(v.shape) for k, v in objective.example(4).items()} | {"image": pictures}
    loss = objective(batch)["loss"]
    loss.backward()
    return objective, loss.item()


def gradients(objective: MAE) -> dict[str, torch.Tensor]:
    return {
        shard.plain(name): distributed.whole(p.grad)
        for name, p in objective.named_parameters()
        if p.grad is not None
    }


def test_blocks_multiply_in_8_bits_and_their_weights_are_what_they_were(group):
    objective, loss = step(precision="fp8")
    other, exact = step(precision="bf16")
    layers = [m for m in objective.modules() if isinstance(m, nn.Linear)]
    in_blocks = 3 * 4  # not the decoder's ends
    assert sum("Float8" in type(m).__name__ for m in layers) == in_blocks
    assert list(objective.state_dict()) == list(other.state_dict())
    assert all(p.dtype == torch.float32 for p in objective.parameters())
    assert loss != exact and loss == pytest.approx(exact, rel=0.01)
    found, expected = gradients(objective), gradients(other)
    assert list(found) == list(expected)
    for name, gradient in found.items():  # whose numbers went through products of three bits
        assert (gradient - expected[name]).norm() <= 0.3 * expected[name].norm(), name


def test_what_is_named_in_float32_is_not_in_8_bits(group):
    objective, _ = step(("*.mlp",), precision="fp8")
    block = objective.model.encoder.blocks[0]
    assert "Float8" in type(block.attn.qkv).__name__
    assert type(block.mlp.fc1) is nn.Linear and block.mlp.fc1.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "how", [{"recompute": "block"}, {"recompute": "offload"}, {"compile": True}], ids=str
)
def test_recomputation_and_compilation_give_the_same(group, how, monkeypatch):
    eager = partialmethod(nn.Module.compile, backend="eager")  # needs no C++ compiler
    monkeypatch.setattr(nn.Module, "compile", eager)
    objective, loss = step(precision="fp8", **how)
    other, exact = step(precision="fp8")
    assert loss == exact
    expected = gradients(other)
    assert all(torch.equal(g, expected[name]) for name, g in gradients(objective).items())


def test_two_processes_share_what_one_computes(group):
    objective, loss = step(precision="fp8")
    processes(2, compare_shares, loss, gradients(objective))


def compare_shares(rank: int, loss: float, expected: dict[str, torch.Tensor]) -> None:
    """Both processes see the same images, so that the mean of their gradients is one's."""
    distributed.init()
    objective, shared = step(precision="fp8")
    assert shared == loss
    for name, gradient in gradients(objective).items():
        torch.testing.assert_close(gradient, expected[name])
    distributed.shutdown()


def test_a_run_continues_from_a_checkpoint_in_another_precision(place):
    asked = ["length=4it", "checkpoint.every=2it"]
    launch("small.yaml", ["shard.precision=fp8", *asked], out="run")
    shutil.rmtree("run/checkpoints/000000004")
    shutil.rmtree("run/export")
    launch("small.yaml", asked, out="run")
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "continu" in Path("run/log.txt").read_text()


@pytest.mark.parametrize(
    "capability, refused", [((7, 5), True), ((8, 0), True), ((8, 9), False), ((9, 0), False)]
)
def test_a_gpu_without_fp8_is_refused_by_name(capability, refused, monkeypatch):
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Some")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(shard, "wrap", lambda *given, **how: None)
    monkeypatch.setattr(shard, "materialise", lambda *given: None)
    if not refused:
        shard.shard(build(), precision="fp8")
        return
    its = ".".join(map(str, capability))
    with pytest.raises(ValueError, match=f"fp8 needs .* 8.9 or newer .*Some has {its}. Take"):
        shard.shard(build(), precision="fp8")


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["model.width=40"], r"multiples of 16, and attn.qkv is 40 x 120. Take bf16"),
        (
            ["shard.float32=['model.encoder','decoder']"],
            r"layers in blocks, and this model has none",
        ),
    ],
)
def test_layers_that_cannot_are_refused_before_anything_starts(place, wrong, said):
    with pytest.raises(ValueError, match=f"shard.precision: fp8 .*{said}"):
        launch("small.yaml", ["shard.precision=fp8", *wrong], dry_run=True)


def test_a_narrow_encoder_is_a_warning(place):
    said = Plan(config.load("small.yaml", ["shard.precision=fp8"]), 1).warnings()
    assert [
        one
        for one in said
        if "shard.precision: fp8 was slower than bf16 for encoders up to a width of 1280" in one
    ]


def test_layers_of_another_forward_pass_are_left_alone():
    """nn.MultiheadAttention, as open_clip's, reads its projection's weight and never calls it."""
    block = nn.Module()
    block.attn, block.mlp = nn.MultiheadAttention(32, 2), nn.Sequential(nn.Linear(32, 64))
    assert [name for name, _ in float8.layers(block)] == ["mlp.0"]
