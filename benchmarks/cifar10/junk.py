"""A source outside of the package: photos with noisy hashtags and, one for each photo, what a crawl brings
home with them: blanks, noise, text pictures, and the same few photos over and over."""

import io
import string

import numpy as np
from cifar10.tagged import CLASSES, Tagged
from PIL import Image, ImageDraw

from prepretrain.data.random import Random
from prepretrain.data.sources.base import Source, fingerprint_of

KINDS = ("blank", "repeated", "text", "noise")
REPEATED = 25  # photos that are there again and again
EVERY, FIRST = 5, 1  # of CIFAR-10's training photos; those from 0 on are the probes'


class Junk(Source):
    """Every fifth of CIFAR-10's training photos, tagged as by cifar10/tagged.py; with `junk`, then as
    many others, of each of KINDS a quarter, whose tags say nothing: a class drawn at random. Copies
    are encoded anew, with qualities of 60 to 95, by a few pixels cut, half of them mirrored."""

    fields = ("image", "hashtags")

    def __init__(self, *, path: str, junk: bool = True, seed: int = 0):
        self.photos, self.seed = Tagged(path=path, seed=seed), seed
        self.count = -(-(len(self.photos) - FIRST) // EVERY)
        self.groups = [self.count * (2 if junk else 1)]
        self.fingerprint = fingerprint_of([self.photos.fingerprint, junk, seed])

    def __getitem__(self, index: int) -> dict:
        if index < self.count:
            return self.photos[FIRST + EVERY * index]
        kind = KINDS[index % len(KINDS)]
        draw = Random(self.seed, 1, index)(kind)
        tag = "#" + CLASSES[int(draw.integers(10))]
        picture, quality = getattr(self, f"_{kind}")(draw), 75
        if kind == "repeated":
            quality = int(draw.integers(60, 96))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return {"key": f"{kind}/{index}", "image": file.getvalue(), "hashtags": [tag]}

    def _blank(self, draw: np.random.Generator) -> Image.Image:
        return Image.new("RGB", (32, 32), _colour(draw))

    def _noise(self, draw: np.random.Generator) -> Image.Image:
        return Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8))

    def _text(self, draw: np.random.Generator) -> Image.Image:
        picture = Image.new("RGB", (32, 32), _colour(draw))
        for top in (1, 11, 21):
            word = "".join(draw.choice(list(string.ascii_letters), 5))
            ImageDraw.Draw(picture).text((1, top), word, fill=_colour(draw))
        return picture

    def _repeated(self, draw: np.random.Generator) -> Image.Image:
        number = FIRST + EVERY * 7 * int(draw.integers(REPEATED))
        photo = Image.open(io.BytesIO(self.photos[number]["image"]))
        left, top = (int(n) for n in draw.integers(0, 3, 2))
        photo = photo.crop((left, top, left + 30, top + 30)).resize((32, 32))
        return photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else photo


def _colour(draw: np.random.Generator) -> tuple[int, ...]:
    return tuple(draw.integers(0, 256, 3).tolist())
