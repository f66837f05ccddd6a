"""Compiles blocks so that all of a depth share their graphs."""

import torch
from torch import Tensor, nn

from prepretrain import contracts

# Blocks that differ (another drop path, training or not, with gradients or not) take a graph each;
# past torch's limit of 8, whole graphs are an error, and other blocks silently stay eager.
GRAPHS = 64


def compile_block(block: nn.Module, fullgraph: bool) -> None:
    """Lets a block's forward pass be compiled when it is first called.

    fullgraph: a part that cannot be compiled is an error. Shapes are not made symbolic where they
    differ (a decoder's blocks are narrower): each gets graphs of its own, which are faster.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for part in list(block.modules()):
        for name, child in part.named_children():
            if isinstance(child, contracts.DropsPaths):
                setattr(part, name, DropPath(child.drop_prob, child.scale_by_keep))
    block.compile(fullgraph=fullgraph, dynamic=False)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382) whose rate is a tensor.

    timm's is a number, which differs from block to block, so each block would be compiled anew.
    """

    def __init__(self, drop_prob: float, scale_by_keep: bool):
        super().__init__()
        self.keep_prob, self.scaled = 1 - drop_prob, scale_by_keep
        self.register_buffer("keep", torch.empty(()), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fills `keep`, after the module was moved from the meta device."""
        self.keep.fill_(self.keep_prob)

    def forward(self, x: Tensor) -> Tensor:
        """[B, …] with whole rows set to 0, the others divided by the share that is kept."""
        if not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < self.keep
        x = x * kept
        return x / self.keep.to(x.dtype) if self.scaled else x
