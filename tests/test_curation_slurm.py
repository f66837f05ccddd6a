"""Curation on a real SLURM of two virtual nodes: arrays of tasks, and the relaunch of one that is lost."""

import os
import tempfile
from pathlib import Path

import pytest
import slurm_box
from test_curation import MORTAL, make_card, recipe, tables

from prepretrain.curation import commands
from prepretrain.curation.engine import Machines

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.faults,
    pytest.mark.timeout(600),
    pytest.mark.skipif(slurm_box.missing() is not None, reason=str(slurm_box.missing())),
]


@pytest.fixture
def box(monkeypatch):
    """The cluster, whose client this process is."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)  # munged refuses a socket that others cannot reach
        made = slurm_box.Box(Path(folder) / "box")
        for key, value in made.environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
        try:
            made.start()
            yield made
        finally:
            made.stop()


def test_a_task_that_is_lost_on_a_cluster_is_run_alone_by_the_relaunch(box, tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/mortal.py").write_text(MORTAL.replace("MARK", str(tmp_path / "killed")))
    monkeypatch.syspath_prepend(tmp_path)
    paths = (str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in paths if p))
    card = make_card(tmp_path)
    chosen = recipe(tmp_path, mortal={"name": "lab.mortal"}, look={})
    out, cluster = tmp_path / "out", Machines(slurm="debug", hours=0.1, memory=1)
    with pytest.raises(ValueError, match="killed.*1 of 3 tasks"):
        commands.run(card, chosen, out, None, cluster)
    made = tables(out)
    assert sorted(made) == ["mortal/00000.parquet", "mortal/00002.parquet"]
    times = {name: (out / name).stat().st_mtime_ns for name in made}
    commands.run(card, chosen, out, None, cluster)
    assert {name: (out / name).stat().st_mtime_ns for name in made} == times
    commands.run(card, chosen, tmp_path / "here", None, Machines())
    assert tables(out) == tables(tmp_path / "here") and len(tables(out)) == 6
