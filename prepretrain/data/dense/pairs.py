"""Images with a map each: a file of the same size that says something of every pixel (its class, its
depth)."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prepretrain.data.io.names import is_image
from prepretrain.data.sources.base import Files, check_names, fingerprint_of
from prepretrain.data.transforms import BadImage, header, orientation

_SHOWN = 3  # files that an error names
_FIRST = 8  # not from the paper: maps that are looked at when a run starts


class Pairs(Files):
    """Image files and their maps; a subclass says what a map is read as.

    An image and its map have the same path below their two folders, but for their endings.
    """

    field: str  # of the sample, that the map is

    def __init__(
        self, *, path: str, maps: str, listing: str | None, endings: tuple[str, str], read: str
    ):
        """read: what `_value` depends on beside the files, for the fingerprint."""
        for folder in (path, maps):
            if not os.path.isdir(folder):
                raise ValueError(f"{folder}: is no folder; looked at {os.path.abspath(folder)}.")
        images, found = _listed(listing, endings) if listing else _paired(path, maps, endings)
        check_names(images, path, listing or path)
        missing = [name for name in found if not os.path.isfile(os.path.join(maps, name))]
        if missing:
            raise ValueError(
                f"{maps}: {len(missing):,} of {len(images):,} images have no map; there is no "
                f"{', '.join(missing[:_SHOWN])}{', …' if missing[_SHOWN:] else ''}."
            )
        super().__init__(path, images, None)
        self.fields = ("image", self.field)
        self.maps = Files(maps, found, None)
        self.fingerprint = fingerprint_of([self.fingerprint, self.maps.fingerprint, read])
        self.stamp = fingerprint_of([self.stamp, self.maps.stamp])

    def __getitem__(self, index: int) -> dict:
        name, sample = self.key(index), {"key": self.key(index)}
        data = (self.path / name).read_bytes()
        if "image" in self.fields:
            sample["image"] = data
        if self.field in self.fields:
            sample[self.field] = self.map(index, data)
        return sample

    def map(self, index: int, image: bytes) -> np.ndarray:
        """The map of an image, as the sample holds it. Raises BadImage, which names its file."""
        file = self.maps.path / self.maps.key(index)
        try:
            found = self._value(*_read(file))
            self._check_size(found, image)
        except BadImage as error:
            raise BadImage(error.cause, f"{file}: {error.detail}", self.key(index)) from error
        return found

    def check_maps(self) -> None:
        """Reads some maps, spread evenly, so that what is wrong with all is known before any time is
        spent. Raises ValueError."""
        count = len(self)
        for index in sorted({i * count // _FIRST for i in range(_FIRST)}):
            try:
                self[index]
            except BadImage as error:
                raise ValueError(str(error)) from error

    def _value(self, pixels: np.ndarray, colours: list[list[int]]) -> np.ndarray:
        """What the sample holds of the numbers in a map's file, and of the colours that an indexed
        picture shows them in. Raises BadImage."""
        raise NotImplementedError

    def _check_size(self, found: np.ndarray, image: bytes) -> None:
        width, height = header(image).size
        if orientation(image) > 4 and found.shape == (width, height):
            width, height = height, width  # a photo on its side, whose map is upright
        if found.shape != (height, width):
            rows, columns = found.shape
            said = f"is {columns} x {rows} pixels, and its image {width} x {height}"
            raise BadImage("map of another size", said)


def _read(file: Path) -> tuple[np.ndarray, list[list[int]]]:
    """The numbers in a map's file, [H, W], and its palette, if it has one. Raises BadImage for
    colours, and for what cannot be read."""
    palette: list[int] = []
    try:
        if file.suffix == ".npy":
            found = np.load(file, allow_pickle=False)
        else:
            image = header(file.read_bytes())
            found = np.asarray(image)  # of an indexed picture the numbers, not the colours
            palette = image.getpalette() or []
    except BadImage:
        raise
    except Exception as error:  # Pillow's parsers raise anything on garbage
        raise BadImage("unreadable map", str(error)) from error
    if found.ndim != 2:
        raise BadImage(
            "map of colours",
            f"has {(1, *found.shape)[-1]} channels. A map has one number a pixel: turn its "
            f"colours into numbers first",
        )
    return found, [palette[i : i + 3] for i in range(0, len(palette), 3)]


def _paired(path: str, maps: str, endings: tuple[str, str]) -> tuple[list[str], list[str]]:
    """The images below a folder that end with the first of `endings`, and their maps, which end with
    the second. Without endings a map may have another extension than its image.

    Raises ValueError for an image without a map, and a map without an image.
    """
    images = {_stem(name, endings[0]): name for name in _below(path) if _fits(name, endings[0])}
    found = {_stem(name, endings[1]): name for name in _below(maps) if _fits(name, endings[1])}
    for these, those, folder, what in (
        (images, found, path, "images"),
        (found, images, maps, "maps"),
    ):
        alone = sorted(these[stem] for stem in these.keys() - those.keys())
        if alone:
            other = "map" if what == "images" else "image"
            raise ValueError(
                f"{folder}: {len(alone):,} {what} have no {other}: {', '.join(alone[:_SHOWN])}"
                f"{', …' if alone[_SHOWN:] else ''}. Remove them, or name the pairs in a list "
                f"(source.listing)."
            )
    if not images:
        raise ValueError(f"{path}: holds no image whose name ends with '{endings[0]}'.")
    stems = sorted(images)
    return [images[stem] for stem in stems], [found[stem] for stem in stems]


def _fits(name: str, ending: str) -> bool:
    if ending:
        return name.endswith(ending)
    return is_image(name.rpartition("/")[2]) or name.endswith(".npy")


def _stem(name: str, ending: str) -> str:
    return name.removesuffix(ending) if ending else name.rpartition(".")[0]


def _below(folder: str) -> Iterator[str]:
    """The paths of all files below a folder, from there; none is hidden."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        inside = os.path.relpath(place, folder)
        for name in files:
            if not name.startswith("."):
                yield name if inside == "." else f"{inside}/{name}"


def _listed(listing: str, endings: tuple[str, str]) -> tuple[list[str], list[str]]:
    """The images and the maps of a list: "image map" a line, where more words may follow, or a name
    without its ending alone. Raises ValueError, also for a line whose map is None."""
    if not os.path.isfile(listing):
        raise ValueError(f"{listing}: is no file.")
    written = Path(listing).read_text(errors="surrogateescape").removeprefix("\ufeff")
    lines = [re.split(r"\s+", line.strip()) for line in written.splitlines() if line.strip()]
    bare = [line[0] for line in lines if line[1:2] == ["None"]]
    if bare:
        raise ValueError(
            f"{listing}: {len(bare):,} images have no map (None): {', '.join(bare[:_SHOWN])}, …. "
            f"Leave their lines out."
        )
    alone = sum(len(line) == 1 for line in lines)
    if alone not in (0, len(lines)):
        raise ValueError(f"{listing}: {alone} of {len(lines)} lines name an image without its map.")
    if alone:
        names = [line[0].lstrip("/") for line in lines]
        return [name + endings[0] for name in names], [name + endings[1] for name in names]
    return [line[0].lstrip("/") for line in lines], [line[1].lstrip("/") for line in lines]
