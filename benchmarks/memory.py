"""The largest resident memory of MAE training steps on the CPU, of a ViT-B/16 at 224 px; one JSON line.

python benchmarks/memory.py
"""

import argparse
import json
import resource

import torch
from mae_step import training_step

from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.models.model import Model
from prepretrain.objectives.mae import MAE
from prepretrain.training import optim


def main() -> None:
    """Two steps, since the optimizer's state is made in the first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="vit_b16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")
    asked = parser.parse_args()
    distributed.init()
    with torch.device("meta"):
        objective = MAE(Model(encoder=asked.encoder, positions="fixed"))
    shard.shard(objective, precision=asked.precision)
    shard.initialise(objective, 0)
    optimizer = optim.build(objective.train(), lr=1e-5, weight_decay=0.05)
    size, cells = objective.model.encoder.image_size, objective.model.encoder.cells
    batch = {
        "image": torch.randint(0, 256, (asked.batch, 3, *size), dtype=torch.uint8),
        "noise": torch.rand(asked.batch, cells),
    }
    before = peak()
    for _ in range(2):
        training_step(objective, optimizer, batch)
    print(
        json.dumps(
            {
                "figure": f"mae_memory_{asked.precision}",
                "peak_gib": round(peak(), 2),
                "before_gib": round(before, 2),
                "batch": asked.batch,
                "encoder": asked.encoder,
                "pixels": size[1],
                "torch": torch.__version__,
            }
        )
    )
    distributed.shutdown()


def peak() -> float:
    """GiB of this process's largest resident set so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
