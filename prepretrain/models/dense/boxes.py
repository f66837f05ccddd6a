"""Boxes of objects: anchors, matching, sampling and suppression, by detectron2's rules on torchvision's
operators. A box is (left, top, right, bottom) in pixels.

G objects of an image, N boxes, A anchors.
"""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import batched_nms, box_iou

_RATIOS = (0.5, 1.0, 2.0)  # height over width of an anchor
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Objects:
    """What is annotated in one image: boxes [G, 4], classes int64 [G], and for heads that draw masks
    bits, uint8 [G, H, ceil(W / 8)]: numpy's packbits of each row."""

    boxes: Tensor
    classes: Tensor
    bits: Tensor | None = None


def anchors(size: int, stride: float, grid: tuple[int, int], device: torch.device) -> Tensor:
    """[rows columns 3, 4]: at each place of a map a box of each ratio with an area of size x size,
    not rounded, as detectron2's are."""
    ratios = torch.tensor(_RATIOS, dtype=torch.float64)
    widths = (size**2 / ratios).sqrt()
    half = torch.stack([-widths, -widths * ratios, widths, widths * ratios], 1).float() / 2
    rows, columns = (torch.arange(count, device=device) * float(stride) for count in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    places = torch.stack([x, y, x, y], 2).view(-1, 1, 4)
    return (places + half.to(device)).flatten(0, 1)


def without_numbers(tensor: Tensor) -> bool:
    """Whether a tensor has a shape alone: a plan's, of which nothing can be chosen by value."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def where(mask: Tensor, guess: int) -> Tensor:
    """The places where a mask [N] is true; in a plan the first `guess`."""
    if without_numbers(mask):
        return torch.arange(min(guess, len(mask)), device=mask.device)
    return mask.nonzero()[:, 0]


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes [..., 4] within an image of a (height, width), int64 [2]."""
    return boxes.clamp(min=0).minimum(size.flip(0).repeat(2).to(boxes.dtype))


def match(boxes: Tensor, objects: Tensor, matcher: Matcher) -> tuple[Tensor, Tensor]:
    """([N] the object of each box, [N] whether it shows it: 1 yes, 0 no, -1 is neither trained)."""
    if not len(objects) or without_numbers(objects):
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return nothing, nothing
    found = matcher(box_iou(objects, boxes))
    verdict = (found >= 0).long()
    verdict[found == Matcher.BETWEEN_THRESHOLDS] = -1
    return found.clamp(min=0), verdict


def sample(verdict: Tensor, seed: Tensor, purpose: str, count: int, share: float) -> Tensor:
    """The indices of `count` boxes of a `match` at most, of which `share` at most show an object:
    those first. Which ones depends on the seed and the purpose alone."""
    drawn, most = priority(seed, purpose, len(verdict)), int(count * share)
    objects = _drawn(verdict == 1, drawn, most)
    return torch.cat([objects, _drawn(verdict == 0, drawn, count - len(objects))])


def _drawn(eligible: Tensor, drawn: Tensor, most: int) -> Tensor:
    places = where(eligible, most)
    if len(places) <= most:
        return places
    return places[drawn[places].argsort()[:most].sort().values]


def priority(seed: Tensor, purpose: str, count: int) -> Tensor:
    """int64 [count], random by (seed, purpose) on every device alike: SplitMix64 (Steele et al. 2014)
    of a counter."""
    first = seed ^ zlib.crc32(purpose.encode())
    word = first + torch.arange(1, count + 1, device=seed.device) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ _shifted(word, shift)) * _signed(factor)
    return word ^ _shifted(word, 31)


def _signed(word: int) -> int:
    """A word of 64 bits as torch's int64 holds it."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(word: Tensor, by: int) -> Tensor:
    """Shifted to the right, as a number without a sign would be."""
    return (word >> by) & (_MASK >> by)


def suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, overlap: float, most: int
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression within each group: (the indices of the best `most` boxes that remain,
    their scores), the best first."""
    if without_numbers(boxes):
        kept = where(scores > 0, most)
    else:
        kept = batched_nms(boxes, scores, groups, overlap)[:most]
    return kept, scores[kept]


def suppress_softly(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    most: int,
    *,
    linear: float | None = None,
    gaussian: float | None = None,
    prune: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS (Bodla et al. 2017): as `suppress`, but each box taken lowers the scores of those of its
    group that it overlaps, instead of removing them.

    linear: by 1 - IoU, where the IoU is above it; gaussian: by exp(-IoU² / it). What falls to `prune`
    is removed.
    """
    apart = boxes + (groups * (boxes.max().item() + 1 if len(boxes) else 0))[:, None]
    left, now, kept, found = torch.arange(len(boxes), device=boxes.device), scores, [], []
    while len(left) and len(kept) < most:
        best = now.argmax()
        kept.append(left[best])
        found.append(now[best])
        shared = box_iou(apart[left[best]][None], apart[left])[0]
        if gaussian is not None:
            now = now * torch.exp(-(shared**2) / gaussian)
        else:
            now = torch.where(shared > linear, now * (1 - shared), now)
        remain = now > prune
        remain[best] = False
        left, now = left[remain], now[remain]
    if not kept:
        return left, now
    return torch.stack(kept), torch.stack(found)


def usable(boxes: Tensor) -> Tensor:
    """[N], whether each box is finite and has an area."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return boxes.isfinite().all(1) & (sides > 0).all(1)
