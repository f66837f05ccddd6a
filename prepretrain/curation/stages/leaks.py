"""Finds near-copies of evaluation images in the training data."""

from typing import Any

import numpy as np
import pyarrow as pa

from prepretrain import plugin
from prepretrain.curation import similarity as cosines
from prepretrain.curation.copies import Alike, near_pairs, with_hashes
from prepretrain.curation.embedding import require_images
from prepretrain.curation.engine import Tables
from prepretrain.curation.hashes import SCHEMA, hashes
from prepretrain.curation.stages.base import Stage
from prepretrain.curation.thumbnail import pictures, thumbnail_of
from prepretrain.data.card import load_card
from prepretrain.data.sources.base import Source
from prepretrain.data.subset import Subset
from prepretrain.data.transforms import BadImage
from prepretrain.evaluation import leaks
from prepretrain.files import read_json

_MATCH = pa.struct(
    [
        ("set", pa.string()),
        ("number", pa.int32()),
        ("key", pa.string()),
        ("distance", pa.int32()),
        ("mirrored", pa.bool_()),
        ("similarity", pa.float32()),
    ]
)
_SIMILAR = pa.schema([("one", pa.int64()), ("other", pa.int64()), ("similarity", pa.float32())])


class Leaks(Stage):
    """`matches`: the images of evaluation sets that an image is a near-copy of, by their set, number in
    it and key, nearest first; `reason`: the set of the nearest. What was found of each set is also in
    found.json beside the tables, which `evaluator.leaks` reads.

    against     the sets, as [cifar10:val, imagenet1k:val]
    coarse, fine, colour, mirrored: what a near-copy is, as stage duplicates has it
    features    the table of a stage embed: images whose features are alike are near-copies, too, as are
                crops, which hashes do not find. Features of the sets are computed by the same model
    similarity  the cosine above which they are alike; it depends on the model: look at the report

    Sets may be of any card; a video is the frame that it shows halfway, here as in stage look, and has no
    features. A match has the `distance` of the hashes or, of features, the `similarity`, or both. Every
    pair of an image and one of an evaluation is compared. An image of an evaluation that cannot be
    decoded has neither: its key is in found.json.
    """

    kind = "reduce"
    columns = {"reason": pa.string(), "matches": pa.list_(_MATCH)}

    def __init__(
        self,
        *,
        against: list[str],
        coarse: int = Alike.coarse,
        fine: int = Alike.fine,
        colour: int = Alike.colour,
        mirrored: bool = True,
        features: str | None = None,
        similarity: float | None = None,
    ):
        if not against or isinstance(against, str) or len(set(against)) != len(against):
            raise ValueError(f"against: {against!r} is no list of sets, such as [cifar10:val].")
        if (features is None) != (similarity is None):
            raise ValueError(
                f"features: {features!r}, similarity: {similarity!r}: one needs the other, such as "
                f"features: embed, similarity: 0.95."
            )
        self.against, self.alike, self.mirrored = against, Alike(coarse, fine, colour), mirrored
        self.features, self.similarity, self.gpu = features, similarity, features is not None
        self.reads = {"look": tuple(SCHEMA.names)}
        if features is not None:
            self.reads[features] = cosines.COLUMNS

    def check(self) -> None:
        """See Stage.check: all the sets are there."""
        sets = self._sets()
        if self.features is not None:
            plugin.require("faiss", "data", "leaks")
            for address, source in sets.items():
                require_images(source, f"leaks.features: {address}")

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
        database, sets = tables.database, self._sets()
        hashed = _hashed(sets)
        features = None if self.features is None else self._features(tables, sets, hashed)
        database.register("evaluated", hashed)
        database.register("near", pa.table(self._near(tables)))
        similar = {} if features is None else self._similar(tables, features)
        database.register(
            "alike", pa.table(similar, _SIMILAR) if similar else _SIMILAR.empty_table()
        )
        database.sql(
            "CREATE TEMP TABLE matched_pairs AS FROM near FULL JOIN alike USING (one, other)"
        )
        self._record(tables, sets, _unreadable(hashed, features))
        return database.sql(
            """WITH matched AS (
                SELECT one, list({
                    'set': set, 'number': number, 'key': key, 'distance': distance,
                    'mirrored': flipped, 'similarity': similarity
                } ORDER BY distance NULLS LAST, similarity DESC, place) AS matches
                FROM matched_pairs JOIN evaluated ON other = place GROUP BY one
            )
            SELECT one >> 32 AS shard, one & 4294967295 AS row, matches, 'near-copy of ' ||
                matches[1].set || if(matches[1].distance IS NULL, ' by features', '') AS reason
            FROM matched"""
        )

    def _near(self, tables: Tables) -> dict[str, np.ndarray]:
        """Pairs of an image and an evaluation's, by its place, that are alike by their hashes."""
        database = tables.database
        database.sql(
            f"CREATE TEMP TABLE trained AS {with_hashes('FROM look WHERE coarse IS NOT NULL')}"
        )
        rows = "FROM (SELECT 0 AS shard, place AS row, * FROM evaluated WHERE coarse IS NOT NULL)"
        turned = f"UNION ALL {with_hashes(rows, flipped=True)}" if self.mirrored else ""
        database.sql(
            f"CREATE TEMP TABLE both_ways AS SELECT *, false AS flipped FROM ({with_hashes(rows)}) {turned}"
        )
        return near_pairs(database, "trained", "both_ways", self.alike)

    def _features(
        self, tables: Tables, sets: dict[str, Source], hashed: pa.Table
    ) -> list[np.ndarray | None]:
        """Those of each image of the sets, one set after another, as the stage of the table `features`
        has made them of the data; None for an image that cannot be read."""
        file = tables.folder.stage_file(self.features)
        options = read_json(file)
        del options["mark"]
        if options["name"] != "embed":
            raise ValueError(
                f"{file}: is no stage embed, so what it makes of an evaluation is not known."
            )
        embed = plugin.build("curation_stages", options.pop("name"), **options)
        models = f'SELECT DISTINCT model FROM "{self.features}" WHERE model IS NOT NULL'
        if {model for (model,) in tables.query(models).fetchall()} - {embed.embedder.mark}:
            raise ValueError(
                f"features: the table '{self.features}' is of another model than {embed.embedder.model} is now. "
                f"Remove the table, and run its stage again."
            )
        found: list[np.ndarray | None] = [None] * len(hashed)
        readable, first = hashed["coarse"].is_valid().to_numpy(), 0
        for source in sets.values():
            rows = np.flatnonzero(readable[first : first + len(source)])
            for row, feature in zip(rows, embed.embedder.features(Subset(source, rows))):
                found[first + row] = feature
            first += len(source)
        return found

    def _similar(self, tables: Tables, features: list[np.ndarray | None]) -> dict[str, np.ndarray]:
        """Pairs of an image and an evaluation's, by its place, that are alike by their features."""
        places = [place for place, feature in enumerate(features) if feature is not None]
        if not places:
            return {}
        rows = np.stack([features[place] for place in places])
        pairs = cosines.pairs_above(tables, self.features, rows, self.similarity)
        return pairs | {"other": np.array(places)[pairs["other"]]}

    def _record(
        self, tables: Tables, sets: dict[str, Source], unreadable: dict[str, list[str]]
    ) -> None:
        """Writes what was found of each set, for evaluations."""
        found = tables.query(
            "SELECT DISTINCT set, number FROM matched_pairs JOIN evaluated ON other = place ORDER BY ALL"
        ).fetchall()
        leaks.write(
            tables.folder.path,
            tables.folder.manifest.data,
            {
                address: leaks.Leaked(
                    source.fingerprint,
                    len(source),
                    [number for name, number in found if name == address],
                    unreadable.get(address, []),
                )
                for address, source in sets.items()
            },
        )


def _hashed(sets: dict[str, Source]) -> pa.Table:
    """A row for each image of each set: `place`, its number among all, set, number, key and hashes,
    which are null where it cannot be decoded."""
    rows: list[dict[str, Any]] = []
    for address, source in sets.items():
        for number in range(len(source)):
            about = {
                "place": len(rows),
                "set": address,
                "number": number,
                "key": source.key(number),
            }
            try:
                rows.append(about | hashes(thumbnail_of(source[number])[0]))
            except BadImage:
                rows.append(about)
    kinds = [("place", pa.int64()), ("set", pa.string()), ("number", pa.int32())]
    return pa.Table.from_pylist(rows, pa.schema([*kinds, ("key", pa.string()), *SCHEMA]))


def _unreadable(hashed: pa.Table, features: list[np.ndarray | None] | None) -> dict[str, list[str]]:
    """The keys of images without a hash, or without a feature where those are looked for, by set."""
    bad = hashed["coarse"].is_null().to_numpy()
    if features is not None:
        bad = bad | np.array([feature is None for feature in features], bool)
    found: dict[str, list[str]] = {}
    for row in hashed.select(["set", "key"]).filter(pa.array(bad)).to_pylist():
        found.setdefault(row["set"], []).append(row["key"])
    return found
