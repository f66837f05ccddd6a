"""Which hashtags there are: one spelling for each, and a vocabulary counted from data."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from prepretrain.files import draft, read_json

_FORMAT = "prepretrain vocabulary 1"


def canonical(tag: str) -> str:
    """One spelling for #Red, RED and red: NFKC, casefold, no '#' or punctuation around it.

    What is left may be empty, which is no tag. Half of a surrogate pair, which JSON may hold and no
    file can, is dropped.
    """
    if tag.isascii():
        return " ".join(tag.lower().split()).strip(_AROUND)
    return _canonical(tag)


def _canonical(tag: str) -> str:
    """`canonical` for any Unicode; of ASCII, which it need not read so closely, the same."""
    tag = tag.encode(errors="ignore").decode()
    # Casefolding can undo the normal form, and the other way round; a second pass settles both.
    for _ in range(2):
        tag = unicodedata.normalize("NFKC", tag).casefold()
    tag = " ".join(tag.split())
    start, end = 0, len(tag)
    while start < end and _is_around(tag[start]):
        start += 1
    while end > start and _is_around(tag[end - 1]):
        end -= 1
    return tag[start:end]


def _is_around(sign: str) -> bool:
    """Punctuation, space or control; symbols stay, so that c++ and emoji are tags."""
    return unicodedata.category(sign)[0] in "PZC"


_AROUND = "".join(filter(_is_around, map(chr, range(128))))


class Vocabulary:
    """The tags that a head predicts, most frequent first; an id is a tag's place in that order."""

    def __init__(
        self, tags: list[str], counts: list[int], *, source: str, images: int, min_count: int
    ):
        """`source` is the fingerprint of the data with `images` images that was counted."""
        self.tags, self.counts = tags, counts
        self.source, self.images, self.min_count = source, images, min_count
        self._ids = {tag: number for number, tag in enumerate(tags)}

    @classmethod
    def count(
        cls, tags_of_images: Iterable[list[str]], *, source: str, min_count: int
    ) -> "Vocabulary":
        """Count in how many images each tag is, and keep those in at least `min_count`."""
        counter: Counter[str] = Counter()
        images = 0
        for tags in tags_of_images:
            images += 1
            counter.update({canonical(tag) for tag in tags} - {""})
        return cls.of_counts(counter, source=source, images=images, min_count=min_count)

    @classmethod
    def of_counts(
        cls, counts: Mapping[str, int], *, source: str, images: int, min_count: int
    ) -> "Vocabulary":
        """Keep those tags that are in at least `min_count` of `images` images."""
        kept = sorted((-n, tag) for tag, n in counts.items() if n >= min_count)
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
            "format": _FORMAT,
            "source": self.source,
            "images": self.images,
            "min_count": self.min_count,
            "tags": dict(zip(self.tags, self.counts)),
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
        if content.get("format") != _FORMAT:
            raise ValueError(f"{path}: is no vocabulary (its format is not '{_FORMAT}').")
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
        )
