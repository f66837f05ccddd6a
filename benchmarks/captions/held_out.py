"""A source outside of the package: captioned photos in shards, of which a fixed fifth is held out."""

import hashlib
from typing import Literal

from prepretrain.data.sources.base import Source, fingerprint_of
from prepretrain.data.sources.shards import Shards


class HeldOut(Source):
    """The photos of one part; which part a photo is in follows from its bytes, so that equal photos
    are in one. Labels are the `articleType` of the json, where there is one, and hashtags its
    `tags`."""

    def __init__(self, *, path: str, part: Literal["train", "val"], also: list[str] | None = None):
        """also: more folders of shards, whose photos come after; then images are all there is."""
        self.shards = [Shards(path=p, hashtags="json.tags") for p in (path, *(also or []))]
        self.places = [
            (shards, index)
            for shards in self.shards
            for index in range(len(shards))
            if (held_out(shards[index]["image"])) == (part == "val")
        ]
        self.groups = [len(self.places)]
        self.fingerprint = fingerprint_of([part, *(s.fingerprint for s in self.shards)])
        self.fields = ("image",) if also else self.shards[0].fields
        kinds = Shards(path=path, text="json.articleType")
        if not also and "text" in kinds.fields:
            self.kinds = [kinds.texts(i)["text"] for i in range(len(kinds))]
            self.classes = sorted(set(self.kinds))
            self.fields += ("label",)

    def __getitem__(self, index: int) -> dict:
        shards, number = self.places[index]
        sample = shards[number]
        return sample | ({"label": self.label(index)} if "label" in self.fields else {})

    def label(self, index: int) -> int:
        return self.classes.index(self.kinds[self.places[index][1]])

    def hashtags(self, index: int) -> list[str]:
        shards, number = self.places[index]
        return shards.hashtags(number)

    def texts(self, index: int) -> dict:
        shards, number = self.places[index]
        return shards.texts(number)


def held_out(image: bytes) -> bool:
    """Whether a photo is one of the fifth that no training sees."""
    return int(hashlib.sha256(image).hexdigest(), 16) % 5 == 0
