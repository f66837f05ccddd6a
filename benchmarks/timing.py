"""How the benchmarks measure: process CPU time on one thread, the variants interleaved in one
process."""

import json
import statistics
import time
from collections.abc import Callable

import torch


def interleaved(
    variants: dict[str, Callable[[], object]], steps: int, warmup: int = 1
) -> dict[str, list[float]]:
    """CPU seconds of each variant's steps, in the order A B B A, so that a drift of the machine
    meets both."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-warmup, steps):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            before = time.process_time()
            variants[name]()
            if number >= 0:
                times[name].append(time.process_time() - before)
    return times


def report(figure: str, base: list[float], ours: list[float], **setting: object) -> None:
    """Prints one JSON line: the medians, their ratio (above 1 is faster), and the ratio's quartiles
    by pairs."""
    pairs = [b / o for b, o in zip(base, ours)]
    quartiles = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs
    print(
        json.dumps(
            {
                "figure": figure,
                "ratio": round(statistics.median(base) / statistics.median(ours), 3),
                "quartiles": [round(quartiles[0], 3), round(quartiles[-1], 3)],
                "base_seconds": round(statistics.median(base), 3),
                "seconds": round(statistics.median(ours), 3),
                "steps": len(ours),
                **setting,
                "torch": torch.__version__,
            }
        ),
        flush=True,
    )
