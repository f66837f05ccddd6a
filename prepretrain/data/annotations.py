"""A file of annotated objects in COCO's format: which there are, and those of one image.

The file is read through once, object by object; later an image's objects are read where they lie in
it, so that a process holds their places alone (a gigabyte of LVIS: 60 MB).
"""

import hashlib
import json
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_PARTS = ("images", "annotations", "categories")
_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_FEW = 3  # flaws of a kind that an error names


class Annotations:
    """The images of a file, in its order, and the objects of each. A class's label is the place of its
    category's id among the sorted ids.

    `left_out` counts objects that cannot be trained, of which COCO's own files hold some; boxes that
    lie partly outside of their image are cut at its edge.
    """

    def __init__(self, path: str | Path):
        """Raises ValueError for a file that contradicts itself, naming what does."""
        self.path = str(path)
        data = Path(path).read_bytes()
        self.fingerprint = hashlib.sha256(data).hexdigest()[:16]
        self._images: list[tuple[int, str, int, int]] = []
        self._categories: list[tuple[int, str]] = []
        self._columns = {name: array("q") for name in ("image", "category", "start", "end")}
        self._columns |= {"crowd": array("b"), "drawn": array("b"), "box": array("d")}
        try:
            # as latin-1 a character is a byte, so its place is that in the file
            for part, value, start, end in _elements(data.decode("latin-1"), self.path):
                getattr(self, f"_read_{part}")(value, start, end)
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(
                f"{self.path}: is not as COCO's files are: {type(error).__name__}: {error}"
            ) from error
        self._name_classes()
        self._index()

    def _read_categories(self, value: dict, *_: int) -> None:
        self._categories.append((_whole(value["id"]), _utf8(str(value.get("name", value["id"])))))

    def _read_images(self, value: dict, *_: int) -> None:
        # LVIS names a file by its address alone, whose last two parts are folder and file
        name = value.get("file_name") or "/".join(value["coco_url"].split("/")[-2:])
        height, width = _whole(value["height"]), _whole(value["width"])
        self._images.append((_whole(value["id"]), _utf8(name), height, width))

    def _read_annotations(self, value: dict, start: int, end: int) -> None:
        entry = {"image": _whole(value["image_id"]), "category": _whole(value["category_id"])}
        entry |= {"start": start, "end": end, "crowd": bool(value.get("iscrowd", 0))}
        for name, item in {**entry, "drawn": _drawn(value.get("segmentation"))}.items():
            self._columns[name].append(item)
        left, top, width, height = (float(side) for side in value["bbox"])
        if not all(map(math.isfinite, (left, top, width, height))) or min(width, height) < 0:
            raise ValueError(
                f"{self.path}: object {value.get('id')} of image {value['image_id']} has the bbox "
                f"{value['bbox']}. It must be four finite numbers: left, top, width and height."
            )
        self._columns["box"].extend((left, top, left + width, top + height))

    def _name_classes(self) -> None:
        self._categories.sort()
        self.category_ids = [one for one, _ in self._categories]
        self.classes = [name for _, name in self._categories]
        self.image_ids = [one[0] for one in self._images]
        self.names = [one[1] for one in self._images]
        self.sizes = [one[2:] for one in self._images]
        for what, values in (
            ("ids of categories", self.category_ids),
            ("names of categories", self.classes),
            ("ids of images", self.image_ids),
            ("files of images", self.names),
        ):
            if twice := [str(one) for one, count in Counter(values).items() if count > 1]:
                raise ValueError(f"{self.path}: {what} that come twice: {_few(twice)}.")
        if not self.classes:
            raise ValueError(f"{self.path}: has no categories.")

    def _index(self) -> None:
        """Sorts the objects by image, without those that cannot be trained."""
        table = {name: np.array(column) for name, column in self._columns.items()}
        del self._columns
        images = self._places(table["image"], self.image_ids, "images")
        labels = self._places(table["category"], self.category_ids, "categories")
        sizes = np.array(self.sizes, dtype=np.float64).reshape(-1, 2)[images]
        boxes = table["box"].reshape(-1, 4)
        flat = (boxes[:, 2:] <= boxes[:, :2]).any(1)
        boxes = np.clip(boxes, 0, np.tile(sizes[:, ::-1], 2))
        outside = (boxes[:, 2:] <= boxes[:, :2]).any(1) & ~flat
        undrawn = (table["drawn"] < 0) & ~flat & ~outside
        self.left_out = {
            what: int(which.sum())
            for what, which in (
                ("objects without an area", flat),
                ("objects outside of their image", outside),
                ("objects of polygons with fewer than three points", undrawn),
            )
            if which.any()
        }
        kept = np.flatnonzero(~(flat | outside | undrawn))
        kept = kept[np.argsort(images[kept], kind="stable")]
        self._starts, self._ends = table["start"][kept], table["end"][kept]
        self._boxes, self._labels = boxes[kept].astype(np.float32), labels[kept]
        self._crowds = table["crowd"][kept].astype(bool)
        self.has_masks = bool(len(kept)) and bool((table["drawn"][kept] > 0).all())
        self._of_image = np.searchsorted(images[kept], np.arange(len(self._images) + 1))

    def _places(self, given: np.ndarray, known: list[int], what: str) -> np.ndarray:
        """The place of each id among those that the file has."""
        places = {one: place for place, one in enumerate(known)}
        found = np.array([places.get(one, -1) for one in given.tolist()], dtype=np.int64)
        if (found < 0).any():
            unknown = sorted(set(given[found < 0].tolist()))
            raise ValueError(
                f"{self.path}: {int((found < 0).sum()):,} objects are of {what} that it does not "
                f"have: {_few(list(map(str, unknown)))}."
            )
        return found

    def __len__(self) -> int:
        return len(self._images)

    def objects(self, index: int, masks: bool) -> dict[str, Any]:
        """The boxes, classes and crowds of an image, and with `masks` those, too: see Source.FIELDS."""
        here = slice(self._of_image[index], self._of_image[index + 1])
        found = {
            "boxes": self._boxes[here].copy(),
            "classes": self._labels[here].copy(),
            "crowds": self._crowds[here].copy(),
        }
        return found | {"masks": self._masks(here)} if masks else found

    def _masks(self, here: slice) -> list[Any]:
        spans, drawn = zip(self._starts[here].tolist(), self._ends[here].tolist()), []
        with open(self.path, "rb") as file:
            for start, end in spans:
                given = json.loads(os.pread(file.fileno(), end - start, start))["segmentation"]
                drawn.append(
                    [p for p in given if _is_polygon(p)] if isinstance(given, list) else given
                )
        return drawn

    def classes_shown(self, index: int) -> list[int]:
        """The labels of an image's objects, without crowds, each once."""
        here = slice(self._of_image[index], self._of_image[index + 1])
        return np.unique(self._labels[here][~self._crowds[here]]).tolist()


def _elements(text: str, path: str) -> Iterator[tuple[str, Any, int, int]]:
    """(part, value, start, end) of each element of the lists that count, where it lies in the text."""
    try:
        at, seen = _after(text, 0, "{"), set()
        while text[at] != "}":
            key, at = _DECODER.raw_decode(text, at)
            at = _after(text, _blank(text, at), ":")
            if key not in _PARTS or text[at] != "[":
                at = _DECODER.raw_decode(text, at)[1]
            else:
                seen.add(key)
                at = _after(text, at, "[")
                while text[at] != "]":
                    value, end = _DECODER.raw_decode(text, at)
                    yield key, value, at, end
                    at = _comma(text, end, "]")
                at += 1
            at = _comma(text, at, "}")
    except (json.JSONDecodeError, IndexError, RecursionError) as error:
        said = str(error) if str(error) != "string index out of range" else "it ends in the middle"
        raise ValueError(f"{path}: not readable as JSON: {said}") from error
    if lacking := [part for part in _PARTS if part not in seen]:
        raise ValueError(f"{path}: has no list {', '.join(lacking)}, as COCO's files have.")


def _blank(text: str, at: int) -> int:
    return _BLANK.match(text, at).end()


def _after(text: str, at: int, sign: str) -> int:
    """The place after a sign that must stand there, and blanks."""
    at = _blank(text, at)
    if text[at] != sign:
        raise json.JSONDecodeError(f"Expecting '{sign}'", text, at)
    return _blank(text, at + 1)


def _comma(text: str, at: int, end: str) -> int:
    """The place of the next element, or of the sign that ends them."""
    at = _blank(text, at)
    return at if text[at] == end else _after(text, at, ",")


def _utf8(text: str) -> str:
    """A text that was read as latin-1; one with escapes of JSON may already be whole."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} must be a whole number")
    return value


def _drawn(segmentation: Any) -> int:
    """1 for a mask, 0 for none, -1 for polygons of which none has an area."""
    if not segmentation:
        return 0
    return 1 if isinstance(segmentation, dict) or any(map(_is_polygon, segmentation)) else -1


def _is_polygon(points: Any) -> bool:
    return len(points) >= 6 and len(points) % 2 == 0 and all(map(math.isfinite, points))


def _few(names: list[str]) -> str:
    return ", ".join(names[:_FEW]) + (", …" if names[_FEW:] else "")
