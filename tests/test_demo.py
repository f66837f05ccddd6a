"""What `make demo` claims of its first stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = "evaluators=[{name: linear, data: demo, every: 100%, solver: lbfgs, pool: mean}]"


def tool(folder: Path, *arguments: str) -> None:
    """One of the commands, in a folder of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PREPRETRAIN_DATA": str(folder / "data")}
    script, *rest = arguments
    subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
    )


@pytest.mark.timeout(900)  # the stage as it is shipped: half of it teaches nothing yet
def test_mae_makes_the_demos_scenes_easier_to_tell_apart_for_a_linear_probe(tmp_path):
    for part, images, seed in (("train", 5000, 0), ("val", 1000, 1)):
        given = ("synthetic", f"images={images}", f"seed={seed}", "--out", f"data/demo/{part}")
        tool(tmp_path, "datasets/make_shards.py", *given)
    stage = ("tools/launch.py", "--stage", "demo/mae", PROBE)
    tool(tmp_path, *stage, "--out", "none", "length=1it", "optim.lr=0", "optim.warmup=0it")
    tool(tmp_path, *stage, "--out", "mae")
    untrained, trained = (
        json.loads((tmp_path / run / "results.json").read_text())["linear/demo"]["top1"]
        for run in ("none", "mae")
    )
    assert trained > untrained + 1, (untrained, trained)
