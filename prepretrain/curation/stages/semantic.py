"""Finds images that say the same by their features, as SemDeDup does."""

import numpy as np
import pyarrow as pa

from prepretrain.curation.copies import roots
from prepretrain.curation.engine import Tables
from prepretrain.curation.similarity import COLUMNS, models_of, unit_rows
from prepretrain.curation.stages.base import Stage
from prepretrain.plugin import require

_PER_CLUSTER, _CLUSTERS = 1000, 50_000  # images; the latter is the paper's for 440 million images
_SAMPLE = 256  # images of a cluster that k-means learns from, as faiss has it
_AT_ONCE = 4096  # not from the paper: rows whose similarities are computed at once


class Semantic(Stage):
    """SemDeDup (arXiv 2303.09540, as its released semdedup.py has it): features are divided into clusters
    by k-means on the sphere; within one, those farthest from the centre come first, and one is
    dropped whose similarity to an earlier one is above 1 - eps. So what is kept of a group is the
    image that is least like its cluster.

    features  the table of a stage embed
    eps       not from the paper; the larger, the more is dropped
    clusters  None: one for each 1,000 images, at most the paper's 50,000, since the time of k-means grows
              with images times clusters
    rounds    of k-means
    after     tables with a column `reason`: what they drop is not looked at
    seed      of the images that k-means begins from

    `reason`, `group`, and of the image that is kept instead `distance` (1 - cosine, to the image that
    one was dropped for), `kept_shard` and `kept_row`. All features, in float16, must fit on the disk of
    the one machine that this runs on, below --out; memory holds one cluster's. It computes in one thread, so
    that its sums do not depend on the machine's cores.
    """

    kind = "reduce"
    columns = {
        "reason": pa.string(),
        "group": pa.int64(),
        "distance": pa.float32(),
        "kept_shard": pa.int32(),
        "kept_row": pa.int32(),
    }

    def __init__(
        self,
        *,
        features: str = "embed",
        eps: float = 0.05,
        clusters: int | None = None,
        rounds: int = 100,
        after: tuple[str, ...] = ("duplicates",),
        seed: int = 0,
    ):
        self.features, self.eps, self.clusters = features, eps, clusters
        self.rounds, self.after, self.seed = rounds, after, seed
        self.reads = {features: COLUMNS} | {name: ("reason",) for name in after}

    def check(self) -> None:
        """See Stage.check."""
        require("faiss", "data", "semantic")

    def reduce(self, tables: Tables) -> pa.Table:
        numbers, rows = self._read(tables)
        parent, distance = np.full(len(rows), -1), np.zeros(len(rows), np.float32)
        if len(rows):
            for members in self._clusters(rows):
                earlier, similarity = nearest_earlier(rows[members].astype(np.float32))
                dropped = similarity > 1 - self.eps
                parent[members[dropped]] = members[earlier[dropped]]
                distance[members[dropped]] = 1 - similarity[dropped]
        kept = roots(parent)
        grouped = np.flatnonzero(np.isin(np.arange(len(rows)), kept[parent >= 0]) | (parent >= 0))
        parent, distance, kept = parent[grouped], distance[grouped], kept[grouped]
        alone, own = parent < 0, numbers[grouped]
        group = numbers[kept]
        return pa.table(
            {
                "shard": pa.array(own >> 32, pa.int32()),
                "row": pa.array(own & 0xFFFFFFFF, pa.int32()),
                "reason": pa.array(np.where(alone, None, "same meaning"), pa.string()),
                "group": pa.array(group, pa.int64()),
                "distance": pa.array(distance, pa.float32(), mask=alone),
                "kept_shard": pa.array((group >> 32).astype(np.int32), mask=alone),
                "kept_row": pa.array((group & 0xFFFFFFFF).astype(np.int32), mask=alone),
            }
        )

    def _read(self, tables: Tables) -> tuple[np.ndarray, np.ndarray]:
        """The numbers [n] of the images that are looked at, and their features [n, D] float16, of
        length 1, in a file."""
        tables.spill.mkdir(parents=True, exist_ok=True)
        numbers, models, width, count = [], set(), 0, 0
        with open(tables.spill / "features", "wb") as file:
            for shard in tables.numbers:
                table = tables.read(self.features, shard)
                wanted = table["feature"].is_valid().to_numpy()
                for name in self.after:
                    wanted &= tables.read(name, shard)["reason"].is_null().to_numpy()
                models |= models_of(table)
                self._require_one(models)
                if not wanted.any():
                    continue
                rows = unit_rows(table, wanted)
                file.write(rows.astype(np.float16).tobytes())
                width, count = rows.shape[1], count + len(rows)
                numbers.append((shard << 32) + np.flatnonzero(wanted))
        if not count:
            return np.zeros(0, np.int64), np.zeros((0, 1), np.float16)
        shape = (count, width)
        return np.concatenate(numbers), np.memmap(file.name, np.float16, "r", shape=shape)

    def _require_one(self, models: set[str]) -> None:
        if len(models) > 1:
            raise ValueError(
                f"semantic: the features in the table '{self.features}' are of {len(models)} models "
                f"({', '.join(sorted(models))}), and cannot be compared. Remove the table and run its stage again."
            )

    def _clusters(self, rows: np.ndarray) -> list[np.ndarray]:
        """The places of each cluster's images, those farthest from its centre first."""
        import faiss

        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            usual = min(max(1, len(rows) // _PER_CLUSTER), _CLUSTERS)
            count = min(self.clusters or usual, len(rows))
            kmeans = faiss.Kmeans(
                rows.shape[1], count, niter=self.rounds, spherical=True, seed=self.seed
            )
            kmeans.cp.min_points_per_centroid = 1
            some = np.linspace(0, len(rows), min(len(rows), _SAMPLE * count), endpoint=False)
            kmeans.train(rows[some.astype(np.int64)].astype(np.float32))
            found = [
                kmeans.index.search(rows[first : first + _AT_ONCE].astype(np.float32), 1)
                for first in range(0, len(rows), _AT_ONCE)
            ]
        finally:
            faiss.omp_set_num_threads(threads)
        similarity, cluster = (np.concatenate(parts)[:, 0] for parts in zip(*found, strict=True))
        order = np.lexsort((np.arange(len(rows)), similarity, cluster))
        return np.split(order, np.flatnonzero(np.diff(cluster[order])) + 1)


def nearest_earlier(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of rows [m, D] of length 1 the place of the most similar one before it, and their cosine;
    the first has none, and -1."""
    places, best = np.zeros(len(rows), np.int64), np.full(len(rows), -1.0, np.float32)
    for first in range(0, len(rows), _AT_ONCE):
        part = rows[first : first + _AT_ONCE]
        for start in range(0, first + len(part), _AT_ONCE):
            others = rows[start : min(start + _AT_ONCE, first + len(part))]
            cosine = part @ others.T
            later = start + np.arange(len(others)) >= first + np.arange(len(part))[:, None]
            cosine[later] = -1
            nearest, mine = cosine.argmax(1), slice(first, first + len(part))
            value = cosine[np.arange(len(part)), nearest]
            better = value > best[mine]
            places[mine][better], best[mine][better] = start + nearest[better], value[better]
    return places, best
