"""Top-1 and top-5 of a video model, of each view of a video and of all together."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prepretrain.data.drawing import at_side, lines_of_text, sheet
from prepretrain.data.loader import evaluation_batches, to_device
from prepretrain.data.sources.base import Source
from prepretrain.data.subset import evenly
from prepretrain.data.video.views import Views, Way, middle_frames
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.evaluators.base import (
    check_classifier,
    ranks,
    require,
    tops,
)
from prepretrain.evaluation.features import frozen
from prepretrain.evaluation.parts import by_parts
from prepretrain.evaluation.pictures import PictureEvaluator
from prepretrain.files import write_json

_SHOWN = 8  # frames of a video on the sheet


class Video(PictureEvaluator):
    """How often the classifier of a model of clips is right about a video, by the mean of its
    probabilities over several clips of the video and several crops of each.

    data           the card, whose classes are the classifier's
    split          its split, of which each video is counted once
    sampling, stride, span: how frames are chosen, as objective video's
    clips          of a video, spread over its length
    crops          of each clip: 3 along its long side, or 1 in the middle
    short_side     of a frame, in pixels; null is the model's image size
    images         so many videos, spread evenly over the split; null takes all
    pictures       of so many of them a sheet is drawn: frames, label and prediction
    feature_batch  clips at once a process;  workers: as data.workers

    Results are, in percent, `top1` and, of more than five classes, `top5`, and of each view by itself
    `view/2x0/top1`, clip 2 and crop 0. The folder `predictions/` of the run gets videos.json, what was
    said of each video, classes.json, the top-1 of each class, and the sheet.
    """

    headline, version = "top1", 1

    def __init__(
        self,
        *,
        data: str,
        split: str = "val",
        sampling: Way = "strided",
        stride: int = 4,
        span: float = 2.7,
        clips: int = 5,
        crops: Literal[1, 3] = 3,
        short_side: int | None = None,
        images: int | None = None,
        pictures: int = 8,
        feature_batch: int = 16,
        workers: int | None = None,
    ):
        super().__init__(
            data=data,
            split=split,
            images=images,
            pictures=pictures,
            feature_batch=feature_batch,
            workers=workers,
        )
        require(clips >= 1, "video.clips", clips, "must be at least 1")
        self.views = Views(
            sampling=sampling,
            stride=stride,
            span=span,
            clips=clips,
            crops=crops,
            short_side=short_side,
        )

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: a classifier of the card's classes, on clips."""
        check_classifier(model, self.card, f"video/{self.data}")
        if model.encoder.frames is None:
            raise ValueError(
                f"video/{self.data}: this model takes images. Fine-tuning on videos makes one that takes "
                f"clips: --stage finetune/k400_b, from this model with --init."
            )
        self.views.of(model.encoder)

    def open(self, split: str) -> Source:
        """See Evaluator.open: a split must have labelled videos."""
        source = super().open(split)
        if lacking := [field for field in ("video", "label") if field not in source.fields]:
            raise ValueError(
                f"video: {self.card.name}:{split} has no {' and no '.join(lacking)} (its fields: "
                f"{', '.join(source.fields)})."
            )
        return source

    def asked(self) -> list[Any]:
        """See PictureEvaluator.asked."""
        return self.views.asked()

    def measured(
        self, model: nn.Module, source: Source, leaked: Tensor, place: Path, change: Any
    ) -> dict[str, float]:
        """See PictureEvaluator.measured."""
        source = source.only(("video", "label"))
        rows: list[dict[str, Any]] = []
        with frozen(model), self.parts(place) as parts:
            measure = lambda some: _part(model, some, self.views, self.feature_batch, self.workers)
            for _, part in by_parts(source, parts, measure, _whole):
                rows += part.get("videos", ())
            found: dict[str, float] = {}
            if distributed.is_main():
                place.mkdir(parents=True, exist_ok=True)
                found = self._metrics(rows, model.head.classes, leaked)
                write_json(place / "videos.json", rows)
                write_json(place / "classes.json", self._of_classes(rows))
                if self.pictures:
                    self._drawn(source, rows, model.encoder.frames).save(place / "sheet.png")
            found = distributed.from_main(found)
        return found | {"videos": len(source)}

    def _metrics(
        self, rows: list[dict[str, Any]], classes: int, leaked: Tensor
    ) -> dict[str, float]:
        """Of the mean over views, and of each view where there are several."""
        mean = torch.tensor([row["rank"] for row in rows])
        each = torch.tensor([row["ranks"] for row in rows])

        def measure(kept: Tensor) -> dict[str, float]:
            metrics = tops(mean[kept], classes)
            for view in range(self.views.count) if self.views.count > 1 else ():
                clip, crop = divmod(view, self.views.crops)
                of_view = tops(each[kept, view], classes)
                metrics |= {f"view/{clip}x{crop}/{top}": share for top, share in of_view.items()}
            return metrics

        return self.certify(measure, leaked)

    def _of_classes(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """The top-1 in percent of each class that some video is of."""
        right: dict[int, list[bool]] = {}
        for row in rows:
            right.setdefault(row["label"], []).append(row["rank"] == 0)
        return {self._called(c): 100.0 * sum(r) / len(r) for c, r in sorted(right.items())}

    def _called(self, number: int) -> str:
        """A class's name, or its number."""
        return self.card.classes[number] if self.card.classes else str(number)

    def _drawn(self, source: Source, rows: list[dict[str, Any]], frames: int) -> Any:
        """A sheet of some videos, the same each time: frames, label and prediction."""
        lines = []
        for index in evenly(len(source), self.pictures):
            row, clip = rows[index], middle_frames(source[index], self.views, frames)
            shown = [at_side(clip[i], side=128) for i in evenly(frames, min(_SHOWN, frames))]
            said = f"{self._called(row['predicted'])} {row['probability']:.2f}"
            colour = "darkgreen" if row["rank"] == 0 else "darkred"
            texts = [(self._called(row["label"]), "black"), (said, colour)]
            lines.append([lines_of_text(texts, shown[0].shape[-2]), *shown])
        return sheet(lines, ["label, prediction", "frames of the middle clip"])


def _part(
    model: nn.Module, source: Source, views: Views, together: int, workers: int
) -> dict[str, Any]:
    """{"videos": what is said of each, on process 0}, of a source, on all processes."""
    reader = evaluation_batches(
        source,
        views.of(model.encoder),
        batch_size=max(1, together // views.count),
        workers=workers,
    )
    rows: dict[int, dict[str, Any]] = {}
    seen = 0
    for batch in reader:
        scores = _probabilities(model, batch["clip"], together)
        mine = [
            (place, {"key": key, "label": label, **_said(each, label, key)})
            for place, key, label, each in zip(
                batch["position"], batch["key"], batch["label"].tolist(), scores
            )
            if place >= 0
        ]
        for part in distributed.all_gather_object(mine):
            seen += len(part)
            if distributed.is_main():
                rows |= dict(part)
    if seen != len(source) or distributed.is_main() and sorted(rows) != list(range(seen)):
        raise RuntimeError(f"of {len(source)} videos {seen} were seen; a result would be wrong.")
    return {"videos": [rows[place] for place in range(seen)] if distributed.is_main() else []}


def _whole(part: dict[str, Any], count: int) -> bool:
    """Whether this is what `_part` gives of so many videos."""
    return len(part["videos"]) == count and all("ranks" in row for row in part["videos"])


def _probabilities(model: nn.Module, clips: Tensor, together: int) -> Tensor:
    """uint8 [B, views, 3, T, H, W] to probabilities [B, views, classes], on the CPU."""
    flat = clips.flatten(0, 1)
    parts = [to_device({"clip": part})["clip"] for part in flat.split(together)]
    scores = torch.cat([model.scores(part).softmax(1).cpu() for part in parts])
    return scores.unflatten(0, clips.shape[:2])


def _said(scores: Tensor, label: int, key: str) -> dict[str, Any]:
    """What is said of a video by its views' probabilities [views, classes]: how many classes are
    likelier than its own, by their mean and by each, and which is the likeliest."""
    if not 0 <= label < scores.shape[1]:
        raise ValueError(f"{key}: label {label} is none of the {scores.shape[1]} classes.")
    mean = scores.mean(0, keepdim=True)
    (rank,) = ranks(mean, torch.tensor([label])).tolist()
    predicted = int(mean.argmax())
    return {
        "predicted": predicted,
        "probability": round(float(mean[0, predicted]), 4),
        "rank": rank,
        "ranks": ranks(scores, torch.full((len(scores),), label)).tolist(),
    }
