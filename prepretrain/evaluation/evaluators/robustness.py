"""Robustness: what is left of a classifier's accuracy on other photos of its classes, and on
corrupted ones."""

from collections.abc import Callable
from dataclasses import dataclass
from os.path import splitext
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prepretrain import plugin
from prepretrain.data.card import Card, MissingData, data_folder, load_card
from prepretrain.data.sources.base import Source
from prepretrain.data.subset import Subset, evenly
from prepretrain.distributed import group as distributed
from prepretrain.evaluation import corruptions as makers
from prepretrain.evaluation.evaluators.base import (
    WITHOUT_LEAKS,
    ProbeEvaluator,
    accuracy,
    class_count,
    require,
)
from prepretrain.evaluation.features import extract, set_aside
from prepretrain.evaluation.probing import probes

# AlexNet's errors on ImageNet-C, each the mean over five severities: mCE is in units of them (arXiv
# 1903.12261, section 4.1; the numbers are those that AugMix's imagenet.py takes from the authors).
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class _Set:
    """A set that a classifier is measured on."""

    card: Card
    source: Source
    answers: list[list[int]] | None  # the right ones of each image; None if each has one, its label
    leaked: Tensor  # bool [n]


class Robustness(ProbeEvaluator):
    """One classifier, measured on the clean `val` of its data and away from it.

    data           the card whose classes the classifier tells apart
    classifier     "own": the model's, which fine-tuning made. "linear": logistic regression on the
                   features of `train`, its L2 strength chosen on a held-out tenth. "zeroshot": the
                   texts of the classes, as evaluator zeroshot has them
    sets           cards whose `val` has the classes of `data`, or groups of them (a card's `groups`: a
                   group scores what its best class does, and only groups compete, as for
                   ImageNet-A and -R; `top1_unrestricted`: all classes compete, and one outside of the
                   groups is wrong), or several right `answers` (ReaL: an image without one is left out)
    official       the card of published corrupted images, shown whole: all 15 of ImageNet-C's kinds
                   at all five severities. Of ImageNet's 1000 classes the result is also `mce`, the
                   mean of errors that are each divided by AlexNet's
    corruptions    of evaluation/corruptions.py, done to the clean images after the crop; [all] takes
                   all 19. An image's noise is the same in every run
    severities     theirs
    table          their constants: "imagenet" for images of about 224 pixels, "cifar" for 32
    frost          the folder of the published textures, which corruption frost needs
    images         so many of each set, spread evenly over it; None takes all. `mce` of some images
                   is an estimate
    pool, layer    of "linear": as features.extract's
    names, templates: of "zeroshot", as its options
    share          of the image's short side that the centre crop shows, but of `official`
    resize         "crop": that centre; "squash": all, without keeping the aspect
    feature_batch  images or texts at once a process;  workers: as data.workers
    seed           of the held-out tenth

    Results are `top1`, `top5` where there are more than five classes, and `images` of the clean
    `val`; the same of each set under its card's name; for official images `<card>/fog/error`, for ours
    `corruption/fog/top1` (means over the severities) and `…/fog/3/top1` of one; and
    `mean_corruption_error`, the plain mean of our corruptions' errors. With `leaks` each set has leaked
    images of its own, and a corrupted image leaks where its clean one does: of a published one, the
    image of the same key but for the ending.
    """

    headline, splits, certified = "top1", ("val",), "val"

    def __init__(
        self,
        *,
        data: str,
        classifier: Literal["own", "linear", "zeroshot"] = "linear",
        sets: tuple[str, ...] = (),
        official: str | None = None,
        corruptions: tuple[str, ...] = (),
        severities: tuple[int, ...] = makers.SEVERITIES,
        table: Literal["imagenet", "cifar"] = "imagenet",
        frost: str | None = None,
        images: int | None = None,
        pool: Literal["class", "mean"] = "class",
        layer: int | None = None,
        names: Literal["card", "imagenet"] = "card",
        templates: Literal["card", "imagenet", "simple", "none"] = "card",
        share: float = 0.875,
        resize: Literal["crop", "squash"] = "crop",
        feature_batch: int = 256,
        workers: int | None = None,
        seed: int = 0,
    ):
        super().__init__(
            data=data,
            pool=pool,
            layer=layer,
            share=share,
            resize=resize,
            feature_batch=feature_batch,
            workers=workers,
        )
        kinds = ("own", "linear", "zeroshot")
        require(classifier in kinds, "robustness.classifier", classifier, f"is one of {kinds}")
        require(pool in ("class", "mean"), "robustness.pool", pool, "is 'class' or 'mean'")
        require(images is None or images >= 1, "robustness.images", images, "must be at least 1")
        self.sets = [self._set(name) for name in sets]
        self.official = None if official is None else _official(official)
        self.corruptions = makers.chosen("robustness", corruptions, severities, table)
        self.severities, self.table = tuple(severities), table
        self.textures = makers.textures_of(self.corruptions, frost, "robustness")
        self.splits = ("train", "val") if classifier == "linear" else ("val",)
        self.zeroshot = None
        if classifier == "zeroshot":
            texts = {"names": names, "templates": templates, "feature_batch": feature_batch}
            self.zeroshot = plugin.build("evaluators", "zeroshot", data=data, **texts)
        self.classifier, self.images, self.seed = classifier, images, seed

    def cards(self) -> list[tuple[Card, tuple[str, ...]]]:
        """See Evaluator.cards. Of official images the card alone: they are published as they are."""
        official = [] if self.official is None else [(self.official, ())]
        return [*super().cards(), *((card, ("val",)) for card in self.sets), *official]

    def open_data(self) -> dict[str, Source]:
        """See Evaluator.open_data: the list of leaks must know the sets, too."""
        for card in self.sets if self.leaks is not None else ():
            self.leaked(card.open("val"), card)
        return super().open_data()

    @classmethod
    def quoted(cls, results: dict[str, float]) -> str:
        """mCE, else the error under our corruptions, else the clean accuracy."""
        return next(k for k in ("mce", "mean_corruption_error", cls.headline) if k in results)

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: a classifier, a text tower or a class token, as `classifier` needs."""
        if self.classifier == "own":
            model.require_scores(f"robustness/{self.data}")
        elif self.zeroshot is not None:
            self.zeroshot.check(model)
        else:
            super().check(model)

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """Accuracies and errors in percent, each image counted once; all the data is looked for
        before any of it is measured."""
        self.check(model)
        sources = super().open_data()
        clean, leaked = self._part(sources["val"]), self.leaked(sources["val"])
        opened = [self._opened(card) for card in self.sets]
        copied = None if self.official is None else self._copied(sources["val"], leaked)
        score = self._classifier(model, sources, folder)
        scores, labels = score(clean, f"{self.card.name}:val")
        self._check_classes(scores.shape[1], clean, labels)
        leaked = self._rows(leaked)
        found = self.certify(lambda kept: accuracy(scores[kept], labels[kept]), leaked)
        found["images"] = len(labels)
        for one in opened:
            self._check_set(one, scores.shape[1])
        for one in opened:
            found |= _under(one.card.name, self._of_set(score, one))
        if copied is not None:
            found |= self._officially(score, copied, scores.shape[1])
        if self.corruptions:
            found |= self._corrupted(score, clean, leaked)
        return distributed.from_main(found)

    def _set(self, name: str) -> Card:
        card = load_card(name)
        if card.groups is not None and card.groups.of != self.card.name:
            raise ValueError(
                f"robustness.sets: '{name}' has groups of the classes of '{card.groups.of}', and the "
                f"classifier's are those of '{self.card.name}'."
            )
        return card

    def _part(self, source: Source) -> Source:
        return Subset(source, evenly(len(source), self.images)) if self.images else source

    def _rows(self, values: Tensor) -> Tensor:
        """Of values of all images those of `_part`."""
        return values[evenly(len(values), self.images)]

    def _opened(self, card: Card) -> "_Set":
        """A set's part."""
        whole, answers = card.open("val"), None
        if card.answers is not None:
            every = card.open_answers("val")
            answers = [every[i] for i in evenly(len(every), self.images)]
        return _Set(card, self._part(whole), answers, self._rows(self.leaked(whole, card)))

    def _copied(self, clean: Source, leaked: Tensor) -> Callable[[Source], Tensor]:
        """Gives of a source of published corrupted images bool [n]: which are of clean images that leaked.
        Raises ValueError for what is missing."""
        _require_official(self.official)
        if self.leaks is None:
            return lambda source: torch.zeros(len(source), dtype=torch.bool)
        numbers = {_stem(clean, number): number for number in range(len(clean))}

        def copied(source: Source) -> Tensor:
            stems = [_stem(source, number) for number in range(len(source))]
            if odd := [stem for stem in stems if stem not in numbers]:
                raise ValueError(
                    f"robustness.official: {len(odd)} images of '{self.official.name}' have a key that "
                    f"none of {self.card.name}:val has, {odd[0]!r} first, so whether they leaked is not "
                    "known. Measure them without evaluator.leaks."
                )
            return leaked[[numbers[stem] for stem in stems]]

        copied(self.official.open("val", corruption=makers.OFFICIAL[0], severity=1))
        return copied

    def _classifier(
        self, model: nn.Module, sources: dict[str, Source], folder: Path
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """(source, its name, extract's options) to scores [n, C] and labels [n]."""
        reading = {
            "share": self.share,
            "resize": self.resize,
            "batch_size": self.feature_batch,
            "workers": self.workers,
            "pool": {"own": "scores", "zeroshot": "joint"}.get(self.classifier, self.pool),
            "layer": self.layer if self.classifier == "linear" else None,
        }
        to_scores = self._fitted(model, sources, folder)

        def score(source: Source, name: str, **changed: Any) -> tuple[Tensor, Tensor]:
            features, labels = extract(model, source, name=name, **(reading | changed))
            return to_scores(features), labels

        return score

    def _fitted(
        self, model: nn.Module, sources: dict[str, Source], folder: Path
    ) -> Callable[[Tensor], Tensor]:
        """What makes scores [n, C] of features [n, D]."""
        if self.classifier == "own":
            return lambda features: features
        if self.zeroshot is not None:
            weight = self.zeroshot.weight(model, sources["val"])[0]
            return lambda features: features @ weight.T
        train, labels = self.features(model, "train", sources["train"], folder)
        classes = max(class_count(self.card, labels), len(sources["val"].classes or ()))
        with set_aside(model):
            head = probes.fit("lbfgs", train, labels, classes, seed=self.seed)
        return lambda features: probes.scores(head, features)

    def _check_classes(self, count: int, clean: Source, labels: Tensor) -> None:
        named = len(self.card.classes or clean.classes or ())
        if (named or count) != count or int(labels.max()) >= count:
            raise ValueError(
                f"robustness.classifier: '{self.classifier}' tells {count} classes apart, and "
                f"{self.card.name}:val has {named or int(labels.max()) + 1}."
            )

    def _check_set(self, one: "_Set", count: int) -> None:
        """Raises ValueError where a set's classes cannot be the classifier's."""
        card = one.card
        rows = one.answers if card.groups is None else card.groups.classes
        most = max((index + 1 for row in rows or () for index in row), default=0)
        named = 0 if card.groups else len(card.classes or one.source.classes or ())
        if most > count or named not in (0, count):
            raise ValueError(
                f"robustness.sets: '{card.name}' has {max(most, named)} classes, and the classifier "
                f"tells {count} apart, those of '{self.card.name}': they are not the same. With "
                "groups a card says which classes of another it has."
            )

    def _of_set(self, score: Callable, one: "_Set") -> dict[str, float]:
        """The accuracies of a set, by its groups or answers if it has such."""
        card, answers = one.card, one.answers
        scores, labels = score(one.source, f"{card.name}:val", labelled=answers is None)
        if answers is not None:
            counts = answered(scores, answers)
            rows = torch.tensor([i for i, right in enumerate(answers) if right])

            def top1(kept: Tensor) -> dict[str, float]:
                some = rows[kept]
                return {"top1": answered(scores[some], [answers[i] for i in some])["top1"]}

            return counts | self.certify(top1, one.leaked[rows])
        if card.groups is None:
            class_count(card, labels)
            measure = lambda kept: accuracy(scores[kept], labels[kept])
        else:
            measure = lambda kept: grouped(scores[kept], labels[kept], card.groups.classes)
        return self.certify(measure, one.leaked) | {"images": len(labels)}

    def _top1(self, scores: Tensor, labels: Tensor, leaked: Tensor) -> dict[str, float]:
        """`top1`, and with `leaks` `top1_without_leaks`."""
        measure = lambda kept: {"top1": accuracy(scores[kept], labels[kept])["top1"]}
        found = self.certify(measure, leaked)
        return {name: value for name, value in found.items() if name != "leaked_images"}

    def _officially(
        self, score: Callable, copied: Callable[[Source], Tensor], count: int
    ) -> dict[str, float]:
        """The errors on published corrupted images, and their mCE if the classes are ImageNet's."""
        card, found, errors = self.official, {}, {}
        for name in makers.OFFICIAL:
            each = []
            for severity in makers.SEVERITIES:
                whole = card.open("val", corruption=name, severity=severity)
                where = f"{card.name}/{name}/{severity}"
                scores, labels = score(self._part(whole), where, share=1.0, resize="crop")
                each.append(self._top1(scores, labels, self._rows(copied(whole))))
                found |= _under(where, each[-1])
            errors[name] = _means(each, "error", lambda tops: 100 - fmean(tops))
            found |= _under(f"{card.name}/{name}", errors[name])
        found[f"{card.name}/images"] = len(labels)
        if count != IMAGENET_CLASSES:
            return found
        for end in ("", WITHOUT_LEAKS)[: len(errors[name])]:
            found[f"mce{end}"] = mce({kind: error[f"error{end}"] for kind, error in errors.items()})
        return found

    def _corrupted(self, score: Callable, clean: Source, leaked: Tensor) -> dict[str, float]:
        """Accuracies under our corruptions, and the plain mean of the errors."""
        found, tops = {}, []
        for name in self.corruptions:
            each = []
            for severity in self.severities:
                change = makers.Corrupt(name, severity, self.table, self.textures)
                where = f"corruption/{name}/{severity}"
                scores, labels = score(clean, f"{self.card.name}:val, {where}", change=change)
                each.append(self._top1(scores, labels, leaked))
                found |= _under(where, each[-1])
            tops.append(_means(each, "top1", fmean))
            found |= _under(f"corruption/{name}", tops[-1])
        return found | _means(tops, "mean_corruption_error", lambda means: 100 - fmean(means))


def _official(name: str) -> Card:
    """The card, if it has all that mCE is over."""
    card = load_card(name)
    declared = card.corruptions("val")
    lacking = [
        f"{kind} {severity}"
        for kind in makers.OFFICIAL
        for severity in makers.SEVERITIES
        if severity not in declared.get(kind, ())
    ]
    if lacking:
        raise ValueError(
            f"robustness.official: {card.path}: val declares no {', '.join(lacking)}: all 15 "
            "corruptions at all five severities are needed. Measure fewer with corruptions."
        )
    return card


def _require_official(card: Card) -> None:
    """Raises MissingData naming each severity of the 15 corruptions that is not there."""
    missing = {k: v for k, v in card.missing("val").items() if k in makers.OFFICIAL}
    if missing:
        named = (f"{kind} {', '.join(map(str, levels))}" for kind, levels in missing.items())
        raise MissingData(
            f"robustness.official: of '{card.name}' there is no {'; '.join(named)} at "
            f"{data_folder() / str(card.splits['val']['path'])}. Complete it, or measure what there "
            "is as cards of their own, in sets."
        )


def _stem(source: Source, number: int) -> str:
    """An image's key without the ending of its file."""
    return splitext(source.key(number))[0]


def _means(
    each: list[dict[str, float]], name: str, mean: Callable[[list[float]], float]
) -> dict[str, float]:
    """The mean of the `top1` of each as `name`, and that of those without leaks, where they have such."""
    ends = [end for end in ("", WITHOUT_LEAKS) if f"top1{end}" in each[0]]
    return {f"{name}{end}": mean([one[f"top1{end}"] for one in each]) for end in ends}


def _under(prefix: str, found: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{key}": value for key, value in found.items()}


def grouped_scores(scores: Tensor, groups: list[list[int]]) -> Tensor:
    """[n, C] to [n, groups]: of each group the best of its classes."""
    return torch.stack([scores[:, group].amax(1) for group in groups], dim=1)


def grouped(scores: Tensor, labels: Tensor, groups: list[list[int]]) -> dict[str, float]:
    """Accuracies among groups, whose numbers the labels are: as `top1` and `top5`, where no other
    class competes, and as `top1_unrestricted`, where all do, and one of no group is wrong."""
    group_of = torch.full((scores.shape[1],), -1)
    for number, group in enumerate(groups):
        group_of[group] = number
    right = (group_of[scores.argmax(1)] == labels).double().mean().item()
    return accuracy(grouped_scores(scores, groups), labels) | {"top1_unrestricted": 100.0 * right}


def answered(scores: Tensor, answers: list[list[int]]) -> dict[str, float]:
    """`top1` where any of an image's answers is right ("Are we done with ImageNet?", Beyer et al.
    2020, section 4), over those that have one, `images`; and `left_out`, the others.

    Raises ValueError if none has, or their numbers differ.
    """
    if len(scores) != len(answers):
        raise ValueError(f"{len(answers)} images have answers, and {len(scores)} scores.")
    rows = [i for i, right in enumerate(answers) if right]
    if not rows:
        raise ValueError(f"none of {len(answers)} images has a right answer.")
    best = scores.argmax(1).tolist()
    hits = sum(best[i] in answers[i] for i in rows)
    return {
        "top1": 100.0 * hits / len(rows),
        "images": len(rows),
        "left_out": len(answers) - len(rows),
    }


def mce(errors: dict[str, float]) -> float:
    """The mean corruption error in percent, of each corruption's error in percent (its mean over
    the severities). Raises ValueError naming what is missing of the 15."""
    missing = [name for name in ALEXNET if name not in errors]
    if missing:
        raise ValueError(f"mCE is over 15 corruptions; {', '.join(missing)} were not measured.")
    return fmean(errors[name] / ALEXNET[name] for name in ALEXNET)
