"""What every optimizer offers."""

from typing import Any

import torch

from prepretrain.distributed import group as distributed

Groups = list[dict[str, Any]]  # parameter groups, each with "params", "lr" and "weight_decay"


class Optimizer(torch.optim.Optimizer):
    """A torch optimizer that the config can name: `optim.name`.

    One file of this folder holds one subclass. Its constructor takes the parameter groups, which
    bring their rate and weight decay along; its keywords are its options, further keys of `optim`.
    """

    state_tensors: int  # float32 tensors of a parameter's shape that it keeps for each parameter


def here(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """This process's parts of tensors."""
    return [distributed.local(value) for value in values]
