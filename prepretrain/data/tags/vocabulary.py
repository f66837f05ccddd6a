"""Which labels there are: hashtags, or synsets of hashtags or of the words of captions, counted from
data."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prepretrain.data.tags.spelling import canonical, caption_words
from prepretrain.files import draft, read_json

_FORMAT = "prepretrain vocabulary 1"
_MERGED = "prepretrain vocabulary 2"  # also says how tags were merged


@dataclass(frozen=True)
class Merged:
    """How tags became labels that several of them share (data/tags/synsets.py).

    of: what the tags are: hashtags, or words of captions. rule: its options and counts, for people.
    labels: of each tag with one. names: of the labels that are synsets, a word each.
    """

    of: Literal["hashtags", "captions"]
    rule: dict[str, Any]
    labels: dict[str, str]
    names: dict[str, str]


def tags_in(sample: Mapping[str, Any], of: Literal["hashtags", "captions"]) -> list[str]:
    """A sample's hashtags, or the words of all its captions, which are of the image together."""
    if of == "hashtags":
        return sample["hashtags"]
    texts = sample.get("captions") or [sample.get("text", "")]
    return [word for text in texts for word in caption_words(text)]


class Vocabulary:
    """The labels that a head predicts, most frequent first; an id is a label's place in that order.

    Without `merged` each hashtag is a label of its own.
    """

    def __init__(
        self,
        tags: list[str],
        counts: list[int],
        *,
        source: str,
        images: int,
        min_count: int,
        merged: Merged | None = None,
    ):
        """`source` is the fingerprint of the data with `images` images that was counted."""
        self.tags, self.counts = tags, counts
        self.source, self.images, self.min_count = source, images, min_count
        self.merged = merged
        self._ids = {tag: number for number, tag in enumerate(tags)}
        if merged is not None:
            self._ids = {tag: self._ids[label] for tag, label in merged.labels.items()}

    @property
    def of(self) -> Literal["hashtags", "captions"]:
        """What samples are labelled by."""
        return "hashtags" if self.merged is None else self.merged.of

    @classmethod
    def count(
        cls,
        tags_of_images: Iterable[Iterable[str]],
        *,
        source: str,
        min_count: int,
        most: int | None = None,
        label: Callable[[str], str | None] = str,
        merged: Callable[[set[str]], Merged | None] = lambda labels: None,
    ) -> "Vocabulary":
        """Count in how many images each label is, and keep those in at least `min_count`; of these the
        `most` that are most frequent.

        label: of a tag in its one spelling, or None; by default the tag itself. merged: how tags became
        the labels that are kept.
        """
        counter: Counter[str] = Counter()
        images = 0
        for tags in tags_of_images:
            images += 1
            spellings = {canonical(tag) for tag in tags} - {""}
            counter.update({label(tag) for tag in spellings} - {None})
        return cls.of_counts(
            counter, source=source, images=images, min_count=min_count, most=most, merged=merged
        )

    @classmethod
    def of_counts(
        cls,
        counts: Mapping[str, int],
        *,
        source: str,
        images: int,
        min_count: int,
        most: int | None = None,
        merged: Callable[[set[str]], Merged | None] = lambda labels: None,
    ) -> "Vocabulary":
        """The labels that are in at least `min_count` of so many images: see `count`."""
        kept = sorted((-n, tag) for tag, n in counts.items() if n >= min_count)[:most]
        if not kept:
            best = max(counts.items(), key=lambda pair: pair[1], default=None)
            raise ValueError(
                f"no tag is in {min_count} of {images} images"
                + (
                    f"; the most frequent, '{best[0]}', is in {best[1]}. Lower min_count."
                    if best
                    else ": they have none."
                )
            )
        return cls(
            [tag for _, tag in kept],
            [-n for n, _ in kept],
            source=source,
            images=images,
            min_count=min_count,
            merged=merged({tag for _, tag in kept}),
        )

    def __len__(self) -> int:
        return len(self.tags)

    def id(self, tag: str) -> int:
        """The id of a tag in its canonical spelling; -1 for one that is not in the vocabulary."""
        return self._ids.get(tag, -1)

    def ids(self, tags: Iterable[str]) -> list[int]:
        """The ids of those tags that are in the vocabulary, each once, in order."""
        found = {self._ids.get(canonical(tag)) for tag in tags}
        return sorted(found - {None})

    def rarest(self, tags: Iterable[str]) -> int:
        """The id of the tag that the fewest images have; -1 if none is in the vocabulary."""
        return min(self.ids(tags), key=self.counts.__getitem__, default=-1)

    def check(self, source: object) -> None:
        """Raise if the vocabulary was counted from other data than this source."""
        if source.fingerprint != self.source:
            raise ValueError(
                f"the vocabulary of {len(self)} tags was counted from data {self.source}, and this "
                f"data is {source.fingerprint}: its counts and ids are not this data's. Count "
                "again: python datasets/hashtags.py CARD --min-count 100 --out FILE."
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        content = {
            "format": _FORMAT if self.merged is None else _MERGED,
            "source": self.source,
            "images": self.images,
            "min_count": self.min_count,
            "tags": dict(zip(self.tags, self.counts)),
            **({} if self.merged is None else vars(self.merged)),
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft(path) as place:
            place.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read what `save` wrote; ValueError names the file and what is wrong with it."""
        try:
            content = read_json(Path(path))
        except FileNotFoundError as error:
            raise ValueError(
                f"{path}: there is no such vocabulary. Make it: "
                f"python datasets/hashtags.py CARD --min-count 100 --out {path}."
            ) from error
        if content.get("format") not in (_FORMAT, _MERGED):
            raise ValueError(
                f"{path}: is no vocabulary (its format is not '{_FORMAT}' nor '{_MERGED}')."
            )
        tags = content.get("tags")
        if not isinstance(tags, dict) or not tags:
            raise ValueError(f"{path}: holds no tags.")
        for tag, n in tags.items():
            if canonical(tag) != tag or not tag or type(n) is not int or n < 1:
                raise ValueError(f"{path}: {tag!r}: {n!r} is no canonical tag with its count.")
        if missing := [k for k in ("source", "images", "min_count") if k not in content]:
            raise ValueError(f"{path}: lacks {', '.join(missing)}.")
        return cls(
            list(tags),
            list(tags.values()),
            source=content["source"],
            images=content["images"],
            min_count=content["min_count"],
            merged=_merged(content, path) if content["format"] == _MERGED else None,
        )


def _merged(content: dict[str, Any], path: str | Path) -> Merged:
    """What a vocabulary's file says of merged tags. Raises ValueError with the file's name."""
    found = {name: content.get(name) for name in ("of", "rule", "labels", "names")}
    if found["of"] not in ("hashtags", "captions"):
        raise ValueError(f"{path}: of: {found['of']!r} is neither hashtags nor captions.")
    for name in ("rule", "labels", "names"):
        if not isinstance(found[name], dict):
            raise ValueError(f"{path}: {name}: {str(found[name])[:40]!r} is no mapping.")
    for tag, label in found["labels"].items():
        if canonical(tag) != tag or not tag or label not in content["tags"]:
            raise ValueError(
                f"{path}: labels: {tag!r}: {label!r} is no tag with one of its labels."
            )
    for label, name in found["names"].items():
        if label not in content["tags"] or not isinstance(name, str):
            raise ValueError(f"{path}: names: {label!r}: {name!r} is no label with its name.")
    return Merged(**found)
