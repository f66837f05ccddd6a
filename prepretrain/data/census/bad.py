"""What cannot be used of a source: names it, and chooses among the rest."""

from collections.abc import Iterator, Sequence

from prepretrain.data.sources.base import Source
from prepretrain.data.subset import evenly
from prepretrain.data.transforms import BadImage

_NAMED = 20


def lines(bad: Sequence[BadImage]) -> Iterator[str]:
    """The first of what is bad, to print, and how much more there is."""
    for one in bad[:_NAMED]:
        yield f"bad: {one}"
    if len(bad) > _NAMED:
        yield f"… and {len(bad) - _NAMED:,} more"


def some_usable(source: Source, bad: Sequence[BadImage], most: int) -> list[int]:
    """The numbers of `most` samples, evenly spread, of those that are not bad."""
    keys = {one.key for one in bad}
    usable = [number for number in range(len(source)) if source.key(number) not in keys]
    return [usable[place] for place in evenly(len(usable), most)]
