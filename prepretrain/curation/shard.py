"""One shard of a curation, opened: its samples, and what earlier stages found out about them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa

from prepretrain.curation.folder import Folder, checksum
from prepretrain.curation.thumbnail import pictures
from prepretrain.data.shards.tar_index import MEMBERS, Index
from prepretrain.data.sources.shards import Shards
from prepretrain.data.transforms import BadImage
from prepretrain.files import draft


class Shard:
    """A shard by its number; raises ValueError where it is not the one that the manifest names."""

    def __init__(self, folder: Folder, number: int, reads: dict[str, tuple[str, ...]]):
        """reads: the columns that `table` may be asked for, by table."""
        manifest = folder.manifest
        expected = manifest.shards[number]
        self.number, self.path = number, Path(expected.path)
        self._folder, self._reads = folder, reads
        if not self.path.is_file():
            raise ValueError(f"{self.path}: is missing; it was there when {folder.path} was begun.")
        size, digest = self.path.stat().st_size, checksum(self.path)
        if (size, digest) != (expected.bytes, expected.checksum):
            raise ValueError(
                f"{self.path}: has changed since {folder.path} was begun: {size} bytes, checksum {digest}; it "
                f"had {expected.bytes}, {expected.checksum}. Put the old one back, or begin anew with another "
                f"--out."
            )
        self._source = _OneShard(self.path, manifest.fields, manifest.options)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def fields(self) -> tuple[str, ...]:
        """What samples of the split may hold, of `Source.FIELDS`."""
        return self._source.fields

    @property
    def source(self) -> Shards:
        """Its samples, for the loader."""
        return self._source

    @property
    def index(self) -> Index:
        """Where its samples' members lie in the tar."""
        return self._source.index

    def key(self, row: int) -> str:
        """A sample's key, which may be any text: never part of a path."""
        return self._source.key(row)

    def sample(self, row: int) -> dict[str, Any]:
        """{"key", "image": bytes, …} of a row. Raises BadImage where the shard has no such."""
        return self._source[row]

    def texts(self, row: int) -> dict[str, Any]:
        """{"text", "captions"} of a row as far as there are, without its image; raises BadImage."""
        return self._source.texts(row)

    def hashtags(self, row: int) -> list[str]:
        """The hashtags of a row, without its image; raises BadImage."""
        return self._source.hashtags(row)

    def pictures(self) -> Iterator[dict[str, Any] | BadImage]:
        """Each row's sample with its image file or video, or what is wrong with it; nothing else is
        read."""
        source = pictures(self._source)
        for row in range(len(self)):
            try:
                yield source[row]
            except BadImage as error:
                yield error

    def members(self, row: int) -> dict[str, bytes]:
        """The files of a row that are read, by their endings, as they are."""
        return self._source.members(row)

    def draft(self, name: str, ending: str) -> AbstractContextManager[Path]:
        """A file beside the table `name` that takes the shard's number as its name once the block has
        ended well."""
        return draft(self._folder.table(name, self.number).with_suffix(f".{ending}"))

    def table(self, name: str) -> pa.Table:
        """What an earlier stage found: a row for each sample, in order."""
        return self._folder.read(name, self.number, list(self._reads[name]))


class _OneShard(Shards):
    """A shard by itself, which may lack fields that others of its split have."""

    def __init__(self, path: Path, fields: list[str], options: dict[str, Any]):
        self._of_split = [field for field in fields if field not in ("image", "video")]
        super().__init__(path=[str(path)], **options)

    @property
    def index(self) -> Index:
        """Of the shard."""
        return self._shard(0).index

    def members(self, row: int) -> dict[str, bytes]:
        """The files of a row, by their endings, as they are."""
        shard = self._shard(0)
        return {f: shard.read(row, f) for f in MEMBERS if shard.index.has(row, f)}

    def _present(self, *_: Any) -> Iterator[str]:
        return iter(self._of_split)
