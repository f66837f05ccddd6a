"""Does training in fp8 reach the loss of bf16 and float32? Emulated, on a CPU.

    python benchmarks/float8.py --work runs/float8 --out benchmarks/results/float8.json

Stage one of `make demo` on its data, in batches of 32, in each precision with each seed; the loss is that of 1,000
held-out images with fixed crops and masks. Products are rounded as a GPU's are, and no faster. What is
done is not done again.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from cifar10_two_stage import record
from demo_seeds import Kept, prepare

import prepretrain
from prepretrain.runs import run as runs

PRECISIONS = ("fp32", "bf16", "fp8")


def loss(precision: str, seed: int, steps: int) -> float:
    """The held-out loss at the end of a run."""
    folder = Path("runs", f"{precision}_{seed}_{steps}")
    if not (folder / "export").exists():
        measured = "validation={data: 'demo:val', every: 100%}"
        own = [f"shard.precision={precision}", f"seed={seed}", f"length={steps}it", "batch_size=32"]
        prepretrain.launch("demo/mae", ["evaluators=[]", measured, *own], out=str(folder))
    return json.loads((folder / "results.json").read_text())["val_loss"]


def main() -> None:
    """Trains all, prints a line each, and writes what they came to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/float8"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    start, out = time.time(), given.out and given.out.resolve()
    prepare(given.work.resolve())
    os.chdir(given.work)
    os.environ["PREPRETRAIN_DATA"] = "data"
    torch.set_num_threads(1)
    runs.Stream = Kept
    found: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for seed in given.seeds:
        for precision in PRECISIONS:
            found[precision].append(loss(precision, seed, given.steps))
            print(json.dumps({"seed": seed, precision: found[precision][-1]}), flush=True)
    losses = {
        name: {"mean": statistics.mean(values), "seeds": values} for name, values in found.items()
    }
    seeds = " ".join(map(str, given.seeds))
    record(out, f"float8.py --seeds {seeds} --steps {given.steps}", start, losses=losses)


if __name__ == "__main__":
    main()
