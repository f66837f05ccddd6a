"""Object detection and instance segmentation: what a model with a detector's head is trained for, as
ViTDet is (arXiv 2203.16527, appendix A.2)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prepretrain import plugin
from prepretrain.data.dense import boxes
from prepretrain.data.sampling.resample import repeat_factor
from prepretrain.losses import detection as losses
from prepretrain.models.dense.boxes import Objects, places
from prepretrain.models.heads.base import Detector
from prepretrain.models.model import Model
from prepretrain.objectives.base import DenseObjective, blank_images

_OBJECTS = 8  # of an image in a plan; COCO's have 7 on average


class Detection(DenseObjective):
    """Losses of proposals, boxes and masks, on images under large-scale jitter.

    Images without objects are not trained on. An image is padded to `model.image_size`.
    """

    fields = ("image", "size", "boxes", "classes", "crowds")
    needs = {"head": Detector}

    def __init__(
        self,
        model: Model,
        *,
        scale: tuple[float, float] = (0.1, 2.0),
        federated: int | None = None,
        repeat: float | None = None,
        freeze: bool = False,
    ):
        """scale: how much larger than the canvas an image is resized, before a part is taken.

        federated: classes that are trained in a step, those of its objects and others, drawn by the
        square root of how many images show them; with model.head.loss=sigmoid. repeat: an image comes
        more often in an epoch, if a class of it is in a smaller share of all images (LVIS). freeze:
        the encoder keeps its weights, and the head alone is trained.
        """
        super().__init__(model, freeze=freeze)
        self.scale, self.federated, self.repeat = scale, federated, repeat
        if federated is not None and not model.head.sigmoid:
            raise ValueError(
                f"objective.federated: {federated} classes are trained alone where each has a score "
                f"of its own: set model.head.loss=sigmoid."
            )
        if model.head.draws:
            plugin.require("faster_coco_eval", "detection", "objective 'detection'")
            self.fields = (*self.fields, "masks")
        self.weights = torch.ones(model.head.classes, device="cpu")  # of classes, as `check` counts

    def check(self, card: Any, source: Any) -> None:
        """Also refuses a number of classes that is not the data's, and counts what `federated` draws
        by."""
        if self.model.head.draws and "boxes" in source.fields and "masks" not in source.fields:
            raise ValueError(
                f"data.train={card.name}: not every object has a mask. Set model.head.masks=false, "
                f"which trains boxes alone."
            )
        super().check(card, source)
        classes = card.classes or source.classes
        if classes and len(classes) != self.model.head.classes:
            raise ValueError(
                f"model.head.classes: {self.model.head.classes}, and the card '{card.name}' has "
                f"{len(classes)}."
            )
        if self.federated is not None:
            shown = np.concatenate([source.classes_shown(i) for i in range(len(source))])
            counts = np.bincount(shown.astype(np.int64), minlength=self.model.head.classes)
            self.weights = torch.from_numpy(counts).float().sqrt()

    def repeats(self, source: Any) -> np.ndarray | None:
        """See Objective.repeats."""
        shown = [source.classes_shown(i) for i in range(len(source))]
        if self.repeat is None:
            trained = np.array([float(bool(one)) for one in shown])
            return None if trained.all() else trained
        return repeat_factors(shown, self.repeat)

    def transform(self, train: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Large-scale jitter and mirroring, or the whole image; its objects with it."""
        size = self.model.encoder.image_size
        return Transform(size, self.scale if train else None)

    def example(self, images: int) -> dict[str, Tensor]:
        """See Objective.example."""
        height, width = self.model.encoder.image_size
        whole = {"dtype": torch.int64, "device": "meta"}
        batch = {
            "image": blank_images(images, (height, width)),
            "size": torch.empty(images, 2, **whole),
            "boxes": torch.empty(images, _OBJECTS, 4, device="meta"),
            "classes": torch.empty(images, _OBJECTS, **whole),
            "seed": torch.empty(images, **whole),
        }
        if self.model.head.draws:
            shape = images, _OBJECTS, height, -(-width // 8)
            batch["bits"] = torch.empty(shape, dtype=torch.uint8, device="meta")
        return batch

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What `transform` made, as a batch, to the losses of proposals, boxes and masks, and their
        sum."""
        model = self.model
        maps = model.read(model.normalise_padded(batch["image"], batch["size"]))
        said = model.head(maps, batch["size"], _annotated(batch), batch["seed"])
        parts = dict(zip(("anchor_class", "anchor_box"), losses.of_anchors(said.anchors)))
        for number, stage in enumerate(said.stages):
            behind = f"_{number + 1}" if len(said.stages) > 1 else ""
            drawn = self._drawn_classes(stage.classes, batch["seed"][0] + number)
            pair = losses.of_boxes(stage, model.head.sigmoid, drawn)
            parts |= zip((f"class{behind}", f"box{behind}"), pair)
        if said.masks is not None:
            parts["mask"] = losses.of_masks(said.masks)
        return {"loss": sum(parts.values())} | {k: v.detach() for k, v in parts.items()}

    def _drawn_classes(self, classes: Tensor, seed: Tensor) -> Tensor | None:
        """bool [classes], which are trained in this step; None for all."""
        if self.federated is None:
            return None
        self.weights = self.weights.to(classes.device)  # once
        return losses.federated(classes, self.weights, self.federated, seed)


def _annotated(batch: dict[str, Any]) -> list[Objects]:
    """The objects of each image; on a CPU without what only fills the batch up."""
    annotated, bits = [], batch.get("bits")
    for i, classes in enumerate(batch["classes"]):
        real = places(classes >= 0, len(classes))
        masks = None if bits is None else bits[i, real]
        annotated.append(Objects(batch["boxes"][i, real], classes[real], masks))
    return annotated


def repeat_factors(shown: list[list[int]], share: float) -> np.ndarray:
    """How often each image comes: the most that one of the classes it shows asks for; 0 without
    any."""
    counts = np.bincount([c for one in shown for c in set(one)])
    factors = repeat_factor(np.maximum(counts, 1) / len(shown), share)
    return np.array([factors[list(one)].max() if one else 0.0 for one in shown])


class Transform:
    """A sample to a row of data/dense/boxes.py, with a "seed" of what is drawn for it."""

    def __init__(self, canvas: tuple[int, int], scale: tuple[float, float] | None):
        """scale None: the whole image."""
        self.canvas, self.scale = canvas, scale

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self.scale is None:
            row = boxes.fitted(sample, self.canvas)
        else:
            row = boxes.jittered(sample, self.canvas, self.scale)
        return row | {"seed": int(sample["random"]("sampling").integers(2**62))}
