"""Zero-shot classification by a head for hashtags: the class whose nearest tags an image is likeliest to
have."""

import logging
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prepretrain.data.sources.base import Source
from prepretrain.data.tags.nearest import Labels, Nearest
from prepretrain.data.tags.wordnet import Nouns
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.evaluators.base import (
    Evaluator,
    class_count,
    class_names,
    decoding,
    per_class,
    require,
)
from prepretrain.evaluation.features import extract
from prepretrain.models import tagger
from prepretrain.models.tagger import Tagger

logger = logging.getLogger(__name__)

_ROWS = 1024  # images whose scores of all labels are held at once


class ZeroshotTags(Evaluator):
    """Scores a class by the labels of a hashtag run that are nearest to its name, as SWAG's author describes
    it (facebookresearch/SWAG issue 13): probabilities of the head's softmax, calibrated so that common
    tags have no advantage, then matched to the classes by WordNet. SWAG's own similarity of synsets is
    not published.

    data           the card
    tags           the run that the head and its vocabulary are of, or its export; null: the one measured
    split          its split
    synsets        by which names and tags are matched: `wordnet`, a folder with its files, a file of
                   your own, or `timm`, which knows no hypernyms: there only a class's own tag counts
    reach          the most steps between a class and its tags: its own, else those below it (hyponyms) at
                   the smallest distance, else those above (hypernyms)
    calibration    what a tag's probability is divided by. "counts": how often it is in the training data;
                   "images": its mean over the images measured, whose labels are not looked at, so that
                   all tags have one mean there (SWAG's "uniform distribution"; a result then
                   depends on which images are measured together); "none": 1
    missing        a class without a tag in reach is an "error", or comes "last": it is never predicted, and
                   its images count as wrong
    language       which of the card's names, where it has several; a name may be a synset (n02084071)
    share          of the image's short side that the centre crop shows
    feature_batch  images at once a process;  workers: as data.workers

    A class of several tags has the sum of their probabilities, divided by the sum of what they are divided
    by. Results are `top1`, `top5` where there are more than five classes, `mean_per_class`, `images`, and
    the number of classes with a tag of their own (`own`), with a near one (`near`) and with none (`without`).
    """

    headline = "top1"

    def __init__(
        self,
        *,
        data: str,
        tags: str | None = None,
        split: str = "val",
        synsets: str = "wordnet",
        reach: int = 3,
        calibration: Literal["counts", "images", "none"] = "counts",
        missing: Literal["error", "last"] = "error",
        language: str = "en",
        share: float = 0.875,
        feature_batch: int = 256,
        workers: int | None = None,
    ):
        super().__init__(data=data)
        require(0 <= reach <= 100, "zeroshot_tags.reach", reach, "must lie in 0 to 100")
        require(0 < share <= 1, "zeroshot_tags.share", share, "must lie above 0 and up to 1")
        require(
            feature_batch >= 1, "zeroshot_tags.feature_batch", feature_batch, "must be positive"
        )
        known = sorted({"en", *self.card.names})
        require(language in known, "zeroshot_tags.language", language, f"is one of {known}")
        self.tags, self.split, self.splits, self.certified = tags, split, (split,), split
        self.synsets, self.reach, self.calibration = synsets, reach, calibration
        self.missing, self.language, self.share = missing, language, share
        self.feature_batch, self.workers = feature_batch, decoding(workers)

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: a run with labels is needed."""
        if self.tags is not None:
            tagger.located(self.tags)

    def data_state(self) -> dict[str, Any]:
        """See Evaluator.data_state; with the head that is read, where it is not the model's own."""
        own = {} if self.tags is None else {"tags": tagger.fingerprint(self.tags)}
        return super().data_state() | own

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """Accuracies on the split, each image counted once."""
        found = Tagger.open(self.tags or str(folder), model.encoder)
        source = self.open_data()[self.split]
        classes = self.nearest(found, source)
        features, labels = extract(
            model,
            source,
            name=f"{self.card.name}:{self.split}",
            pool=found.head.pool,
            batch_size=self.feature_batch,
            workers=self.workers,
            share=self.share,
            cache=self.features_folder(folder),
        )
        if class_count(self.card, labels) > len(classes):
            raise ValueError(
                f"{self.card.name}: names {len(classes)} classes, and the labels of {self.split} go to "
                f"{int(labels.max())}."
            )
        scored = scores(found, features, classes, self.calibration)
        measure = lambda kept: per_class(scored[kept], labels[kept])
        results = self.certify(measure, self.leaked(source))
        counts = [nearest.distance for nearest in classes]
        without = counts.count(None)
        own = counts.count(0)
        results |= {"own": own, "near": len(counts) - own - without, "without": without}
        return distributed.from_main(results | {"images": len(labels)})

    def nearest(self, found: Tagger, source: Source) -> list[Nearest]:
        """The tags of each class of the card. Raises ValueError for classes that have none, where asked."""
        labels = Labels(found.vocabulary, Nouns.open(self.synsets))
        names = class_names(self.card, source, self.language)
        classes = [labels.nearest(row, self.reach) for row in names]
        without = [row[0] for row, nearest in zip(names, classes) if not nearest.ids]
        if without and (self.missing == "error" or len(without) == len(classes)):
            few = ", ".join(without[:8]) + (", …" if len(without) > 8 else "")
            raise ValueError(
                f"zeroshot_tags: {len(without)} of {len(classes)} classes of '{self.card.name}' have no tag "
                f"within {self.reach} steps in the vocabulary: {few}. Name them by other words "
                f"(the card's names), raise evaluator.reach, or take evaluator.missing=last: they are never "
                f"predicted then, and count as wrong."
            )
        shared = len(classes) - len({tuple(one.ids) for one in classes}) - max(0, len(without) - 1)
        if shared:
            logger.warning(
                "%d classes have the same tags as another: the first is predicted", shared
            )
        return classes


def scores(
    found: Tagger,
    features: Tensor,
    classes: list[Nearest],
    calibration: Literal["counts", "images", "none"],
) -> Tensor:
    """[n, classes]: the logarithm of each class's calibrated probability; -inf for one without tags."""
    likely, sums = [], []
    for some in features.split(_ROWS):
        every = found.log_probabilities(some)
        likely.append(_of_classes(every, classes))
        sums.append(every.double().logsumexp(0))
    if calibration == "none":
        return torch.cat(likely)
    usual = found.log_frequencies()
    if calibration == "images":
        usual = (torch.stack(sums).logsumexp(0) - math.log(len(features))).float()
    # a class without a tag is -inf already
    return torch.cat(likely) - _of_classes(usual[None], classes).nan_to_num(neginf=0.0)


def _of_classes(log_probabilities: Tensor, classes: list[Nearest]) -> Tensor:
    """[B, C] of labels to [B, classes]: of the sum over a class's labels; -inf without any."""
    return torch.stack([log_probabilities[:, one.ids].logsumexp(1) for one in classes], 1)
