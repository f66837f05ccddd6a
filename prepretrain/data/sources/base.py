"""What every way of reading samples has in common."""

import copy
import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from prepretrain import plugin
from prepretrain.data.sampling.weights import Weights
from prepretrain.data.tags.hashtags import Tags, of_lists
from prepretrain.data.tags.vocabulary import tags_in
from prepretrain.data.transforms import BadImage, decode

FIELDS = {
    "image": "the bytes of an image file, as it lies on disk",
    "video": "a handle whose frames are decoded when they are read: data/video/handles.py, Clip",
    "label": "int, the number of the class",
    "hashtags": "list of str, as people wrote them",
    "text": "str, one caption",
    "captions": "list of str, several texts that each say what is in the image",
    # numpy's arrays, of the image's size
    "label_map": "uint8 [H, W], the number of each pixel's class; 255 where it has none",
    "depth": "float32 [H, W], metres to each pixel; 0 where it is not known",
    # numpy's arrays, a row an object
    "boxes": "float64 [n, 4], left, top, right and bottom in pixels, as far as they may go",
    "classes": "int64 [n], the number of the class",
    "crowds": "bool [n], whether it is a region of many objects that are not told apart",
    "areas": "float64 [n], pixels of the mask, by which metrics tell small from large",
    "masks": "n of polygons [[x, y, x, y, …], …] or run lengths {size, counts}: data/dense/masks.py",
    # of an image with objects
    "image_id": "int, by which a file of results names it",
    "size": "(height, width) that boxes and masks are of",
    "negative": "int64, the classes that are known not to be in it (LVIS)",
    "not_exhaustive": "int64, the classes of which it may show more than are marked (LVIS)",
}


class Source:
    """A map-style set of samples: a length, and a sample for each number; order is the loader's.

    A sample holds "key" (str) and those of `FIELDS` that the source's `fields` name. `groups` are
    the sizes of the parts that are cheap to read together (shards). `fingerprint` says what the
    data is, wherever it lies; `stamp` changes whenever a file of it is written anew, for what is kept
    of the data between evaluations ("" where no file is read). `weights` say how often training takes
    each sample, where a curation decided that; an evaluation reads all. A field of your own is a line more, as in
    `Source.FIELDS["normal"] = "float32 [H, W, 3], of length 1"`.
    """

    FIELDS = FIELDS  # what a sample may hold
    fields: tuple[str, ...] = ("image",)
    classes: list[str] | None = None
    categories: list[dict] | None = None  # of each class {"id", "name", …}, where it has objects
    left_out: Mapping[str, int] = {}  # how many files of which kind are not read
    groups: list[int]
    open_at_once: int | None = None  # of the groups, where reading another means opening it anew
    fingerprint: str
    stamp: str = ""
    reads_ahead: bool = False  # whether `read_ahead` does anything
    cached: int = 0  # bytes of one shard of each store, which a process needs in the cache to read
    weights: Weights | None = None

    def __len__(self) -> int:
        return int(sum(self.groups))

    def __getitem__(self, index: int) -> dict:
        raise NotImplementedError

    @classmethod
    def class_names(cls, **options: Any) -> list[str] | None:
        """The `classes` of a source with these options, where it costs little to know them: the
        images are not looked at. None where it does not."""
        return None

    def only(self, fields: Iterable[str]) -> "Source":
        """The same samples, of which only these fields are read: a flaw in another loses no image."""
        narrowed, wanted = copy.copy(self), set(fields)
        narrowed.fields = tuple(name for name in self.fields if name in wanted)
        return narrowed

    def read_ahead(self, indexes: np.ndarray) -> None:
        """These images will be read soon: what lies far away may be fetched meanwhile."""

    def keep_open(self, shards: int) -> None:
        """Holds at most so many shards of each store open from now on, and none until one is read."""

    def key(self, index: int) -> str:
        """The key alone, without reading the image where the source can."""
        return self[index]["key"]

    def label(self, index: int) -> int:
        """The label alone, without reading the image where the source can."""
        return self[index]["label"]

    def labels(self) -> list[int]:
        """The labels of all images."""
        return [self.label(index) for index in range(len(self))]

    def hashtags(self, index: int) -> list[str]:
        """The hashtags alone, without reading the image where the source can."""
        return self[index]["hashtags"]

    def tags_of_group(self, group: int, of: Literal["hashtags", "captions"] = "hashtags") -> Tags:
        """The hashtags, or the words of the captions, of all images of a group (see `groups`), without
        the images."""
        first = sum(self.groups[:group])
        bad: list[BadImage] = []
        return of_lists(
            (self._tags(index, of, bad) for index in range(first, first + self.groups[group])), bad
        )

    def _tags(
        self, index: int, of: Literal["hashtags", "captions"], bad: list[BadImage]
    ) -> list[str]:
        try:
            return tags_in(self.texts(index), of) if of == "captions" else self.hashtags(index)
        except BadImage as error:
            bad.append(error)
            return []

    def classes_shown(self, index: int) -> list[int]:
        """The classes of an image's objects, each once and without crowds, without reading the image
        where the source can."""
        sample = self[index]
        return np.unique(sample["classes"][~sample["crowds"]]).tolist()

    def texts(self, index: int) -> dict:
        """{"text", "captions"} as far as there are, without the image where the source can."""
        sample = self[index]
        return {name: sample[name] for name in ("text", "captions") if name in sample}


class Files(Source):
    """Image files below a folder; the key of each is its path from there, as in "cat/1.jpg"."""

    def __init__(
        self, path: str | Path, names: list[str], labels: list[int] | None, *, border: int = 0
    ):
        """`border` pixels are cut off each side of every image."""
        self.path, self.border = Path(path), border
        files = [os.stat(self.path / name) for name in names]
        self.fingerprint = fingerprint_of(f"{n} {f.st_size}" for n, f in zip(names, files))
        self.stamp = stamp_of(files)
        if border:
            self.fingerprint = fingerprint_of([self.fingerprint, border])
        self.fields = ("image",) if labels is None else ("image", "label")
        self.groups = [len(names)]
        # Arrays, not lists: a list's reference counts make every forked worker copy its pages.
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._names = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._labels = None if labels is None else np.array(labels, dtype=np.int32)

    def __getitem__(self, index: int) -> dict:
        name = self.key(index)
        image = (self.path / name).read_bytes()
        sample = {"key": name, "image": _without_border(image, self.border, name)}
        return sample | {"label": self.label(index)} if "label" in self.fields else sample

    def key(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._names[start : self._ends[index]].tobytes())

    def label(self, index: int) -> int:
        return int(self._labels[index])


def check_names(names: list[str], path: str, listing: str) -> None:
    """Raises ValueError unless each image of a list is there, below the folder, and named once."""
    if not names:
        raise ValueError(f"{listing}: names no image.")
    if outside := [name for name in names if ".." in name.split("/")]:
        raise ValueError(f"{listing}: '{outside[0]}' lies outside {path}.")
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))
        raise ValueError(f"{listing}: names '{twice}' twice.")
    missing = [name for name in names if not os.path.isfile(os.path.join(path, name))]
    if missing:
        raise ValueError(
            f"{listing}: {len(missing):,} of its {len(names):,} images are not below {path}: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}."
        )


def check_fields(names: Iterable[str], where: str) -> None:
    """Raises ValueError for a field that no sample may hold: see Source.FIELDS."""
    for name in names:
        if name not in FIELDS:
            known = plugin.unknown(f"{where}: fields: no field", name, list(FIELDS), quote=True)
            raise ValueError(
                f"{known} Add one of your own: Source.FIELDS['{name}'] = 'what it is'."
            )


def _without_border(data: bytes, border: int, key: str) -> bytes:
    if not border:
        return data
    try:
        pixels = decode(data).permute(1, 2, 0).numpy()
    except BadImage as error:
        raise BadImage(error.cause, error.detail, key) from error
    if min(pixels.shape[:2]) <= 2 * border:
        raise BadImage("all border", f"{pixels.shape[:2]} without {border} on each side", key)
    file = io.BytesIO()
    inner = np.ascontiguousarray(pixels[border:-border, border:-border])
    Image.fromarray(inner).save(file, "PNG", compress_level=1)  # fast, and loses nothing
    return file.getvalue()


def stamp_of(files: Iterable[os.stat_result]) -> str:
    """A short hash of when each file last changed."""
    times = np.array([file.st_mtime_ns for file in files], dtype=np.int64)
    return hashlib.sha256(times.tobytes()).hexdigest()[:16]


def fingerprint_of(parts: Iterable[object]) -> str:
    """A short hash over the text of the parts, in order."""
    digest = hashlib.sha256()
    for part in parts:
        text = str(part).encode(errors="surrogatepass")  # names of files need not be UTF-8
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()[:16]
