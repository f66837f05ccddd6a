"""Decides which samples are kept, why not, and how often each is to be seen."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from prepretrain.curation.shard import Shard
from prepretrain.curation.stages.base import Stage


class Decide(Stage):
    """Makes the table `keep`: `keep`, `reason` and `weight` of each sample.

    reasons: tables with a column `reason`, in the order in which they are asked: the first that has one
    is why a sample is not kept. weights: tables with a column `weight`, which are multiplied; what is
    not kept weighs 0. draw: "table.column" of a probability to be kept, above 1 as 1 and null as 0,
    drawn once for each sample by `seed`: Pixio keeps an image with its MAE loss as probability.
    """

    table = "keep"
    columns = {"keep": pa.bool_(), "reason": pa.string(), "weight": pa.float32()}
    images_a_second = 1e6  # not from the paper: nothing is decoded

    def __init__(
        self,
        *,
        reasons: tuple[str, ...] = ("filter",),
        weights: tuple[str, ...] = (),
        draw: str | None = None,
        seed: int = 0,
    ):
        self.reasons, self.weights, self.draw, self.seed = reasons, weights, draw, seed
        columns: dict[str, tuple[str, ...]] = {}
        for name in reasons:
            columns[name] = (*columns.get(name, ()), "reason")
        for name in weights:
            columns[name] = (*columns.get(name, ()), "weight")
        if draw is not None:
            name, dot, column = draw.partition(".")
            if not dot:
                raise ValueError(f"draw: {draw!r} is no table and column, such as embed.mae_loss.")
            columns[name] = (*columns.get(name, ()), column)
        self.reads = columns

    def shard(self, shard: Shard) -> dict[str, Any]:
        reasons: list[str | None] = [None] * len(shard)
        for name in self.reasons:
            for row, reason in enumerate(shard.table(name)["reason"].to_pylist()):
                if reasons[row] is None and reason is not None:
                    reasons[row] = f"{name}: {reason}"
        if self.draw is not None:
            for row in np.flatnonzero(~self._drawn(shard)).tolist():
                reasons[row] = reasons[row] or f"{self.draw}: not drawn"
        keep = np.array([reason is None for reason in reasons], dtype=bool)
        weight = keep.astype(np.float32)
        for name in self.weights:
            weight *= shard.table(name)["weight"].fill_null(1.0).to_numpy().astype(np.float32)
        return {"keep": keep, "reason": reasons, "weight": weight}

    def _drawn(self, shard: Shard) -> np.ndarray:
        """Whether each sample is drawn, by a generator of the seed and the shard's number."""
        name, _, column = self.draw.partition(".")
        chance = shard.table(name)[column].fill_null(0.0).to_numpy().astype(np.float64)
        text = hashlib.sha256(f"{self.seed} keep {shard.number}".encode()).digest()
        draws = np.random.default_rng(int.from_bytes(text[:16], "big")).random(len(shard))
        return draws < chance
