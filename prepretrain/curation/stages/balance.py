"""Weighs samples by how frequent what is said of them is: much of the rare, some of the frequent."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prepretrain.curation.engine import Tables
from prepretrain.curation.stages.base import Stage
from prepretrain.data.sampling.resample import LAWS, cap, tail_of, threshold_of


class Balance(Stage):
    """`weight`, how often a sample is to come, by the entries of a list column: tags, or what a caption
    matches.

    by        the column: tags.tags, text.matches, or one of your own
    law       "metaclip": the probability that MetaCLIP (arXiv 2309.16671) keeps a caption with: each
              entry draws with min(1, t / count), and one is enough. "cap", "repeat_factor" and
              "inverse_sqrt" (data/sampling/resample.py): the largest factor of its entries
    t         in how many samples an entry may be before it is frequent (MetaCLIP: 20,000 for 400
              million pairs, 170,000 for 2.5 billion)
    language  a column of languages, as text.language: entries are counted in each by itself, and t, which
              is English's, is carried over to others by the share of all matches that rarer entries
              have (MetaCLIP 2, arXiv 2507.22062)
    after     tables with a column `reason`: what they drop is not counted

    A sample without an entry has the weight 0 and a `reason` with "metaclip", as there, and 1 with other
    laws. A weight below 1 leaves a sample out of some epochs.
    """

    kind = "reduce"
    columns = {"weight": pa.float32(), "reason": pa.string()}

    def __init__(
        self,
        *,
        by: str,
        t: float,
        law: Literal["metaclip", "cap", "repeat_factor", "inverse_sqrt"] = "metaclip",
        language: str | None = None,
        after: tuple[str, ...] = (),
    ):
        if law not in ("metaclip", *LAWS):
            raise ValueError(f"law: {law!r} is none of metaclip, {', '.join(LAWS)}.")
        self.t, self.law, self.after = t, law, after
        self.reads: dict[str, tuple[str, ...]] = {}
        self.by, self.language = self._place("by", by), None
        if language is not None:
            self.language = self._place("language", language)
        for name in after:
            self._read(name, "reason")

    def _place(self, option: str, place: str) -> tuple[str, str]:
        """(table, column) of what an option names, which is then read."""
        name, dot, column = place.partition(".")
        if not dot:
            raise ValueError(f"{option}: {place!r} is no table.column, such as text.matches.")
        self._read(name, column)
        return name, column

    def _read(self, table: str, column: str) -> None:
        self.reads[table] = (*self.reads.get(table, ()), column)

    def reduce(self, tables: Tables) -> Any:
        counts = self._counts(tables)
        thresholds = self._thresholds(counts)
        rows = pa.RecordBatchReader.from_batches(
            pa.schema([("shard", pa.int32()), ("row", pa.int32()), *self.columns.items()]),
            self._weighed(tables, counts, thresholds),
        )
        tables.database.register("weighed", rows)
        return tables.query("FROM weighed")

    def _counts(self, tables: Tables) -> dict[str, tuple[pa.Array, np.ndarray]]:
        """The entries of each language, or of "", and in how many samples each is."""
        table, column = self.by
        said, joined = "''", ""
        if self.language is not None:
            said = f'l."{self.language[1]}"'
            joined = f"JOIN {self.language[0]} l USING (shard, row)"
        found = tables.query(
            f"""SELECT language, entry, count(*) AS count FROM (
                SELECT shard, row, {said} AS language, unnest(list_distinct(b."{column}")) AS entry
                FROM {tables.left(table, self.after)} b {joined}
            ) WHERE language IS NOT NULL GROUP BY ALL ORDER BY ALL"""
        ).to_arrow_table()
        counts = {}
        for language in found["language"].unique().to_pylist():
            rows = found.filter(pc.equal(found["language"], language))
            counts[language] = (rows["entry"].combine_chunks(), rows["count"].to_numpy())
        return counts

    def _thresholds(self, counts: dict[str, tuple[pa.Array, np.ndarray]]) -> dict[str, float]:
        """t of each language, as a count."""
        if self.language is None:
            return dict.fromkeys(counts, self.t)
        if "en" not in counts:
            raise ValueError("balance.language: no sample is in English, whose threshold t is.")
        tail = tail_of(counts["en"][1], self.t)
        return {
            language: self.t if language == "en" else threshold_of(count, tail)
            for language, (_, count) in counts.items()
        }

    def _weighed(
        self,
        tables: Tables,
        counts: dict[str, tuple[pa.Array, np.ndarray]],
        thresholds: dict[str, float],
    ) -> Iterator[pa.RecordBatch]:
        """The weights of one shard after another."""
        for number in tables.numbers:
            lists = tables.read(self.by[0], number)[self.by[1]].combine_chunks()
            languages = np.full(len(lists), "", object)
            if self.language is not None:
                read = tables.read(self.language[0], number)[self.language[1]]
                languages = np.array(read.to_pylist(), object)
            weight = np.full(len(lists), 0.0 if self.law == "metaclip" else 1.0)
            known = np.zeros(len(lists), bool)
            for language, (entries, count) in counts.items():
                rows = np.flatnonzero(languages == language)
                factors = self._factors(count, thresholds[language])
                found, some = _of_rows(lists.take(pa.array(rows)), entries, factors, self.law)
                weight[rows[some]], known[rows[some]] = found, True
            reason = np.where(known | (self.law != "metaclip"), None, "no entry")
            yield pa.record_batch(
                [
                    pa.array(np.full(len(lists), number), pa.int32()),
                    pa.array(np.arange(len(lists)), pa.int32()),
                    pa.array(weight, pa.float32()),
                    pa.array(reason, pa.string()),
                ],
                names=["shard", "row", *self.columns],
            )

    def _factors(self, count: np.ndarray, threshold: float) -> np.ndarray:
        """What each entry asks for, by in how many samples it is."""
        law = cap if self.law == "metaclip" else LAWS[self.law]
        return law(count.astype(np.float64), threshold)


def _of_rows(
    lists: pa.Array, entries: pa.Array, factors: np.ndarray, law: str
) -> tuple[np.ndarray, np.ndarray]:
    """The weights of those rows that have an entry, and their places."""
    lengths = np.nan_to_num(pc.list_value_length(lists).to_numpy(zero_copy_only=False))
    places = pc.index_in(lists.flatten(), entries).to_numpy(zero_copy_only=False)
    counted = ~np.isnan(places.astype(np.float64))
    rows = np.repeat(np.arange(len(lists)), lengths.astype(np.int64))[counted]
    found = factors[places[counted].astype(np.int64)]
    some, starts = np.unique(rows, return_index=True)
    if not len(some):
        return np.zeros(0), some
    if law == "metaclip":
        return 1 - np.multiply.reduceat(1 - found, starts), some
    return np.maximum.reduceat(found, starts), some
