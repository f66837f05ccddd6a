"""Finds images that are in the data more than once, and says which of them is kept."""

from typing import Any

import numpy as np
import pyarrow as pa

from prepretrain.curation.copies import NUMBER, Alike, Pairs, masks, near_pairs, with_hashes
from prepretrain.curation.engine import Tables
from prepretrain.curation.hashes import SCHEMA
from prepretrain.curation.stages.base import Stage

_CROWD = 200  # not from the paper: how many images make one
FILE, PIXELS, NEAR, MIRRORED = "same file", "same pixels", "near-copy", "mirrored near-copy"


class Duplicates(Stage):
    """Groups of copies: equal files (SHA-256), then equal pixels, then near-copies by perceptual hashes
    (curation/hashes.py), each among what the one before has left.

    coarse    how many bits of the 64 of the coarse hash may differ: every pair of so few is found. Time
              grows with it: 8 for some millions of images, 4 for a billion
    fine      how many of the 256 bits of the fine hash may differ (31: what PDQ's users take for a
              match, ThreatExchange). Of photographs from everywhere 60 finds more crops; of pictures
              of one kind, as of a shop's goods, what only looks alike comes with it
    colour    how many levels of 255 the colours of parts may differ; 255 takes a grey copy for one
    mirrored  whether mirror images are copies, too
    after     tables with a column `reason`: what they drop is no copy and has none

    Of equal files and pixels the first is kept; of near-copies the largest picture, then the largest
    file, then the first, and every one that has no copy among those that are kept. A picture that is
    there hundreds of times is compared with the best of them alone. `group`
    is a number that all of a group have, those that are kept included; the other columns are null for these:
    `reason`, `distance` (bits of the fine hash) to the image that is kept instead, and its
    `kept_shard`, `kept_row` and key, `kept`. An image that cannot be decoded has no hash, and so no
    copy but an equal file.
    """

    kind = "reduce"
    columns = {
        "reason": pa.string(),
        "group": pa.int64(),
        "distance": pa.int32(),
        "kept_shard": pa.int32(),
        "kept_row": pa.int32(),
        "kept": pa.string(),
    }

    def __init__(
        self,
        *,
        coarse: int = Alike.coarse,
        fine: int = Alike.fine,
        colour: int = Alike.colour,
        mirrored: bool = True,
        after: tuple[str, ...] = (),
    ):
        self.alike, self.mirrored, self.after = Alike(coarse, fine, colour), mirrored, after
        self.reads = {
            "meta": ("key", "bytes", "width", "height", "sha256"),
            "look": tuple(SCHEMA.names),
            **{name: ("reason",) for name in after},
        }

    def reduce(self, tables: Tables) -> Any:
        database = tables.database
        meta, look = tables.left("meta", self.after), tables.left("look", self.after)
        database.sql(f"CREATE TEMP TABLE dropped AS {_equal(meta, 'sha256', FILE)}")
        left = f"{look} ANTI JOIN dropped ON {NUMBER} = number"
        database.sql(f"INSERT INTO dropped {_equal(left, 'thumb', PIXELS)}")
        found, groups = self._near(tables)
        database.register("near_found", found)
        database.sql("INSERT INTO dropped FROM near_found")
        database.register("near_groups", groups)
        return database.sql(_ANSWER)

    def _near(self, tables: Tables) -> tuple[pa.Table, pa.Table]:
        """(what near-copies make superfluous, the group of each of them and of those that are kept)."""
        database = tables.database
        left = f"FROM {tables.left('look', self.after)} ANTI JOIN dropped ON {NUMBER} = number WHERE coarse IS NOT NULL"
        database.sql(f"CREATE TEMP TABLE hashed AS {with_hashes(left)}")
        turned = f"UNION ALL {with_hashes(left, flipped=True)}" if self.mirrored else ""
        database.sql(f"CREATE TEMP TABLE turned AS SELECT *, false AS flipped FROM hashed {turned}")
        while self._thin(tables):
            pass
        found = near_pairs(database, "hashed", "turned", self.alike, ordered=True)
        pairs = Pairs(**found)
        dropped_by = pairs.keep(self._best_first(tables, pairs.images))
        dropped = np.flatnonzero(dropped_by >= 0)
        by = dropped_by[dropped]
        kept = pairs.one[by] + pairs.other[by] - dropped  # a pair's other end
        return (
            _dropped(pairs.images[dropped], pairs.images[kept], found, by),
            pa.table({"number": pairs.images, "first": pairs.groups()}),
        )

    def _thin(self, tables: Tables) -> bool:
        """Drops the copies of the best image of each crowd, of images that agree in the bits of one mask:
        a picture that is there n times would make n²/2 pairs with itself. What remains in `hashed` is
        like none of the images that are kept here. Returns whether there was such a picture, beside which
        a crowd may hold others."""
        database = tables.database
        ((images,),) = database.sql("SELECT count(*) FROM turned").fetchall()
        bits = f"coarse & {masks(self.alike.coarse, images)[0]}::UBIGINT"
        database.sql(
            f"""CREATE OR REPLACE TEMP TABLE leaders AS SELECT h.* FROM hashed h SEMI JOIN (
            SELECT arg_max(number, (width::BIGINT * height, bytes, -number)) AS number FROM hashed
            JOIN meta ON number = {NUMBER}
            WHERE {bits} IN (SELECT {bits} FROM hashed GROUP BY ALL HAVING count(*) > {_CROWD})
            GROUP BY {bits}) USING (number)"""
        )
        leaders = database.sql("SELECT number FROM leaders ORDER BY number").fetchnumpy()["number"]
        if not len(leaders):
            return False
        found = near_pairs(database, "leaders", "turned", self.alike)
        found = {name: values[found["one"] != found["other"]] for name, values in found.items()}
        among = np.isin(found["other"], leaders)
        pairs = Pairs(**{name: values[among] for name, values in found.items()})
        lost = pairs.images[pairs.keep(self._best_first(tables, pairs.images)) >= 0]
        by_kept = np.flatnonzero(~np.isin(found["one"], lost))
        by_kept = by_kept[np.lexsort((found["distance"][by_kept], found["other"][by_kept]))]
        dropped, nearest = np.unique(found["other"][by_kept], return_index=True)
        by = by_kept[nearest]
        database.register("thinned", _dropped(dropped, found["one"][by], found, by))
        database.register("settled", pa.table({"number": np.union1d(dropped, leaders)}))
        database.sql("INSERT INTO dropped FROM thinned")
        for table in ("hashed", "turned"):
            database.sql(f"DELETE FROM {table} WHERE number IN (FROM settled)")
        _, copies = np.unique(found["one"][by], return_counts=True)
        return bool((copies >= _CROWD).any())

    def _best_first(self, tables: Tables, images: np.ndarray) -> np.ndarray:
        """The places of these images, those first that are kept rather than others."""
        tables.database.register("images", pa.table({"number": images}))
        about = tables.query(
            f"SELECT width::BIGINT * height AS pixels, bytes FROM images "
            f"JOIN meta ON number = {NUMBER} ORDER BY number"
        ).fetchnumpy()
        return np.lexsort((images, -np.asarray(about["bytes"]), -np.asarray(about["pixels"])))


def _dropped(
    number: np.ndarray, kept: np.ndarray, pairs: dict[str, np.ndarray], by: np.ndarray
) -> pa.Table:
    """Which images are dropped, in favour of which, and by which of the pairs."""
    reasons = np.where(pairs["flipped"][by], MIRRORED, NEAR)
    return pa.table(
        {
            "number": number,
            "kept": kept,
            "reason": pa.array(reasons, pa.string()),
            "distance": pairs["distance"][by],
        }
    )


def _equal(rows: str, column: str, reason: str) -> str:
    """A query of those rows that have the value of an earlier one, in SQL."""
    return f"""
        SELECT number, first AS kept, '{reason}' AS reason, 0 AS distance FROM (
            SELECT {NUMBER} AS number, min({NUMBER}) OVER (PARTITION BY {column}) AS first
            FROM {rows} WHERE {column} IS NOT NULL
        ) WHERE number != first ORDER BY number"""


# An image in whose favour another is dropped may itself be dropped by a later step, of which there are
# three; `alone` are the images that are kept.
_ANSWER = """
    WITH resolved AS (
        SELECT d.number, d.reason, coalesce(f.kept, e.kept, d.kept) AS kept,
            d.distance + coalesce(e.distance, 0) + coalesce(f.distance, 0) AS distance
        FROM dropped d LEFT JOIN dropped e ON d.kept = e.number LEFT JOIN dropped f ON e.kept = f.number
    ), alone AS (
        SELECT kept AS number FROM resolved UNION SELECT number FROM near_groups
        EXCEPT SELECT number FROM dropped
    ), members AS (
        FROM resolved UNION ALL SELECT number, NULL, NULL, NULL FROM alone
    )
    SELECT m.number >> 32 AS shard, m.number & 4294967295 AS row, m.reason, m.distance,
        coalesce(g.first, m.kept, m.number) AS group, m.kept >> 32 AS kept_shard,
        m.kept & 4294967295 AS kept_row, k.key AS kept
    FROM members m
    LEFT JOIN near_groups g ON g.number = coalesce(m.kept, m.number)
    LEFT JOIN meta k ON m.kept >> 32 = k.shard AND m.kept & 4294967295 = k.row
"""
