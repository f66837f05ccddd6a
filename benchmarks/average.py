"""What a moving average of the weights (`optim.ema`) costs a step of the loop, beside its arithmetic
alone, and whether memory grows; CPU time of one thread.

    python benchmarks/average.py [--steps N] [--rounds N]
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from loop import IMAGES, WARMUP, Ready
from torch import nn

from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.models.model import Model
from prepretrain.objectives.mae import MAE
from prepretrain.training import optim
from prepretrain.training.fit import fit
from prepretrain.training.schedule import Schedule


def prepared(depth: int) -> nn.Module:
    """An MAE of as many parameters' tensors as a ViT-B's, and narrow."""
    with torch.device("meta"):
        model = Model(encoder="vit_mini8", positions="fixed", image_size=32, depth=depth)
        objective = MAE(model, decoder_depth=8, decoder_width=96, decoder_heads=3)
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    return objective.train()


def trained(depth: int, batch: dict[str, Any], steps: int, ema: float | None) -> float:
    """Seconds of a step of the loop."""
    objective, data = prepared(depth), Ready(batch)
    optimizer = optim.build(objective, lr=1e-5, weight_decay=0.05, ema=ema)
    schedule = Schedule(1e-5, WARMUP + steps + 1)
    how = {"seed": 0, "options": {}, "save_every": None, "log_every": 10 * steps}
    with tempfile.TemporaryDirectory() as place:
        fit(objective, data, optimizer, schedule, folder=Path(place), **how)
    return (data.asked[WARMUP + steps] - data.asked[WARMUP]) / steps


def arithmetic(depth: int, steps: int) -> float:
    """Seconds of the average's sums alone, on all parameters that are trained."""
    weights = [p.detach() for p in prepared(depth).parameters() if p.requires_grad]
    averages, weight = [w.clone() for w in weights], torch.tensor(0.001)
    before = time.process_time()
    for _ in range(steps):
        torch._foreach_lerp_(averages, weights, [weight] * len(weights))
    return (time.process_time() - before) / steps


def main() -> None:
    """One JSON line: medians over interleaved rounds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init("cpu")
    batch = {
        "image": torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8),
        "noise": torch.rand(IMAGES, 16),
    }
    variants = {
        "without": lambda: trained(asked.depth, batch, asked.steps, None),
        "with": lambda: trained(asked.depth, batch, asked.steps, 0.9999),
        "arithmetic": lambda: arithmetic(asked.depth, asked.steps),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    memory = []
    for _ in range(asked.rounds):
        for name, measured in variants.items():
            times[name].append(1e3 * measured())
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    grown = (memory[-1] - memory[len(memory) // 2]) / asked.steps
    print(
        json.dumps(
            {
                "figure": "average",
                **{f"{name}_milliseconds": value for name, value in medians.items()},
                "ratio": round(medians["with"] / medians["without"], 3),
                "kib_a_step": round(grown / max(1, len(memory) // 2), 2),
                "parameters": sum(1 for p in prepared(asked.depth).parameters()),
            }
        )
    )
    distributed.shutdown()


if __name__ == "__main__":
    main()
