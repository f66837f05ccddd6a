"""Where everything lies in a tar shard: checked once, kept in a sidecar file beside the shard."""

import hashlib
import json
import mmap
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

IMAGES = ("jpg", "jpeg", "png", "webp")
MEMBERS = (*IMAGES, "txt", "json", "cls")

_VERSION = 1
_BLOCK = 512
_SKIPPED = b"5gK"  # folders, global pax headers, long link names: nothing to read in them


class Index:
    """The index of one shard, mapped from its sidecar: workers and processes share its pages."""

    def __init__(self, shard: Path):
        head = read_head(shard)
        n, fields = head["samples"], head["fields"]
        # A plain array over the mapping: slicing np.memmap itself is ten times slower.
        body = np.asarray(np.memmap(head["file"], dtype=np.uint8, mode="r"))[head["start"] :]
        spans, ends = n * len(fields) * 16, n * 8
        self._columns = {field: i for i, field in enumerate(fields)}
        self._spans = body[:spans].view("<i8").reshape(n, len(fields), 2)
        self._ends = body[spans : spans + ends].view("<i8")
        self._keys = body[spans + ends :]

    def key(self, row: int) -> str:
        """The key of a sample."""
        start = self._ends[row - 1] if row else 0
        return _decoded(self._keys[start : self._ends[row]].tobytes())

    def has(self, row: int, field: str) -> bool:
        """Whether a sample has this member."""
        return field in self._columns and self._spans[row, self._columns[field], 0] >= 0

    def span(self, row: int, field: str) -> tuple[int, int]:
        """(offset, size) of a member's data in the shard."""
        offset, size = self._spans[row, self._columns[field]]
        return int(offset), int(size)


def read_head(shard: Path) -> dict:
    """What the index says of a shard as a whole: "samples", "fields", "digest"; built if need be.

    A sidecar counts while version, size and time of change of the shard are those it was built
    from; otherwise it is built again. It lies beside the shard as <shard>.index or, where that
    cannot be written, under $XDG_CACHE_HOME/prepretrain/index by the shard's absolute path.
    """
    stat = os.stat(shard)
    asked = {"version": _VERSION, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    for file in _sidecars(shard):
        if head := _valid(file, asked):
            return head
    content = _packed(shard, asked)
    for file in _sidecars(shard):
        try:
            _replace(file, content)
        except OSError as error:
            refused = error
            continue
        if head := _valid(file, asked):
            return head
    raise ValueError(
        f"{shard}: its index can be written neither beside it nor to {file}: "
        f"{refused}. Set XDG_CACHE_HOME to a folder that can be written."
    )


def _sidecars(shard: Path) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(shard.absolute())).hexdigest()[:32]
    return [shard.with_name(shard.name + ".index"), cache / "prepretrain" / "index" / name]


def _valid(file: Path, asked: dict) -> dict | None:
    """The head of a sidecar that is whole and fits the shard as it is now."""
    try:
        with open(file, "rb") as stream:
            line = stream.readline(1 << 16)
            size = os.fstat(stream.fileno()).st_size
        head = json.loads(line)
        body = head["samples"] * (len(head["fields"]) * 16 + 8) + head["keys"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any(head.get(key) != value for key, value in asked.items()) or size != len(line) + body:
        return None
    return head | {"file": file, "start": len(line)}


def _packed(shard: Path, asked: dict) -> bytes:
    """A line of JSON, then int64 (offset, size) [samples, fields, 2], ends of keys, the keys."""
    keys, found = walk(shard)
    fields = [field for field in MEMBERS if any(field in sample for sample in found)]
    spans = np.full((len(keys), len(fields), 2), -1, dtype="<i8")
    for row, sample in enumerate(found):
        for column, field in enumerate(fields):
            spans[row, column] = sample.get(field, (-1, -1))
    encoded = [key.encode(errors="surrogateescape") for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype="<i8")
    blob = b"".join(encoded)
    # The digest says what the data is: names and sizes, not where or when it was packed.
    digest = hashlib.sha256(json.dumps(fields).encode() + spans[..., 1].tobytes() + blob)
    head = asked | {
        "samples": len(keys),
        "fields": fields,
        "keys": len(blob),
        "digest": digest.hexdigest()[:32],
    }
    line = json.dumps(head).encode()
    line += b" " * (-(len(line) + 1) % 8) + b"\n"
    return line + spans.tobytes() + ends.tobytes() + blob


def _replace(file: Path, content: bytes) -> None:
    """Write under a name of its own, then rename: others see the whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def _decoded(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def walk(path: Path) -> tuple[list[str], list[dict[str, tuple[int, int]]]]:
    """The keys, and for each the (offset, size) of its fields, read from a shard's headers.

    The key is everything up to the last dot. ValueError, with file and offset, for anything that
    is off in the archive, for a key that comes back after others, and for two images in one key.
    """
    keys, spans, seen = [], [], set()
    for name, offset, size in _members(path):
        key, dot, extension = name.rpartition(".")
        extension = extension.lower()
        if not dot or "/" in extension or extension not in MEMBERS:
            continue
        if not keys or keys[-1] != key:
            if key in seen:
                raise _broken(
                    path,
                    offset,
                    f"the key '{key}' comes back after others. The members "
                    "of one image must stand together",
                )
            seen.add(key)
            keys.append(key)
            spans.append({})
        fields = spans[-1]
        if extension in fields or extension in IMAGES and any(f in fields for f in IMAGES):
            raise _broken(path, offset, f"a second {extension} for the key '{key}'")
        fields[extension] = (offset, size)
    return keys, spans


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the data, size) of each file in the archive."""
    total = os.path.getsize(path)
    if not total:
        raise _broken(path, 0, "the file is empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, extra = 0, {}
        while True:
            block = data[at : at + _BLOCK]
            if len(block) < _BLOCK:
                raise _broken(path, at, "the end marker is missing: the file is truncated")
            if block.count(0) == _BLOCK:
                return _check_end(path, data, at)
            kind, name, size = _parse(path, at, block)
            size, start = int(extra.get("size", size)), at + _BLOCK
            if start + size > total:
                raise _broken(
                    path,
                    at,
                    f"member '{name}' of {size} bytes goes past the end of the "
                    f"file ({total} bytes): it is truncated",
                )
            if kind == b"L":
                extra["path"] = _decoded(data[start : start + size].rstrip(b"\0"))
            elif kind == b"x":
                extra |= _pax(path, at, data[start : start + size])
            elif kind in b"0\0":
                yield extra.get("path", name), start, size
                extra = {}
            elif kind in _SKIPPED:
                extra = {} if kind == b"5" else extra
            else:
                raise _broken(path, at, f"member '{name}' of type {kind!r}: only files are read")
            at = start + -(-size // _BLOCK) * _BLOCK


def _parse(path: Path, at: int, block: bytes) -> tuple[bytes, str, int]:
    """(type, name, size) of a header whose checksum is right."""
    try:
        checksum = int(block[148:156].strip(b" \0"), 8)
        # 256 is the checksum field read as eight spaces.
        if checksum != sum(block) - sum(block[148:156]) + 256:
            raise ValueError("checksum")
        if block[124] & 0x80:  # a size past 8 GiB is written in binary
            size = int.from_bytes(block[125:136], "big")
        else:
            size = int(block[124:136].strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise _broken(path, at, "a bad header (its checksum is wrong)") from error
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return block[156:157], _decoded(name), size


def _pax(path: Path, at: int, data: bytes) -> dict[str, str]:
    """The records "length key=value" of an extended header."""
    records = {}
    while data.strip(b"\0"):
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise _broken(path, at, "a bad extended header")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode()] = _decoded(value)
        data = data[int(length) :]
    if any(key.startswith("GNU.sparse") for key in records):
        raise _broken(path, at, "a sparse file: only plain ones are read")
    return records


def _check_end(path: Path, data: mmap.mmap, at: int) -> None:
    if len(data) < at + 2 * _BLOCK:
        raise _broken(path, at, "half of the end marker is missing: the file is truncated")
    for start in range(at, len(data), 1 << 20):
        rest = np.frombuffer(data[start : start + (1 << 20)], dtype=np.uint8)
        if rest.any():
            raise _broken(
                path,
                start + int(rest.nonzero()[0][0]),
                "bytes that are not zero after the end "
                f"marker at {at}: a block inside the file was lost, or files were joined",
            )


def _broken(path: Path, offset: int, what: str) -> ValueError:
    return ValueError(f"{path}: at offset {offset}: {what}. Fetch or write this shard again.")
