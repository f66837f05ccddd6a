"""Several data sets as one: what a config may name as its training data, and a source of all parts."""

import bisect
import itertools
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

import numpy as np

from prepretrain import plugin
from prepretrain.data import card, subset
from prepretrain.data.sampling.weights import joined
from prepretrain.data.sources.base import Source, fingerprint_of
from prepretrain.data.tags.hashtags import Tags
from prepretrain.data.transforms import BadImage

_MEANT = ("label", "label_map", "classes")  # fields of which classes say what they mean


class Part:
    """A part of the training data: a split of a card, and its share of the images.

    card    a card's name, with a split after a colon if it is not "train"
    share   of the images of an epoch, beside the shares of the other parts
    subset  a random part of it, as data.subset of data that are no mix
    """

    def __init__(
        self, *, card: str, share: float = 1.0, subset: str | int | dict[str, Any] | None = None
    ):
        self.address, self.share, self.subset, self.where = card, share, subset, "data.train"
        self.name, _, split = card.partition(":")
        self.split = split or "train"

    @cached_property
    def card(self) -> card.Card:
        """Its card."""
        return card.load_card(self.name)

    @property
    def choice(self) -> subset.Choice:
        """Which of its images are trained on."""
        return subset.choice("100%" if self.subset is None else self.subset, f"{self.where}.subset")


def parts(train: Any, chosen: Any) -> list[Part]:
    """What `data.train` and `data.subset` name. Raises ValueError naming the key."""
    if isinstance(train, str):
        only = Part(card=train, subset=chosen)
        only.where = "data"
        return [only]
    if chosen is not None:
        raise ValueError(
            f"data.subset: {chosen} of a mix does not say of which part. Give it to the parts, as in "
            f"data.train=[{{card: web, share: 3, subset: 10%}}, …]."
        )
    if not train:
        raise ValueError("data.train: is an empty list. Name a card, as in data.train=cifar10.")
    found = []
    for i, given in enumerate(train):
        where = f"data.train[{i}]"
        if isinstance(given, dict) and "share" not in given:
            raise ValueError(f"{where}.share: is missing, as in {{card: web, share: 3}}.")
        part = Part(**plugin.check(Part, given, where))
        part.where = where
        found.append(part)
    if not sum(part.share for part in found):
        raise ValueError("data.train: the shares of all parts are 0, so no image would be drawn.")
    return found


def name(parts: list[Part]) -> str:
    """What the data are called: cifar10, or web+shop."""
    return "+".join(part.address for part in parts)


def title(parts: list[Part]) -> str:
    """The same with all splits."""
    return " + ".join(f"{part.name}:{part.split}" for part in parts)


class Mix(Source):
    """The samples of several sources, one after another, with the fields that all of them have.

    Keys begin with the name of the part, since those of two crawls may be the same.
    """

    def __init__(self, names: list[str], sources: list[Source]):
        self.names, self.sources = names, sources
        self.firsts = [0, *itertools.accumulate(map(len, sources))]
        first, *others = sources
        common = set(first.fields).intersection(*(source.fields for source in others))
        self.fields = tuple(field for field in first.fields if field in common)
        self.classes, self.categories = first.classes, first.categories
        self.groups = [size for source in sources for size in source.groups]
        self.fingerprint = fingerprint_of(source.fingerprint for source in sources)
        self.stamp = fingerprint_of(source.stamp for source in sources)
        self.reads_ahead = any(source.reads_ahead for source in sources)
        self.cached = sum(source.cached for source in sources)
        self.weights = joined([source.weights for source in sources], [*map(len, sources)])
        if all(source.open_at_once is not None for source in sources):
            self.open_at_once = sum(source.open_at_once or 0 for source in sources)

    def only(self, fields: Iterable[str]) -> "Mix":
        """See Source.only."""
        narrowed = super().only(wanted := tuple(fields))
        narrowed.sources = [source.only(wanted) for source in self.sources]
        return narrowed

    def _find(self, index: int) -> tuple[int, int]:
        number = bisect.bisect_right(self.firsts, index) - 1
        return number, index - self.firsts[number]

    def _of(self, method: str, index: int) -> Any:
        """What a method of the part's source says of an image."""
        number, own = self._find(index)
        try:
            return getattr(self.sources[number], method)(own)
        except BadImage as error:
            key = None if error.key is None else f"{self.names[number]}/{error.key}"
            raise BadImage(error.cause, error.detail, key) from error

    def __getitem__(self, index: int) -> dict:
        sample = self._of("__getitem__", index)
        return sample | {"key": f"{self.names[self._find(index)[0]]}/{sample['key']}"}

    def key(self, index: int) -> str:
        return f"{self.names[self._find(index)[0]]}/{self._of('key', index)}"

    def label(self, index: int) -> int:
        return self._of("label", index)

    def hashtags(self, index: int) -> list[str]:
        return self._of("hashtags", index)

    def classes_shown(self, index: int) -> list[int]:
        return self._of("classes_shown", index)

    def texts(self, index: int) -> dict:
        return self._of("texts", index)

    def tags_of_group(self, group: int, of: Literal["hashtags", "captions"] = "hashtags") -> Tags:
        for source in self.sources:
            if group < len(source.groups):
                return source.tags_of_group(group, of)
            group -= len(source.groups)
        raise IndexError(f"group {group} past the last")

    def read_ahead(self, indexes: np.ndarray) -> None:
        for source, first in zip(self.sources, self.firsts):
            inside = (first <= indexes) & (indexes < first + len(source))
            if source.reads_ahead and inside.any():
                source.read_ahead(indexes[inside] - first)

    def keep_open(self, shards: int) -> None:
        for source in self.sources:
            source.keep_open(shards)


def open_together(addresses: str) -> Source:
    """The source at "card:split", or those of several, one after another, as in web+shop:train."""
    if addresses in card.card_names() or "+" not in addresses or addresses.endswith(".yaml"):
        return card.open_data(addresses)
    parts = [Part(card=address) for address in addresses.split("+")]
    return Mix([part.name for part in parts], [part.card.open(part.split) for part in parts])


def check_classes(parts: list[Part], sources: list[Source], fields: Iterable[str]) -> None:
    """Raises ValueError where labels that are trained on mean another thing in another part."""
    if not set(fields) & set(_MEANT):
        return
    named = [part.card.classes or source.classes for part, source in zip(parts, sources)]
    for part, classes in zip(parts, named):
        if classes != named[0]:
            raise ValueError(
                f"{part.where}.card: the classes of {part.address} are not those of {parts[0].address}, so "
                f"labels would not mean the same."
            )
