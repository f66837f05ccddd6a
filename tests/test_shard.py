"""Exceptions of mixed precision: what is named computes in float32, and all else in bf16."""

import shutil

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from prepretrain.distributed import shard
from prepretrain.models.model import Model
from prepretrain.objectives.mae import MAE
from prepretrain.runs.launch import launch


def step(
    names: list[str], depth: int = 2, **how
) -> tuple[float, dict[str, torch.dtype], dict[str, torch.Tensor], int]:
    """A step of MAE in bf16: loss, in what each norm and layer of the encoder computes, gradients, and
    into how many pieces it is sharded."""
    with torch.device("meta"):
        model = Model(encoder="vit_test8", positions="fixed", depth=depth)
        objective = MAE(model, decoder_depth=depth - 1, decoder_width=32, decoder_heads=2)
    shard.keep_float32(objective, names)
    shard.shard(objective, **how)
    shard.initialise(objective, 0)
    seen = {}

    def look(name: str):
        def note(module, given, output):
            weight = module.weight.dtype
            assert given[0].dtype == weight
            seen[name] = weight

        return note

    for name, module in model.encoder.named_modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.Linear)):
            module.register_forward_hook(look(shard.plain(name)))
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = {k: torch.rand(v.shape) for k, v in objective.example(4).items()} | {"image": pictures}
    loss = objective(batch)["loss"]
    loss.backward()
    gradients = {
        shard.plain(name): p.grad.full_tensor()
        for name, p in objective.named_parameters()
        if p.grad is not None
    }
    pieces = sum(isinstance(m, FSDPModule) for m in objective.modules())
    return loss.item(), seen, gradients, pieces


@pytest.mark.parametrize(
    "names, exact, more",
    [
        ([], "", 0),
        (["*.norm*"], "norm", 8),  # four in the blocks, one after them, and three of the decoder
        (["model.encoder"], "", 0),
        (["model.encoder.blocks.1"], "blocks.1.", 0),
        (["model.encoder.blocks.1", "*.blocks.1.norm1"], "blocks.1.", 0),
    ],
)
def test_what_is_named_computes_in_float32_and_gives_bf16_back(group, names, exact, more):
    torch.manual_seed(0)
    _, seen, gradients, pieces = step(names)
    expected = {
        name: torch.float32
        if names == ["model.encoder"] or exact and exact in name
        else torch.bfloat16
        for name in seen
    }
    assert seen == expected and len(seen) == 2 * 6 + 1
    assert pieces == 5 + more  # encoder, decoder and their three blocks
    torch.manual_seed(0)
    plain = step([], precision="fp32")[2]
    for name, gradient in gradients.items():
        # bf16 has 8 bits; a gradient that never came back from an exception would be none at all
        assert (gradient - plain[name]).norm() <= 0.1 * plain[name].norm(), name


HOW = [{"recompute": "block"}, {"recompute": "offload"}]
if shutil.which("g++"):
    HOW.append({"compile": True})


@pytest.mark.parametrize("how", HOW, ids=str)
def test_exceptions_go_with_recomputation_and_compilation(group, how):
    torch.manual_seed(0)
    loss, _, gradients, _ = step(["*.norm1"], depth=1)
    torch.manual_seed(0)
    other, _, others, _ = step(["*.norm1"], depth=1, **how)
    assert other == pytest.approx(loss, rel=1e-3)
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() <= 0.02 * gradient.norm(), name


def test_a_name_that_nothing_has_is_an_error_before_the_run_starts(place):
    with pytest.raises(
        ValueError, match=r"shard.float32: no part is called '\*.nrm'.*encoder.norm"
    ):
        launch("small.yaml", ["shard.float32=['*.nrm']"], dry_run=True)
