"""The space that images and texts share."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = math.log(100)  # of the logarithm of the scale (CLIP, section 2.5)


class Joint(nn.Module):
    """The space that images and texts share: a bias-free projection of each tower, and the learned
    scale (and bias) of their products. J channels."""

    precision = "fp32"  # in bf16 a step of the scale's logarithm would be 1.6 %

    def __init__(
        self,
        image_width: int,
        text_width: int,
        *,
        width: int = 512,
        pool: Literal["class", "mean"] = "class",
        bias: bool = False,
    ):
        """width: J. pool: how an image's tokens become one feature. bias: a learned one is added to
        the products, as the sigmoid loss needs (SigLIP, arXiv 2303.15343, section 3.2)."""
        super().__init__()
        self.width, self.pool = width, pool
        self.vision_projection = nn.Parameter(torch.empty(image_width, width))
        self.text_projection = nn.Parameter(torch.empty(text_width, width))
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if bias else None

    def forward(
        self, image: Tensor | None, text: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Pooled features [B, D] and [B, W], either of which may be None, to float32 [B, J] of length
        1, the scale [1], at most 100, and the bias [1], 0 without one."""
        scale = _Ceiling.apply(self.logit_scale.float()).exp()
        bias = torch.zeros_like(scale) if self.logit_bias is None else self.logit_bias.float()
        return (
            None if image is None else _projected(image, self.vision_projection),
            None if text is None else _projected(text, self.text_projection),
            scale,
            bias,
        )

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """Projections N(0, 1 / width of the tower), scale 1 / 0.07 (CLIP, its code and section 2.5);
        with a bias, scale 10 and bias -10 (SigLIP, section 3.2)."""
        if name == "logit_scale":
            tensor.fill_(math.log(1 / 0.07) if self.logit_bias is None else math.log(10))
        elif name == "logit_bias":
            tensor.fill_(-10.0)
        else:
            tensor.normal_(std=tensor.shape[0] ** -0.5, generator=generator)
        return True


def _projected(feature: Tensor, projection: Tensor) -> Tensor:
    return F.normalize(feature.float() @ projection.float(), dim=-1)


class _Ceiling(torch.autograd.Function):
    """The smaller of a value and LARGEST; past it only gradients that lead back get through.

    A plain clamp has none there, so a scale that once stepped over it would never move again.
    """

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        context.save_for_backward(value)
        return value.clamp(max=LARGEST)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (value,) = context.saved_tensors
        return torch.where(value > LARGEST, gradient.clamp(min=0), gradient)
