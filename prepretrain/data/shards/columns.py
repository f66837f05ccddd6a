"""One value of all samples of a tar shard, read in one pass over its json and txt members."""

import mmap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.json as arrow_json

from prepretrain.data.shards.tar_index import Index

_AT_ONCE = 1 << 26  # not from the paper: bytes of json members that are parsed together
_KINDS = (pa.list_(pa.string()), pa.string())


def read_column(shard: Path, index: Index, place: str) -> pa.Array | None:
    """The values of a member ("txt"), or of a name in the json members ("json.hashtags"): texts or
    lists of texts, null where a sample has none.

    None where the members of this shard hold, or lack, something that only reading them one by one
    tells apart: other types, bytes that are not UTF-8, a member that is no JSON.
    """
    member, _, name = place.partition(".")
    spans = index.spans(member)
    if spans is None:
        return pa.nulls(len(index), pa.string())
    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # the kernel reads ahead, and large images between two members are not touched
        pieces = [data[start:end] if start >= 0 else None for start, end in spans.tolist()]
    return _named(pieces, name) if name else _texts(pieces)


def _texts(pieces: list[bytes | None]) -> pa.Array | None:
    try:
        return pa.array(pieces, pa.binary()).cast(pa.string())  # which checks that it is UTF-8
    except pa.ArrowInvalid:
        return None


def _named(pieces: list[bytes | None], name: str) -> pa.Array | None:
    """The values of a name in these json texts."""
    texts = [b"{}" if piece is None else piece for piece in pieces]
    parts = np.array_split(np.arange(len(texts)), sum(map(len, texts)) // _AT_ONCE + 1)
    for kind in _KINDS:
        columns = [parsed([texts[row] for row in rows], name, kind) for rows in parts]
        if all(column is not None for column in columns):
            return pa.chunked_array(columns, kind).combine_chunks()
    return None


def parsed(texts: list[bytes], name: str, kind: pa.DataType) -> pa.Array | None:
    """The values of a name in json texts, each of which is one object; None where they are not, or
    where a value is of another type."""
    data = b"\n".join(texts)
    signs, sizes = np.frombuffer(data, np.uint8), np.fromiter(map(len, texts), int, len(texts))
    ends = np.cumsum(sizes + 1) - 1
    # An object can begin only where another has ended, so as many objects as texts are one each.
    if not sizes.all() or (signs[ends - sizes] != ord("{")).any():
        return None
    if (signs[ends - 1] != ord("}")).any():
        stripped = [text.rstrip(b" \t\r\n") for text in texts]  # some writers end with a new line
        return None if stripped == texts else parsed(stripped, name, kind)
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


def _check_text(data: bytes) -> None:
    """Raises pa.ArrowInvalid for what is not UTF-8."""
    ends = pa.py_buffer(np.array([0, len(data)], np.int64))
    pa.LargeStringArray.from_buffers(1, ends, pa.py_buffer(data)).validate(full=True)
