"""What would more photos, a larger encoder, longer training buy? The study of cifar10_scaling.yaml, on
50,000 real photographs.

    python benchmarks/cifar10_scaling.py --data FOLDER --work runs/cifar10_scaling

FOLDER holds train.parquet and val.parquet of CIFAR-10. All runs are made by `prepretrain-scaling run`, one
thread each; the same command continues it. The table goes to benchmarks/results/cifar10_scaling.csv.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARD = """description: CIFAR-10, of which the probes see a tenth and a fifth
licence: as the photos
classes: [airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck]
train: {source: parquet, path: cifar10/train.parquet, images: 50_000, subset: {images: 10%, per_class: true}}
val: {source: parquet, path: cifar10/val.parquet, images: 10_000, subset: {images: 20%, per_class: true}}
"""


def main() -> None:
    """Makes the runs that are not there, and writes their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10_scaling"))
    parser.add_argument("--study", type=Path, default=ROOT / "benchmarks" / "cifar10_scaling.yaml")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    work, study, results = (p.resolve() for p in (given.work, given.study, given.results))
    (work / "datasets").mkdir(parents=True, exist_ok=True)
    (work / "datasets" / "photos.yaml").write_text(CARD)
    (work / "data").mkdir(exist_ok=True)
    if not (work / "data" / "cifar10").exists():
        (work / "data" / "cifar10").symlink_to(given.data.resolve())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    tool = [sys.executable, str(ROOT / "tools" / "scaling.py")]
    for command in (["run", str(study), "--jobs", str(given.jobs)], ["collect", str(study)]):
        subprocess.run([*tool, *command], cwd=work, env=environment, check=True)
    shutil.copy(work / "runs" / study.stem / "runs.csv", results / f"{study.stem}.csv")


if __name__ == "__main__":
    main()
