"""One job at a time trains in a run's folder, and all its machines see it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import processes

from prepretrain.cluster import lease
from prepretrain.runs import run

DEAD = {"job": None, "host": "node7", "pid": 1}


def owner(**changed) -> Path:
    """A folder with the owner that it names."""
    Path("run").mkdir(exist_ok=True)
    Path("run/owner.json").write_text(json.dumps({**DEAD, **changed}))
    return Path("run")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_folder_is_held_by_one_and_free_afterwards():
    folder = Path("run")
    folder.mkdir()
    with lease.held(folder):
        assert f"process {os.getpid()} on {socket.gethostname()}" in lease.refusal(folder)
        with pytest.raises(ValueError, match="two jobs must not write to one run"):
            with lease.held(folder):
                raise AssertionError("both are in")
    assert lease.refusal(folder) is None
    with pytest.raises(OSError, match="its own"), lease.held(folder):
        raise OSError("its own")
    assert not list(folder.iterdir())


def test_a_dead_process_of_this_machine_is_taken_over_at_once():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    with lease.held(owner(host=socket.gethostname(), pid=done.pid)):
        assert json.loads(Path("run/owner.json").read_text())["pid"] == os.getpid()


def test_one_of_another_machine_is_taken_over_when_it_has_given_no_sign_for_long():
    folder = owner()
    assert "process 1 on node7" in lease.refusal(folder)
    long_ago = time.time() - lease.PATIENCE - 10
    os.utime(folder / "owner.json", (long_ago, long_ago))
    with lease.held(folder):
        assert json.loads((folder / "owner.json").read_text())["host"] == socket.gethostname()


def test_the_same_job_takes_over_from_itself(monkeypatch):
    folder = owner(job="17", host="node7")
    assert "job 17" in lease.refusal(folder)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    with lease.held(folder):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(ValueError, match="job 17"):
        owner(job="17")
        with lease.held(folder):
            pass


def test_a_living_process_of_this_machine_keeps_its_folder_whatever_the_age_of_its_last_sign():
    folder = Path("run")
    folder.mkdir()
    with lease.held(folder):
        os.utime("run/owner.json", (0, 0))  # suspended for long, or a clock that was set ahead
        assert "two jobs must not" in lease.refusal(folder)
        known = json.loads(Path("run/owner.json").read_text())
    with lease.held(owner(**known | {"began": "7"})):  # its number is another process's by now
        pass
    elsewhere = known | {"system": "another boot", "pid": 2**22 + 1}
    assert "two jobs must not" in lease.refusal(owner(**elsewhere))  # this name, another machine


def test_a_sign_of_life_from_the_future_counts_only_if_another_follows(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.1)
    later = time.time() + 86_400
    folder = owner()
    os.utime(folder / "owner.json", (later, later))
    assert lease.refusal(folder) is None
    monkeypatch.setattr(lease.time, "sleep", lambda _: os.utime(folder / "owner.json"))
    os.utime(folder / "owner.json", (later, later))
    assert "process 1 on node7" in lease.refusal(folder)


def test_the_age_of_a_sign_of_life_is_told_by_the_clock_of_the_files(monkeypatch):
    folder = owner()
    monkeypatch.setattr(lease.time, "time", lambda: 1e10)  # this machine's is far ahead
    assert "was 0 s ago" in lease.refusal(folder)


@pytest.mark.parametrize("how", ["taken over", "removed"])
def test_an_owner_that_lost_its_folder_is_told_and_leaves_the_others_file_alone(how, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.02)
    Path("run").mkdir()
    told = threading.Event()
    with lease.held(Path("run"), told.set) as own:
        assert own.lost() is None
        if how == "removed":
            shutil.rmtree("run")
        else:
            owner()
        assert told.wait(10)
        assert "no longer this run's" in own.lost()
    assert Path("run/owner.json").exists() == (how == "taken over")


@pytest.mark.parametrize("text", ["", "[]", "{}", "1", "\udcff", '{"pid": "x", "host": 3}'])
def test_a_damaged_owner_file_is_an_owner_of_whom_nothing_is_known(text):
    folder = owner()
    Path("run/owner.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "two jobs must not" in lease.refusal(folder)


def test_the_owner_gives_signs_of_life(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    Path("run").mkdir()
    with lease.held(Path("run")):
        os.utime("run/owner.json", (0, 0))
        time.sleep(0.5)
        assert time.time() - Path("run/owner.json").stat().st_mtime < 5


def _take(rank: int, place: str) -> None:
    os.chdir(place)
    try:
        with lease.held(Path("run")):
            Path(f"said-{rank}").write_text("in")
            time.sleep(5)  # until the others have tried
    except ValueError:
        Path(f"said-{rank}").write_text("out")


def test_of_many_that_find_a_dead_owner_one_gets_the_folder():
    owner(host=socket.gethostname(), pid=2**22 + 1)
    processes(4, _take, str(Path.cwd()))
    assert sorted(p.read_text() for p in Path().glob("said-*")) == ["in", "out", "out", "out"]


def _elsewhere(rank: int, places: list[str]) -> None:
    os.chdir(places[rank])
    with pytest.raises(ValueError, match=f"is not shared: .*{places[1]}"):
        with run.joined(Path("runs/a"), "cpu"):
            raise AssertionError("both went on")


def test_a_folder_that_a_process_does_not_see_is_an_error_that_says_where(tmp_path):
    places = [str(tmp_path / "one"), str(tmp_path / "two")]
    for place in places:
        Path(place).mkdir()
    processes(2, _elsewhere, places)
