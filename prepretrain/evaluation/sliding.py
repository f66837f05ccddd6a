"""What a model with a dense head says of a whole picture, window by window, mirrored and at several
scales."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# normalised [B, 3, *window], padded at the right and below with zeros, to values [B, C, *window]
Network = Callable[[Tensor], Tensor]


def slide(
    network: Network,
    image: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int],
    batch_size: int = 1,
) -> Tensor:
    """Normalised [3, H, W] to values [C, H, W], the mean of the windows that see a pixel.

    Windows at the border are moved back inside; an image that is smaller than a window is padded.
    """
    places = list(_places(image.shape[-2:], window, stride))
    parts = torch.stack([_cut(image, place, window) for place in places])
    total, seen = None, image.new_zeros(image.shape[-2:])
    for first in range(0, len(places), batch_size):
        found = network(parts[first : first + batch_size]).float()
        total = found.new_zeros(found.shape[1], *image.shape[-2:]) if total is None else total
        for one, (top, left) in zip(found, places[first:]):
            area = slice(top, top + window[0]), slice(left, left + window[1])
            height, width = seen[area].shape
            total[(slice(None), *area)] += one[:, :height, :width]
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
    """Values [C, *size] of an image given at several scales, each resized to `size`; `squash` makes of
    each what is averaged over views, which are also mirrored with `flip`."""
    total, count = torch.zeros(()), 0
    for image in images:
        for mirrored in (False, True) if flip else (False,):
            found = predict(image.flip(-1) if mirrored else image)
            found = found.flip(-1) if mirrored else found
            resized = F.interpolate(found[None], size, mode="bilinear")[0]
            total, count = total.to(found) + squash(resized), count + 1
    return total / count
