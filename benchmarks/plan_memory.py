"""The memory of training steps as planned (runs/memory.py) and as measured, in new processes;
one JSON line a case.

    python benchmarks/plan_memory.py

On a GPU, measured is torch.cuda.max_memory_allocated over the second step, in bf16. On the CPU, it is
the largest resident set over that of the same process before it shards, in float32 on one thread,
with malloc told to return what is freed (MALLOC_MMAP_THRESHOLD_); the plan is then of a CPU's step:
without device copies, so "offload" is not a case.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from typing import Any

import torch

from prepretrain.distributed import group as distributed
from prepretrain.distributed import ports, shard
from prepretrain.models.model import Model
from prepretrain.objectives.base import Objective
from prepretrain.objectives.hashtag import Hashtag
from prepretrain.objectives.mae import MAE
from prepretrain.runs import memory
from prepretrain.training import optim

CUDA = torch.cuda.is_available()
CASES = [  # objective, encoder, recompute, processes, images in each
    ("mae", "vit_b16", "none", 1, 16),
    ("hashtag", "vit_b16", "none", 1, 8),
    ("hashtag", "vit_b16", "block", 1, 8),
    ("mae", "vit_b16", "none", 2, 8),
    ("hashtag", "vit_b16", "block", 2, 4),
]
CUDA_CASES = [
    ("mae", "vit_l16", "none", 1, 128),
    ("hashtag", "vit_l16", "none", 1, 64),
    ("hashtag", "vit_l16", "block", 1, 128),
    ("hashtag", "vit_l16", "offload", 1, 128),
    ("hashtag", "vit_2b14", "block", 1, 32),
]


def build(objective: str, encoder: str) -> Objective:
    """An objective without storage."""
    with torch.device("meta"):
        model = Model(encoder=encoder)
        if objective == "mae":
            return MAE(model)
        return Hashtag(model, vocabulary="none", tags=28000)


def measure(objective_name: str, encoder: str, recompute: str, images: int) -> None:
    """In one of the processes: two real steps. The first process prints its peak, in bytes."""
    torch.set_num_threads(1)
    distributed.init()
    objective = build(objective_name, encoder)
    before = peak()
    shard.shard(objective, precision="bf16" if CUDA else "fp32", recompute=recompute)
    shard.initialise(objective, 0)
    optimizer = optim.build(objective.train(), lr=1e-5, weight_decay=0.0)
    example, device = objective.example(images), distributed.device()
    batch = {k: torch.zeros(v.shape, dtype=v.dtype, device=device) for k, v in example.items()}
    for _ in range(2):
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        objective(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    if distributed.is_main():
        print(torch.cuda.max_memory_allocated() if CUDA else peak() - before)
    distributed.shutdown()


def peak() -> int:
    """Bytes of this process's largest resident set so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(case: tuple[str, str, str, int, int]) -> int:
    """The peak of process 0 of a case, run beside this one."""
    objective, encoder, recompute, world, images = case
    common = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ports.free()),
    }
    common |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    asked = ["--measure", objective, encoder, recompute, str(images)]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *asked],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{case}: failed")
    return int(printed[0].split()[-1])


def report(case: tuple[str, str, str, int, int]) -> dict[str, Any]:
    """A case's figures."""
    objective, encoder, recompute, world, images = case
    precision = "bf16" if CUDA else "fp32"
    planned = memory.simulate(
        lambda: build(objective, encoder),
        images=images,
        world=world,
        precision=precision,
        recompute=recompute,
    ).peak
    found = measured(case)
    return {
        "figure": "plan_memory",
        "objective": objective,
        "encoder": encoder,
        "recompute": recompute,
        "processes": world,
        "images": images,
        "precision": precision,
        "planned_mb": round(planned / 1e6),
        "measured_mb": round(found / 1e6),
        "planned_over_measured": round(planned / found, 3),
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "torch": torch.__version__,
    }


def main() -> None:
    """All cases, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)  # one of a case's processes
    asked = parser.parse_args().measure
    if asked:
        measure(*asked[:3], int(asked[3]))
        return
    for case in CUDA_CASES if CUDA else CASES:
        print(json.dumps(report(case)), flush=True)


if __name__ == "__main__":
    main()
