"""Exceptions of mixed precision: what is named computes in float32, and all else in bf16."""

import shutil

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.models.model import Model
from prepretrain.objectives.mae import MAE
from prepretrain.runs.launch import launch


def build(names: list[str], depth: int = 2) -> MAE:
    """An MAE on the meta device, with what is named in float32."""
    with torch.device("meta"):
        model = Model(encoder="vit_test8", positions="fixed", depth=depth)
        objective = MAE(model, decoder_depth=depth - 1, decoder_width=32, decoder_heads=2)
    shard.keep_float32(objective, names)
    return objective


def step(
    names: list[str], depth: int = 2, **how
) -> tuple[float, dict[str, torch.dtype], dict[str, torch.Tensor], int]:
    """A step of MAE in bf16: loss, in what each norm and layer of the encoder computes, and
    gradients."""
    objective = build(names, depth)
    model = objective.model
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
        shard.plain(name): distributed.whole(p.grad)
        for name, p in objective.named_parameters()
        if p.grad is not None
    }
    return loss.item(), seen, gradients


@pytest.mark.parametrize(
    "names, exact",
    [
        ([], ""),
        (["*.norm*"], "norm"),
        (["model.encoder"], ""),
        (["model.encoder.blocks.1"], "blocks.1."),
        (["model.encoder.blocks.1", "*.blocks.1.norm1"], "blocks.1."),
    ],
)
def test_what_is_named_computes_in_float32_and_gives_bf16_back(group, names, exact):
    torch.manual_seed(0)
    _, seen, gradients = step(names)
    expected = {
        name: torch.float32
        if names == ["model.encoder"] or exact and exact in name
        else torch.bfloat16
        for name in seen
    }
    assert seen == expected and len(seen) == 2 * 6 + 1
    torch.manual_seed(0)
    plain = step([], precision="fp32")[2]
    for name, gradient in gradients.items():
        # bf16 has 8 bits; a gradient that never came back from an exception would be none at all
        assert (gradient - plain[name]).norm() <= 0.1 * plain[name].norm(), name


@pytest.mark.parametrize(
    "world, names, units",
    [
        (2, [], 5),  # encoder, decoder and their three blocks
        (2, ["*.norm*"], 13),  # four norms in the blocks, one after them, and three of the decoder
        (2, ["model.encoder"], 5),
        (1, ["*.norm*"], 0),  # one process has nothing to share
    ],
)
def test_each_block_and_each_exception_is_gathered_by_itself(world, names, units):
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        objective = build(names)
        shard.wrap(objective)
        assert sum(isinstance(m, FSDPModule) for m in objective.modules()) == units
    finally:
        dist.destroy_process_group()


def test_one_process_in_bf16_keeps_its_parameters_and_gradients_in_float32(group):
    objective = build([])
    names = list(objective.state_dict())
    shard.shard(objective, precision="bf16")
    shard.initialise(objective, 0)
    batch = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in objective.example(2).items()}
    objective(batch)["loss"].backward()
    assert list(objective.state_dict()) == names
    for parameter in objective.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    assert objective.model.encoder.norm.weight.dtype == torch.bfloat16  # what a forward pass reads


HOW = [{"recompute": "block"}, {"recompute": "offload"}]
if shutil.which("g++"):
    HOW.append({"compile": True})


@pytest.mark.parametrize("how", HOW, ids=str)
def test_exceptions_go_with_recomputation_and_compilation(group, how):
    torch.manual_seed(0)
    loss, _, gradients = step(["*.norm1"], depth=1)
    torch.manual_seed(0)
    other, _, others = step(["*.norm1"], depth=1, **how)
    assert other == pytest.approx(loss, rel=1e-3)
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() <= 0.02 * gradient.norm(), name


def test_a_name_that_nothing_has_is_an_error_before_the_run_starts(place):
    with pytest.raises(
        ValueError, match=r"shard.float32: no part is called '\*.nrm'.*encoder.norm"
    ):
        launch("small.yaml", ["shard.float32=['*.nrm']"], dry_run=True)


def test_a_buffer_that_no_checkpoint_holds_and_nothing_fills_is_an_error():
    class Table(nn.Module):
        """A buffer that only its constructor fills."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.register_buffer("numbers", torch.arange(3), persistent=False)

    class Filled(Table):
        """One that is filled again."""

        def init_non_persistent_buffers(self) -> None:
            self.numbers.copy_(torch.arange(3))

    for made, fits in ((Filled(), True), (Table(), False)):
        whole = nn.Sequential(made).to_empty(device="cpu")
        if fits:
            shard.fill_buffers(whole)
            assert made.numbers.tolist() == [0, 1, 2]
            continue
        with pytest.raises(ValueError, match="0.numbers: no checkpoint holds this buffer"):
            shard.fill_buffers(whole)
