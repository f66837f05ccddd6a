"""Writes the tables of docs/scale.md: what MAWS's two largest models need on 8, 64 and 512 GPUs of 80 GB.

    python benchmarks/plan_tables.py

Each row is one command of tools/plan.py, in a process of its own; all of it takes minutes.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
HEAD = """# Memory and communication at scale

[README](../README.md) · [precision and speed](precision.md)

Written by `benchmarks/plan_tables.py` on {date} at commit {commit}, with torch {torch}; each row by

    python tools/plan.py --stage STAGE base=size/SIZE.yaml --gpus GPUS --memory 80

**Simulated, not measured.** Nothing here ran on a GPU. A row is one training step of process 0 of so many,
run on tensors without storage over a process group that does not exist: the same objective, sharding and
optimizer as a run's, each tensor's life followed. Of a ViT-B on the CPU, in float32 on one and two processes,
the same simulation is within 1 % of measured resident memory (`benchmarks/plan_memory.py`, whose GPU cases
have not been run). Not simulated: torch.compile, the allocator's rounding and
fragmentation, the memory of CUDA, NCCL and cuBLAS; for those a tenth of a GPU is left free.

A step takes as long as the slowest of computing, of its memory and of the network, as if a GPU did all three at
the same time: "limited by" says which. The rates are a DGX H100's as remembered of its
data sheets, which were not looked up: 989 TFLOP/s (dense
bf16), 3,350 GB/s of memory, 450 GB/s to the other GPUs of a node of eight, 50 GB/s of each GPU to other nodes. Of the
first 40 % are taken to be reached, recomputed FLOPs included, of the others 80 %: both are assumptions, not from
the paper. Memory is that of operations each by itself, as without torch.compile. What a step does after
another, as the last exchanges before the optimizer, and what the host takes, make a run slower than this.

A row shows the config as it is if that fits, else with the first settings that make it fit, or the smallest
that was tried. "GB" are 10⁹ bytes a GPU: the largest of each kind, which are not all at the same time, and
the peak of all together. In flight: gathered parameters, and gradients being reduced.
"""
BY_HAND = "\n## A billion samples"  # this section, and what follows, is not written here
COLUMNS = (
    "GPUs | fits | to be added | group | images x parts | parameters | gradients | optimizer "
    "| activations | in flight | peak | GB/step in a node | to others | compute s | memory s "
    "| network s | images/s | days | limited by"
)
STAGES, SIZES, GPUS = ("wsp", "mae"), ("vit_2b14", "vit_6.5b14"), (8, 64, 512)


def planned(stage: str, size: str, gpus: int) -> dict[str, Any]:
    """The last line of a command. Raises RuntimeError if it could not say."""
    asked = ["--stage", stage, f"base=size/{size}.yaml", "--gpus", str(gpus), "--memory", "80"]
    tool = [sys.executable, str(ROOT / "tools" / "plan.py")]
    done = subprocess.run([*tool, *asked], capture_output=True, text=True)
    if not done.stdout:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    used, sizes = found["settings"], found["bytes"]
    held = [sizes[k] for k in ("parameters", "gradients", "optimizer", "activations", "in_flight")]
    sent = found["communicated_bytes_inside"], found["communicated_bytes_between"]
    cells = [
        found["gpus"],
        "yes" if found["fits"] else "no",
        f"`{' '.join(found['overrides'])}`" if found["overrides"] else "",
        used["group"],
        f"{used['batch_per_process']} x {used['accumulate']}",
        *(f"{value / 1e9:.1f}" for value in [*held, found["peak_bytes"]]),
        *(f"{value / 1e9:.1f}" for value in sent),
        *(f"{value:.3g}" for value in found["seconds"].values()),
        f"{found['images_per_second']:,.0f}",
        f"{found['days']:,.1f}",
        found["limited_by"],
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def main() -> None:
    """Writes the file anew."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    today = datetime.date.today().isoformat()
    text = HEAD.format(date=today, commit=commit, torch=torch.__version__)
    for stage in STAGES:
        for size in SIZES:
            rows = [row(planned(stage, size, gpus)) for gpus in GPUS]
            rule = "|" + " --- |" * (COLUMNS.count("|") + 1)
            text += "\n".join([f"\n## {size}, stage {stage}\n", f"| {COLUMNS} |", rule, *rows, ""])
            print(text.rpartition("\n## ")[2], flush=True)
    path = ROOT / "docs" / "scale.md"
    path.write_text(text + "".join(path.read_text().partition(BY_HAND)[1:]))


if __name__ == "__main__":
    main()
