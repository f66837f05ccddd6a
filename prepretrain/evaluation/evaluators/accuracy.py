"""Accuracy of a fine-tuned model's own classifier."""

from pathlib import Path
from typing import Literal

from torch import nn

from prepretrain.evaluation.evaluators.base import (
    Evaluator,
    accuracy,
    check_classifier,
    decoding,
    require,
)
from prepretrain.evaluation.features import extract


class Accuracy(Evaluator):
    """How often the classifier of a fine-tuned model is right, each image counted once.

    data           the card, whose classes are the classifier's
    split          its split
    resize         "crop": the short side to image size / share, then the centre (MAE, SimMIM);
                   "squash": the whole image, its aspect not kept (MAWS's released script)
    share          of the short side that the centre crop shows
    feature_batch  images at once a process;  workers: as data.workers
    """

    headline = "top1"

    def __init__(
        self,
        *,
        data: str,
        split: str = "val",
        resize: Literal["crop", "squash"] = "crop",
        share: float = 0.875,
        feature_batch: int = 256,
        workers: int | None = None,
    ):
        super().__init__(data=data)
        require(0 < share <= 1, "accuracy.share", share, "must lie above 0 and up to 1")
        require(feature_batch >= 1, "accuracy.feature_batch", feature_batch, "must be at least 1")
        self.splits, self.certified = (split,), split
        self.split, self.resize, self.share = split, resize, share
        self.feature_batch, self.workers = feature_batch, decoding(workers)

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: a classifier of the card's classes is needed."""
        check_classifier(model, self.card, f"accuracy/{self.data}")

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """Top-1, and top-5 where there are more than five classes, with the number of images."""
        source = self.open_data()[self.split]
        scores, labels = extract(
            model,
            source,
            name=f"{self.card.name}:{self.split}",
            pool="scores",
            resize=self.resize,
            share=self.share,
            batch_size=self.feature_batch,
            workers=self.workers,
        )
        if int(labels.min()) < 0 or int(labels.max()) >= scores.shape[1]:
            raise ValueError(
                f"{self.card.name}:{self.split}: labels run from {int(labels.min())} to "
                f"{int(labels.max())}, and the model's classifier has {scores.shape[1]} classes."
            )
        measure = lambda kept: accuracy(scores[kept], labels[kept])
        return self.certify(measure, self.leaked(source)) | {"images": len(scores)}
