"""Hashtags alone, or MAE and then hashtags, at the same FLOPs? MAWS's Figure 5 (arXiv 2303.13496) on
50,000 real photographs.

    python benchmarks/cifar10_flop_matched.py --data FOLDER --work runs/cifar10_flop_matched

FOLDER holds train.parquet and val.parquet of CIFAR-10, whose photos get noisy hashtags. For each seed one
MAE; from it, and from scratch, hashtags at three budgets: without MAE they train longer by as many FLOPs as
MAE took. Two studies of `prepretrain-scaling`, one thread a run; the same command continues them. The table
goes to benchmarks/results/cifar10_flop_matched.csv.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from cifar10_two_stage import ROOT, prepare

MODEL = {"encoder": "vit_mini8", "image_size": 32, "width": 64, "depth": 3, "heads": 2}
DATA = {"train": "tagged", "workers": 0, "window": 0}
PLAIN = {"batch_size": 64, "shard": {"precision": "fp32"}, "checkpoint": {"every": "100%"}}
CROP = {"crop_scale": [0.5, 1.0]}
MAE = {
    "base": [],
    "model": {**MODEL, "positions": "fixed"},
    "objective": {"decoder_depth": 1, "decoder_width": 48, "decoder_heads": 3, **CROP},
    "optim": {"lr": 6e-3},
    "length": "800it",
}
WSP = {
    "model": {**MODEL, "positions": "learned"},
    "objective": {"name": "hashtag", "vocabulary": "hashtags.json", "tags": None, **CROP},
    "optim": {"lr": 4e-3, "weight_decay": 0.05, "schedule": "cosine", "warmup": "10%"},
}
EVALUATIONS = [
    {"stage": "eval/knn", "data": "photos", "evaluator": {"workers": 0}},
    {"stage": "eval/linear", "data": "photos", "evaluator": {"protocol": "ridge", "workers": 0}},
]
STEPS = (100, 300, 900)  # of hashtags after MAE


class Studies:
    """Writes studies into a work folder and runs them there."""

    def __init__(self, work: Path, jobs: int):
        self.work, self.jobs = work, jobs

    def tool(self, *arguments: str) -> str:
        """Runs `prepretrain-scaling`; what it prints."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}",
        }
        command = [sys.executable, str(ROOT / "tools" / "scaling.py"), *arguments]
        done = subprocess.run(
            command, cwd=self.work, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout

    def write(self, name: str, stage: str, base: dict, axes: dict) -> list[dict]:
        """A study's file; its plan, a row a run."""
        content = {"stage": stage, "set": {**base, "data": DATA, **PLAIN}, "axes": axes}
        content["evaluations"] = [] if stage == "mae" else EVALUATIONS
        (self.work / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return json.loads(self.tool("plan", f"{name}.yaml").splitlines()[-1])["each"]

    def run(self, name: str) -> None:
        """Makes the runs that are not there."""
        self.tool("run", f"{name}.yaml", "--jobs", str(self.jobs))


def main() -> None:
    """Makes the runs that are not there, and writes their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10_flop_matched"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    work, results, data = (p.resolve() for p in (given.work, given.results, given.data))
    prepare(work, data)
    studies, seeds = Studies(work, given.jobs), range(given.seeds)
    mae = studies.write("mae", "mae", MAE, {"seed": list(seeds)})
    studies.run("mae")
    probe = {"start": {"probe": {"length": "1000it"}}}
    (row,) = studies.write("probe", "wsp", WSP, probe)
    longer = round(mae[0]["flops"] / row["flops"] * 1000)  # steps of hashtags that MAE costs
    runs = {}
    for seed in seeds:
        for steps in STEPS:
            after = {"length": f"{steps}it", "init": f"runs/mae/{seed}", "seed": seed}
            runs[f"mae_then_{steps}_{seed}"] = after
            alone = {"length": f"{steps + longer}it", "seed": seed}
            runs[f"alone_{steps + longer}_{seed}"] = alone
    studies.write("matched", "wsp", WSP, {"start": runs})
    studies.run("matched")
    studies.tool("collect", "matched.yaml")
    shutil.copy(work / "runs" / "matched" / "runs.csv", results / "cifar10_flop_matched.csv")


if __name__ == "__main__":
    main()
