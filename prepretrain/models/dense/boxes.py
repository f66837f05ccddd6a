"""Boxes of objects: anchors, coding, matching, sampling and suppression, by detectron2's rules on
torchvision's operators. A box is (left, top, right, bottom) in pixels.

On a GPU the host would wait to read how many boxes there are of some kind. So there sizes do not follow
values while a model is trained: what is not there is filled up, and has no area, or the class -1. A CPU
leaves it out (`counts_freely`). torchvision's suppression alone reads its number on the host.

G objects of an image, N boxes, A anchors.
"""

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torchvision.ops import batched_nms, box_iou

_RATIOS = (0.5, 1.0, 2.0)  # height over width of an anchor
_LARGEST = math.log(1000 / 16)  # of the logarithms that are decoded, detectron2's
_MASK, _LAST = (1 << 64) - 1, (1 << 63) - 1


@dataclass(frozen=True)
class Objects:
    """What is annotated in one image: boxes [G, 4], classes int64 [G], -1 where there is no object, and
    for heads that draw masks bits, uint8 [G, H, ceil(W / 8)]: numpy's packbits of each row."""

    boxes: Tensor
    classes: Tensor
    bits: Tensor | None = None


@dataclass(frozen=True)
class Coder:
    """One box by another: how far the centre is off, in the other's sides, times `shift`; and the
    logarithms of the ratios of sides, times `scale`. To the digit torchvision's BoxCoder, which copies
    numbers to the device for each."""

    shift: float
    scale: float

    def encode(self, targets: Tensor, boxes: Tensor) -> Tensor:
        """The deltas [N, 4] from boxes to targets, [N, 4] each."""
        (centre, sides), (there, longer) = _centre(boxes), _centre(targets)
        moved = self.shift * (there - centre) / sides
        return torch.cat([moved, self.scale * (longer / sides).log()], 1)

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Where the k deltas [N, 4 k] of each box [N, 4] lead, [N, k, 4]."""
        centre, sides = (one[:, None] for one in _centre(boxes))
        moved, grown = deltas.unflatten(1, (-1, 4)).split(2, -1)
        centre = moved / self.shift * sides + centre
        half = 0.5 * ((grown / self.scale).clamp(max=_LARGEST).exp() * sides)
        return torch.cat([centre - half, centre + half], -1)


def _centre(boxes: Tensor) -> tuple[Tensor, Tensor]:
    sides = boxes[:, 2:] - boxes[:, :2]
    return boxes[:, :2] + 0.5 * sides, sides


def anchors(size: int, stride: float, grid: tuple[int, int], device: torch.device) -> Tensor:
    """[rows columns 3, 4]: at each place of a map a box of each ratio with an area of size x size,
    not rounded, as detectron2's are."""
    rows, columns = (torch.arange(count, device=device) * float(stride) for count in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    around = []
    for ratio in _RATIOS:
        width = math.sqrt(size**2 / ratio)
        right, below = width / 2, width * ratio / 2
        around.append(torch.stack([x - right, y - below, x + right, y + below], 2))
    return torch.stack(around, 2).flatten(0, 2)


def without_numbers(tensor: Tensor) -> bool:
    """Whether a tensor has a shape alone: a plan's, of which nothing can be chosen by value."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def counts_freely(tensor: Tensor) -> bool:
    """Whether sizes may follow a tensor's values: the host need not wait for them."""
    return tensor.device.type == "cpu" and not without_numbers(tensor)


def where(mask: Tensor, guess: int) -> Tensor:
    """The places where a mask [N] is true, for which the host waits; in a plan the first `guess`."""
    if without_numbers(mask):
        return torch.arange(min(guess, len(mask)), device=mask.device)
    return mask.nonzero()[:, 0]


def first(rank: Tensor, most: int, end: int = 1) -> Tensor:
    """The places of the `most` lowest ranks, int [N], in order; of ranks below `end` alone where that
    needs no wait."""
    places = rank.argsort(stable=True)[:most]
    return places[rank[places] < end] if counts_freely(rank) else places


def places(mask: Tensor, most: int) -> Tensor:
    """The places where a mask [N] is true, `most` at most; on a GPU so many, the true ones first."""
    return first((~mask).long(), most)


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes [..., 4] within an image of a (height, width), int64 [2]."""
    return boxes.clamp(min=0).minimum(size.flip(0).repeat(2).to(boxes.dtype))


def match(
    boxes: Tensor, objects: Objects, low: float, high: float, best: bool = False
) -> tuple[Tensor, Tensor]:
    """([N] the object that each box overlaps most, [N] whether it shows it: 1 where they overlap by
    `high`, 0 by less than `low`, -1 between, which is not trained). best: the boxes that overlap an
    object most show one, too, however little that is."""
    if not len(objects.boxes):
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return nothing, nothing
    real = (objects.classes >= 0)[:, None]
    overlaps = box_iou(objects.boxes, boxes).masked_fill(~real, -1.0)
    overlap, place = overlaps.max(0)
    verdict = (overlap >= low).long() * ((overlap >= high).long() * 2 - 1)
    if best:
        nearest = (overlaps == overlaps.amax(1, keepdim=True)) & real
        verdict = torch.where(nearest.any(0), 1, verdict)
    return place, verdict


def sample(
    verdict: Tensor, seed: Tensor, purpose: str, count: int, share: float
) -> tuple[Tensor, Tensor]:
    """Which boxes of a `match` are trained as showing an object, and which as showing none, bool [N]
    each: `count` at most, of which `share` at most show one. Which ones depends on the seed and the
    purpose alone."""
    drawn, most = priority(seed, purpose, len(verdict)), int(count * share)
    objects = _drawn(verdict == 1, drawn, most, most)
    return objects, _drawn(verdict == 0, drawn, count - objects.sum(), count)


def _drawn(eligible: Tensor, drawn: Tensor, number: int | Tensor, most: int) -> Tensor:
    """The eligible boxes with the least numbers drawn, bool [N]; `number` is `most` at most."""
    most = min(most, len(eligible))
    places = drawn.masked_fill(~eligible, _LAST).topk(most, largest=False).indices
    taken = eligible[places] & (torch.arange(most, device=places.device) < number)
    return torch.zeros_like(eligible).scatter(0, places, taken)


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


def filled(boxes: Tensor, usable: Tensor) -> Tensor:
    """Boxes [N, 4], with one of a pixel in the place of each that is not usable."""
    corner, end = boxes.masked_fill(~usable[:, None], 0.0).split(2, 1)
    return torch.cat([corner, end + (~usable)[:, None].to(end.dtype)], 1)
