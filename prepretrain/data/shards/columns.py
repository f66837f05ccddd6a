"""One value of all samples of a tar shard, read in one pass over its json and txt members."""

import re
import sys
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.json as arrow_json

from prepretrain.data.shards.tar_index import Index

_AT_ONCE = 1 << 21  # not from the paper: bytes of members that are parsed together
_BLANK = np.frombuffer(b" \t\r\n", np.uint8)
_KINDS = (pa.list_(pa.string()), pa.string())


def read_column(shard: Path, index: Index, place: str, largest: int) -> pa.Array | None:
    """The values of a member ("txt"), or of a name in the json members ("json.hashtags"): texts or
    lists of texts, null where a sample has none.

    None where the members of this shard hold, or lack, something that only reading them one by one
    tells apart: other types, bytes that are not UTF-8, a member that is no JSON or has more than
    `largest` bytes.
    """
    member, _, name = place.partition(".")
    spans = index.spans(member)
    if spans is None:
        return pa.nulls(len(index), pa.string())
    if np.diff(spans).max(initial=0) > largest:
        return None
    # An array over the mapping: large images between two members are not touched.
    data = np.asarray(np.memmap(shard, np.uint8, "r"))
    return _named(data, spans, name) if name else _texts(_taken(data, spans))


def _taken(data: np.ndarray, spans: np.ndarray) -> pa.LargeBinaryArray:
    """The bytes of each of these spans, which rise; null for one that is negative."""
    there = spans[:, 0] >= 0
    if not there.any():
        return pa.nulls(len(spans), pa.large_binary())
    ends = spans[there].ravel()  # of the pieces that are wanted and, between them, of the others
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(data)]
    pieces = pa.Array.from_buffers(pa.large_binary(), len(ends) - 1, buffers)
    return pieces.take(pa.array(2 * there.cumsum() - 2, mask=~there))


def _texts(members: pa.LargeBinaryArray) -> pa.Array | None:
    try:
        return members.cast(pa.large_string()).cast(pa.string())  # checks that it is UTF-8
    except pa.ArrowInvalid:
        return None


def _named(data: np.ndarray, spans: np.ndarray, name: str) -> pa.Array | None:
    """The values of a name in the json members at these spans."""
    there = spans[:, 0] >= 0
    members, size = spans[there], np.diff(spans).sum()
    if _has_long_number(data, members):
        return None
    parts = [part for part in np.array_split(members, size // _AT_ONCE + 1) if len(part)]
    column = _decoded([_written(_taken(data, part - (1, 0)), name) for part in parts])
    if column is None:
        column = _parsed_whole([_taken(data, part).to_pylist() for part in parts], name)
    return None if column is None else column.take(pa.array(there.cumsum() - 1, mask=~there))


def _has_long_number(data: np.ndarray, members: np.ndarray) -> bool:
    """Whether a member may hold a number that is too long for Python's json, which alone says so."""
    digits = sys.get_int_max_str_digits()
    long = members[np.diff(members)[:, 0] > digits] if digits else []
    number = re.compile(rb"[0-9]{%d}" % (digits + 1))
    return any(number.search(data[start:end]) for start, end in long)


def _written(lines: pa.LargeBinaryArray, name: str) -> pa.BinaryArray | None:
    """The value of a name as each of these json texts has it written, each of which begins with a byte
    that is not its own; None unless all are objects, as msgspec reads them, which admits no NaN."""
    _, ends, buffer = lines.buffers()
    ends = np.frombuffer(ends, np.int64)[: len(lines) + 1]
    data = np.frombuffer(buffer, np.uint8)[: ends[-1]].copy()
    data[ends[:-1]] = ord("\n")
    if not _are_objects(data, ends[:-1] + 1, ends[1:]):
        return None
    try:
        _check_text(data)
        objects = _decoder(name).decode_lines(data)
    except (msgspec.DecodeError, pa.ArrowInvalid, RecursionError):
        return None
    if len(objects) != len(lines):
        return None
    return pa.array([bytes(found.value) for found in objects], pa.binary())


def _are_objects(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> bool:
    """Whether each text begins and ends as an object. Between two, where a line ends, an object can
    begin only if another has ended, so if there are as many objects as texts, each is one."""
    if (ends - starts < 2).any() or (data[starts] != ord("{")).any():
        return False
    last = ends - 1
    while (blank := np.isin(data[last], _BLANK)).any():  # some writers end with a new line
        last = last - blank
    return bool((data[last] == ord("}")).all())


@lru_cache
def _decoder(name: str) -> msgspec.json.Decoder:
    """Of objects, of which all else is checked and skipped."""
    fields = [("value", msgspec.Raw, msgspec.Raw(b"null"))]
    objects = msgspec.defstruct("Object", fields, rename={"value": name}, gc=False)
    return msgspec.json.Decoder(objects)


def _decoded(parts: list[pa.BinaryArray | None]) -> pa.Array | None:
    """The lists or texts that these json values are; None unless all are."""
    if any(part is None for part in parts):
        return None
    encoded = pa.chunked_array(parts, pa.binary()).combine_chunks().dictionary_encode()
    texts = [b'{"": %s}' % text for text in encoded.dictionary.to_pylist()]
    for kind in _KINDS:
        if (values := parsed(texts, "", kind)) is not None:
            return values.take(encoded.indices)
    return None


def _parsed_whole(parts: list[list[bytes]], name: str) -> pa.Array | None:
    """The values of a name in these json texts, as pyarrow reads them, which takes longer."""
    for kind in _KINDS:
        columns = [parsed(texts, name, kind) for texts in parts]
        if all(column is not None for column in columns):
            return pa.chunked_array(columns, kind).combine_chunks()
    return None


def parsed(texts: list[bytes], name: str, kind: pa.DataType) -> pa.Array | None:
    """The values of a name in json texts, each of which is one object; None where they are not, or
    where a value is of another type."""
    data = b"\n".join(texts)
    sizes = np.fromiter(map(len, texts), int, len(texts))
    ends = np.cumsum(sizes + 1) - 1
    if not _are_objects(np.frombuffer(data, np.uint8), ends - sizes, ends):
        return None
    try:
        _check_text(data)
        table = arrow_json.read_json(
            pa.BufferReader(data),
            # one block, on one thread: pyarrow's pool does not survive a fork
            arrow_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            arrow_json.ParseOptions(
                explicit_schema=pa.schema([(name, kind)]),
                unexpected_field_behavior="ignore",
                newlines_in_values=True,
            ),
        )
    except pa.ArrowInvalid:
        return None
    return table[name].combine_chunks() if len(table) == len(texts) else None


def _check_text(data: bytes | np.ndarray) -> None:
    """Raises pa.ArrowInvalid for what is not UTF-8."""
    ends = pa.py_buffer(np.array([0, len(data)], np.int64))
    pa.LargeStringArray.from_buffers(1, ends, pa.py_buffer(data)).validate(full=True)
