"""Images with label maps, which say the class of each pixel: for semantic segmentation."""

import numpy as np

from prepretrain.data.dense.maps import VOID
from prepretrain.data.dense.pairs import Pairs
from prepretrain.data.transforms import BadImage

_IDS = 256  # numbers that a map of 8 bits can hold
_NAMED = 5  # ids that an error names


class LabelMaps(Pairs):
    """Image files, and a picture of numbers for each, of its size.

    path     the folder of the images
    maps     the folder of their maps, with the same paths below it but for their endings
    endings  what the names of an image and of its map end with, as [_leftImg8bit.png,
             _gtFine_labelIds.png]; without them, each its extension
    listing  a text file that names the images: "image map" a line, from the two folders, or names
             without their endings
    classes  the names of the classes, in label order (of the card's key `classes`)
    ids      the number that stands for each class in the maps; without them the first is `offset`
    offset   the number of the first class, as 1 for ADE20K
    void     numbers of pixels that have no class: they are neither trained on nor measured
    palette  the colour of each class [red, green, blue], for pictures; a map that has a palette of its
             own must have these

    A number that is neither is an error, which names the file, the number and how often it comes.
    """

    field = "label_map"

    def __init__(
        self,
        *,
        path: str,
        maps: str,
        classes: list[str],
        listing: str | None = None,
        endings: tuple[str, str] = ("", ""),
        ids: tuple[int, ...] | None = None,
        offset: int = 0,
        void: tuple[int, ...] = (),
        palette: list[list[int]] | None = None,
    ):
        self.classes = list(classes)
        self.palette = _checked_palette(palette, len(self.classes))
        self.table = _table(len(self.classes), ids, offset, void)
        self.colours = {} if palette is None else {
            number: palette[label] for number, label in enumerate(self.table) if label < VOID
        }  # fmt: skip
        read = self.table.tolist()
        super().__init__(
            path=path, maps=maps, listing=listing, endings=endings, read=f"{classes} {read}"
        )

    def _value(self, pixels: np.ndarray, colours: list[list[int]]) -> np.ndarray:
        if pixels.dtype != np.uint8:
            said = f"has numbers of {pixels.dtype}, and a label map has 8 bits a pixel"
            raise BadImage("map of another type", said)
        counts = np.bincount(pixels.ravel(), minlength=_IDS)
        odd = np.flatnonzero((counts > 0) & (self.table < 0))
        if len(odd):
            some = ", ".join(f"{i} ({counts[i]:,} pixels)" for i in odd[:_NAMED])
            raise BadImage(
                "unknown id",
                f"holds {some}{', …' if odd[_NAMED:].size else ''}, which stand for none of the "
                f"{len(self.classes)} classes, nor for void. Mend the map, or the card's key values "
                f"(offset, ids, void)",
            )
        self._check_colours(counts, colours)
        found = self.table[pixels].astype(np.uint8)
        if (found == VOID).all():
            raise BadImage("all void", "has no pixel of a class")
        return found

    def _check_colours(self, counts: np.ndarray, shown: list[list[int]]) -> None:
        """Raises BadImage if a map shows one of its numbers in another colour than the card's."""
        for number, colour in self.colours.items():
            if counts[number] and number < len(shown) and shown[number] != list(colour):
                raise BadImage(
                    "other palette",
                    f"shows {number} as {shown[number]}, and the card says {list(colour)}",
                )


def _checked_palette(palette: list[list[int]] | None, classes: int) -> list[list[int]] | None:
    if palette is None:
        return None
    if len(palette) != classes or any(len(one) != 3 for one in palette):
        raise ValueError(
            f"source.palette: must be {classes} colours [red, green, blue], one a class; there are "
            f"{len(palette)}."
        )
    return palette


def _table(
    classes: int, ids: tuple[int, ...] | None, offset: int, void: tuple[int, ...]
) -> np.ndarray:
    """int64 [256], what each number of a map stands for: a class, VOID, or -1 for nothing."""
    if ids is not None and offset:
        raise ValueError("source.offset: source.ids say the number of each class already.")
    numbers = list(range(offset, offset + classes)) if ids is None else list(ids)
    if len(numbers) != classes or len(set(numbers)) != classes:
        raise ValueError(f"source.ids: must be {classes} different numbers, one a class.")
    if classes >= VOID or max(numbers, default=0) >= _IDS:
        raise ValueError(
            f"source: a map of 8 bits holds the numbers 0 to {_IDS - 1}, of at most {VOID - 1} classes; "
            f"{classes} classes from {min(numbers)} on do not fit."
        )
    if both := sorted(set(numbers) & set(void)):
        raise ValueError(f"source.void: {both[0]} is the number of a class, too.")
    table = np.full(_IDS, -1, dtype=np.int64)
    table[list(void)] = VOID
    table[numbers] = np.arange(classes)
    return table
