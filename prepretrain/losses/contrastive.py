"""The losses that compare every image with every caption of a batch, over all processes.

B images and captions of a process, G = B x processes of the batch, J channels of the shared space.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prepretrain.distributed import group as distributed


def softmax_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """InfoNCE both ways (CLIP, arXiv 2103.00020, figure 3) of this process's rows, and the share of
    images whose caption is the likeliest of all.

    image, text: [B, J] of length 1; the mean over processes is the loss of the whole batch, and so
    are its gradients. Each process computes only its rows, [B, G], `chunk` of them at a time in the
    forward and in the backward pass, so memory grows with chunk x G. The bias cancels.
    """
    images, texts, first = _all(image, text)
    there, hits = _by_chunks(_cross_entropy, image, texts, (scale,), first, chunk)
    back, _ = _by_chunks(_cross_entropy, text, images, (scale,), first, chunk)
    return (there + back) / (2 * len(image)), hits / len(image)


def sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """SigLIP's loss (arXiv 2303.15343, equation 1): each pair alone is a match or is none.

    Arguments and results as those of `softmax_loss`.
    """
    _, texts, first = _all(image, text)
    loss, hits = _by_chunks(_log_sigmoid, image, texts, (scale, bias), first, chunk)
    return loss / len(image), hits / len(image)


LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
BIASED = ("sigmoid",)  # those that use a learned bias


def _all(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, int]:
    """The features [G, J] of all processes, and the place of this one's first row."""
    both = distributed.all_rows(torch.cat([image, text], 1))  # one exchange, not two
    images, texts = both.chunk(2, 1)
    return images, texts, 0 if len(both) == len(image) else distributed.rank() * len(image)


def _by_chunks(
    one: Callable, rows: Tensor, columns: Tensor, learned: tuple, first: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """The sums over rows of a loss and of its hits; past one chunk, each is computed again in the
    backward pass instead of being kept."""
    size = len(rows) if chunk is None else chunk
    if size >= len(rows):
        return one(rows, columns, first, *learned)
    loss, hits = rows.new_zeros(()), rows.new_zeros(())
    for start in range(0, len(rows), size):
        part = (rows[start : start + size], columns, first + start, *learned)
        found = checkpoint(one, *part, use_reentrant=False, preserve_rng_state=False)
        loss, hits = loss + found[0], hits + found[1]
    return loss, hits


def _cross_entropy(
    rows: Tensor, columns: Tensor, first: int, scale: Tensor
) -> tuple[Tensor, Tensor]:
    logits = scale * rows @ columns.T
    match = first + torch.arange(len(rows), device=rows.device)
    return F.cross_entropy(logits, match, reduction="sum"), _hits(logits, match)


def _log_sigmoid(
    rows: Tensor, columns: Tensor, first: int, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    logits = scale * rows @ columns.T + bias
    match = first + torch.arange(len(rows), device=rows.device)
    sign = torch.full_like(logits, -1.0).scatter(1, match[:, None], 1.0)
    return -F.logsigmoid(sign * logits).sum(), _hits(logits, match)


def _hits(logits: Tensor, match: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == match).sum().to(logits.dtype)
