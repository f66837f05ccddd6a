"""The region proposal network of Faster R-CNN, with ViTDet's two hidden layers.

B images, C channels, A anchors of an image on all maps together.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from prepretrain.models.dense import boxes
from prepretrain.models.dense.boxes import Objects

_PER_PLACE = 3  # anchors
_OVERLAP = 0.7  # from which of two proposals of a map one is suppressed
_SHARE = 0.5  # of the sampled anchors that show objects, at most
_NONE, _OBJECT = 0.3, 0.7  # overlaps of an anchor that shows no object, or one
_CODER = boxes.Coder(1.0, 1.0)


@dataclass(frozen=True)
class Anchors:
    """What the network says of every anchor and, in training, should say: objectness [B, A], deltas
    [B, A, 4]; labels int64 [B, A] (1 an object, 0 none, -1 not sampled), targets [B, A, 4]. sampled: of
    an image, at most."""

    objectness: Tensor
    deltas: Tensor
    labels: Tensor | None = None
    targets: Tensor | None = None
    sampled: int = 0


class ProposalHead(nn.Module):
    """Two convolutions shared by all maps, then how likely each anchor shows an object, and where."""

    def __init__(self, channels: int):
        super().__init__()
        self.convs = nn.Sequential(
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True)),
        )
        self.objectness = nn.Conv2d(channels, _PER_PLACE, 1)
        self.deltas = nn.Conv2d(channels, 4 * _PER_PLACE, 1)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """[B, C, h, w] each to [B, 3, h, w] and [B, 12, h, w] each."""
        hidden = [self.convs(one) for one in maps]
        return [self.objectness(one) for one in hidden], [self.deltas(one) for one in hidden]

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """As detectron2's: N(0, 0.01), no bias."""
        if name.endswith("weight"):
            tensor.normal_(std=0.01, generator=generator)
        else:
            tensor.zero_()
        return True


class Proposer:
    """What turns the outputs of a ProposalHead into boxes, and labels its anchors. Its numbers are
    detectron2's."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        strides: list[float],
        candidates: tuple[int, int],
        proposals: tuple[int, int],
        sampled: int,
    ):
        """sizes, strides: of the anchors of each map. candidates: the best of each map, and proposals:
        the best of an image, that are kept before and after suppression, in training and at test.
        sampled: anchors of an image that are trained."""
        self.sizes, self.strides, self.sampled = sizes, strides, sampled
        self.candidates, self.proposals = candidates, proposals

    def outputs(self, objectness: list[Tensor], deltas: list[Tensor]) -> Anchors:
        """The outputs of all maps side by side, in the order of `anchors`."""
        scores = [one.permute(0, 2, 3, 1).flatten(1) for one in objectness]
        moves = [one.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for one in deltas]
        return Anchors(torch.cat(scores, 1).float(), torch.cat(moves, 1).float())

    def anchors(self, maps: list[Tensor]) -> list[Tensor]:
        """The anchors of each map, [rows columns 3, 4]."""
        shapes = [tuple(one.shape[-2:]) for one in maps]
        device = maps[0].device
        return [boxes.anchors(*one, device) for one in zip(self.sizes, self.strides, shapes)]

    @torch.no_grad()
    def propose(
        self, said: Anchors, anchors: list[Tensor], sizes: Tensor, training: bool
    ) -> list[Tensor]:
        """The proposals of each image, boxes [n, 4], the best first; within its own height and width,
        int64 [B, 2]. In training on a GPU some at the end may have no area."""
        moved = _CODER.decode(said.deltas.flatten(0, 1), torch.cat(anchors).repeat(len(sizes), 1))
        decoded = moved[:, 0].unflatten(0, said.objectness.shape)
        limits = self.candidates[not training], self.proposals[not training]
        starts = list(accumulate(map(len, anchors), initial=0))
        proposals = []
        for scores, found, size in zip(said.objectness, decoded, sizes):
            best = [
                start + scores[start:end].topk(min(limits[0], end - start)).indices
                for start, end in pairwise(starts)
            ]
            maps = torch.cat([torch.full_like(one, level) for level, one in enumerate(best)])
            chosen = torch.cat(best)
            inside = boxes.clip(found[chosen], size)
            proposals.append(_remaining(inside, scores[chosen], maps, limits[1], training))
        return proposals

    @torch.no_grad()
    def label(
        self, anchors: Tensor, objects: list[Objects], seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(labels, targets) of every image's anchors: see Anchors."""
        labels, targets = [], []
        for one, seed in zip(objects, seeds):
            place, verdict = boxes.match(anchors, one, _NONE, _OBJECT, best=True)
            shown, nothing = boxes.sample(verdict, seed, "anchors", self.sampled, _SHARE)
            labels.append(torch.where(shown, 1, torch.where(nothing, 0, -1)))
            target = anchors
            if len(one.boxes):
                target = torch.where(shown[:, None], one.boxes[place], anchors)
            targets.append(_CODER.encode(target, anchors))
        return torch.stack(labels), torch.stack(targets)


def _remaining(found: Tensor, scores: Tensor, maps: Tensor, most: int, training: bool) -> Tensor:
    """The boxes that have an area and are no worse double of another on their map."""
    usable = boxes.usable(found) & scores.isfinite()
    found = found.masked_fill(~usable[:, None], 0.0)
    scores = scores.masked_fill(~usable, -torch.inf)  # they come last
    kept = boxes.suppress(found, scores, maps, _OVERLAP, most)[0]
    if not training or boxes.counts_freely(found):
        kept = kept[boxes.where(usable[kept], most)]
    return found[kept]
