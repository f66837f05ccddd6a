"""A source outside of the package: photos with labels, told as noisy, partly coarse hashtags
instead."""

from prepretrain.data.random import Random
from prepretrain.data.sources.base import Source, fingerprint_of
from prepretrain.data.sources.parquet import Parquet

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
COARSE = [
    "vehicle",
    "vehicle",
    "animal",
    "animal",
    "animal",
    "animal",
    "animal",
    "animal",
    "vehicle",
    "vehicle",
]
MISSING, WRONG, COARSE_MISSING = 0.2, 0.1, 0.3


class Tagged(Source):
    """CIFAR-10's training photos with hashtags: the class's name (missing from 20 %, another
    class's in 10 %), and a coarser tag (missing from 30 %); the label itself is not among the
    fields. A photo left without any tag keeps its coarse one."""

    fields = ("image", "hashtags")

    def __init__(self, *, path: str, seed: int = 0):
        self.photos, self.seed = Parquet(path=path), seed
        self.groups = self.photos.groups
        self.fingerprint = fingerprint_of([self.photos.fingerprint, seed])

    def __getitem__(self, index: int) -> dict:
        photo = self.photos[index]
        label = photo["label"]
        missing, wrong, coarse_missing = Random(self.seed, 0, index)("tags").random(3)
        other = int(Random(self.seed, 0, index)("wrong").integers(10))
        tags = [] if missing < MISSING else ["#" + CLASSES[other if wrong < WRONG else label]]
        if coarse_missing >= COARSE_MISSING or not tags:
            tags.append("#" + COARSE[label])
        return {"key": photo["key"], "image": photo["image"], "hashtags": tags}
