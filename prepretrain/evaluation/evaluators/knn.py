"""Weighted k-nearest neighbours: what a model's features say without any training."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from prepretrain.data.sources.base import Source
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.evaluators.base import (
    ProbeEvaluator,
    accuracy,
    class_count,
    require,
)
from prepretrain.evaluation.features import set_aside

VALUES = 1 << 26  # similarities at once


class Knn(ProbeEvaluator):
    """k-NN by cosine similarity, as DINO measures it (its eval_knn.py at commit 04c0ad9; the rule is
    that of Wu et al. 2018, arXiv 1805.01978): each of the k nearest images of `train` votes for its class with the
    weight exp(similarity / temperature). Cheap enough to watch a pretraining run with.

    data           the card; images of its `val` are classified by those of its `train`
    pool           "class" (the class token) or "mean" (of the patch tokens)
    layer          read the tokens after that many blocks; None: after the last, and its norm
    k              neighbours that vote (20: "usually working the best", DINO's eval_knn.py)
    temperature    of the weights (0.07: eval_knn.py's)
    share          of the image's short side that the centre crop shows
    resize         "crop": that centre; "squash": all, without keeping the aspect
    views          of a card of videos, what is seen of each, in place of share and resize: {sampling,
                   stride, span, clips, crops, short_side, frames}, data/video/views.py's. Features are the
                   mean over clips, and over the frames (by default 8 of them) of a model of images
    feature_batch  images at once a process, while features are computed;  workers: as data.workers
    """

    headline, splits, certified = "top1", ("train", "val"), "val"

    def __init__(
        self,
        *,
        data: str,
        pool: Literal["class", "mean"] = "class",
        layer: int | None = None,
        k: int = 20,
        temperature: float = 0.07,
        share: float = 0.875,
        resize: Literal["crop", "squash"] = "crop",
        views: dict[str, Any] | None = None,
        feature_batch: int = 256,
        workers: int | None = None,
    ):
        super().__init__(
            data=data,
            pool=pool,
            layer=layer,
            share=share,
            resize=resize,
            views=views,
            feature_batch=feature_batch,
            workers=workers,
        )
        require(pool in ("class", "mean"), "knn.pool", pool, "is 'class' or 'mean'")
        require(k >= 1, "knn.k", k, "must be at least 1")
        require(temperature > 0, "knn.temperature", temperature, "must be above 0")
        self.k, self.temperature = k, temperature

    def open_data(self) -> dict[str, Source]:
        """See Evaluator.open_data: as many images as neighbours are asked for."""
        sources = super().open_data()
        if self.k > (count := len(sources["train"])):
            raise ValueError(
                f"knn.k: {self.card.name}:train has {count} images, fewer than the {self.k} "
                f"neighbours asked for. Ask for fewer."
            )
        return sources

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """Top-1 (and top-5) on `val`, with the numbers of images that it was measured and trained
        on."""
        sources = self.open_data()
        train, train_labels = self.features(model, "train", sources["train"], folder)
        val, val_labels = self.features(model, "val", sources["val"], folder)
        classes = class_count(self.card, train_labels, val_labels)
        mine = val.tensor_split(distributed.world())[distributed.rank()]
        with set_aside(model):
            votes = self.votes(train, train_labels, mine, classes)
        votes = torch.cat(distributed.all_gather_object(votes))
        votes[votes == 0] = -torch.inf  # no neighbour's class is no guess, whatever its number
        measure = lambda kept: accuracy(votes[kept], val_labels[kept])
        found = self.certify(measure, self.leaked(sources["val"]))
        return distributed.from_main(found | {"images": len(val), "train_images": len(train)})

    def votes(self, train: Tensor, labels: Tensor, val: Tensor, classes: int) -> Tensor:
        """float32 [len(val), classes] on the CPU: each class's share of the neighbours' weights."""
        device = distributed.device()
        train, labels = normalize(train.to(device), dim=1), labels.to(device)
        found = [torch.zeros(0, classes)]
        for part in val.split(max(1, VALUES // len(train))):
            likeness = normalize(part.to(device), dim=1) @ train.T
            nearest, rows = likeness.topk(self.k, dim=1)
            # a softmax: the same shares of the votes, without the overflow of exp(1 / temperature)
            weight = (nearest / self.temperature).softmax(dim=1)
            votes = torch.zeros(len(part), classes, device=device)
            found.append(votes.scatter_add_(1, labels[rows], weight).cpu())
        return torch.cat(found)
