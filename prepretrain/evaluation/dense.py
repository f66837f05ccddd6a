"""What evaluators of maps share: every picture of a split once, seen whole or window by window, at
several scales and mirrored, counted part by part."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from prepretrain.data.dense.maps import Scaled, pair
from prepretrain.data.drawing import coloured, legend, palette_of, sheet
from prepretrain.data.loader import evaluation_batches, to_device
from prepretrain.data.random import Random
from prepretrain.data.sources.base import Source
from prepretrain.data.subset import Subset, evenly
from prepretrain.data.transforms import sides
from prepretrain.distributed import group as distributed
from prepretrain.evaluation import segmentation_metrics
from prepretrain.evaluation.features import frozen
from prepretrain.evaluation.parts import by_parts
from prepretrain.evaluation.pictures import PictureEvaluator
from prepretrain.evaluation.sliding import Network, mean_of_views, slide
from prepretrain.files import write_json


class DenseEvaluator(PictureEvaluator):
    """An evaluator of a head that says something of every pixel.

    A subclass says what is counted of a picture, as a tensor that is added up over all of them, and
    what metrics its sum gives.
    """

    version = 2
    field: str  # of the samples, what a picture is compared with
    cut: tuple[int, int] | None = (
        None  # of picture and map, before all else: see data/dense/maps.py
    )

    def __init__(
        self,
        *,
        whole: bool,
        short_side: int | None = None,
        stride: int | tuple[int, int] | None = None,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        **looked_at: Any,
    ):
        """looked_at: the options of PictureEvaluator."""
        super().__init__(**looked_at)
        self.short_side, self.whole, self.stride = short_side, whole, stride
        self.scales, self.flip = tuple(scales), flip
        if whole and (short_side is not None or stride is not None or self.scales != (1.0,)):
            raise ValueError(
                f"{self.kind}.whole: fits a picture into the model's image size, so there is no "
                f"{self.kind}.short_side, {self.kind}.stride, or {self.kind}.scales. Leave them out, or "
                "set whole=false."
            )

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: windows must not leave out pixels between them."""
        stride, canvas = self._stride(model), model.encoder.image_size
        if any(step > side for step, side in zip(stride, canvas)):
            raise ValueError(
                f"{self.kind}.stride: {list(stride)} leaves gaps between windows of {list(canvas)} pixels "
                f"(model.image_size). Take a smaller one."
            )

    def _stride(self, model: nn.Module) -> tuple[int, int]:
        """Rows and columns from a window to the next."""
        if self.stride is None:
            height, width = model.encoder.image_size
            return height * 2 // 3, width * 2 // 3
        return sides(self.stride)

    def nothing(self, model: nn.Module) -> Tensor:
        """What is counted of no picture, on the CPU."""
        raise NotImplementedError

    def count(self, truth: Tensor, said: Tensor) -> Tensor:
        """What is counted of a picture: its map [H, W], and what `said_of` gave; on the CPU."""
        raise NotImplementedError

    def said_of(self, values: Tensor) -> Tensor:
        """Values [C, H, W] to what is compared with the map and drawn, [H, W]."""
        raise NotImplementedError

    def squash(self, values: Tensor) -> Tensor:
        """Values of one view to what a mean over views is taken of; not asked for a single view."""
        return values

    def metrics(self, total: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """(metrics, {name of a file: its content}) of the sum of all counts."""
        raise NotImplementedError

    def drawn(self, source: Source, said: list[Tensor], change: Any) -> Image.Image:
        """A sheet of a source's pictures, with what was said of each."""
        raise NotImplementedError

    def network(self, model: nn.Module) -> Network:
        """Normalised windows [n, 3, H, W] to values [n, C, rows, columns]: what the head says."""

        def values(windows: Tensor) -> Tensor:
            said = model.head(model.read(windows))
            return said[0] if isinstance(said, list) else said

        return values

    def asked(self) -> list[Any]:
        """See PictureEvaluator.asked; with what the numbers in maps mean."""
        seen = [self.short_side, self.whole, self.stride, self.scales, self.flip]
        return [*seen, self.card.values]

    def open(self, split: str) -> Source:
        """See Evaluator.open: a split must have maps that are as the card says; some are read."""
        source = super().open(split)
        if self.field not in source.fields:
            raise ValueError(
                f"{self.kind}: {self.card.name}:{split} has no {self.field} (its fields: "
                f"{', '.join(source.fields)}). See datasets/{self.field}s.yaml."
            )
        source.check_maps()
        return source

    def measured(
        self, model: nn.Module, source: Source, leaked: Tensor, place: Path, change: Any
    ) -> dict[str, float]:
        """See PictureEvaluator.measured."""
        total = self._nothing(model)
        with frozen(model), self.parts(place) as parts:
            measure = partial(self._part, model, leaked, change)
            for _, part in by_parts(source, parts, measure, self._is_part):
                part = distributed.from_main(part)
                total = total + torch.tensor(part["counts"], dtype=total.dtype)
            found, files = self._certified(total, leaked)
            some = Subset(source, evenly(len(source), self.pictures))
            drawn = self._drawn(model, some, change)
            if distributed.is_main():
                self._write(place, files, drawn)
        return found | {"images": len(source)}

    def _nothing(self, model: nn.Module) -> Tensor:
        """What is counted of no picture [2, …]: of those that did not leak, and of those that did."""
        return torch.stack([self.nothing(model)] * 2)

    def _certified(self, total: Tensor, leaked: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """(metrics of `_nothing`'s sums over all pictures, {name of a file: its content})."""
        _, files = self.metrics(total.sum(0))

        def measure(kept: Tensor) -> dict[str, float]:
            counts = total.sum(0) if kept.all() else total[0]
            return self.metrics(counts)[0] if kept.all() or counts.any() else {}

        return self.certify(measure, leaked), files

    def _write(self, place: Path, files: dict[str, Any], drawn: Image.Image | None) -> None:
        """Writes what was found to a folder."""
        place.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_json(place / name, content)
        if drawn is not None:
            drawn.save(place / "sheet.png")

    def _drawn(self, model: nn.Module, source: Source, change: Any) -> Image.Image | None:
        """The sheet of a source, on process 0."""
        if not len(source):
            return None
        mine = [said for _, _, said in self._seen(model, source, change)]
        said = [one for part in distributed.all_gather_object(mine) for one in part]
        return self.drawn(source, said, change) if distributed.is_main() else None

    def _is_part(self, part: dict[str, Any], count: int) -> bool:
        """Whether this is what `_part` gives of so many images."""
        return part["images"] == count and bool(part["counts"])

    def _part(
        self, model: nn.Module, leaked: Tensor, change: Any, source: Subset
    ) -> dict[str, Any]:
        """{"images", "counts"} of some pictures of those that `leaked` is of, on all processes."""
        total, images = self._nothing(model), 0
        for place, truth, said in self._seen(model, source, change):
            total[int(leaked[source.indexes[place]])] += self.count(truth, said)
            images += 1
        seen = int(distributed.all_sum(torch.tensor(images)))
        if seen != len(source):
            raise RuntimeError(
                f"of {len(source)} images {seen} were evaluated; a result would be wrong."
            )
        return {"images": seen, "counts": distributed.all_sum(total).tolist()}

    def _seen(
        self, model: nn.Module, source: Source, change: Any
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number, map, what is said), both [H, W] on the CPU, of each picture of this process."""
        canvas = model.encoder.image_size
        short = None if self.whole else self.short_side or min(canvas)
        network = partial(_together, self.network(model), self.feature_batch)
        predict = partial(slide, network, window=canvas, stride=self._stride(model))
        single = len(self.scales) == 1 and not self.flip
        squash = (lambda values: values) if single else self.squash
        reader = evaluation_batches(
            source.only(["image", self.field]),
            Scaled(
                self.field,
                short=short,
                canvas=canvas,
                scales=self.scales,
                change=change,
                cut=self.cut,
            ),
            batch_size=1,  # pictures differ in size, so windows are what a batch is made of
            workers=self.workers,
        )
        for batch in reader:
            height, width = batch["original"][0].tolist()
            images = []
            for number in range(len(self.scales)):
                rows, columns = batch[f"size_{number}"][0].tolist()
                pixels = to_device({"image": batch[f"image_{number}"]})["image"]
                images.append(model.normalise(pixels[:, :, :rows, :columns])[0])
            values = mean_of_views(predict, images, (height, width), self.flip, squash)
            if batch["position"][0] >= 0:  # else it only keeps the processes together
                truth = batch[self.field][0, :height, :width]
                yield batch["position"][0], truth, self.said_of(values).cpu()


def _together(network: Network, size: int, windows: Tensor) -> Tensor:
    """What a network says of windows, so many at once, resized to them; as many calls on every
    process, since a sharded model runs on all together."""
    calls = max(distributed.all_gather_object(math.ceil(len(windows) / size)))
    found = []
    for first in range(0, calls * size, size):
        part = windows[first : first + size]
        said = network(part if len(part) else windows[:1])
        if len(part):
            found.append(F.interpolate(said.float(), windows.shape[-2:], mode="bilinear"))
    return torch.cat(found)


class LabelMapEvaluator(DenseEvaluator):
    """Counts pixels by class and prediction."""

    headline, field, averaged = "mIoU", "label_map", {"mIoU": ""}

    def nothing(self, model: nn.Module) -> Tensor:
        """See DenseEvaluator."""
        classes = len(self.card.classes)
        return torch.zeros(classes, classes, dtype=torch.int64)

    def count(self, truth: Tensor, said: Tensor) -> Tensor:
        """See DenseEvaluator: pixels by class and prediction."""
        return segmentation_metrics.confusion(truth, said, len(self.card.classes))

    def squash(self, values: Tensor) -> Tensor:
        """See DenseEvaluator: probabilities."""
        return values.softmax(0)

    def said_of(self, values: Tensor) -> Tensor:
        """See DenseEvaluator: the class with the highest score."""
        return values.argmax(0).to(torch.uint8)

    def metrics(self, total: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """See DenseEvaluator."""
        classes = segmentation_metrics.of_classes(total, self.card.classes)
        found = segmentation_metrics.metrics(total)
        return found, {"confusion.json": total.tolist(), "classes.json": classes}

    def drawn(self, source: Source, said: list[Tensor], change: Any) -> Image.Image:
        """See DenseEvaluator."""
        palette, names = palette_of(self.card), self.card.classes
        rows = []
        for index, found in enumerate(said):
            sample = source[index]
            picture, labels = pair(sample, "label_map")
            truth = torch.from_numpy(labels)
            if change is not None:
                picture = change(picture, Random(0, 0, index))
            shown = [coloured(picture, one, palette) for one in (truth, found)]
            said_of = legend((truth, found), palette, names, shown[0].shape[-2])
            rows.append([coloured(picture), *shown, said_of])
        return sheet(rows, ["image", "label map", "prediction", "classes"])
