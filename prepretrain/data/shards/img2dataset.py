"""What img2dataset writes beside each shard: NNNNN.parquet, a row for each URL, and NNNNN_stats.json."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prepretrain.data.shards.files import Shard, beside
from prepretrain.data.shards.tar_index import Index
from prepretrain.data.subset import evenly
from prepretrain.files import read_json

_COMPARED = 8  # not from the paper: samples of each shard that are compared with their rows
_COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")


class Disagrees(ValueError):
    """A file beside a shard that says something else than the shard."""


def read_rows(file: Path, index: Index, columns: Sequence[str]) -> pa.Table | None:
    """These columns of a shard's Parquet file (sha256, width, …), a row for each of the shard's samples
    and in their order; None for a file that is not img2dataset's or lacks one of them.

    Raises Disagrees where its successful rows are not the shard's samples, by their keys.
    """
    wanted = {"key", "status", *columns}
    try:
        opened = pq.ParquetFile(file)
        if not wanted <= set(opened.schema_arrow.names):
            return None
        table = opened.read(columns=sorted(wanted), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Disagrees(f"{file}: not readable as Parquet: {error}") from error
    return _ordered(file, table.filter(pc.equal(table["status"], "success")), index)


def column(
    file: Path,
    index: Index,
    place: str,
    read: Callable[[Sequence[int]], Sequence[Any]],
    convert: Callable,
) -> pa.Array | None:
    """The column of a place ("json.tags", or "txt", which is the column caption) of a shard's Parquet
    file: see `read_rows`. Raises Disagrees, too, where one of some rows, spread evenly, is not what the
    members hold: convert(value) is compared with read(row)."""
    name = "caption" if place == "txt" else place.partition(".")[2]
    rows = read_rows(file, index, [name]) if name else None
    values = None if rows is None else _plain(rows[name])
    if values is None:
        return None
    rows_compared = evenly(len(values), _COMPARED)
    for row, held in zip(rows_compared, read(rows_compared)):
        if held != (written := convert(values[row].as_py())):
            raise Disagrees(
                f"{file}: {name} of '{index.key(row)}' is {written!r}, and in the shard {held!r}"
            )
    return values


def _ordered(file: Path, table: pa.Table, index: Index) -> pa.Table:
    """The rows of a shard's samples, in its order."""
    keys, written = index.keys(), table["key"].cast(pa.large_string()).combine_chunks()
    if len(keys) == len(written) and keys.equals(written):
        return table
    places = pc.index_in(keys, value_set=written)
    if len(keys) != len(written) or places.null_count:
        raise Disagrees(
            f"{file}: has {len(written):,} successful rows, and the shard {len(keys):,} samples, of "
            f"which {places.null_count:,} have no row"
        )
    return table.take(places)


def _plain(values: pa.ChunkedArray) -> pa.Array | None:
    """A column as texts, or as lists of texts; None for other types."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    is_text = lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_text(kind):
        return values.cast(pa.string()).combine_chunks()
    if is_list and is_text(kind.value_type):
        return values.cast(pa.list_(pa.string())).combine_chunks()
    return pa.nulls(len(values), pa.string()) if pa.types.is_null(kind) else None


def downloads(shards: Sequence[Shard], samples: Sequence[int]) -> tuple[Counter, list[str]]:
    """What img2dataset counted while it made these shards, summed ({} without its files), with each
    cause of a failure as "status: CAUSE"; and what of it is not so."""
    total: Counter[str] = Counter()
    wrong = []
    for shard, held in zip(shards, samples):
        name = f"{shard.stem}_stats.json"
        with beside(shard, name) as file:
            if file is None:
                continue
            try:
                stats = _counted(file)
            except ValueError as error:
                wrong.append(str(error))
                continue
        if stats["successes"] != held:
            wrong.append(
                f"{name}: counts {stats['successes']:,} images, and {shard} holds {held:,}"
            )
        total.update(stats)
    return total, wrong


def _counted(file: Path) -> dict[str, int]:
    content = read_json(file)
    causes = content.get("status_dict")
    causes = causes if isinstance(causes, dict) else {}
    stats = {name: content.get(name) for name in _COUNTS}
    stats |= {f"status: {cause}": n for cause, n in causes.items() if cause != "success"}
    if odd := next((name for name, n in stats.items() if type(n) is not int or n < 0), None):
        raise ValueError(f"{file}: {odd}: {stats[odd]!r} is no count.")
    return stats
