"""Mask R-CNN and Cascade Mask R-CNN as ViTDet trains them (arXiv 2203.16527; detectron2's code), on a
pyramid of maps.

B images, N regions of an image, R of a batch, K classes, G objects of an image.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from prepretrain.models.dense import boxes, masks, regions
from prepretrain.models.dense.boxes import Coder, Objects
from prepretrain.models.dense.proposals import Anchors, ProposalHead, Proposer
from prepretrain.models.dense.pyramid import FeaturePyramid, SimplePyramid
from prepretrain.models.encoders.base import Encoder
from prepretrain.models.heads.base import Detections, Detector

_SHARE = 0.25  # of the sampled regions that show objects, at most


@dataclass(frozen=True)
class Stage:
    """How a stage of boxes is trained: the overlap from which a region shows an object, and how it says
    where that is."""

    overlap: float
    coder: Coder


@dataclass(frozen=True)
class Regions:
    """Regions of one image: boxes [N, 4], the classes [N] that they show (K: none; -1: it is not
    trained), and the object [N] that each was matched with."""

    boxes: Tensor
    classes: Tensor
    place: Tensor


@dataclass(frozen=True)
class BoxOutputs:
    """What a stage says of R regions and should say: logits [R, K + 1], deltas [R, 4] or [R, 4 K],
    classes [R] (-1: it is not trained), targets [R, 4] (of those that show an object)."""

    logits: Tensor
    deltas: Tensor
    classes: Tensor
    targets: Tensor


@dataclass(frozen=True)
class MaskOutputs:
    """What is said of regions for the class of their object, and should be: logits [R, 28, 28], targets
    bool [R, 28, 28]; and shown, bool [R], whether they show one."""

    logits: Tensor
    targets: Tensor
    shown: Tensor


@dataclass(frozen=True)
class Outputs:
    """What a detector says in training: for losses/detection.py."""

    anchors: Anchors
    stages: list[BoxOutputs]
    masks: MaskOutputs | None


class RCNN(Detector):
    """A pyramid, a proposal network, one or several stages of boxes, and masks.

    Coordinates are float32 whatever the precision of its parts, which are sharded one by one.
    """

    container = True
    precision = "fp32"
    stages: tuple[Stage, ...]
    shared_boxes: bool  # a region has one box, not one for each class

    def __init__(
        self,
        encoder: Encoder,
        *,
        classes: int,
        channels: int = 256,
        hidden: int = 1024,
        anchors: tuple[int, ...] = (32, 64, 128, 256, 512),
        candidates: tuple[int, int] = (2000, 1000),
        proposals: tuple[int, int] = (1000, 1000),
        sampled_anchors: int = 256,
        sampled_regions: int = 512,
        loss: Literal["softmax", "sigmoid"] = "softmax",
        masks: bool = True,
    ):
        """channels: of the pyramid and the heads' convolutions; hidden: of the box head's layer.
        anchors: pixels, one for each map of the pyramid. candidates, proposals: how many boxes of a
        map, and of an image, are kept before and after suppression, in training and at test.
        sampled_…: of an image, that are trained. loss: sigmoid scores each class by itself (LVIS).
        masks: false leaves them out, for data that has none."""
        super().__init__(encoder, classes, draws=masks, sigmoid=loss == "sigmoid")
        self.sampled_regions = sampled_regions
        if encoder.scales:
            widths, strides = zip(*encoder.scales)
            self.pyramid = FeaturePyramid(list(widths), channels)
            self.strides = [*map(float, strides), strides[-1] * 2.0]
        else:
            self.pyramid = SimplePyramid(encoder.width, channels)
            self.strides = [encoder.stride * 2.0**i for i in range(-2, 3)]
        if len(anchors) != len(self.strides):
            raise ValueError(
                f"model.head.anchors: {list(anchors)} must be {len(self.strides)} sizes."
            )
        self.proposer = Proposer(anchors, self.strides, candidates, proposals, sampled_anchors)
        self.proposals = ProposalHead(channels)
        count = 1 if self.shared_boxes else classes
        self.boxes = nn.ModuleList(
            regions.BoxHead(channels, channels, hidden, classes, count) for _ in self.stages
        )
        self.boxes.container = True  # each is a unit by itself: see distributed/shard.py
        self.masks = regions.MaskHead(channels, channels, classes) if masks else None

    def forward(
        self,
        maps: list[Tensor],
        sizes: Tensor,
        objects: list[Objects],
        seeds: Tensor,
    ) -> Outputs:
        """See Detector.forward."""
        scales = self.pyramid(maps)
        anchors = self.proposer.anchors(scales)
        said = self.proposer.outputs(*self.proposals(scales))
        labels, targets = self.proposer.label(torch.cat(anchors), objects, seeds)
        proposed = self.proposer.propose(said, anchors, sizes, training=True)
        sampled = [
            self._sampled(torch.cat([found, one.boxes]), one, seed)
            for found, one, seed in zip(proposed, objects, seeds)
        ]
        said = replace(said, labels=labels, targets=targets, sampled=self.proposer.sampled)
        stages = self._stages(scales, sampled, objects, sizes)
        return Outputs(said, stages, self._masks(scales, sampled, objects))

    def _sampled(self, proposed: Tensor, objects: Objects, seed: Tensor) -> Regions:
        """The regions of an image that are trained, those that show an object first."""
        matched, verdict = self._matched(proposed, objects, 0)
        shown, nothing = boxes.sample(verdict, seed, "regions", self.sampled_regions, _SHARE)
        rank = torch.where(shown, 0, torch.where(nothing, 1, 2))
        chosen = boxes.first(rank, self.sampled_regions, 2)
        classes = matched.classes[chosen].masked_fill(rank[chosen] == 2, -1)
        return Regions(matched.boxes[chosen], classes, matched.place[chosen])

    def _matched(self, found: Tensor, objects: Objects, stage: int) -> tuple[Regions, Tensor]:
        """All boxes as regions of a stage, and whether each shows an object; -1 if it is none."""
        usable, overlap = boxes.usable(found), self.stages[stage].overlap
        found = boxes.filled(found, usable)
        place, verdict = boxes.match(found, objects, overlap, overlap)
        verdict = verdict.masked_fill(~usable, -1)
        classes = torch.full_like(place, self.classes)
        if len(objects.classes):
            classes = torch.where(verdict == 1, objects.classes[place], classes)
        return Regions(found, classes.masked_fill(~usable, -1), place), verdict

    def _stages(
        self,
        scales: list[Tensor],
        sampled: list[Regions],
        objects: list[Objects],
        sizes: Tensor,
    ) -> list[BoxOutputs]:
        """The outputs of each stage, whose regions are the boxes of the one before."""
        outputs = []
        for number, stage in enumerate(self.stages):
            if number:
                decoded = self._decoded(number - 1, outputs[-1].deltas.detach(), sampled, sizes)
                sampled = [self._again(*each, number) for each in zip(decoded, sampled, objects)]
            logits, deltas = self._said(scales, [one.boxes for one in sampled], number)
            classes = torch.cat([one.classes for one in sampled])
            at = torch.cat([one.boxes for one in sampled])
            shown = torch.cat([self._target(*pair) for pair in zip(sampled, objects)])
            outputs.append(BoxOutputs(logits, deltas, classes, stage.coder.encode(shown, at)))
        return outputs

    def _again(self, found: Tensor, before: Regions, objects: Objects, stage: int) -> Regions:
        """The boxes [N, 4] that an image's regions became, as regions of the next stage."""
        trained = boxes.usable(found) & (before.classes >= 0)
        here = boxes.places(trained, len(found))
        again, trained = self._matched(found[here], objects, stage)[0], trained[here]
        return replace(again, classes=again.classes.masked_fill(~trained, -1))

    def _target(self, sampled: Regions, objects: Objects) -> Tensor:
        """[N, 4], the box of the object that each region shows; its own where it shows none."""
        if not len(objects.boxes):
            return sampled.boxes
        shown = self._shown(sampled.classes)[:, None]
        return torch.where(shown, objects.boxes[sampled.place], sampled.boxes)

    def _shown(self, classes: Tensor) -> Tensor:
        """[N], whether a region shows an object."""
        return (classes >= 0) & (classes < self.classes)

    def _said(self, scales: list[Tensor], found: list[Tensor], stage: int) -> tuple[Tensor, Tensor]:
        """(logits, deltas) of a stage for each image's regions. The maps get the mean of the stages'
        gradients, whose losses are summed."""
        pooled = regions.pool(scales[:4], found, self.strides, regions.BOX_CELLS)
        if len(self.stages) > 1 and pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient / len(self.stages))
        logits, deltas = self.boxes[stage](pooled)
        return logits.float(), deltas.float()

    def _decoded(
        self, stage: int, deltas: Tensor, sampled: list[Regions], sizes: Tensor
    ) -> list[Tensor]:
        found = [one.boxes for one in sampled]
        return [one[:, 0] for one in self._boxes(stage, deltas, found, sizes)]

    def _boxes(
        self, stage: int, deltas: Tensor, found: list[Tensor], sizes: Tensor
    ) -> list[Tensor]:
        """The boxes of a stage, [N, 1 or K, 4] of each image, within it."""
        moved = self.stages[stage].coder.decode(deltas, torch.cat(found))
        parts = moved.split([len(one) for one in found])
        return [boxes.clip(one, size) for one, size in zip(parts, sizes)]

    def _masks(
        self, scales: list[Tensor], sampled: list[Regions], objects: list[Objects]
    ) -> MaskOutputs | None:
        if self.masks is None:
            return None
        most = int(_SHARE * self.sampled_regions)
        places = [boxes.places(self._shown(one.classes), most) for one in sampled]
        found = [one.boxes[here] for one, here in zip(sampled, places)]
        classes = torch.cat([one.classes[here] for one, here in zip(sampled, places)])
        pooled = regions.pool(scales[:4], found, self.strides, regions.MASK_CELLS)
        logits = self.masks(pooled).float()
        own = classes.clamp(0, self.classes - 1)
        logits = logits[torch.arange(len(logits), device=logits.device), own]
        targets = [
            masks.cut(one.bits, regions_of.place[here], at, logits.shape[-1])
            for one, regions_of, here, at in zip(objects, sampled, places, found)
        ]
        return MaskOutputs(logits, torch.cat(targets), self._shown(classes))

    @torch.no_grad()
    def detect(
        self,
        maps: list[Tensor],
        sizes: Tensor,
        *,
        threshold: float = 0.05,
        overlap: float = 0.5,
        most: int = 100,
        soft: dict[str, float] | None = None,
    ) -> list[Detections]:
        """See Detector.detect."""
        scales = self.pyramid(maps)
        anchors = self.proposer.anchors(scales)
        said = self.proposer.outputs(*self.proposals(scales))
        found = self.proposer.propose(said, anchors, sizes, training=False)
        parts = zip(*self._likely(scales, found, sizes))
        chosen = [_best(*part, threshold, overlap, most, soft) for part in parts]
        return self._with_masks(scales, chosen)

    def _likely(
        self, scales: list[Tensor], found: list[Tensor], sizes: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The boxes [N, 1 or K, 4] that proposals of each image become, and their scores [N, K + 1]:
        the last stage's boxes, the mean of all stages' scores."""
        counts, scores = [len(one) for one in found], []
        for number in range(len(self.stages)):
            logits, deltas = self._said(scales, found, number)
            scores.append(logits.sigmoid() if self.sigmoid else logits.softmax(1))
            moved = self._boxes(number, deltas, found, sizes)
            found = [one[:, 0] for one in moved]
        return moved, torch.stack(scores).mean(0).split(counts)

    def _with_masks(self, scales: list[Tensor], chosen: list[Detections]) -> list[Detections]:
        if self.masks is None:
            return chosen
        found = [one.boxes for one in chosen]
        pooled = regions.pool(scales[:4], found, self.strides, regions.MASK_CELLS)
        drawn = self.masks(pooled).float()
        classes = torch.cat([one.classes for one in chosen])
        drawn = drawn[torch.arange(len(drawn), device=drawn.device), classes].sigmoid()
        parts = drawn.split([len(one.classes) for one in chosen])
        return [Detections(c.boxes, c.scores, c.classes, part) for c, part in zip(chosen, parts)]


def _best(
    found: Tensor,
    scores: Tensor,
    threshold: float,
    overlap: float,
    most: int,
    soft: dict[str, float] | None,
) -> Detections:
    """The detections among boxes [N, 1 or K, 4] with scores [N, K + 1], without masks."""
    finite = found.isfinite().flatten(1).all(1) & scores.isfinite().all(1)
    scores = scores[:, :-1]
    chosen = boxes.where(((scores > threshold) & finite[:, None]).flatten(), most)
    place, classes = chosen // scores.shape[1], chosen % scores.shape[1]
    at = found[place, classes if found.shape[1] > 1 else torch.zeros_like(classes)]
    likely = scores[place, classes]
    if soft is None:
        kept, likely = boxes.suppress(at, likely, classes, overlap, most)
    else:
        kept, likely = boxes.suppress_softly(at, likely, classes, most, **soft)
    return Detections(at[kept], likely, classes[kept], None)
