"""Rows in a file that is filled chunk by chunk, so that a kill costs one chunk."""

import json
import os
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BYTES, ROWS = 1 << 28, 16384  # of a chunk at most: what is held in memory, and what a kill costs


@dataclass(frozen=True)
class Store:
    """`rows` rows of `shape` in <path>.bin; <path>.json describes it.

    The description holds the checksum of each chunk of `chunk` rows that is whole on disk. It is
    replaced as a whole after the chunk was, so a chunk that a kill tore has none, and one that
    changed later has another. One process writes; any number may read what is complete.
    """

    path: Path
    rows: int
    shape: tuple[int, ...]
    dtype: str
    chunk: int

    @classmethod
    def open(cls, path: Path) -> "Store | None":
        """What is there, perhaps incomplete; None where there is nothing that can be continued."""
        try:
            head = json.loads(_described(path).read_text())
            found = cls(path, head["rows"], tuple(head["shape"]), head["dtype"], head["chunk"])
            whole = found.file.stat().st_size == found.bytes
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if whole else None

    @classmethod
    def create(cls, path: Path, rows: int, shape: tuple[int, ...], dtype: str) -> "Store":
        """An empty one, in the place of whatever was there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        row = int(np.prod(shape)) * np.dtype(dtype).itemsize
        made = cls(path, rows, shape, dtype, max(1, min(ROWS, rows, BYTES // row)))
        _described(path).unlink(missing_ok=True)
        with open(made.file, "wb") as file:
            file.truncate(made.bytes)
        made._describe({})
        return made

    @property
    def file(self) -> Path:
        """Where the rows are."""
        return self.path.with_name(f"{self.path.name}.bin")

    @property
    def bytes(self) -> int:
        """The size of that file."""
        return size(self.rows, self.shape, self.dtype)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """[first, end) of each chunk."""
        return [(a, min(a + self.chunk, self.rows)) for a in range(0, self.rows, self.chunk)]

    def missing(self) -> list[tuple[int, int]]:
        """The spans that were never written whole, or that have changed since; reads all of the
        file."""
        sums, rows = self._sums(), self._rows()
        return [(a, b) for a, b in self.spans if sums.get(str(a)) != zlib.crc32(rows[a:b].data)]

    def write(self, first: int, features: Tensor) -> None:
        """One chunk, durably: the rows, and only then its checksum."""
        values = features.contiguous().numpy()
        with open(self.file, "r+b") as file:
            file.seek(first * values[0].nbytes)
            file.write(values.data)
            file.flush()
            os.fsync(file.fileno())
        self._describe(self._sums() | {str(first): zlib.crc32(values.data)})

    def read(self) -> Tensor:
        """Rows [n, *shape], memory-mapped; changing them changes no file."""
        return torch.from_numpy(self._rows())

    def _rows(self) -> np.ndarray:
        return np.memmap(self.file, self.dtype, "c", shape=(self.rows, *self.shape))

    def _sums(self) -> dict[str, int]:
        return json.loads(_described(self.path).read_text())["crc32"]

    def _describe(self, sums: dict[str, int]) -> None:
        head = {k: v for k, v in asdict(self).items() if k != "path"} | {"crc32": sums}
        draft = self.path.with_name(f"{self.path.name}.tmp")
        with open(draft, "w") as file:
            json.dump(head, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, _described(self.path))


def size(rows: int, shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of the rows."""
    return rows * int(np.prod(shape)) * np.dtype(dtype).itemsize


def file_name(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", text)


def _described(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
