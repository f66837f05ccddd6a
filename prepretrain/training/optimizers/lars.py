"""LARS: SGD whose rate follows the norm of each parameter (arXiv 1708.03888)."""

import timm.optim

from prepretrain.training.optimizers.base import Groups, Optimizer


class LARS(Optimizer, timm.optim.Lars):
    """timm's LARS. It adapts the rate only of parameters with weight decay, so not of biases and
    norms; with optim.weight_decay=0 it needs always_adapt."""

    state_tensors = 1

    def __init__(
        self,
        groups: Groups,
        *,
        momentum: float = 0.9,
        trust_coeff: float = 0.001,
        always_adapt: bool = False,
    ):
        """trust_coeff: the rate's share of |parameter| / |gradient|. always_adapt: also adapts the
        rate of parameters without weight decay."""
        if momentum <= 0:
            raise ValueError(f"momentum {momentum} must be more than 0.")
        given = {"momentum": momentum, "trust_coeff": trust_coeff, "always_adapt": always_adapt}
        super().__init__(groups, **given)
