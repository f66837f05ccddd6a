"""What a model with a dense head says of a whole picture, window by window, mirrored and at several
scales."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# normalised [n, 3, *window], padded at the right and below with zeros, to values [n, C, *window]
Network = Callable[[Tensor], Tensor]


def slide(
    network: Network, image: Tensor, window: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """Normalised [3, H, W] to values [C, H, W], the mean of the windows that see a pixel.

    Windows at the border are moved back inside; an image that is smaller than a window is padded.
    """
    places = list(_places(image.shape[-2:], window, stride))
    values = network(torch.stack([_cut(image, place, window) for place in places]))
    total = values.new_zeros(values.shape[1], *image.shape[-2:])
    seen = values.new_zeros(image.shape[-2:])
    for found, (top, left) in zip(values, places):
        area = slice(top, top + window[0]), slice(left, left + window[1])
        height, width = seen[area].shape
        total[(slice(None), *area)] += found[:, :height, :width]
        seen[area] += 1
    return total / seen


def _places(
    size: torch.Size, window: tuple[int, int], stride: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """(top, left) of each window."""
    firsts = [
        [min(step * by, max(0, side - seen)) for step in range(-(-max(0, side - seen) // by) + 1)]
        for side, seen, by in zip(size, window, stride)
    ]
    yield from ((top, left) for top in firsts[0] for left in firsts[1])


def _cut(image: Tensor, place: tuple[int, int], window: tuple[int, int]) -> Tensor:
    (top, left), (height, width) = place, window
    part = image[:, top : top + height, left : left + width]
    return F.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2]))


def mean_of_views(
    predict: Callable[[Tensor], Tensor],
    images: list[Tensor],
    size: tuple[int, int],
    flip: bool,
    squash: Callable[[Tensor], Tensor],
) -> Tensor:
    """Values [C, *size]: the mean of what is said of an image at several scales, with `flip` also
    mirrored, each resized to `size`; `squash` makes of each what a mean is taken of."""
    views = []
    for image in images:
        views.append(predict(image))
        if flip:
            views.append(predict(image.flip(-1)).flip(-1))
    return sum(squash(F.interpolate(one[None], size, mode="bilinear")[0]) for one in views) / len(
        views
    )
