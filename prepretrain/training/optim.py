"""Builds an objective's optimizer: its parameter groups, and a moving average of the weights."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from prepretrain import contracts, plugin
from prepretrain.distributed.shard import find_roots
from prepretrain.training.optimizers.base import Groups, Optimizer, here


def build(
    objective: nn.Module,
    name: str = "adamw",
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    ema: float | None = None,
    **options: Any,
) -> Optimizer:
    """The optimizer `name` over an objective's parts; options: its own.

    lr is the peak that is used, not "per 256 images". ema: the decay of a moving average of the
    parameters, which `averaged` puts in their place.
    """
    parts = groups(objective, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay)
    try:
        optimizer = plugin.build("optimizers", name, parts, **options)
    except ValueError as error:  # torch's own names no key
        raise ValueError(f"optim.name={name}: {error}") from error
    if ema is not None:
        optimizer.register_step_post_hook(partial(_average, decay=ema))
    return optimizer


def groups(
    objective: nn.Module, *, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> Groups:
    """The parameters that are trained, in groups for an optimizer that a Schedule drives.

    No weight decay on 1-d parameters, nor on those that a part names in `no_weight_decay()`: for
    MAE's class and mask token # not from the paper, whose pre-training code decays both.
    layer_decay scales the rate of each layer of a part that has a `group_matcher()`, the encoder,
    by its distance from the head; 1 is none. Raises ValueError if no part says its layers.
    """
    all_groups = []
    roots = find_roots(objective)
    if layer_decay != 1.0 and not any(isinstance(root, contracts.Layered) for root in roots):
        raise ValueError(
            f"optim.layer_decay: {layer_decay} does nothing here: no part of this model says which "
            f"layers it has. Set it to 1, or give the encoder a group_matcher()."
        )
    for root in roots:
        names = root.no_weight_decay() if isinstance(root, contracts.NoWeightDecay) else set()
        if layer_decay != 1.0 and isinstance(root, contracts.Layered):
            all_groups += param_groups_layer_decay(
                _UnderHead(root), weight_decay, no_weight_decay_list=names, layer_decay=layer_decay
            )
        else:
            all_groups += param_groups_weight_decay(root, weight_decay, no_weight_decay_list=names)
    return [
        {
            "params": list(g["params"]),
            "lr": lr,
            "weight_decay": g["weight_decay"],
            "lr_scale": g.get("lr_scale", 1.0),
        }
        for g in all_groups
        if g["params"]
    ]


class _UnderHead:
    """A part with a head above it, from which timm counts the layers: it gives the last layer of
    what it is shown the whole rate, so it must be shown a whole model."""

    def __init__(self, part: contracts.Layered):
        self.part, self.group_matcher = part, part.group_matcher

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.part.named_parameters()
        yield "head", nn.Parameter(torch.empty(0), requires_grad=False)  # in no group itself


def step(optimizer: torch.optim.Optimizer, left_out: Tensor) -> None:
    """Takes an optimizer's step, unless `left_out`, a 1.0 or 0.0 on the device, says not to: then
    neither weights nor what the optimizer keeps change.

    Optimizers that torch calls fused (AdamW) look at it on the device, as with a GradScaler. Gradients
    of 0 would not do: momentum and weight decay move the weights all the same. So any other makes the
    host wait for the answer.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = left_out
        optimizer.step()
        del optimizer.found_inf
    elif not left_out.item():
        optimizer.step()


@torch.no_grad()
def _average(optimizer: torch.optim.Optimizer, *_: Any, decay: float) -> None:
    """Moves each parameter's average towards it. Kept as the optimizer's state, so that it is
    sharded, saved and resumed with it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    left_out = getattr(optimizer, "found_inf", None)  # see `step`
    step = _step(optimizer.state[parameters[0]], parameters[0].device, left_out)
    weight = 1 - ((1 + step) / (10 + step)).clamp(max=decay)  # faster at first # not from the paper
    weight = (weight if left_out is None else weight * (1 - left_out)).float()
    for parameter in parameters:
        state = optimizer.state[parameter]
        if "average" not in state:
            state["average"] = parameter.detach().clone()
    averages = here([optimizer.state[parameter]["average"] for parameter in parameters])
    torch._foreach_lerp_(averages, here(parameters), [weight] * len(averages))


def _step(state: dict[str, Tensor], device: torch.device, left_out: Tensor | None) -> Tensor:
    """The number of steps taken, by the optimizer's own count or, where it keeps none, by ours; on
    the device."""
    if "step" in state:  # AdamW
        return torch.as_tensor(state["step"], dtype=torch.float64, device=device)
    taken = torch.ones((), device=device) if left_out is None else 1 - left_out
    state["averaged"] = state.get("averaged", torch.zeros((), device=device)) + taken
    return state["averaged"].double()


@contextlib.contextmanager
def averaged(objective: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it the parameters are their moving averages, if the optimizer keeps them."""
    _swap(objective, optimizer)
    try:
        yield
    finally:
        _swap(objective, optimizer)


@torch.no_grad()
def _swap(objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    averages = [(p, s) for p, s in optimizer.state.items() if "average" in s]
    for parameter, state in averages:
        now = parameter.detach().clone()
        parameter.copy_(state["average"])
        state["average"].copy_(now)
    if averages:  # what FSDP gathered for the last forward pass is of the other ones
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
