"""Durations with a unit, turned into optimizer steps; and whether something is due at a step."""

import math
import re

FORM = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(ep|img|it|%)\s*$")
_MOST = 1e15  # of any unit
WAYS = "Write '90ep' (epochs), '3e9img' (images), '1000it' (steps) or '5%' (of the run)."


def parse(duration: str, where: str) -> tuple[float, str]:
    """('90ep', …) -> (90.0, 'ep'). Raises ValueError naming `where` for anything else."""
    match = FORM.match(str(duration))
    if not match:
        raise ValueError(f"{where}: {duration!r} is no duration. {WAYS}")
    amount = float(match.group(1))
    if amount > _MOST:
        raise ValueError(f"{where}: {duration!r} is more than {_MOST:g}, which no run takes.")
    return amount, match.group(2)


def steps(
    duration: str,
    where: str,
    *,
    batch_size: int,
    images: int | None = None,
    total: int | None = None,
) -> int:
    """Optimizer steps in a duration; a part of a batch counts as a step, so nothing is cut off.

    images: in an epoch. total: steps of the whole run, for '%'.
    """
    amount, unit = parse(duration, where)
    if unit == "it":
        if not amount.is_integer():
            raise ValueError(f"{where}: {duration!r} is not a whole number of steps.")
        return int(amount)
    if unit == "%":
        if total is None:
            raise ValueError(
                f"{where}: {duration!r} is a share of the run, whose length it cannot set. {WAYS}"
            )
        return round(amount / 100 * total)
    if unit == "ep" and images is None:
        raise ValueError(
            f"{where}: {duration!r} needs the number of images, which the data does not tell. "
            f"Give the card 'images:', or write the length in images or steps."
        )
    seen = amount * images if unit == "ep" else amount
    return math.ceil(round(seen / batch_size, 9))


def due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every `every` steps, and at the end, is due after `step`
    steps."""
    return step == total or (every > 0 and step % every == 0)
