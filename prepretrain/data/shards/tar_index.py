"""Where everything lies in a tar shard: checked once, kept in a sidecar file beside the shard."""

import functools
import hashlib
import json
import mmap
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prepretrain.data.io.names import IMAGES, USUAL, VIDEOS, extension, left_out
from prepretrain.files import draft

FILMS = tuple(ending for ending in VIDEOS if ending not in IMAGES)
MEMBERS = (*IMAGES, *FILMS, "txt", "json", "cls")
_MEMBERS, _PICTURES = frozenset(MEMBERS), frozenset(IMAGES)

# 1 had no checksums, 2 no count of what is left out, 3 no videos, 4 no checksum of the ends
_VERSION = 5
_BLOCK = 512
_ENDS = 1 << 14  # not from the paper: bytes at each end of a shard, past the zeros that pad a tar
_EXTENDED = 1 << 20  # not from the paper: bytes of an extended header or of a long name
_unpack = struct.Struct("100s24x12s20xB").unpack_from  # of a header: name, size, kind
_PAX, _FOLDER = b"x5"  # kinds are numbers, which are found in bytes ten times sooner than bytes are
_CHECKED = 8192  # headers whose checksums are verified at once
_RECORD = re.compile(rb"([0-9]{1,10}) ")  # how a record of an extended header begins
_HEAD = {"samples": int, "fields": list, "keys": int, "digest": str, "crc32": int, "left_out": dict}
_SKIPPED = b"5gKV"  # folders, global pax headers, long link names, labels: nothing to read in them


_OTHERS = {  # how files begin that are often found in a tar's place
    b"\x1f\x8b": "it is compressed by gzip. Unpack it: gunzip",
    b"BZh9": "it is compressed by bzip2. Unpack it: bunzip2",
    b"\xfd7zXZ": "it is compressed by xz. Unpack it: unxz",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd. Unpack it: unzstd",
    b"PK\x03\x04": "it is a zip archive. Unpack it, and pack it with tar",
    b"<!DOCTYPE": "it is a web page, perhaps a server's error. Fetch the shard again",
    b"<HTML": "it is a web page, perhaps a server's error. Fetch the shard again",
    b"version https://git-lfs": "it is a pointer of Git LFS. Fetch what it points to: git lfs pull",
}


class Index:
    """The index of one shard, mapped from its sidecar: workers and processes share its pages."""

    def __init__(self, shard: Path):
        self._open(_sound_head(shard))

    @classmethod
    def of_head(cls, head: dict) -> "Index":
        """The index of a shard that need not be here, by what `read_head` returned."""
        index = cls.__new__(cls)
        index._open(head)
        return index

    def _open(self, head: dict) -> None:
        n, fields = head["samples"], head["fields"]
        self._columns = {field: i for i, field in enumerate(fields)}
        self._spans, self._ends, self._keys = _parts(_body(head["file"], head["start"]), n, fields)

    def __len__(self) -> int:
        return len(self._ends)

    def keys(self) -> pa.Array:
        """The keys of all samples; those that are not UTF-8 are equal to no text."""
        ends = np.append(0, self._ends)
        parts = pa.py_buffer(ends), pa.py_buffer(self._keys)
        return pa.LargeStringArray.from_buffers(len(self), *parts)

    def spans(self, field: str) -> np.ndarray | None:
        """int64 [samples, 2]: where this member of each sample begins and ends in the shard, (-1, -1)
        for one without; None where no sample has it."""
        if field not in self._columns:
            return None
        offsets, sizes = self._spans[:, self._columns[field]].T
        return np.stack([offsets, np.where(offsets < 0, -1, offsets + sizes)], axis=1)

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

    A sidecar counts while version, size, time of change and ends of the shard are those it was built
    from, and its checksums are right; otherwise it is built again. It lies beside the shard as
    <shard>.index or, where that cannot be written, under $XDG_CACHE_HOME/prepretrain/index by the
    shard's absolute path.
    """
    return kept_head(shard) or _built(shard, _asked(shard))


def kept_head(shard: Path) -> dict | None:
    """What `read_head` returns, where a sidecar is there and fits; None where one is to be built."""
    asked = _asked(shard)
    heads = (_valid(file, asked) for file in _sidecars(shard))
    return next((head for head in heads if head), None)


def kept_elsewhere(file: Path, size: int, mtime_ns: int) -> dict | None:
    """The head of a sidecar whose shard need not be here: it has this size and time of change."""
    return _valid(file, {"version": _VERSION, "bytes": size, "mtime_ns": mtime_ns})


def adopt(content: bytes, file: Path, size: int, mtime_ns: int, ends: bytes) -> dict | None:
    """Keeps the content of another sidecar, which was built elsewhere from a shard of this size with
    these ends, as `file`, for a copy of the shard with this time of change; None where it does not fit."""
    line, _, body = content.partition(b"\n")
    with draft(file) as place:
        place.write_bytes(content)
        head = _valid(place, {"version": _VERSION, "bytes": size, "ends": zlib.crc32(ends)})
        if head is None or zlib.crc32(body) != head["crc32"]:
            return None
        head = json.loads(line) | {"mtime_ns": mtime_ns}
        del head["check"]
        place.write_bytes(_line(head) + body)
    return kept_elsewhere(file, size, mtime_ns)


def ends_of(size: int) -> list[tuple[int, int]]:
    """The spans of a shard whose checksum its sidecar has."""
    return [(0, min(_ENDS, size)), (max(0, size - _ENDS), size)]


def _sound_head(shard: Path) -> dict:
    """The head of a sidecar whose body is sound, too; built if need be. To read the whole body
    takes a moment, which a process spends once for each shard that it opens."""
    asked = _asked(shard)
    for file in _sidecars(shard):
        head = _valid(file, asked)
        if head and is_sound(head):
            return head
    return _built(shard, asked)


def is_sound(head: dict) -> bool:
    """Whether the body of this head's sidecar is what was written."""
    return _is_sound(head["file"], head["state"], head["bytes"])


def _asked(shard: Path) -> dict:
    with open(shard, "rb") as file:
        stat = os.fstat(file.fileno())
        spans = ends_of(stat.st_size)
        ends = b"".join(os.pread(file.fileno(), end - start, start) for start, end in spans)
    return {
        "version": _VERSION,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ends": zlib.crc32(ends),
    }


def _built(shard: Path, asked: dict) -> dict:
    content = _packed(shard, asked)
    for file in _sidecars(shard):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with draft(file) as place:
                place.write_bytes(content)
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
    """The head of a sidecar that has its size and fits the shard as it is now."""
    try:
        with open(file, "rb") as stream:
            line = stream.readline(1 << 16)
            stat = os.fstat(stream.fileno())
        head = json.loads(line)
        check = head.pop("check")
        body = head["samples"] * (len(head["fields"]) * 16 + 8) + head["keys"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if any(head.get(key) != value for key, value in asked.items()) or check != _check(head):
        return None
    odd = any(type(head.get(key)) is not kind for key, kind in _HEAD.items())
    odd = odd or any(type(count) is not int for count in head["left_out"].values())
    if odd or not set(head["fields"]) <= set(MEMBERS) or stat.st_size != len(line) + body:
        return None
    return head | {"file": file, "start": len(line), "state": (stat.st_ino, stat.st_mtime_ns)}


def _check(head: dict) -> int:
    return zlib.crc32(json.dumps(head).encode())


@functools.lru_cache(maxsize=1 << 16)
def _is_sound(file: Path, state: tuple[int, int], size: int) -> bool:
    """Whether a sidecar's body is what was written, and all it names lies in a shard of this size;
    looked at once while the file's state is the same."""
    with open(file, "rb") as stream:
        line = stream.readline(1 << 16)
    head = json.loads(line)
    body = _body(file, len(line))
    if zlib.crc32(body) != head["crc32"]:
        return False
    spans, ends, keys = _parts(body, head["samples"], head["fields"])
    offsets, sizes = spans[..., 0], spans[..., 1]
    inside = (offsets >= 0) & (sizes >= 0) & (sizes <= size) & (offsets <= size - sizes)
    absent = (offsets == -1) & (sizes == -1)
    rising = bool((np.diff(ends, prepend=0) >= 0).all())
    whole = len(keys) == (ends[-1] if len(ends) else 0)
    return bool((inside | absent).all()) and rising and whole


def _body(file: Path, start: int) -> np.ndarray:
    # A plain array over the mapping: slicing np.memmap itself is ten times slower.
    return np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))[start:]


def _parts(body: np.ndarray, n: int, fields: list[str]) -> tuple[np.ndarray, ...]:
    """(spans [n, fields, 2], ends of keys [n], the keys) of a sidecar's body."""
    spans, ends = n * len(fields) * 16, n * 8
    places = body[:spans].view("<i8").reshape(n, len(fields), 2)
    return places, body[spans : spans + ends].view("<i8"), body[spans + ends :]


def _packed(shard: Path, asked: dict) -> bytes:
    """A line of JSON, then int64 (offset, size) [samples, fields, 2], ends of keys, the keys."""
    try:
        keys, found, others = walk(shard)
    except ValueError as error:
        _check_kind(shard, error)
        raise
    there = set().union(*found)
    fields, absent = [field for field in MEMBERS if field in there], (-1, -1)
    each = chain.from_iterable(sample.get(field, absent) for sample in found for field in fields)
    spans = np.fromiter(each, dtype="<i8").reshape(len(keys), len(fields), 2)
    encoded = [key.encode(errors="surrogateescape") for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype="<i8")
    blob = b"".join(encoded)
    # The digest says what the data is: names and sizes, not where or when it was packed.
    digest = hashlib.sha256(json.dumps(fields).encode() + spans[..., 1].tobytes() + blob)
    body = spans.tobytes() + ends.tobytes() + blob
    head: dict[str, Any] = asked | {
        "samples": len(keys),
        "fields": fields,
        "keys": len(blob),
        "digest": digest.hexdigest()[:32],
        "crc32": zlib.crc32(body),
        "left_out": others,
    }
    return _line(head) + body


def _line(head: dict) -> bytes:
    """A head as the first line of a sidecar, after which numbers of 8 bytes are aligned."""
    line = json.dumps(head | {"check": _check(head)}).encode()
    return line + b" " * (-(len(line) + 1) % 8) + b"\n"


def _decoded(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


Walked = tuple[list[str], list[dict[str, tuple[int, int]]], dict[str, int]]


def walk(path: Path) -> Walked:
    """The keys, for each the (offset, size) of its fields, and how many files of what kind are left
    out though they may look like images; all read from a shard's headers.

    The key is everything up to the last dot. ValueError, with file and offset, for anything that
    is off in the archive, for a key that comes back after others, and for two images in one key.
    """
    keys, spans, seen, others = [], [], set(), Counter()
    last, fields = None, {}
    for name, offset, size in _members(path):
        key, dot, ending = name.rpartition(".")
        ending = ending.lower()
        known = dot and ending in _MEMBERS
        # all others are, or lie in, something that programs may have left behind
        if (not known or "/" in name or name[0] == ".") and (reason := left_out(name)):
            others[reason] += 1
            continue
        if not known:
            continue
        if key != last:
            if key in seen:
                raise _broken(
                    path,
                    offset,
                    f"the key '{key}' comes back after others. The members "
                    "of one image must stand together",
                )
            seen.add(key)
            keys.append(last := key)
            spans.append(fields := {})
        image = None
        if fields and ending in _PICTURES:
            image = next((f for f in fields if f in IMAGES), None)
        if ending in fields or image and (image in USUAL) == (ending in USUAL):
            raise _broken(path, offset, f"a second {ending} for the key '{key}'")
        if image:
            others["previews beside another image"] += 1
            if image in USUAL:
                continue
            del fields[image]
        fields[ending] = (offset, size)
    return keys, spans, others


def _members(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset of the data, size) of each file in the archive."""
    if not os.path.getsize(path):
        raise _broken(path, 0, "the file is empty")
    headers: list[int] = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return list(_walked(path, data, headers))
        finally:  # a damaged header is the cause of whatever else its values lead to
            if (at := _damaged(data, headers)) is not None:
                raise _broken(path, at, "a bad header (its checksum is wrong)") from None


def _walked(path: Path, data: mmap.mmap, headers: list[int]) -> Iterator[tuple[str, int, int]]:
    """Each file of `_members`, by headers whose checksums are not yet verified; `headers` gets the
    offsets of all of them."""
    at, extra, total = 0, {}, len(data)
    while True:
        if at + _BLOCK > total:
            raise _broken(path, at, "the end marker is missing: the file is truncated")
        if not data[at] and data[at : at + _BLOCK].count(0) == _BLOCK:
            return _check_end(path, data, at)
        headers.append(at)
        kind, name, size = _parse(path, at, data)
        start = at + _BLOCK
        if extra:
            size, name = int(extra.get("size", size)), extra.get("path", name)
        if kind in b"xL" and size > _EXTENDED:
            what = f"an extended header of {size} bytes; the limit is {_EXTENDED}"
            raise _broken(path, at, what)
        if start + size > total:
            raise _broken(
                path,
                at,
                f"member '{name}' of {size} bytes goes past the end of the "
                f"file ({total} bytes): it is truncated",
            )
        if kind in b"0\x007":
            yield name, start, size
            extra = {}
        elif kind in b"xL":
            value = data[start : start + size]
            extra |= (
                _pax(path, at, value) if kind == _PAX else {"path": _decoded(value.rstrip(b"\0"))}
            )
        elif kind in _SKIPPED:
            extra = {} if kind == _FOLDER else extra
        elif extension(name) not in MEMBERS:  # nor would a file be read
            extra = {}
        else:
            raise _broken(path, at, f"member '{name}' of type {bytes([kind])}: only files are read")
        at = start + -(-size // _BLOCK) * _BLOCK


def _parse(path: Path, at: int, data: mmap.mmap) -> tuple[int, str, int]:
    """(type, name, size) of a header."""
    name, digits, kind = _unpack(data, at)
    if digits[0] == 0x80:  # a size past 8 GiB is written in binary
        size = int.from_bytes(digits[1:], "big")
    elif (size := _octal(digits)) is None:
        raise _broken(path, at, f"a member with the size {digits!r}, which is no number")
    name = name.partition(b"\0")[0]
    if data[at + 345] and data[at + 257 : at + 263] == b"ustar\0":
        name = data[at + 345 : at + 500].split(b"\0", 1)[0] + b"/" + name
    return kind, _decoded(name), size


def _octal(field: bytes) -> int | None:
    """The number that a header's field holds; None for anything else, such as one with a sign."""
    digits = field.strip(b" \0")
    if not digits:
        return 0
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None


def _damaged(data: mmap.mmap, headers: list[int]) -> int | None:
    """The offset of the first header whose checksum is wrong."""
    blocks = np.frombuffer(data, np.uint8, len(data) // _BLOCK * _BLOCK).reshape(-1, _BLOCK)
    for first in range(0, len(headers), _CHECKED):
        some = np.array(headers[first : first + _CHECKED])
        rows = np.take(blocks, some // _BLOCK, axis=0)
        fields = rows[:, 148:156].copy()
        stated = (fields[:, :6] - 48.0) @ 8 ** np.arange(5, -1, -1.0)
        for row in np.flatnonzero((fields[:, :6] // 8 != 6).any(1) | (fields[:, 6:] & 0xDF).any(1)):
            stated[row] = _octal(fields[row].tobytes())  # one that is not six digits
        rows[:, 148:156] = ord(" ")  # as which the checksum itself counts
        right = rows.sum(1, dtype=np.uint32) == stated
        if not right.all():
            return int(some[right.argmin()])
    return None


def _pax(path: Path, at: int, data: bytes) -> dict[str, str]:
    """The records "length key=value" of an extended header."""
    if data.startswith(b"%d mtime=" % len(data)) and data[-1:] == b"\n":
        return {}  # one record, which webdataset's writer has of every member
    records, begin, data = {}, 0, data.rstrip(b"\0")
    while begin < len(data):
        found = _RECORD.match(data, begin)
        end = begin + int(found[1]) if found else 0
        if not found or not found.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise _broken(path, at, "a bad extended header")
        key, _, value = data[found.end() : end - 1].partition(b"=")
        records[_decoded(key)] = _decoded(value)
        begin = end
    if not re.fullmatch(r"[0-9]{1,19}", records.get("size", "0")):
        raise _broken(
            path, at, f"a member with the size {records['size'][:40]!r}, which is no number"
        )
    if any(key.startswith("GNU.sparse") for key in records):
        raise _broken(path, at, "a sparse file: only plain ones are read")
    return records


def _check_kind(path: Path, error: ValueError) -> None:
    """Raises ValueError for what is known not to be a plain tar, with the way to make one of it."""
    with open(path, "rb") as file:
        start = file.read(256).lstrip(b"\xef\xbb\xbf \r\n")
    for magic, way_out in _OTHERS.items():
        if start.startswith((magic, magic.lower())):
            raise ValueError(f"{path}: is no plain tar: {way_out}.") from error


def _check_end(path: Path, data: mmap.mmap, at: int) -> None:
    if at == 0 and len(data) < 2 * _BLOCK:  # after whole members half of the marker will do
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
