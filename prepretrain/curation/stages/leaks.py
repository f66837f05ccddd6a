"""Finds near-copies of evaluation images in the training data."""

from typing import Any

import pyarrow as pa

from prepretrain.curation.copies import Alike, near_pairs, with_hashes
from prepretrain.curation.engine import Tables
from prepretrain.curation.hashes import SCHEMA, hashes
from prepretrain.curation.stages.base import Stage
from prepretrain.curation.thumbnail import pictures, thumbnail_of
from prepretrain.data.card import load_card
from prepretrain.data.sources.base import Source
from prepretrain.data.transforms import BadImage
from prepretrain.evaluation import leaks

_MATCH = pa.struct(
    [
        ("set", pa.string()),
        ("number", pa.int32()),
        ("key", pa.string()),
        ("distance", pa.int32()),
        ("mirrored", pa.bool_()),
    ]
)


class Leaks(Stage):
    """`matches`: the images of evaluation sets that an image is a near-copy of, by their set, number in
    it and key, nearest first; `reason`: the set of the nearest. What was found of each set is also in
    found.json beside the tables, which `evaluator.leaks` reads.

    against   the sets, as [cifar10:val, imagenet1k:val]
    coarse, fine, colour, mirrored: what a near-copy is, as stage duplicates has it

    Sets may be of any card; a video is the frame that it shows halfway, here as in stage look. An image
    of an evaluation that cannot be decoded has no hash: its key is in found.json.
    """

    kind = "reduce"
    reads = {"look": tuple(SCHEMA.names)}
    columns = {"reason": pa.string(), "matches": pa.list_(_MATCH)}

    def __init__(
        self,
        *,
        against: list[str],
        coarse: int = Alike.coarse,
        fine: int = Alike.fine,
        colour: int = Alike.colour,
        mirrored: bool = True,
    ):
        if not against or isinstance(against, str) or len(set(against)) != len(against):
            raise ValueError(f"against: {against!r} is no list of sets, such as [cifar10:val].")
        self.against, self.alike, self.mirrored = against, Alike(coarse, fine, colour), mirrored

    def check(self) -> None:
        """See Stage.check: all the sets are there."""
        self._sets()

    def _sets(self) -> dict[str, Source]:
        """Each set's images, by "card:split"."""
        sets = {}
        for address in self.against:
            name, colon, split = address.rpartition(":")
            if not colon:
                raise ValueError(f"against: {address!r} names no split, as cifar10:val does.")
            card = load_card(name)
            sets[f"{card.name}:{split}"] = pictures(card.open(split))
        return sets

    def reduce(self, tables: Tables) -> Any:
        database = tables.database
        sets = self._sets()
        hashed, unreadable = _hashed(sets)
        database.register("hashed_sets", hashed)
        database.sql(
            f"CREATE TEMP TABLE trained AS {with_hashes('FROM look WHERE coarse IS NOT NULL')}"
        )
        rows = "FROM (SELECT 0 AS shard, place AS row, * FROM hashed_sets)"
        turned = f"UNION ALL {with_hashes(rows, flipped=True)}" if self.mirrored else ""
        database.sql(
            f"CREATE TEMP TABLE evaluated AS SELECT *, false AS flipped FROM ({with_hashes(rows)}) {turned}"
        )
        pairs = near_pairs(database, "trained", "evaluated", self.alike)
        database.register("near", pa.table(pairs))
        self._record(tables, sets, unreadable)
        return database.sql(
            """WITH matched AS (
                SELECT one, list(
                    {'set': set, 'number': number, 'key': key, 'distance': distance, 'mirrored': flipped}
                    ORDER BY distance, place
                ) AS matches FROM near JOIN hashed_sets ON other = place GROUP BY one
            )
            SELECT one >> 32 AS shard, one & 4294967295 AS row, matches,
                'near-copy of ' || matches[1].set AS reason
            FROM matched"""
        )

    def _record(
        self, tables: Tables, sets: dict[str, Source], unreadable: dict[str, list[str]]
    ) -> None:
        """Writes what was found of each set, for evaluations."""
        found = tables.query(
            "SELECT DISTINCT set, number FROM near JOIN hashed_sets ON other = place ORDER BY ALL"
        ).fetchall()
        leaks.write(
            tables.folder.path,
            tables.folder.manifest.data,
            {
                address: leaks.Leaked(
                    source.fingerprint,
                    len(source),
                    [number for name, number in found if name == address],
                    unreadable[address],
                )
                for address, source in sets.items()
            },
        )


def _hashed(sets: dict[str, Source]) -> tuple[pa.Table, dict[str, list[str]]]:
    """The hashes of all images, with `place`, their number among all, set, number and key; and the keys
    of those that cannot be decoded, by set."""
    rows: list[dict[str, Any]] = []
    unreadable: dict[str, list[str]] = {}
    for address, source in sets.items():
        unreadable[address] = []
        for number in range(len(source)):
            try:
                found = hashes(thumbnail_of(source[number])[0])
            except BadImage:
                unreadable[address].append(source.key(number))
                continue
            about = {"set": address, "number": number, "key": source.key(number)}
            rows.append({"place": len(rows), **about, **found})
    kinds = [("place", pa.int64()), ("set", pa.string()), ("number", pa.int32())]
    return pa.Table.from_pylist(
        rows, pa.schema([*kinds, ("key", pa.string()), *SCHEMA])
    ), unreadable
