"""Parameter-efficient tuning: small trained parts beside the frozen layers of a ViT.

An adapter is a child of a layer, `adapter`, and acts through the layer's hooks: the frozen parameters
keep their names, and blocks are sharded with their adapters as ever. B images, N tokens, D channels.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prepretrain import plugin
from prepretrain.models.encoders.base import Encoder
from prepretrain.models.encoders.vit import ViT


class Prompts(nn.Module):
    """Trained tokens that stand between the class token and the patches (VPT, arXiv 2203.12119).
    P D parameters."""

    def __init__(self, encoder: ViT, *, tokens: int = 5):
        """tokens: P."""
        super().__init__()
        _positive("tokens", tokens)
        self.tokens = nn.Parameter(torch.empty(1, tokens, encoder.width))
        self.limit = math.sqrt(6 / (3 * encoder.patch**2 + encoder.width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, 1 + N, D] to [B, 1 + P + N, D]."""
        prompts = self.tokens.to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """Uniform, in the limits that Xavier's rule gives the projection of patches (VPT's code)."""
        tensor.uniform_(-self.limit, self.limit, generator=generator)
        return True


class VPT(Prompts):
    """Prompts before the first block; what becomes of them is dropped at the end."""

    @classmethod
    def put(cls, encoder: ViT, **options: Any) -> None:
        """Puts it on an encoder."""
        first = encoder.blocks[0]
        first.adapter = cls(encoder, **options)
        first.register_forward_pre_hook(_insert)
        encoder.register_forward_hook(partial(_drop, first.adapter.tokens.shape[1]))


class DeepVPT(Prompts):
    """Prompts of its own for each block, which are dropped after it. L P D parameters in L blocks."""

    @classmethod
    def put(cls, encoder: ViT, **options: Any) -> None:
        """Puts it on an encoder."""
        for block in encoder.blocks:
            block.adapter = cls(encoder, **options)
            block.register_forward_pre_hook(_insert)
            block.register_forward_hook(partial(_drop, block.adapter.tokens.shape[1]))


class LoRA(nn.Module):
    """A low-rank change of the maps to queries and values (arXiv 2106.09685).

    W + alpha / r B A, with B = 0 at first: the adapted model starts as the frozen one. 4 r D
    parameters a block.
    """

    def __init__(
        self,
        encoder: ViT,
        *,
        rank: int = 4,  # not from the paper
        alpha: float = 4.0,  # not from the paper
    ):
        """rank: r."""
        super().__init__()
        _positive("rank", rank)
        _positive("alpha", alpha)
        self.scale = alpha / rank
        self.q_down, self.v_down = (nn.Linear(encoder.width, rank, bias=False) for _ in "qv")
        self.q_up, self.v_up = (nn.Linear(rank, encoder.width, bias=False) for _ in "qv")

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to what is added to queries, keys and values, [B, N, 3 D]."""
        q, v = self.q_up(self.q_down(tokens)), self.v_up(self.v_down(tokens))
        return self.scale * torch.cat([q, torch.zeros_like(q), v], -1)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """B zero, A uniform within 1 / sqrt(D) (its released code; the paper says Gaussian)."""
        return _start_without_effect(name, tensor, generator)

    @classmethod
    def put(cls, encoder: ViT, **options: Any) -> None:
        """Puts it on an encoder."""
        _beside((block.attn.qkv for block in encoder.blocks), lambda: cls(encoder, **options))


class AdaptFormer(nn.Module):
    """A bottleneck beside each MLP, s Up(ReLU(Down(x))) (arXiv 2205.13535).

    Up is zero at first. It reads what the MLP reads, tokens after the norm; the released code
    reads them before it. 2 D m + D + m
    parameters a block.
    """

    def __init__(self, encoder: ViT, *, width: int = 64, scale: float = 0.1):
        """width: m, channels of the bottleneck. scale: s. Both as in its released code."""
        super().__init__()
        _positive("width", width)
        _positive("scale", scale)
        self.scale = scale
        self.down, self.up = nn.Linear(encoder.width, width), nn.Linear(width, encoder.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to what is added to the MLP's output, [B, N, D]."""
        return self.scale * self.up(self.down(tokens).relu())

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """As LoRA's, biases zero (its released code)."""
        return _start_without_effect(name, tensor, generator)

    @classmethod
    def put(cls, encoder: ViT, **options: Any) -> None:
        """Puts it on an encoder."""
        _beside((block.mlp for block in encoder.blocks), lambda: cls(encoder, **options))


ADAPTERS = {"vpt": VPT, "vpt_deep": DeepVPT, "lora": LoRA, "adaptformer": AdaptFormer}


def adapt(encoder: Encoder, method: str, options: dict[str, Any]) -> None:
    """Freezes an encoder and puts an adapter on it, in place; `encoder(image)` works as before.

    options: those of the adapter's class. Raises ValueError for an
    unknown method or option, or an encoder that is no ViT.
    """
    asked = check(encoder, method, options)
    encoder.requires_grad_(False)
    ADAPTERS[method].put(encoder, **asked)


def check(encoder: Encoder, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options as their types; raises ValueError as `adapt` does, but for values that do not fit."""
    if method not in ADAPTERS:
        raise ValueError(plugin.unknown("no adapter", method, sorted(ADAPTERS), quote=True))
    if not isinstance(encoder, ViT):
        raise ValueError(
            f"{method}: adapts the blocks of a ViT, and model.encoder is a {type(encoder).__name__}. "
            f"Take one of the ViT sizes, as vit_b16, or tune a linear classifier alone."
        )
    if encoder.window is not None and issubclass(ADAPTERS[method], Prompts):
        raise ValueError(
            f"{method}: its tokens would be in no window (model.window={encoder.window}). Take lora or "
            f"adaptformer; or the same weights as a plain ViT, with model.window=null."
        )
    return plugin.check(ADAPTERS[method], options, "adapter")


def _beside(layers: Iterable[nn.Module], make: Any) -> None:
    for layer in layers:
        layer.adapter = make()
        layer.register_forward_hook(_add)


def _add(layer: nn.Module, given: tuple, out: Tensor) -> Tensor:
    return out + layer.adapter(given[0])


def _insert(block: nn.Module, given: tuple) -> tuple:
    return (block.adapter(given[0]), *given[1:])


def _drop(count: int, layer: nn.Module, given: tuple, tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, :1], tokens[:, 1 + count :]], 1)


def _start_without_effect(name: str, tensor: Tensor, generator: torch.Generator) -> bool:
    if "down" in name and tensor.ndim == 2:
        tensor.uniform_(-1, 1, generator=generator).mul_(tensor.shape[1] ** -0.5)
    else:
        tensor.zero_()
    return True


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"adapter.{name}: {value} must be above 0.")
