"""What an average of the weights costs a step: its own arithmetic, and nothing where nothing is
measured."""

import torch
from torch.distributed.fsdp import FSDPModule

from prepretrain.distributed import shard
from prepretrain.models.model import Model
from prepretrain.runs.launch import launch
from prepretrain.training import optim

EMA = ["optim.ema=0.9", "evaluators=[{name: knn, data: colours, every: 6it, pool: mean, k: 3}]"]


def test_weights_change_places_with_their_average_only_where_something_is_measured(
    place, monkeypatch
):
    swaps = []
    swap = optim._swap
    monkeypatch.setattr(optim, "_swap", lambda *given: (swaps.append(1), swap(*given)))
    launch("small.yaml", [*EMA, "checkpoint.every=12it"])
    # there and back at steps 6 and 12, and for the export at the end
    assert len(swaps) == 6


def test_an_average_is_that_of_each_parameter_alone(group):
    model = Model(encoder="vit_test8")
    shard.initialise(model, 0)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    objective = torch.nn.ModuleDict({"model": model})
    optimizer = optim.build(objective, lr=1e-2, weight_decay=0.05, ema=0.9)
    expected = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        weight = 1 - min(0.9, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            if step == 1:
                expected[name] = parameter.detach().clone()
            expected[name].lerp_(parameter.detach(), weight)
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["average"], expected[name]), name
