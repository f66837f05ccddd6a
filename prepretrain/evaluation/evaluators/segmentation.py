"""Mean intersection over union of a segmenter, on the images of a card with label maps."""

from torch import nn

from prepretrain.evaluation import corruptions as makers
from prepretrain.evaluation.dense import LabelMapEvaluator
from prepretrain.models.heads.base import Segmenter


class Segmentation(LabelMapEvaluator):
    """Label maps that a model's head predicts, against those of a card's split, pixel by pixel at the
    size of the maps; pixels without a class are left out.

    data           the card
    split          its split, of which each image is counted once
    short_side     an image is resized to, at scale 1; null is the smaller side of model.image_size
    whole          true: it is resized to fit into model.image_size instead, and seen at once
    stride         pixels between windows of model.image_size; null is two thirds of it
    scales         of the short side; scores of several are averaged
    flip           also averages those of the mirrored image
    images         so many, spread evenly over the split; null takes all
    pictures       of so many of them a sheet is drawn: image, truth, prediction
    corruptions    of evaluation/corruptions.py, done to the images as they are; [all] takes all 19
    severities     theirs
    frost          the folder of the published textures, which corruption frost needs
    feature_batch  windows at once a process;  workers: as data.workers

    Results are, in percent, `mIoU`, over the classes that are in the maps or predicted;
    `mIoU_absent_0`, over all classes, where one that is in neither counts as 0; `mAcc`, the mean over
    classes of the share of its pixels that are right; `aAcc`, that of all pixels. Of corruptions
    `corruption/fog/3/mIoU`, the mean over the severities `corruption/fog/mIoU`, that over all `mPC`, and
    `rPC`, its share of the clean `mIoU`. The folder `predictions/` of the run gets confusion.json
    (pixels by class, in rows, and prediction), classes.json, and the sheet.
    """

    def __init__(
        self,
        *,
        data: str,
        split: str = "val",
        short_side: int | None = None,
        whole: bool = False,
        stride: int | tuple[int, int] | None = None,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        images: int | None = None,
        pictures: int = 8,
        corruptions: tuple[str, ...] = (),
        severities: tuple[int, ...] = makers.SEVERITIES,
        frost: str | None = None,
        feature_batch: int = 4,
        workers: int | None = None,
    ):
        super().__init__(
            data=data,
            split=split,
            short_side=short_side,
            whole=whole,
            stride=stride,
            scales=scales,
            flip=flip,
            images=images,
            pictures=pictures,
            corruptions=corruptions,
            severities=severities,
            frost=frost,
            feature_batch=feature_batch,
            workers=workers,
        )

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: a head that scores the card's classes is needed."""
        super().check(model)
        if not isinstance(model.head, Segmenter):
            raise ValueError(
                f"segmentation/{self.data}: this model says no class of a pixel. Fine-tuning on label maps "
                f"makes one that does: --stage finetune/ade20k_upernet_b, from this model with --init."
            )
        known = len(self.card.classes or ())
        if known and known != model.head.classes:
            raise ValueError(
                f"segmentation/{self.data}: the data has {known} classes, and the model's head "
                f"{model.head.classes}."
            )
