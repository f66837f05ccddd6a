"""Images with their objects, as COCO's and LVIS's files have them: a folder, and a json file."""

import functools
import json
import logging
import math
import mmap
import os
import re
import zlib
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from prepretrain.data.dense import masks
from prepretrain.data.io.long_json import elements
from prepretrain.data.sources.base import Files, check_names, fingerprint_of
from prepretrain.data.transforms import MAX_SIDE, BadImage

logger = logging.getLogger(__name__)

_NEEDED = ("images", "annotations", "categories")
_OBJECT = ("boxes", "classes", "crowds", "areas")
_IMAGE = ("image_id", "size")
_LVIS = ("negative", "not_exhaustive")
_CATEGORIES = re.compile(r'"categories"\s*:\s*')
_LISTED = 1 << 26  # not from the paper: bytes of a file's list of categories


class Coco(Files):
    """The images that a json file of COCO's form names, in the order of their ids, with objects.

    path     the folder that the images' `file_name` starts at, or, without one, the last two parts of
             their `coco_url`, as in LVIS
    listing  the json file: images, annotations, categories. It is read as a stream, and its masks are
             left in it until an image is asked for, so its size does not matter

    A class is the place of its category among the sorted ids, which may have gaps. Objects without an
    area in their image, and crowds, are in the sample: training leaves them out, metrics do not. Masks
    are a field where every object has one.
    """

    def __init__(self, *, path: str, listing: str):
        if not os.path.isdir(path):
            raise ValueError(f"{path}: is no folder; looked at {os.path.abspath(path)}.")
        if not os.path.isfile(listing):
            raise ValueError(f"{listing}: is no file.")
        file = os.stat(listing)
        table = _read(listing, file.st_size, file.st_mtime_ns)
        check_names(table.names, path, listing)
        super().__init__(path, table.names, None)
        self.listing, self.table = listing, table
        self.categories = table.categories
        self.classes = [one["name"] for one in table.categories]
        fields = ["image", *_OBJECT, *_IMAGE]
        fields += ["masks"] if table.masked else []
        self.fields = (*fields, *(_LVIS if table.judged else ()))
        self.fingerprint = fingerprint_of([self.fingerprint, table.fingerprint])
        self.stamp = fingerprint_of([self.stamp, file.st_mtime_ns])
        self._file = open(listing, "rb")  # for os.pread, which forked processes may call, too

    @classmethod
    def class_names(cls, *, path: str, listing: str) -> list[str] | None:
        """See Source.class_names; the categories alone are read."""
        with open(listing, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = max(0, content.rfind(b'"categories"'))  # the last: COCO has it at the end
        text = content[start : start + _LISTED].decode(errors="replace")
        if (key := _CATEGORIES.match(text)) is None:
            return None
        try:
            found, _ = json.JSONDecoder().raw_decode(text, key.end())
            return [one["name"] for one in _categories(found, listing)]
        except ValueError:
            return None

    def __getitem__(self, index: int) -> dict:
        wanted, name = set(self.fields), self.key(index)
        sample: dict[str, Any] = {"key": name}
        if "image" in wanted:
            sample["image"] = (self.path / name).read_bytes()
        table, mine = self.table, self._objects(index)
        for field in _OBJECT:
            if field in wanted:
                sample[field] = getattr(table, field)[mine]
        if "classes" in wanted:
            sample["classes"] = sample["classes"].astype(np.int64)
        if "image_id" in wanted:
            sample["image_id"] = int(table.ids[index])
        if "size" in wanted:
            sample["size"] = tuple(map(int, table.sizes[index]))
        if "masks" in wanted:
            sample["masks"] = self._masks(index)
        for field in _LVIS:
            if field in wanted:
                values, ends = getattr(table, field)
                sample[field] = values[ends[index] : ends[index + 1]]
        return sample

    def classes_shown(self, index: int) -> list[int]:
        """See Source.classes_shown."""
        mine = self._objects(index)
        return np.unique(self.table.classes[mine][~self.table.crowds[mine]]).tolist()

    def _objects(self, index: int) -> slice:
        return slice(*self.table.ends[index : index + 2].tolist())

    def _masks(self, index: int) -> list[masks.Segmentation]:
        """The masks of an image's objects, read from the file."""
        mine, found = self._objects(index), []
        height, width = map(int, self.table.sizes[index])
        for start, end in zip(self.table.starts[mine].tolist(), self.table.stops[mine].tolist()):
            one = None
            try:
                one = json.loads(os.pread(self._file.fileno(), end - start, start))
                masks.check(one.get("segmentation"), height, width)
            except ValueError as error:
                where = f"{self.listing}: {_named(one or {'image_id': self.table.ids[index]})}"
                raise BadImage("bad mask", f"{where}: {error}", self.key(index)) from error
            found.append(one["segmentation"])
        return found


@dataclass(frozen=True, eq=False)
class _Table:
    """What a json file says but its masks; images by id, an image's objects by theirs.

    Arrays, not lists of dicts: see Files.
    """

    categories: list[dict]
    names: list[str]
    ids: np.ndarray  # of images
    sizes: np.ndarray  # [images, 2]: height, width
    ends: np.ndarray  # [images + 1]: the objects of image i are ends[i] to ends[i + 1]
    boxes: np.ndarray
    classes: np.ndarray
    crowds: np.ndarray
    areas: np.ndarray
    starts: np.ndarray  # [objects]: where each is in the file
    stops: np.ndarray
    masked: bool
    judged: bool
    negative: tuple[np.ndarray, np.ndarray]
    not_exhaustive: tuple[np.ndarray, np.ndarray]
    fingerprint: str


class _Objects:
    """Columns that grow by an annotation at a time."""

    def __init__(self, where: str):
        self.where = where
        self.whole = {name: array("q") for name in ("id", "image", "category", "start", "stop")}
        self.crowd = array("b")
        self.real = array("d")  # x, y, width, height, area of each
        self.unmasked, self.first = 0, ""  # how many have no mask, and which is the first

    def add(self, one: Any, start: int, stop: int) -> None:
        """Takes an annotation that lies at bytes [start, stop) of the file."""
        try:
            box, crowd = [float(number) for number in one["bbox"]], one.get("iscrowd", 0)
            row = one.get("id", len(self.crowd) + 1), one["image_id"], one["category_id"]
            area = one.get("area")
            area = box[2] * box[3] if area is None else float(area)
            for name, value in zip(self.whole, (*map(_whole, row), start, stop)):
                self.whole[name].append(value)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as why:
            said = f"lacks {why}" if isinstance(why, KeyError) else f"{type(why).__name__}: {why}"
            raise ValueError(f"{self.where}: {_named(one)}: {said}") from why
        if len(box) != 4 or not all(map(math.isfinite, (*box, area))):
            raise ValueError(
                f"{self._name(one)}: bbox {box}, area {area}: not four finite numbers."
            )
        if box[2] < 0 or box[3] < 0 or area < 0:
            raise ValueError(
                f"{self._name(one)}: bbox {box}, area {area}: is negative. A bbox is [left, top, "
                "width, height]."
            )
        if crowd not in (0, 1):
            raise ValueError(f"{self._name(one)}: iscrowd {crowd!r} is neither 0 nor 1.")
        self.real.extend((*box, area))
        self.crowd.append(int(crowd))
        if not one.get("segmentation"):
            self.unmasked, self.first = self.unmasked + 1, self.first or _named(one)

    def _name(self, one: dict) -> str:
        return f"{self.where}: {_named(one)}"


def _named(one: Any) -> str:
    """What an annotation is called in an error."""
    if not isinstance(one, dict):
        return f"the annotation {str(one)[:60]}"
    return f"image {one.get('image_id')!r}, annotation {one.get('id')!r}"


def _whole(value: Any) -> int:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) < 1 << 63 or value != int(value):
        raise ValueError(f"{value!r} is no whole number of 64 bits")
    return int(value)


@functools.lru_cache(maxsize=4)  # a run opens its data several times
def _read(file: str, size: int, changed: int) -> _Table:
    """The table of a json file as it was then. Raises ValueError, which names what is wrong."""
    seen, images, categories, objects = set(), [], [], _Objects(file)
    for key, one, start, stop in elements(file):
        seen.add(key)
        if key == "annotations":
            objects.add(one, start, stop)
        elif key == "images":
            images.append(_image(one, file))
        elif key == "categories":
            categories.append(one)
    if lacking := [name for name in _NEEDED if name not in seen]:
        raise ValueError(
            f"{file}: holds no {', no '.join(lacking)}. A file of COCO's form is a mapping of "
            f"{', '.join(_NEEDED)}."
        )
    categories = _categories(categories, file)
    numbers = np.array([one["id"] for one in categories], dtype=np.int64)
    images.sort(key=lambda one: one[0])
    ids = np.array([one[0] for one in images], dtype=np.int64)
    if len(twice := _repeated(ids)):
        same = [one[1] for one in images if one[0] == twice[0]]
        raise ValueError(f"{file}: image id {twice[0]} stands for {' and for '.join(same[:2])}.")
    sizes = np.array([one[2] for one in images], dtype=np.int32).reshape(-1, 2)
    columns = {name: np.array(column) for name, column in objects.whole.items()}
    order = np.lexsort((columns["id"], columns["image"]))
    columns = {name: column[order] for name, column in columns.items()}
    real = np.array(objects.real).reshape(-1, 5)[order]
    _check_ids(file, columns, ids, numbers)
    boxes = np.concatenate([real[:, :2], real[:, :2] + real[:, 2:4]], axis=1)
    place = np.searchsorted(ids, columns["image"])
    _say_outside(file, boxes, sizes[place], columns)
    if 0 < objects.unmasked < len(order):
        few = f"{objects.unmasked:,} of {len(order):,} objects"
        logger.warning("%s: has no masks, as %s have none: %s, …", file, few, objects.first)
    judged = [_judged(images, i, numbers, file) for i in (3, 4)]
    crowd = np.array(objects.crowd, dtype=bool)[order]
    said = [zlib.crc32(np.ascontiguousarray(part)) for part in (ids, sizes, real, crowd)]
    said.append(_checksum(file, columns))
    return _Table(
        categories=categories,
        names=[one[1] for one in images],
        ids=ids,
        sizes=sizes,
        ends=np.searchsorted(place, np.arange(len(ids) + 1)),
        boxes=boxes,
        classes=np.searchsorted(numbers, columns["category"]).astype(np.int32),
        crowds=crowd,
        areas=real[:, 4].copy(),
        starts=columns["start"],
        stops=columns["stop"],
        masked=not objects.unmasked,
        judged=any(one[3] is not None for one in images),
        negative=judged[0],
        not_exhaustive=judged[1],
        fingerprint=fingerprint_of([*said, categories]),
    )


def _checksum(file: str, columns: dict) -> int:
    """Of all annotations, in their order here and as the file writes them."""
    total = 0
    with open(file, "rb") as content:
        for start, stop in zip(columns["start"].tolist(), columns["stop"].tolist()):
            total = zlib.crc32(os.pread(content.fileno(), stop - start, start), total)
    return total


def _categories(given: list, file: str) -> list[dict]:
    """The categories by id, of each what is used of it."""
    try:
        kept = [
            {"id": _whole(one["id"]), "name": str(one.get("name", one["id"]))}
            | {key: one[key] for key in ("frequency", "image_count") if key in one}
            for one in given
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file}: categories: {type(error).__name__}: {error}. Each has an id and a name."
        ) from error
    kept.sort(key=lambda one: one["id"])
    if len(twice := _repeated(np.array([one["id"] for one in kept]))):
        raise ValueError(f"{file}: category id {twice[0]} stands for several categories.")
    return kept


def _image(one: Any, file: str) -> tuple[int, str, tuple[int, int], Any, Any]:
    """(id, name, (height, width), and LVIS's two lists of categories or None)."""
    try:
        number, size = _whole(one["id"]), (_whole(one["height"]), _whole(one["width"]))
        name = one.get("file_name") or "/".join(one["coco_url"].split("/")[-2:])
        name.startswith("/")
        lists = [one.get(f"{key}_category_ids") for key in ("neg", "not_exhaustive")]
        lists = [given if given is None else [_whole(label) for label in given] for given in lists]
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as why:
        said = f"lacks {why}" if isinstance(why, KeyError) else f"{type(why).__name__}: {why}"
        called = one.get("id") if isinstance(one, dict) else str(one)[:60]
        raise ValueError(f"{file}: image {called!r}: {said}") from why
    if not (0 < min(size) and max(size) <= MAX_SIDE):
        raise ValueError(
            f"{file}: image {number}: its height and width are {size}; they must lie in 1 to "
            f"{MAX_SIDE:,}."
        )
    return number, name.lstrip("/"), size, *lists


def _judged(images: list, which: int, numbers: np.ndarray, file: str) -> tuple:
    """(classes, ends): of LVIS's lists, those of all images behind each other."""
    lists = [one[which] or [] for one in images]
    flat = np.array([number for one in lists for number in one], dtype=np.int64)
    if len(unknown := np.setdiff1d(flat, numbers)):
        owner = next(one[0] for one in images if unknown[0] in (one[which] or []))
        raise ValueError(f"{file}: image {owner}: names category {unknown[0]}, which there is not.")
    ends = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return np.searchsorted(numbers, flat), ends


def _check_ids(file: str, columns: dict, images: np.ndarray, categories: np.ndarray) -> None:
    """Raises ValueError for an annotation of no image or no category, or an id of two."""
    for kind, known in (("image", images), ("category", categories)):
        wrong = np.flatnonzero(~np.isin(columns[kind], known))
        if len(wrong):
            first = wrong[0]
            raise ValueError(
                f"{file}: image {columns['image'][first]}, annotation {columns['id'][first]}: its "
                f"{kind} id {columns[kind][first]} is not among the {len(known):,} of the file. So it "
                f"is with {len(wrong):,} of {len(columns['id']):,} annotations."
            )
    if len(twice := _repeated(columns["id"])):
        raise ValueError(f"{file}: annotation id {twice[0]} stands for several annotations.")


def _repeated(ids: np.ndarray) -> np.ndarray:
    values, counts = np.unique(ids, return_counts=True)
    return values[counts > 1]


def _say_outside(file: str, boxes: np.ndarray, sizes: np.ndarray, columns: dict) -> None:
    """Logs how many boxes go past their image, and how many have no area in it."""
    edges = sizes[:, [1, 0, 1, 0]] if len(sizes) else np.zeros((0, 4))
    inside = np.clip(boxes, 0, edges)
    empty = (inside[:, 2:] <= inside[:, :2]).any(axis=1)
    past = (np.abs(boxes - inside) > 1).any(axis=1) & ~empty
    for which, what in (
        (empty, "no area within their image: training leaves them out, metrics count them"),
        (past, "boxes that go past their image by more than a pixel: training cuts them off"),
    ):
        if which.any():
            first = np.flatnonzero(which)[0]
            logger.warning(
                "%s: %s of %s objects have %s; the first is annotation %s of image %s: %s in %s",
                *(file, f"{which.sum():,}", f"{len(which):,}", what),
                *(columns["id"][first], columns["image"][first], boxes[first].tolist()),
                f"{sizes[first][1]} x {sizes[first][0]}",
            )
