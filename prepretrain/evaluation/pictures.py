"""What evaluators share that look at each picture of one split, as it is and corrupted, and keep what a
model says of it in a run's folder `predictions/`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from torch import Tensor, nn

from prepretrain.data.sources.base import Source, fingerprint_of
from prepretrain.data.subset import evenly, evenly_spaced
from prepretrain.evaluation import corruptions as makers
from prepretrain.evaluation import leaks
from prepretrain.evaluation.evaluators.base import WITHOUT_LEAKS, Evaluator, decoding, require
from prepretrain.evaluation.feature_store import file_name
from prepretrain.evaluation.features import fingerprint, state
from prepretrain.evaluation.parts import forget


class PictureEvaluator(Evaluator):
    """An evaluator that looks at each picture, or video, of one split.

    A subclass says what is `measured` of them, and what that depends on: the options that `asked` names,
    and `version`, which is raised when the way from a picture to what is counted changes.
    `averaged`: of the metrics whose mean over corruptions is a result, what stands before its name.
    """

    version: ClassVar[int]
    averaged: Mapping[str, str] = {}

    def __init__(
        self,
        *,
        data: str,
        split: str,
        images: int | None,
        pictures: int,
        feature_batch: int,
        workers: int | None,
        corruptions: tuple[str, ...] = (),
        severities: tuple[int, ...] = makers.SEVERITIES,
        frost: str | None = None,
    ):
        super().__init__(data=data)
        kind = type(self).__module__.rpartition(".")[2]
        require(feature_batch >= 1, f"{kind}.feature_batch", feature_batch, "must be at least 1")
        self.kind, self.split = kind, split
        self.splits, self.certified = (split,), split
        self.images, self.pictures = images, pictures
        self.feature_batch, self.workers = feature_batch, decoding(workers)
        self.corruptions = makers.chosen(kind, corruptions, severities, "imagenet")
        self.severities = tuple(severities)
        self.textures = makers.textures_of(self.corruptions, frost, kind)

    def measured(
        self, model: nn.Module, source: Source, leaked: Tensor, place: Path, change: Any
    ) -> dict[str, float]:
        """Metrics of a source's pictures, as they are or changed; what is said of them is written to the
        folder `place`. leaked: see Evaluator.certify."""
        raise NotImplementedError

    def asked(self) -> list[Any]:
        """The options that what is found depends on."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, sources: dict[str, Source]) -> None:
        """Computes what all measurements of a run share. sources: of each split the pictures measured, of
        others all."""

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """See the class."""
        sources = self.open_data()
        whole = sources[self.split]
        leaked = self.leaked(whole)[evenly(len(whole), self.images)]
        source = evenly_spaced(whole, self.images)
        self.prepare(model, sources | {self.split: source})
        place = folder / "predictions" / self._name(model, source)
        metrics = self.measured(model, source, leaked, place, None)
        if self.corruptions:
            measure = lambda change, name: self.measured(
                model, source, leaked, place / name, change
            )
            metrics |= self._corrupted(measure, metrics)
        return metrics

    def _name(self, model: nn.Module, source: Source) -> str:
        """Of a folder for what is found: another for other weights, data or options. Not while the
        model is training, where nothing is kept but the last."""
        name = file_name(f"{self.kind}-{self.card.name}-{self.split}")
        if not self.cache:
            return name
        asked = [self.version, *self.asked(), *state(source), len(source)]
        asked += [] if self.leaks is None else leaks.state(self.leaks)
        return f"{name}-{fingerprint_of([fingerprint(model), *asked])}"

    @contextmanager
    def parts(self, place: Path) -> Iterator[Path | None]:
        """Where `by_parts` keeps parts of what goes to the folder `place`; they are removed when the block
        ends without an error. None while the model is training, where none are kept."""
        folder = place / "parts" if self.cache else None
        yield folder
        if folder is not None:
            forget(folder)

    def _corrupted(
        self, measure: Callable[[makers.Corrupt, str], dict[str, float]], clean: dict[str, float]
    ) -> dict[str, float]:
        """Metrics under each corruption and severity, and their means (arXiv 1907.07484): `mPC`, over all
        corruptions, and `rPC`, its share of the clean metric in percent.

        measure: of a corruption, and what its results are called.
        """
        quoted = {
            f"{key}{end}": (before, end)
            for key, before in self.averaged.items()
            for end in ("", WITHOUT_LEAKS)
            if f"{key}{end}" in clean
        }
        found: dict[str, float] = {}
        for name in self.corruptions:
            for severity in self.severities:
                where = f"corruption/{name}/{severity}"
                change = makers.Corrupt(name, severity, "imagenet", self.textures)
                metrics = measure(change, where)
                found |= {f"{where}/{key}": metrics[key] for key in quoted}
            for key in quoted:
                each = [found[f"corruption/{name}/{level}/{key}"] for level in self.severities]
                found[f"corruption/{name}/{key}"] = fmean(each)
        for key, (before, end) in quoted.items():
            mean = fmean(found[f"corruption/{name}/{key}"] for name in self.corruptions)
            found[f"{before}mPC{end}"] = mean
            if clean[key] > 0:
                found[f"{before}rPC{end}"] = 100 * mean / clean[key]
        return found
