"""Finds copies among images by their hashes, in DuckDB, which spills to disk what memory does not hold.

An image is a number: shard * 2^32 + row. Results depend on the hashes alone, not on how many workers
there were or on how the work was divided.
"""

from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from prepretrain.curation.hashes import COLOURS, WORDS

BITS = 64  # of the coarse hash
NUMBER = "shard::BIGINT * 4294967296 + row"  # of an image, in SQL


def masks(distance: int, images: int) -> list[int]:
    """Parts of the coarse hash such that images with at most `distance` different bits agree in all
    bits of one of them: all ways to choose `agree` of distance + agree blocks of bits, for the bits
    that differ lie in `distance` blocks at most. `agree` is such that an image agrees with few of so
    many by chance: it changes the time that a search takes, and nothing that it finds."""
    agree = 1
    while agree < 6 and BITS * agree / (distance + agree) < np.log2(max(images, 1)) - 3:
        agree += 1
    ends = np.linspace(0, BITS, distance + agree + 1).round().astype(int).tolist()
    blocks = [(1 << b) - (1 << a) for a, b in pairwise(ends)]
    return [sum(chosen) for chosen in combinations(blocks, agree)]


def with_hashes(rows: str, *, flipped: bool = False) -> str:
    """A query of the number and the hashes of some rows of `look`, in SQL; flipped: those of the
    mirror images, with a column that says so."""
    words = [f"{word}_flipped AS {word}" if flipped else word for word in ("coarse", *WORDS)]
    said = ["true AS flipped"] if flipped else []
    return f"SELECT {NUMBER} AS number, {', '.join([*words, *COLOURS, *said])} {rows}"


@dataclass(frozen=True)
class Alike:
    """What makes two images near-copies: at most so many different bits of the coarse and of the fine
    hash, and so many levels of 255 between the colours of their parts."""

    coarse: int = 8  # not from the paper
    fine: int = 31  # of 256 bits, what PDQ's users take for a match (ThreatExchange)
    colour: int = 8  # not from the paper

    def __post_init__(self) -> None:
        for name, most in (("coarse", 16), ("fine", 128), ("colour", 255)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ValueError(
                    f"{name}: {value!r} does not fit; it is a number from 0 to {most}."
                )

    def rule(self) -> str:
        """That images a and b are, but for the fine hash, in SQL."""
        shades = [
            f"abs((a.{word} >> {8 * byte} & 255)::INTEGER - (b.{word} >> {8 * byte} & 255)::INTEGER)"
            for word in COLOURS
            for byte in range(8)
        ]
        colours = " AND ".join(f"{shade} <= {self.colour}" for shade in shades)
        return f"bit_count(xor(a.coarse, b.coarse)) <= {self.coarse} AND {colours}"


def near_pairs(
    database: Any, one: str, other: str, alike: Alike, *, ordered: bool = False
) -> dict[str, np.ndarray]:
    """The pairs of an image of table `one` and an image of table `other` that are alike, each pair
    once, by number: arrays one, other, flipped, distance (of the fine hashes).

    Both tables have number and the hashes; `other` also has flipped: whether these are those of the
    mirror image. ordered: only pairs whose first number is the lower.
    """
    ((images,),) = database.sql(f"SELECT count(*) FROM {other}").fetchall()
    far = " + ".join(f"bit_count(xor(a.{word}, b.{word}))::INTEGER" for word in WORDS)
    database.sql(
        "CREATE OR REPLACE TEMP TABLE pairs (one BIGINT, other BIGINT, flipped BOOL, distance INTEGER)"
    )
    order = "AND a.number < b.number" if ordered else ""
    for mask in masks(alike.coarse, images):
        database.sql(
            f"""INSERT INTO pairs
            SELECT a.number, b.number, b.flipped, {far} AS distance
            FROM {one} a JOIN {other} b ON (a.coarse & {mask}::UBIGINT) = (b.coarse & {mask}::UBIGINT)
            WHERE {far} <= {alike.fine} AND {alike.rule()} {order}"""
        )
    found = database.sql(
        """SELECT one, other, arg_min(flipped, (distance, flipped)) AS flipped,
        min(distance) AS distance FROM pairs GROUP BY one, other ORDER BY one, other"""
    ).fetchnumpy()
    return {name: np.asarray(values) for name, values in found.items()}


def roots(parent: np.ndarray) -> np.ndarray:
    """Where one comes to by going from place to parent until there is none, -1."""
    found = np.where(parent < 0, np.arange(len(parent)), parent)
    while (parent[found] >= 0).any():
        found = found[found]
    return found


class Pairs:
    """Pairs of images that are alike, and what is made of them."""

    def __init__(
        self, *, one: np.ndarray, other: np.ndarray, distance: np.ndarray, flipped: np.ndarray
    ):
        self.images, places = np.unique(np.concatenate([one, other]), return_inverse=True)
        self.one, self.other = np.split(places, 2)
        self.distance, self.flipped = distance, flipped

    def groups(self) -> np.ndarray:
        """The first image of the group of each of `images`: what is alike is in one group, and so is
        what is like it."""
        shape = (len(self.images), len(self.images))
        graph = csr_array((np.ones(len(self.one), np.int8), (self.one, self.other)), shape=shape)
        count, label = connected_components(graph, directed=False)
        first = np.full(count, np.iinfo(np.int64).max)
        np.minimum.at(first, label, self.images)
        return first[label]

    def keep(self, best_first: np.ndarray) -> np.ndarray:
        """For each of `images` the number of the pair by which it is dropped, or -1.

        best_first: the places of `images` in the order in which they are looked at. One is dropped
        where it is like one that is kept, in favour of the most similar such; so what is dropped
        has a near-copy that is kept, which one image of each group would not ensure.
        """
        ends = np.concatenate([self.one, self.other])
        others, pairs = np.concatenate([self.other, self.one]), np.arange(len(ends)) % len(self.one)
        order = np.lexsort((others, self.distance[pairs], ends))
        starts = np.searchsorted(ends[order], np.arange(len(self.images) + 1))
        others, pairs = others[order], pairs[order]
        dropped_by, kept = np.full(len(self.images), -1), np.zeros(len(self.images), bool)
        for place in best_first.tolist():
            mine = slice(starts[place], starts[place + 1])
            alike = np.flatnonzero(kept[others[mine]])
            if len(alike):
                dropped_by[place] = pairs[mine][alike[0]]
            else:
                kept[place] = True
        return dropped_by
