"""SGD with momentum."""

import torch

from prepretrain.training.optimizers.base import Groups, Optimizer


class SGD(Optimizer, torch.optim.SGD):
    """torch's SGD; weight decay is added to the gradient."""

    def __init__(self, groups: Groups, *, momentum: float = 0.9, nesterov: bool = False):
        """momentum: 0 keeps no state."""
        super().__init__(groups, momentum=momentum, nesterov=nesterov)
        self.state_tensors = 1 if momentum else 0
