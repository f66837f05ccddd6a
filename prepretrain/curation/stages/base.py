"""What every stage of a curation has in common."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pyarrow as pa

from prepretrain.curation.engine import Tables
from prepretrain.curation.shard import Shard


class Stage:
    """Makes a table for each shard, with a row for each sample, in order; options are the keyword
    arguments of the constructor, which costs little: a stage is pickled to where it works.

    A stage of kind "map" defines `shard`, a pure function of one shard and its earlier tables; many
    run at once. One of kind "reduce" defines `reduce`, which sees the tables of all shards, in one
    process. `reads` names the columns of earlier tables that it needs, as {"look": ("phash",)}; it
    may be set by the constructor, where it depends on the options. `columns` are what it makes, by
    pyarrow's types; `row`, the number of the sample in its shard, is put before them.

    Columns with a meaning for other stages: `reason` (string, null where nothing is wrong) for
    `decide`, which takes the first that applies, and `weight` (float) to be multiplied into the
    sample's weight.
    """

    kind: ClassVar[Literal["map", "reduce"]] = "map"
    columns: dict[str, pa.DataType]
    reads: dict[str, tuple[str, ...]] = {}
    table: ClassVar[str | None] = None  # its folder, where that is not called as the stage is
    gpu: ClassVar[bool] = False  # whether a task is given one where there are any
    images_a_second: ClassVar[float | None] = None  # of one core, for `plan`; measured

    def check(self) -> None:
        """Raises ValueError for what would keep it from running, before any stage runs."""

    def shard(self, shard: Shard) -> dict[str, Sequence[Any]]:
        """The columns of one shard, a value for each sample."""
        raise NotImplementedError

    def reduce(self, tables: Tables) -> Any:
        """A table of pyarrow, or a query of DuckDB, with `shard`, `row` and the stage's columns.
        Samples that it says nothing of have null in all of them."""
        raise NotImplementedError
