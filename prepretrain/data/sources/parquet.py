"""Images in the rows of Parquet files, as the Hugging Face hub and many exports keep them."""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prepretrain.data.sources.base import Source, fingerprint_of, stamp_of
from prepretrain.data.transforms import BadImage

_IN_MEMORY = 2_000_000_000  # not from the paper: bytes of row groups that are kept read


class Parquet(Source):
    """One Parquet file, or all of a folder in the order of their names; a row is an image.

    `image` is a column of bytes, or of structs with a field `bytes`. The other columns are
    optional where their name is the default's. Row groups are the groups to read together: up to
    2 GB of them are kept, so larger data wants shuffling in windows.
    """

    def __init__(
        self,
        *,
        path: str,
        image: str = "image",
        label: str = "label",
        text: str = "text",
        captions: str = "captions",
        hashtags: str = "hashtags",
        key: str = "path",
    ):
        found = Path(path)
        self.paths = sorted(found.glob("*.parquet")) if found.is_dir() else [found]
        if not self.paths or not self.paths[0].is_file():
            raise ValueError(f"{path}: there is no .parquet file here.")
        try:
            self._files = [pq.ParquetFile(file, memory_map=True) for file in self.paths]
        except pa.ArrowException as error:
            raise ValueError(f"{path}: not readable as Parquet: {error}") from error
        asked = {"image": image, "label": label, "text": text, "captions": captions}
        asked |= {"hashtags": hashtags, "key": key}
        self.columns = self._present(asked)
        self.fields = tuple(name for name in self.columns if name != "key")
        self._index()

    def _present(self, asked: dict[str, str]) -> dict[str, str]:
        """The columns there are; an error if one is missing that was asked for by name."""
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
        return {name: column for name, column in asked.items() if column in there}

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
        self._bytes = [group.total_byte_size for *_, group in groups]
        self._kept: OrderedDict[int, dict[str, pa.ChunkedArray]] = OrderedDict()
        if sum(self._bytes) <= _IN_MEMORY:
            for number in range(len(groups)):
                self._group(number)  # before any worker is forked, so that all share it

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        number, row = self._find(index)
        group = self._group(number)
        key = self.key(index)
        try:
            values = {n: column[row].as_py() for n, column in group.items() if n != "key"}
        except UnicodeDecodeError as error:
            raise BadImage("bad metadata", f"text: {error}", key) from error
        image = values["image"]
        values["image"] = image.get("bytes") if isinstance(image, dict) else image
        if not values["image"]:
            raise BadImage("no image", f"the row has no bytes in {self.columns['image']}", key)
        if values.get("label", 0) is None:
            del values["label"]
        if "hashtags" in values:
            values["hashtags"] = values["hashtags"] or []
        if "text" in values:
            values["text"] = values["text"] or ""
        if "captions" in values:
            values["captions"] = [c for c in values["captions"] or [] if c is not None]
        return {"key": key, **values}

    def key(self, index: int) -> str:
        number, row = self._find(index)
        group = self._group(number)
        key = group["key"][row].as_py() if "key" in group else None
        return f"{self.paths[self._places[number][0]].stem}/{index}" if key is None else str(key)

    def label(self, index: int) -> int:
        number, row = self._find(index)
        return self._group(number)["label"][row].as_py()

    def labels(self) -> list[int]:
        """See Source.labels; of that column alone, since a row group's images are large."""
        name = self.columns["label"]
        read = (file.read(columns=[name], use_threads=False) for file in self._files)
        return [label for table in read for label in table[name].to_pylist()]

    def hashtags(self, index: int) -> list[str]:
        number, row = self._find(index)
        return self._group(number)["hashtags"][row].as_py() or []

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} of {self._length}")
        number = int(self._starts.searchsorted(index, side="right")) - 1
        return number, int(index - self._starts[number])

    def _group(self, number: int) -> dict[str, pa.ChunkedArray]:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        file, group = self._places[number]
        # One thread: pyarrow's pool does not survive the fork into a worker.
        table = self._files[file].read_row_group(
            group, columns=list(self.columns.values()), use_threads=False
        )
        while self._kept and sum(self._bytes[k] for k in self._kept) > _IN_MEMORY:
            self._kept.popitem(last=False)
        self._kept[number] = {name: table[column] for name, column in self.columns.items()}
        return self._kept[number]
