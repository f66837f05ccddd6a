"""Masks of objects: cut out at a region as targets, and pasted back into the image.

G objects, R regions, S cells along a side of a region's mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from prepretrain.models.dense.boxes import clip, usable
from prepretrain.models.heads.base import Detections

_AT_ONCE = 16  # objects whose masks are unpacked together: 64 MB at 1024 x 1024 pixels


def unpack(bits: Tensor) -> Tensor:
    """uint8 [G, H, ceil(W / 8)], numpy's packbits of each row, to uint8 [G, H, a multiple of 8] of 0
    and 1."""
    return ((bits[..., None] >> torch.arange(7, -1, -1, device=bits.device)) & 1).flatten(-2)


def cut(bits: Tensor, place: Tensor, regions: Tensor, cells: int) -> Tensor:
    """The masks of regions [R, 4], each of the object `place` [R] of the packed ones: bool [R, S, S],
    where at least half of a cell is the object's."""
    share = torch.zeros(len(regions), cells, cells, device=regions.device)
    for start in range(0, len(bits), _AT_ONCE):
        whole = unpack(bits[start : start + _AT_ONCE])[:, None].float()
        here = place.clamp(start, start + len(whole) - 1)
        # of another object's regions nothing is cut: they have no area here
        rows = torch.cat([(here - start)[:, None].float(), regions * (here == place)[:, None]], 1)
        share = share + roi_align(whole, rows, cells, 1.0, 0, True)[:, 0]
    return share >= 0.5


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """float [R, S, S] of boxes [R, 4] to bool [R, H, W] in an image of the size (height, width)."""
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    limits = torch.tensor([size[1], size[0]] * 2, device=boxes.device)
    around = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], 1).clamp(min=0)
    for one, mask, box, edges in zip(pasted, masks, boxes, around.minimum(limits).long().tolist()):
        left, top, right, bottom = edges
        x = torch.arange(left, right, device=box.device) + 0.5
        y = torch.arange(top, bottom, device=box.device) + 0.5
        x, y = ((p - box[i]) / (box[i + 2] - box[i]) * 2 - 1 for i, p in enumerate((x, y)))
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2)
        drawn = F.grid_sample(mask[None, None], places[None], align_corners=False)
        one[top:bottom, left:right] = drawn[0, 0] >= 0.5
    return pasted


def restored(found: Detections, size: tuple[int, int], original: tuple[int, int]) -> Detections:
    """What was found in an image that was resized to `size`, in the image as it was: boxes there, and
    masks, if there are, as bool [n, height, width]. Boxes that have no area there are left out."""
    scale = [original[1] / size[1], original[0] / size[0]] * 2
    at = found.boxes * torch.tensor(scale, device=found.boxes.device)
    at = clip(at, torch.tensor(original, device=at.device))
    left = usable(at)
    pasted = None if found.masks is None else paste(found.masks[left], at[left], original)
    return Detections(at[left], found.scores[left], found.classes[left], pasted)
