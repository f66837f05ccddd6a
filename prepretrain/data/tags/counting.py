"""Counts the hashtags of a source by a map over its groups, in all cores' processes."""

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from prepretrain.data.shards.cache import readers
from prepretrain.data.shards.on_cores import cores, on_cores
from prepretrain.data.sources.base import Source
from prepretrain.data.tags.hashtags import Tags
from prepretrain.data.tags.vocabulary import Merged, Vocabulary
from prepretrain.data.transforms import BadImage
from prepretrain.distributed import heartbeat

logger = logging.getLogger(__name__)

_FEW = 5  # examples of what is wrong


@dataclass
class Counts:
    """In how many of so many images each tag is; how many of them cannot be read, and some of these;
    what is wrong with files beside the shards."""

    tags: Counter[str] = field(default_factory=Counter)
    images: int = 0
    bad: int = 0
    few: list[BadImage] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        """Takes over the counts of other images."""
        self.tags.update(other.tags)
        self.images += other.images
        self.bad += other.bad
        self.few = (self.few + other.few)[:_FEW]
        self.said += other.said

    def log(self) -> None:
        """Says what could not be read, and which files beside shards were not taken."""
        if self.bad:
            few = "; ".join(map(str, self.few)) + ("; …" if self.bad > len(self.few) else "")
            logger.warning(
                "the hashtags of %d images cannot be read, and are none: %s", self.bad, few
            )
        if self.said:
            few = "; ".join(self.said[:_FEW]) + ("; …" if len(self.said) > _FEW else "")
            logger.warning(
                "the tags of %d shards come from their members, because the file beside them "
                "disagrees: %s",
                len(self.said),
                few,
            )


def count_groups(source: Source, rank: int = 0, world_size: int = 1) -> Counts:
    """The hashtags of every world_size-th group (shard), from number `rank` on. The counts of all
    ranks, put together by Counts.add, are those of the source; any engine can call it on any machine."""
    total = Counts()
    for group in range(rank, len(source.groups), world_size):
        total.add(_counted(source.tags_of_group(group)))
    return total


def count(
    source: Source,
    place: Path,
    *,
    min_count: int,
    most: int | None = None,
    of: Literal["hashtags", "captions"] = "hashtags",
    label: Callable[[str, int], str | None] | None = None,
    merged: Callable[[set[str]], Merged | None] = lambda labels: None,
    processes: int | None = None,
) -> tuple[Vocabulary, np.ndarray, Counts]:
    """The vocabulary of a source (see Vocabulary.count), int32 [images], the rarest label of each image
    (see rarest.read), and the counts of its tags; `label` is called once for each tag, with its count.

    Shards are read once: which image has which tag lies in a folder in `place` meanwhile, three or
    four bytes for each tag of each image.
    """
    groups, processes = range(len(source.groups)), _processes(source, processes)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".tags-") as folder:
        file = lambda group: Path(folder, f"{group}.npz")

        def count_tags(group: int) -> Counts:
            tags = source.tags_of_group(group, of)
            tags.save(file(group))
            return _counted(tags)

        total = Counts()
        for counts in on_cores(count_tags, groups, processes):
            total.add(counts)
        labels = total.tags
        if label is not None:
            names = {tag: label(tag, uses) for tag, uses in total.tags.items()}
            count_labels = lambda group: Tags.load(file(group)).named(names).counts()
            labels = sum(map(Counter, on_cores(count_labels, groups, processes)), Counter())
        vocabulary = Vocabulary.of_counts(
            labels,
            source=source.fingerprint,
            images=total.images,
            min_count=min_count,
            most=most,
            merged=merged,
        )
        rarest = lambda group: Tags.load(file(group)).rarest(vocabulary)
        return vocabulary, _joined(on_cores(rarest, groups, processes)), total


def rank(
    source: Source, vocabulary: Vocabulary, groups: Sequence[int]
) -> tuple[Counts, np.ndarray]:
    """The counts of some groups, and int32, the rarest tag of each of their images."""

    def of_one(group: int) -> tuple[Counts, np.ndarray]:
        tags = source.tags_of_group(group, vocabulary.of)
        return _counted(tags), tags.rarest(vocabulary)

    total, ids = Counts(), []
    for counts, rarest in on_cores(of_one, groups, _processes(source, None)):
        heartbeat.beat(f"the hashtags of {total.images} images")
        total.add(counts)
        ids.append(rarest)
    return total, _joined(ids)


def _processes(source: Source, asked: int | None) -> int:
    """How many processes count a source: as many as asked for, or as cores and the shard cache allow,
    where each of them holds a shard."""
    source.keep_open(1)
    return min(cores(), readers(source.cached)) if asked is None else asked


def _counted(tags: Tags) -> Counts:
    said = [tags.said] if tags.said else []
    return Counts(Counter(tags.counts()), tags.images, len(tags.bad), tags.bad[:_FEW], said)


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int32), *parts])
