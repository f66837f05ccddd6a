"""Compares features by their cosine."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from prepretrain.curation.engine import Tables
from prepretrain.data.shards.on_cores import cores

_AT_ONCE = 1024  # not from the paper: rows that are compared at once
_MOST = 100  # not from the paper: pairs for each of them
_NO_PAIRS = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))

COLUMNS = ("feature", "model")  # of a stage embed's table, which are read here


def unit_rows(table: pa.Table, wanted: np.ndarray) -> np.ndarray:
    """The features of those rows of a stage embed's table that are wanted, float32 [n, D], of length
    1."""
    features = table["feature"].combine_chunks().filter(pa.array(wanted)).flatten()
    rows = int(wanted.sum())
    return of_length_one(features.to_numpy().reshape(rows, len(features) // max(rows, 1)))


def of_length_one(rows: np.ndarray) -> np.ndarray:
    """Rows [n, D] as float32, each divided by its length."""
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def models_of(table: pa.Table) -> set[str]:
    """Which models the features of a stage embed's table are of."""
    return set(table["model"].drop_null().unique().to_pylist())


def pairs_above(
    tables: Tables, features: str, others: np.ndarray, similarity: float
) -> dict[str, np.ndarray]:
    """The pairs of an image of the table `features` and one of others [m, D] whose cosine is above
    `similarity`: arrays one (its number), other (its place) and similarity.

    Every pair is computed, one shard in each thread, whose sums do not depend on how many there are.
    Raises ValueError where so many are above that the model hardly tells images apart there.
    """
    import faiss

    index = faiss.IndexFlatIP(others.shape[1])
    index.add(of_length_one(others))

    def of_shard(shard: int) -> dict[str, np.ndarray]:
        table = tables.read(features, shard)
        wanted = table["feature"].is_valid().to_numpy()
        rows, numbers = unit_rows(table, wanted), (shard << 32) + np.flatnonzero(wanted)
        parts = [
            _above(index, rows[first : first + _AT_ONCE], similarity)
            for first in range(0, len(rows), _AT_ONCE)
        ]
        count, other, cosine = (np.concatenate(part) for part in zip(_NO_PAIRS, *parts))
        return {"one": np.repeat(numbers, count), "other": other, "similarity": cosine}

    with ThreadPoolExecutor(cores(), initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        shards = list(pool.map(of_shard, tables.numbers))
    return {name: np.concatenate([found[name] for found in shards]) for name in shards[0]}


def _above(index: Any, rows: np.ndarray, similarity: float) -> tuple[np.ndarray, ...]:
    """(how many of the index's rows each of `rows` has above `similarity`, their places, their cosines),
    places in order."""
    ends, cosines, places = index.range_search(rows, similarity)
    if len(places) > _MOST * len(rows):
        raise ValueError(
            f"similarity: {similarity} is passed by {len(places) / len(rows):,.0f} images of the evaluation sets "
            f"for each of {len(rows)} images. Name one nearer to 1, or features that tell more apart."
        )
    count = np.diff(ends.astype(np.int64))
    order = np.lexsort((places, np.repeat(np.arange(len(rows)), count)))
    return count, places[order], cosines[order]
