"""What every way of reading samples has in common."""

import hashlib
from collections.abc import Iterable

FIELDS = ("image", "label", "hashtags", "text")


class Source:
    """A map-style set of samples: a length, and a sample for each number; order is the loader's.

    A sample holds "key" (str), "image" (the file's bytes), and, where the source has them, "label"
    (int), "hashtags" (list of str) and "text" (str); `fields` names those it has. `groups` are the
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


def fingerprint_of(parts: Iterable[object]) -> str:
    """A short hash over the text of the parts, in order."""
    digest = hashlib.sha256()
    for part in parts:
        text = str(part).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()[:16]
