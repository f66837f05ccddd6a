"""Counts what the maps of a source hold, finds what cannot be used of them, and draws some."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from prepretrain.data.card import Card
from prepretrain.data.dense.boxes import upright
from prepretrain.data.dense.maps import VOID
from prepretrain.data.drawing import coloured, heights, legend, palette_of, sheet
from prepretrain.data.sources.base import Source
from prepretrain.data.transforms import BadImage


@dataclass
class Census:
    """What maps hold. pixels, images_of: of each class, and of VOID at the end; of depth maps nearest
    and farthest metres, and the pixels that are known, and all. bad: maps that cannot be used."""

    pixels: np.ndarray = field(default_factory=lambda: np.zeros(VOID + 1, dtype=np.int64))
    images_of: np.ndarray = field(default_factory=lambda: np.zeros(VOID + 1, dtype=np.int64))
    limits: tuple[float, float] = (float("inf"), 0.0)
    known: int = 0
    all: int = 0
    bad: list[BadImage] = field(default_factory=list)

    def lines(self, names: Sequence[str] | None) -> Iterator[str]:
        """What to print of it."""
        if self.all:
            low, high = self.limits
            yield f"depths of {low:g} to {high:g} m; {self.known / self.all:.1%} of the pixels are known"
            return
        whole = max(1, int(self.pixels.sum()))
        for label in [*np.argsort(-self.pixels[: len(names)], kind="stable").tolist(), VOID]:
            name = "(void)" if label == VOID else names[label]
            share, images = self.pixels[label] / whole, self.images_of[label]
            yield f"{share:8.3%} of the pixels, in {images:7,} images  {name}"


def count(source: Source) -> Census:
    """Reads all maps of a source. Raises ValueError for one without."""
    kinds = [name for name in ("label_map", "depth") if name in source.fields]
    if not kinds:
        raise ValueError(f"these data have no maps (their fields: {', '.join(source.fields)}).")
    found, narrowed = Census(), source.only(kinds)
    for index in range(len(source)):
        try:
            values = narrowed[index][kinds[0]]
        except BadImage as error:
            found.bad.append(error)
            continue
        if kinds[0] == "label_map":
            counts = np.bincount(values.ravel(), minlength=VOID + 1)
            found.pixels += counts
            found.images_of += counts > 0
        else:
            known = values[values > 0]
            low, high = found.limits
            found.limits = min(low, float(known.min())), max(high, float(known.max()))
            found.known, found.all = found.known + len(known), found.all + values.size
    return found


def draw(card: Card, source: Source, indexes: Sequence[int]) -> Image.Image:
    """A sheet of some images, each beside its map."""
    rows = []
    for sample in (source[index] for index in indexes):
        values = torch.from_numpy(sample["label_map" if "label_map" in sample else "depth"])
        picture = upright(sample["image"], values.shape)
        if "depth" in sample:
            limits = float(values[values > 0].min()), float(values.max())
            rows.append([coloured(picture), heights(values, *limits)])
            continue
        palette = palette_of(card)
        shown = coloured(picture, values, palette)
        names = legend([values], palette, card.classes, shown.shape[-2])
        rows.append([coloured(picture), shown, names])
    return sheet(rows, ["image", "map", "classes"][: len(rows[0])])
