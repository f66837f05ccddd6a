"""Images in the rows of Parquet files, as the Hugging Face hub and many exports keep them."""

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prepretrain.data.io import values
from prepretrain.data.io.paths import find_files
from prepretrain.data.sources.base import Source, fingerprint_of, stamp_of
from prepretrain.data.transforms import BadImage

_IN_MEMORY = 2_000_000_000  # not from the paper: bytes of row groups that are kept read
_GROUP = 8_000_000_000  # not from the paper: bytes of one row group, which is read whole
_ROWS = 256  # that are decoded at once: a column of structs cannot be decoded in one past 2 GB

Columns = dict[str, pa.ChunkedArray]  # of each field


class Parquet(Source):
    """Parquet files by folder, glob, braces or a list, in the order of their names; a row is an image.

    `image` is a column of bytes, or of structs with a field `bytes`. The other columns are
    optional where their name is the default's; data/io/values.py says what they may hold, and a list
    in the column of `text` are captions; null leaves one out. Class names come from Hugging Face's metadata. Row groups are
    the groups to read together: up to 2 GB of them are kept, so larger data wants shuffling in
    windows.
    """

    def __init__(
        self,
        *,
        path: str | list[str],
        image: str = "image",
        label: str | None = "label",
        text: str | None = "text",
        captions: str | None = "captions",
        hashtags: str | None = "hashtags",
        key: str | None = "path",
    ):
        self.paths = find_files(path, ".parquet", ".parquet file")
        self._files = [_opened(file) for file in self.paths]
        asked = {"image": image, "label": label, "text": text, "captions": captions}
        asked |= {"hashtags": hashtags, "key": key}
        self.columns = self._present({name: column for name, column in asked.items() if column})
        self.fields = tuple(name for name in self.columns if name != "key")
        self.classes = self._classes()
        self._index()

    @classmethod
    def class_names(
        cls, *, path: str | list[str], label: str | None = "label", **_: Any
    ) -> list[str] | None:
        """See Source.class_names."""
        first = find_files(path, ".parquet", ".parquet file")[0]
        return _class_names(_opened(first).schema_arrow, label)

    def _present(self, asked: dict[str, str]) -> dict[str, str]:
        """The column of each field that there is; an error if one is missing that was asked for by
        name, or is of a type that has no meaning there."""
        there = self._files[0].schema_arrow.names
        defaults = type(self).__init__.__kwdefaults__
        for name, column in asked.items():
            if column not in there and (name == "image" or column != defaults[name]):
                raise ValueError(
                    f"{self.paths[0]}: no column '{column}' (source.{name}). "
                    f"There are: {', '.join(there)}."
                )
        for path, file in zip(self.paths, self._files):
            if file.schema_arrow.names != there:
                raise ValueError(f"{path}: its columns are not those of {self.paths[0]}.")
        columns = {name: column for name, column in asked.items() if column in there}
        schema = self._files[0].schema_arrow
        if "text" in columns and _is_list(schema.field(columns["text"]).type):
            if "captions" in columns:
                raise ValueError(
                    f"{self.paths[0]}: column '{columns['text']}' (source.text) is a list, and so is "
                    f"'{columns['captions']}' (source.captions). Name the captions in one of them."
                )
            columns["captions"] = columns.pop("text")
        for path, file in zip(self.paths, self._files):
            for name, column in columns.items():
                _check_type(path, column, name, file.schema_arrow.field(column).type)
        return columns

    def _classes(self) -> list[str] | None:
        """The names of the label's classes, where the files hold them as Hugging Face writes them."""
        label = self.columns.get("label")
        found = [_class_names(file.schema_arrow, label) for file in self._files]
        for path, names in zip(self.paths, found):
            if names != found[0]:
                raise ValueError(
                    f"{path}: its class names are not those of {self.paths[0]}, so labels would not mean "
                    f"the same: {names} and {found[0]}."
                )
        return found[0]

    def _index(self) -> None:
        groups = [
            (f, g, file.metadata.row_group(g))
            for f, file in enumerate(self._files)
            for g in range(file.metadata.num_row_groups)
        ]
        self._places = [(f, g) for f, g, _ in groups]
        self.groups = [group.num_rows for *_, group in groups]
        self._starts = np.cumsum(self.groups) - self.groups
        self._length = sum(self.groups)
        self.fingerprint = fingerprint_of(
            [*self.columns.items()] + [(g.num_rows, g.total_byte_size) for *_, g in groups]
        )
        self.stamp = stamp_of(map(os.stat, self.paths))
        self._kept: OrderedDict[int, Columns | OSError] = OrderedDict()
        self._bytes: dict[int, int] = {}  # of the groups that are kept
        # What fits is read before any worker is forked, so that all share it. Files say how large
        # their rows are encoded, which may be far less.
        if sum(group.total_byte_size for *_, group in groups) <= _IN_MEMORY:
            for number in range(len(groups)):
                self._group(number)
                if len(self._kept) <= number:
                    break

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        key = self.key(index)
        found = self._values(index, self.fields, key)
        image = found["image"]
        found["image"] = image.get("bytes") if isinstance(image, dict) else image
        if not found["image"]:
            raise BadImage("no image", f"the row has no bytes in {self.columns['image']}", key)
        return {"key": key, **found}

    def key(self, index: int) -> str:
        number, row = self._find(index)
        group = self._group(number)
        key = None
        if "key" in self.columns and not isinstance(group, OSError):
            key = group["key"][row].as_py()
        if isinstance(key, bytes):
            key = key.decode(errors="surrogateescape")
        return f"{self.paths[self._places[number][0]].stem}/{index}" if key is None else str(key)

    def label(self, index: int) -> int:
        return self._value(index, "label")

    def labels(self) -> list[int]:
        """See Source.labels; of that column alone, since a row group's images are large."""
        name, found = self.columns["label"], []
        for path, file in zip(self.paths, self._files):
            try:
                column = file.read(columns=[name], use_threads=False)[name]
            except (pa.ArrowException, OSError) as error:
                raise BadImage("unreadable", f"{path}: column '{name}': {error}") from error
            found += map(values.label, column.to_pylist())
        if None in found:
            raise BadImage("no label", f"the row has none in {name}", self.key(found.index(None)))
        return found

    def hashtags(self, index: int) -> list[str]:
        return self._value(index, "hashtags")

    def texts(self, index: int) -> dict:
        wanted = tuple(name for name in ("text", "captions") if name in self.fields)
        return self._values(index, wanted, self.key(index))

    def _value(self, index: int, field: str) -> Any:
        key = self.key(index)
        found = self._values(index, (field,), key)
        if field not in found:
            raise BadImage(f"no {field}", f"the row has none in {self.columns[field]}", key)
        return found[field]

    def _values(self, index: int, wanted: tuple[str, ...], key: str) -> dict[str, Any]:
        number, row = self._find(index)
        group = self._group(number)
        if isinstance(group, OSError):
            raise BadImage("unreadable", str(group), key)
        found = {}
        try:
            for field in wanted:
                value = group[field][row].as_py()
                if field in values.CONVERT:
                    value = values.CONVERT[field](value)
                if value is not None or field == "image":
                    found[field] = value
        except BadImage as error:
            raise BadImage(error.cause, error.detail, key) from error
        except UnicodeDecodeError as error:
            raise BadImage("bad metadata", f"{field}: {error}", key) from error
        return found

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} of {self._length}")
        number = int(self._starts.searchsorted(index, side="right")) - 1
        return number, int(index - self._starts[number])

    def _group(self, number: int) -> Columns | OSError:
        """The columns of a row group; an error where its bytes are damaged, which is kept, too."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        try:
            group, size = self._read(number)
        except pa.ArrowException as error:
            group, size = self._damaged(number, error), 0
        except OSError as error:
            if error.errno is not None:  # the system's, not the file's
                raise
            group, size = self._damaged(number, error), 0
        while self._kept and sum(self._bytes.values()) + size > _IN_MEMORY:
            oldest, _ = self._kept.popitem(last=False)
            del self._bytes[oldest]
        self._kept[number], self._bytes[number] = group, size
        return group

    def _read(self, number: int) -> tuple[Columns, int]:
        """(columns, bytes) of a row group."""
        file, group = self._places[number]
        parts: dict[str, list[pa.Array]] = {name: [] for name in self.columns}
        size = 0
        # One thread: pyarrow's pool does not survive the fork into a worker.
        batches = self._files[file].iter_batches(
            batch_size=_ROWS,
            row_groups=[group],
            columns=list(self.columns.values()),
            use_threads=False,
        )
        for batch in batches:
            size += batch.nbytes
            if size > _GROUP:
                raise ValueError(
                    f"{self.paths[file]}: row group {group} holds more than {_GROUP:,} bytes, and is "
                    f"read whole. Write the file with smaller ones, as with row_group_size=1000."
                )
            for name, column in self.columns.items():
                parts[name].append(batch.column(column))
        schema = self._files[file].schema_arrow
        types = {name: schema.field(column).type for name, column in self.columns.items()}
        return {name: pa.chunked_array(parts[name], kind) for name, kind in types.items()}, size

    def _damaged(self, number: int, error: Exception) -> OSError:
        file, group = self._places[number]
        return OSError(f"{self.paths[file]}: row group {group}: {error}")


def _opened(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        str(file.schema_arrow)  # in which a name that is not UTF-8 is found
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as Parquet: {error}") from error
    return file


def _is_list(kind: pa.DataType | None) -> bool:
    return isinstance(kind, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)) or (
        isinstance(kind, (pa.ListViewType, pa.LargeListViewType))
    )


def _is_bytes(kind: pa.DataType) -> bool:
    is_some = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(is_one(kind) for is_one in (*is_some, pa.types.is_binary_view))


def _is_text(kind: pa.DataType) -> bool:
    is_some = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return _is_bytes(kind) or any(is_one(kind) for is_one in is_some)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return _is_bytes(kind)


def _is_texts(kind: pa.DataType) -> bool:
    return _is_text(_plain(kind.value_type)) if _is_list(kind) else _is_text(kind)


_TYPES = {
    "image": (_is_image, "bytes, or a struct with a field 'bytes'"),
    "label": (_is_number, "a number of a class"),
    "text": (_is_text, "text, or a list of text"),
    "captions": (_is_texts, "text, or a list of text"),
    "hashtags": (_is_texts, "text, or a list of text"),
    "key": (lambda kind: not pa.types.is_nested(kind), "text or a number"),
}


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _check_type(path: Path, column: str, field: str, kind: pa.DataType) -> None:
    """Raises ValueError for a column whose values cannot be what a field is made of."""
    fits, wanted = _TYPES[field]
    if not fits(_plain(kind)) and not (pa.types.is_null(kind) and field != "image"):
        raise ValueError(
            f"{path}: column '{column}' is {kind}, not {wanted} (source.{field}). Name another column, "
            f"convert it, or leave it out: source.{field}: null."
        )


def _class_names(schema: pa.Schema, label: str | None) -> list[str] | None:
    """The names of the classes of a column, which the hub writes into the file's metadata."""
    try:
        written = json.loads((schema.metadata or {})[b"huggingface"])
        names = written["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    several = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if several and names else None
