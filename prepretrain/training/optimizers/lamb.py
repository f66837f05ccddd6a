"""LAMB: Adam whose rate follows the norm of each parameter (arXiv 1904.00962)."""

import timm.optim

from prepretrain.training.optimizers.base import Groups, Optimizer


class LAMB(Optimizer, timm.optim.Lamb):
    """timm's LAMB. It adapts the rate only of parameters with weight decay, so not of biases and
    norms; with optim.weight_decay=0 it needs always_adapt."""

    state_tensors = 2

    def __init__(
        self,
        groups: Groups,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        always_adapt: bool = False,
    ):
        """betas: decay of the averages of the gradient and of its square. always_adapt: also adapts
        the rate of parameters without weight decay."""
        given = {"betas": betas, "eps": eps, "always_adapt": always_adapt}
        super().__init__(groups, **given, max_grad_norm=None)  # the loop clips: optim.clip
