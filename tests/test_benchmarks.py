"""The measurements run: what a GPU will be asked, at tiny sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_what_a_gpu_will_be_asked_runs_on_the_cpu(tmp_path):
    script = [sys.executable, "benchmarks/gpu.py", "--smoke", "--out", tmp_path]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        script, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert figures[0]["figure"] == "machine" and figures[-1]["figure"] == "end"
    assert not [figure for figure in figures if "failed" in figure]
    skipped = {figure["figure"]: figure["skipped"] for figure in figures if "skipped" in figure}
    assert skipped == {"reference_mae": "no --reference", "profile": "no GPU"}
    checks = [figure["ok"] for figure in figures if "ok" in figure]
    assert len(checks) == 9 and all(checks)
