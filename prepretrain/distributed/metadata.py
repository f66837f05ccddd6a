"""Reads DCP's checkpoints without running what they name: `.metadata` and each value that is no
tensor are pickles, which could run any program."""

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

# What a checkpoint's `.metadata` is made of. Their constructors keep what they are given.
_RECORDS = {
    *(metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta),
    *(metadata.TensorStorageMetadata, metadata.BytesStorageMetadata),
    *(metadata.ChunkStorageMetadata, metadata.TensorProperties),
    filesystem._StorageInfo,
}
_ALLOWED = {(one.__module__, one.__qualname__): one for one in _RECORDS} | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    (metadata.__name__, "_MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,  # Python 3.13's name of the same
}


class Reader(dcp.FileSystemReader):
    """A checkpoint's files, as DCP reads them, with a `.metadata` that can only hold data, and that is
    read once however often tensors are loaded."""

    found: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds. Raises ValueError for anything but the metadata of one."""
        self.found = self.found or self._read()
        self.found.storage_meta = self.found.storage_meta or metadata.StorageMeta()
        self.found.storage_meta.load_id = self.load_id
        return self.found

    def _read(self) -> Metadata:
        path = Path(self.path, ".metadata")
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
            _check(found)
        except OSError:
            raise
        except Exception as error:  # a pickle that is cut or mutated raises anything
            cause = str(error) or type(error).__name__
            raise ValueError(
                f"{path}: is not the metadata of a checkpoint: {cause}. Nothing of it was run. Take "
                f"an export (model.safetensors) of the model instead, from where it is published."
            ) from error
        return found


class Planner(DefaultLoadPlanner):
    """DCP's plan to load, with values that are no tensors read with weights_only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts a value in its place, written anew so that what is unpickled there is our own."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _Unpickler(pickle._Unpickler):
    """Python's own, in Python, which lets an instruction be looked at before it is followed."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the names that the metadata of a checkpoint needs."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def load_build(self) -> None:
        """Sets attributes, of records only: set on a class or a function, they would stay."""
        if type(self.stack[-2]) not in _RECORDS:
            raise pickle.UnpicklingError(f"it changes {self.stack[-2]!r}")
        super().load_build()

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def _check(found: Any) -> None:
    """Raises ValueError for what is no Metadata of files in the checkpoint's own folder."""
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    for name, one in found.state_dict_metadata.items():
        kinds = (metadata.TensorStorageMetadata, metadata.BytesStorageMetadata)
        if not isinstance(name, str) or not isinstance(one, kinds):
            raise ValueError(f"it has no tensor and no value under {name!r}")
    for place in found.storage_data.values():
        file = place.relative_path
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"it takes values from {file!r}, outside of its folder")
