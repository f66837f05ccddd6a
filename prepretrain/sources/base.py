"""What every way of reading samples has in common."""

import hashlib
from collections.abc import Iterable

FIELDS = ("image", "label", "hashtags", "text", "captions")


class Source:
    """A map-style set of samples: a length, and a sample for each number; order is the loader's.

    A sample holds "key" (str), "image" (the file's bytes), and, where the source has them, "label"
    (int), "hashtags" (list of str), "text" (str) and "captions" (list of str, several texts that each
    say what is in the image); `fields` names those it has. `groups` are the
    sizes of the parts that are cheap to read together (shards). `fingerprint` says what the data
    is, wherever it lies.
    """

    fields: tuple[str, ...] = ("image",)
    classes: list[str] | None = None
    groups: list[int]
    fingerprint: str

    def __len__(self) -> int:
        return int(sum(self.groups))

    def __getitem__(self, index: int) -> dict:
        raise NotImplementedError

    def label(self, index: int) -> int:
        """The label alone, without reading the image where the source can."""
        return self[index]["label"]

    def hashtags(self, index: int) -> list[str]:
        """The hashtags alone, without reading the image where the source can."""
        return self[index]["hashtags"]

    def texts(self, index: int) -> dict:
        """{"text", "captions"} as far as there are, without the image where the source can."""
        sample = self[index]
        return {name: sample[name] for name in ("text", "captions") if name in sample}


class Subset(Source):
    """Some images of a source, in the order of their numbers given."""

    def __init__(self, source: Source, indexes: list[int]):
        self.source, self.indexes = source, indexes
        self.fields, self.classes, self.groups = source.fields, source.classes, [len(indexes)]
        self.fingerprint = fingerprint_of([source.fingerprint, *indexes])

    def __getitem__(self, index: int) -> dict:
        return self.source[self.indexes[index]]

    def label(self, index: int) -> int:
        return self.source.label(self.indexes[index])

    def hashtags(self, index: int) -> list[str]:
        return self.source.hashtags(self.indexes[index])

    def texts(self, index: int) -> dict:
        return self.source.texts(self.indexes[index])


def fingerprint_of(parts: Iterable[object]) -> str:
    """A short hash over the text of the parts, in order."""
    digest = hashlib.sha256()
    for part in parts:
        text = str(part).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()[:16]
