"""Gives a reason against samples of which a column of an earlier stage is not as asked."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from prepretrain.curation.shard import Shard
from prepretrain.curation.stages.base import Stage

# What a rule may ask for, what to compute, and how a reason says that it was not so.
_TESTS = {
    "above": (pc.greater, "<= {}"),
    "at_least": (pc.greater_equal, "< {}"),
    "below": (pc.less, ">= {}"),
    "at_most": (pc.less_equal, "> {}"),
    "among": (lambda values, among: pc.is_in(values, pa.array(among, values.type)), "not {}"),
}


class Filter(Stage):
    """The column `reason`: the first rule that a sample does not fulfil; null where it fulfils all.

    rules: {"table.column": {test: value}}, for columns of any earlier stage, one of your own among
    them; in their order. Tests are above, at_least, below, at_most (a number), among (a list) and
    null (true or false: whether there is a value). A sample without the value fails all but the last.
    """

    columns = {"reason": pa.string()}
    images_a_second = 1e6  # not from the paper: nothing is decoded

    def __init__(self, *, rules: dict[str, dict[str, Any]]):
        if not rules:
            raise ValueError("rules: there are none, so nothing would be left out.")
        self.rules, columns = rules, {}
        for place, tests in rules.items():
            name, dot, column = place.partition(".")
            if not dot or not isinstance(tests, dict) or not tests:
                raise ValueError(
                    f"rules: {place}: {tests!r} is no table.column with its tests, such as "
                    f"look.entropy: {{above: 4.5}}."
                )
            for test, value in tests.items():
                _check(f"rules: {place}.{test}", test, value)
            columns.setdefault(name, {})[column] = None
        self.reads = {name: tuple(named) for name, named in columns.items()}

    def shard(self, shard: Shard) -> dict[str, Any]:
        reasons = pa.nulls(len(shard), pa.string())
        tables = {name: shard.table(name) for name in self.reads}
        for place, tests in self.rules.items():
            name, _, column = place.partition(".")
            values = tables[name][column].combine_chunks()
            for test, value in tests.items():
                passed, reason = _passed(place, values, test, value)
                against = pc.and_(pc.is_null(reasons), pc.invert(passed))
                reasons = pc.if_else(against, reason, reasons)
        return {"reason": reasons}


def _check(where: str, test: str, value: Any) -> None:
    """Raises ValueError for a test that does not exist, or a value that it cannot compare with."""
    if test == "null" and isinstance(value, bool) or test == "among" and isinstance(value, list):
        return
    if test in _TESTS and test != "among" and isinstance(value, (int, float)):
        return
    raise ValueError(
        f"{where}: {value!r}: tests are above, at_least, below, at_most (a number), among (a list) and null "
        f"(true or false)."
    )


def _passed(place: str, values: pa.Array, test: str, value: Any) -> tuple[pa.Array, Any]:
    """(whether each value passes, the reason against each that does not)."""
    if test == "null":
        missing = pc.is_null(values)
        return (missing, place) if value else (pc.invert(missing), f"{place} is missing")
    compute, text = _TESTS[test]
    shown = ", ".join(map(str, value)) if test == "among" else f"{value:g}"
    reason = pc.if_else(pc.is_null(values), f"{place} is missing", f"{place} {text.format(shown)}")
    return pc.and_(pc.is_valid(values), pc.fill_null(compute(values, value), False)), reason
