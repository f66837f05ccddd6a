"""Matrix products of blocks' linear layers in 8-bit floating point, by torchao."""

from collections.abc import Iterator

import torch
from torch import nn

from prepretrain import contracts

LEAST = (8, 9)  # the compute capability of the first GPUs with such products: Ada, Hopper
MULTIPLE = 16  # what their kernels want the sides of a weight to be


def layers(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a block that compute in the run's precision, by name."""
    for name, child in block.named_children():
        if isinstance(child, contracts.Precise) and child.precision != "bf16":
            continue
        if type(child) is nn.Linear:  # others' forward pass may be another
            yield name, child
        for rest, layer in layers(child):
            yield f"{name}.{rest}", layer


def check(blocks: list[nn.Module]) -> None:
    """Raises ValueError where the blocks' layers cannot compute in fp8."""
    found = [one for block in blocks for one in layers(block)]
    if not found:
        raise ValueError(
            "shard.precision: fp8 is for linear layers in blocks, and this model has none. Take bf16."
        )
    for name, layer in found:
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            raise ValueError(
                f"shard.precision: fp8 takes layers whose sides are multiples of {MULTIPLE}, and "
                f"{name} is {layer.in_features} x {layer.out_features}. Take bf16, or a model.width that "
                f"is such a multiple."
            )


def check_gpu(gpu: torch.device) -> None:
    """Raises ValueError for one without fp8."""
    capability = torch.cuda.get_device_capability(gpu)
    if capability < LEAST:
        needed, its = (".".join(map(str, version)) for version in (LEAST, capability))
        raise ValueError(
            f"shard.precision: fp8 needs a GPU of compute capability {needed} or newer (H100, L40S), and "
            f"{torch.cuda.get_device_name(gpu)} has {its}. Take bf16."
        )


def convert(block: nn.Module, emulate: bool) -> None:
    """Lets a block's layers compute in fp8: inputs, weights and gradients of outputs scaled by row.

    Weights keep their names and dtypes. emulate: rounds as a GPU does, and multiplies in float32.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    rowwise = Float8LinearConfig.from_recipe_name("rowwise")
    options = {**vars(rowwise), "emulate": emulate, "pad_inner_dim": True}  # any number of tokens
    chosen = {layer for _, layer in layers(block)}
    convert_to_float8_training(
        block,
        config=Float8LinearConfig(**options),
        module_filter_fn=lambda layer, _: layer in chosen,
    )
