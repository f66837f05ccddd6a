"""What `make demo` claims of its first stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = "evaluators=[{name: linear, data: demo, every: 100%, protocol: lbfgs, pool: mean}]"


def together(folder: Path, *commands: tuple[str, ...]) -> None:
    """Runs commands side by side, in a folder of their own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PREPRETRAIN_DATA": str(folder / "data")}
    started = [
        subprocess.Popen([sys.executable, str(ROOT / script), *rest], cwd=folder, env=environment)
        for script, *rest in commands
    ]
    assert [process.wait() for process in started] == [0] * len(commands)


@pytest.mark.timeout(900)  # the stage as it is shipped: half of it teaches nothing yet
def test_mae_makes_the_demos_scenes_easier_to_tell_apart_for_a_linear_probe(tmp_path):
    made = (("train", 5000, 0), ("val", 1000, 1))
    given = (
        ("synthetic", f"images={n}", f"seed={s}", "--out", f"data/demo/{p}") for p, n, s in made
    )
    together(tmp_path, *(("datasets/make_shards.py", *one) for one in given))
    stage = ("tools/launch.py", "--stage", "demo/mae", PROBE)
    nothing = ("length=1it", "optim.lr=0", "optim.warmup=0it")
    together(tmp_path, (*stage, "--out", "none", *nothing), (*stage, "--out", "mae"))
    untrained, trained = (
        json.loads((tmp_path / run / "results.json").read_text())["linear/demo"]["top1"]
        for run in ("none", "mae")
    )
    assert trained > untrained + 1, (untrained, trained)
