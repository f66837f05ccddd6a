"""What the training loop itself costs: `fit()` beside bare forward, backward and optimizer, on a model so
small that nothing else shows; CPU time of one thread.

    python benchmarks/loop.py [--steps N] [--rounds N] [--depth N]

A deeper model has more tensors of parameters, which should cost the loop little.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.models.model import Model
from prepretrain.objectives.mae import MAE
from prepretrain.training import optim
from prepretrain.training.fit import fit
from prepretrain.training.schedule import Schedule

IMAGES, WARMUP = 8, 10


def prepared(depth: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small MAE and its optimizer, the same at each call."""
    with torch.device("meta"):
        model = Model(encoder="vit_test8", positions="fixed", depth=depth)
        objective = MAE(model, decoder_depth=1, decoder_width=32, decoder_heads=2)
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    return objective.train(), optim.build(objective, lr=1e-5, weight_decay=0.05)


def bare(depth: int, batch: dict[str, Any], steps: int) -> float:
    """Seconds of a step without the loop."""
    objective, optimizer = prepared(depth)
    for number in range(WARMUP + steps):
        if number == WARMUP:
            before = time.process_time()
        objective(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.process_time() - before) / steps


class Ready:
    """Stands in for a Stream: one batch for ever, and the time when each was asked for."""

    accumulate, max_bad, batch_size = 1, 0.01, IMAGES

    def __init__(self, batch: dict[str, Any]):
        self.batch, self.asked = batch, []

    def fingerprint(self, position: int = 0) -> str:
        """As Stream.fingerprint."""
        return "ready"

    def batches(self, consumed: int = 0) -> Iterator[dict[str, Any]]:
        """As Stream.batches."""
        while True:
            self.asked.append(time.process_time())
            yield {**self.batch, "key": [""] * IMAGES, "position": [0] * IMAGES, "bad": []}


def looped(depth: int, batch: dict[str, Any], steps: int, log_every: int) -> float:
    """Seconds of a step of the loop, with a row of metrics every so many."""
    (objective, optimizer), data = prepared(depth), Ready(batch)
    schedule = Schedule(1e-5, WARMUP + steps + 1)
    how = {"seed": 0, "options": {}, "save_every": None, "log_every": log_every}
    with tempfile.TemporaryDirectory() as place:
        fit(objective, data, optimizer, schedule, folder=Path(place), **how)
    return (data.asked[WARMUP + steps] - data.asked[WARMUP]) / steps


def main() -> None:
    """One JSON line: medians over rounds, and the differences' quartiles."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--depth", type=int, default=2, help="blocks of the encoder")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init("cpu")
    batch = {
        "image": torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8),
        "noise": torch.rand(IMAGES, 16),
    }
    variants: dict[str, Callable[[], float]] = {
        "bare": lambda: bare(asked.depth, batch, asked.steps),
        "loop": lambda: looped(asked.depth, batch, asked.steps, 10 * asked.steps),
        "logged": lambda: looped(asked.depth, batch, asked.steps, 1),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(asked.rounds):
        for name, measured in variants.items():
            times[name].append(1e3 * measured())
    own = [loop - plain for loop, plain in zip(times["loop"], times["bare"])]
    row = [logged - loop for logged, loop in zip(times["logged"], times["loop"])]
    quartiles = statistics.quantiles(own, n=4) if len(own) > 1 else own
    figures = {
        "bare_milliseconds": statistics.median(times["bare"]),
        "loop_milliseconds": statistics.median(own),
        "a_row_milliseconds": statistics.median(row),
    }
    rounded = {name: round(value, 3) for name, value in figures.items()}
    spread = [round(quartiles[0], 3), round(quartiles[-1], 3)]
    print(json.dumps({"figure": "loop", **rounded, "quartiles": spread, "depth": asked.depth}))
    distributed.shutdown()


if __name__ == "__main__":
    main()
