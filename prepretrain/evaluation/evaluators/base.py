"""What an evaluator is, and the few pieces that several protocols share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prepretrain import plugin
from prepretrain.data.card import Card, check_names, load_card
from prepretrain.data.loader import loading
from prepretrain.data.sources.base import Source, fingerprint_of
from prepretrain.data.video.views import Views
from prepretrain.evaluation import leaks
from prepretrain.evaluation.features import extract, state

WITHOUT_LEAKS = "_without_leaks"  # behind a metric of the images that did not leak
SPEED = ("feature_batch", "workers")  # options that change no result but for rounding


class Evaluator:
    """A protocol: its constructor takes the options, `run` measures a model.

    `headline` is the metric that tables quote; `splits` are those of the card that it reads, so
    that missing data are known before any time is spent. `variant` is appended to the result's
    name, so that two settings of one protocol can be reported together. `certified` is the split whose
    images the results are of: a protocol that names it takes the option `leaks`, and passes its results
    through `certify`. A subclass's constructor is keyword-only, typed and checked; its signature is the
    option list, and its docstring documents each option.
    """

    headline: str
    splits: tuple[str, ...] = ()
    variant: str | None = None
    certified: str | None = None
    leaks: Path | None = None  # a curation's folder, of the data that models were trained on
    options: dict[str, Any]  # its name and every option with its value, but those of SPEED
    cache = True  # whether `run` may keep features in its folder; not of a model that is training

    def __init__(self, *, data: str):
        self.data = data
        self.card = load_card(data)

    def check(self, model: nn.Module) -> None:
        """Raises ValueError if this model cannot be measured, before any time is spent."""

    def open_data(self) -> dict[str, Source]:
        """Opens every split that is read, and the list of leaks if there is one. Raises what is wrong
        with one before any time is spent on the others."""
        sources = {split: self.open(split) for split in self.splits}
        if self.certified is not None:
            self.leaked(sources[self.certified])
        return sources

    def open(self, split: str) -> Source:
        """Opens a split. A subclass raises ValueError where it lacks what is measured."""
        return self.card.open(split)

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """Named numbers, the same on every rank; called on every rank. `folder` is the run's."""
        raise NotImplementedError

    def leaked(self, source: Source, card: Card | None = None) -> Tensor:
        """bool [n]: which images have near-copies in the data of `leaks`; none without `leaks`.

        source: all of the split `certified` of the card, by default the evaluator's. Raises ValueError
        where near-copies of it were not searched, or it is not as it was then.
        """
        if self.leaks is None:
            return torch.zeros(len(source), dtype=torch.bool)
        return leaks.read(self.leaks, f"{(card or self.card).name}:{self.certified}", source)

    def certify(
        self, measure: Callable[[Tensor], dict[str, float]], leaked: Tensor
    ) -> dict[str, float]:
        """Metrics of all images. With `leaks` also `leaked_images`, how many have near-copies in the
        training data, and each metric of the others alone, as in `top1_without_leaks`, if there are
        others.

        measure: gives the metrics of the images that bool [n] keeps. leaked: as `leaked` gives it, bool
        [n].
        """
        metrics = measure(torch.ones_like(leaked))
        if self.leaks is None:
            return metrics
        metrics["leaked_images"] = int(leaked.sum())
        if leaked.all():
            return metrics
        others = measure(~leaked)
        return metrics | {f"{name}{WITHOUT_LEAKS}": value for name, value in others.items()}

    def cards(self) -> list[tuple[Card, tuple[str, ...]]]:
        """All cards that it reads, each with the splits."""
        return [(self.card, self.splits)]

    def data_state(self) -> dict[str, Any]:
        """What it reads, as it is now: with other options alike, a result holds as long as this is
        the same. Called on every process."""
        found: dict[str, Any] = {}
        for card, splits in self.cards():
            said = [card.classes, card.names, card.templates, card.groups, card.splits]
            said += [card.values] if card.values else []
            answers = card.answers.read_bytes() if card.answers is not None else b""
            found[card.name] = fingerprint_of([*said, answers])
            found |= {f"{card.name}:{split}": state(card.open(split)) for split in splits}
        return found if self.leaks is None else found | {"leaks": leaks.state(self.leaks)}

    @classmethod
    def quoted(cls, results: dict[str, float]) -> str:
        """The key of these results that a table quotes: the headline, unless an option moved it."""
        return cls.headline

    def features_folder(self, folder: Path | None) -> Path | None:
        """Where a run keeps features, as extract's `cache`; the folder may be removed at any
        time."""
        return folder / "features" if self.cache and folder is not None else None


class ProbeEvaluator(Evaluator):
    """A protocol that learns from the features of a card's `train` and is measured on its `val`.

    data           the card
    pool, layer, share, resize: as features.extract's
    views          of a card of videos, the options of data/video/views.py's Views
    feature_batch  images at once a process, while features are computed;  workers: as data.workers
    """

    def __init__(
        self,
        *,
        data: str,
        pool: str = "class",
        layer: int | None = None,
        share: float = 0.875,
        resize: Literal["crop", "squash"] = "crop",
        views: dict[str, Any] | None = None,
        feature_batch: int = 256,
        workers: int | None = None,
    ):
        super().__init__(data=data)
        kind = type(self).__module__.rpartition(".")[2]
        self.views = Views(**plugin.check(Views, views or {}, "views"))
        require(resize in ("crop", "squash"), f"{kind}.resize", resize, "is 'crop' or 'squash'")
        require(0 < share <= 1, f"{kind}.share", share, "must lie above 0 and up to 1")
        require(feature_batch >= 1, f"{kind}.feature_batch", feature_batch, "must be at least 1")
        self.kind, self.pool, self.layer = kind, pool, layer
        self.share, self.resize = share, resize
        self.feature_batch, self.workers = feature_batch, decoding(workers)

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: a class token, where it is asked for."""
        if self.pool == "class" and model.encoder.prefix < 1:
            raise ValueError(
                f"{self.kind}.pool: this encoder has no class token. Use {self.kind}.pool=mean."
            )

    def features(
        self, model: nn.Module, split: str, source: Source, folder: Path | None
    ) -> tuple[Tensor, Tensor]:
        """Features and labels of a split of the card, from the folder's cache if they are there."""
        videos = "video" in source.fields
        batch_size = self.feature_batch
        if videos:  # as many frames as there are images of others
            frames = self.views.count * self.views.length(model.encoder)
            batch_size = max(1, batch_size // frames)
        return extract(
            model,
            source,
            name=f"{self.card.name}:{split}",
            pool=self.pool,
            layer=self.layer,
            batch_size=batch_size,
            workers=self.workers,
            share=self.share,
            resize=self.resize,
            views=self.views if videos else None,
            cache=self.features_folder(folder),
        )


class ContrastiveEvaluator(Evaluator):
    """A protocol that compares images with texts, in the space that they share.

    data           the card
    split          its split, of which each image is counted once
    share          of the image's short side that the centre crop shows
    feature_batch  images or texts at once a process;  workers: as data.workers
    """

    def __init__(
        self,
        *,
        data: str,
        split: str = "val",
        share: float = 1.0,
        feature_batch: int = 256,
        workers: int | None = None,
    ):
        super().__init__(data=data)
        kind = type(self).__module__.rpartition(".")[2]
        require(0 < share <= 1, f"{kind}.share", share, "must lie above 0 and up to 1")
        require(feature_batch >= 1, f"{kind}.feature_batch", feature_batch, "must be at least 1")
        self.kind, self.split, self.share = kind, split, share
        self.splits, self.certified = (split,), split
        self.feature_batch, self.workers = feature_batch, decoding(workers)

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: a text tower is needed, and its tokenizer."""
        model.require_text(f"{self.kind}/{self.data}")
        model.text.tokenizer()

    def images(self, model: nn.Module, source: Any, **reading: Any) -> tuple[Tensor, Tensor]:
        """The shared features [n, J] of a source's images, and their labels; reading: extract's."""
        return extract(
            model,
            source,
            pool="joint",
            batch_size=self.feature_batch,
            workers=self.workers,
            name=f"{self.card.name}:{self.split}",
            share=self.share,
            **reading,
        )


def build(name: str, *, cache: bool, **given: Any) -> Evaluator:
    """The evaluator `name` with checked options. cache: whether it may keep features in its folder;
    not of a model that is training, whose weights are others each time. Every evaluator that says whose
    images its results are of (Evaluator.certified) also takes `leaks`, a curation's folder of the
    training data."""
    kind, folder = plugin.find("evaluators", name), given.pop("leaks", None)
    options = plugin.defaults(kind) | plugin.check(kind, given, "evaluator")
    built = kind(**options)
    built.options = {"name": name} | {k: v for k, v in options.items() if k not in SPEED}
    built.cache = cache
    if folder is not None:
        rule = f"is for evaluators that say whose images they measure (Evaluator.certified); {name} does not"
        require(built.certified is not None, "leaks", folder, rule)
        built.leaks, built.options = Path(folder), built.options | {"leaks": str(folder)}
    return built


def decoding(workers: int | None) -> int:
    """How many processes decode images for each process: by default as many as load for a training."""
    require(workers is None or workers >= 0, "workers", workers, "must not be negative")
    return loading(workers)


def require(fits: bool, option: str, value: Any, rule: str) -> None:
    """Raises ValueError naming the option, the value and the rule, unless it fits."""
    if not fits:
        raise ValueError(f"{option}: {value!r} does not fit; it {rule}.")


def check_classifier(model: nn.Module, card: Card, who: str) -> None:
    """Raises ValueError unless the model has a classifier, of as many classes as the card."""
    model.require_scores(who)
    if card.classes and len(card.classes) != model.head.classes:
        raise ValueError(
            f"{who}: the card has {len(card.classes)} classes, and the model's classifier "
            f"{model.head.classes}."
        )


def class_count(card: Any, *labels: Tensor) -> int:
    """The number of classes: the card's, else one more than the largest label; labels must be in
    it."""
    low = min(int(part.min()) for part in labels)
    high = max(int(part.max()) for part in labels)
    count = len(card.classes) if card.classes else high + 1
    if low < 0 or high >= count:
        raise ValueError(
            f"{card.name}: labels run from {low} to {high}, and there are {count} classes "
            f"(0 to {count - 1}). Mend the labels, or the card's list of classes."
        )
    if count < 2:
        raise ValueError(f"{card.name}: has a single class, so there is nothing to tell apart.")
    return count


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 in percent, and top-5 where there are more than five classes. `scores` is [n,
    classes]; of equal scores the lower class comes first, on every device, and one whose score is
    -inf is not among the first at all.

    Raises RuntimeError for scores that are NaN.
    """
    return tops(ranks(scores, labels), scores.shape[1])


def tops(rank: Tensor, classes: int) -> dict[str, float]:
    """Top-1 in percent, and top-5 where there are more than five classes, of `ranks`."""
    most = (1, 5) if classes > 5 else (1,)
    return {f"top{k}": 100.0 * (rank < k).sum().item() / len(rank) for k in most}


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the right one, int64 [n]; see `accuracy`."""
    if scores.isnan().any():
        raise RuntimeError("scores are NaN, which has no rank. Did the training stay finite?")
    own, classes = scores.gather(1, labels[:, None]), torch.arange(scores.shape[1])
    before = (scores == own) & (classes.to(labels.device) < labels[:, None])
    rank = ((scores > own) | before).sum(dim=1)
    rank[own[:, 0] == -torch.inf] = scores.shape[1]
    return rank


def per_class(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1, top-5 and the mean over classes of top-1, in percent, of [n, classes] scores."""
    hit = (scores.argmax(1) == labels).double()
    count = torch.bincount(labels, minlength=scores.shape[1])
    right = torch.bincount(labels, weights=hit, minlength=scores.shape[1])
    shares = right[count > 0] / count[count > 0]
    return accuracy(scores, labels) | {"mean_per_class": 100.0 * shares.mean().item()}


def class_names(card: Card, source: Any, language: str) -> list[list[str]]:
    """Each class's names in a language of the card. Raises ValueError if there are none, or two
    classes share one."""
    if language in card.names:
        return card.names[language]
    if language != "en" or not (card.classes or source.classes):
        raise ValueError(
            f"{card.path}: has no names in '{language}' to classify by. Add "
            f"names: {{{language}: […]}}, or classes: […], in label order."
        )
    names = [[name] for name in card.classes or source.classes]
    check_names(names, f"{card.path}: classes")
    return names
