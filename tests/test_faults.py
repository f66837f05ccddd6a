"""What goes wrong in long runs: values that are not finite, processes that die or hang, and damage to
checkpoints. A run never goes on wrongly, never waits for ever, and never loses its last good save."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import command, processes, start
from safetensors.torch import load_file
from test_train import rows, train
from torch.testing import assert_close

from prepretrain.distributed import checkpoint, heartbeat, ports
from prepretrain.distributed import group as distributed

ROOT = Path(__file__).parents[1]
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
}


def poisoned(harm: str, first: int, last: int | None = None, rank: int | None = None) -> str:
    """The override that makes a run fail where it meets these positions of its data."""
    last = first if last is None else last
    where = "null" if rank is None else rank
    return (
        f"objective={{name: faulty.poison, decoder_depth: 1, decoder_width: 32, decoder_heads: 2, "
        f"harm: {harm}, first: {first}, last: {last}, rank: {where}}}"
    )


def exported(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/export/model.safetensors")


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def _poisoned_on_one_of_two(rank: int, where: str) -> None:
    os.chdir(where)
    distributed.init()
    with pytest.raises(FloatingPointError, match="step 6 is not finite.*--replay"):
        train("runs/two", poisoned("nan", 80, 95, rank=1), "checkpoint.every=4it")
    train("runs/skips", poisoned("nan", 80, 95, rank=1), "numerics.skip=1")
    distributed.shutdown()


def test_a_value_that_is_not_finite_on_one_process_applies_no_step_on_any_and_is_dumped(place):
    processes(2, _poisoned_on_one_of_two, str(place))
    dump = json.loads(Path("runs/two/dumps/000000006/dump.json").read_text())
    assert dump["step"] == 6 and dump["position"] == 80 and dump["world"] == 2
    losses = [p["figures"]["loss"] for p in dump["processes"]]
    assert isinstance(losses[0], float) and losses[1] == "nan"
    positions = [b["position"] for p in dump["processes"] for b in p["batches"]]
    assert sorted(sum(positions, [])) == list(range(80, 96))
    assert all(len(b["key"]) == 8 for p in dump["processes"] for b in p["batches"])
    assert "model.encoder.blocks.0" in dump["gradient_norms"]
    assert [r["step"] for r in rows("runs/two")] == [1, 2, 3, 4, 5]
    skipped = rows("runs/skips")
    assert [r["step"] for r in skipped] == list(range(1, 13))  # no step twice, none missing
    assert skipped[5]["event"] == "not finite, left out" and "loss" not in skipped[5]
    assert all("event" not in r and "loss" in r for r in skipped[:5] + skipped[6:])


def test_what_is_skipped_or_rolled_back_is_decided_alike_by_a_run_that_is_resumed(place, group):
    given = [poisoned("nan", 80, 111), "numerics={skip: 1, rollbacks: 1}"]
    train("runs/whole", *given)
    whole = rows("runs/whole")
    # steps 6 and 7 are poisoned: one is skipped, the other leads back to step 4
    assert [r["step"] for r in whole] == [1, 2, 3, 4, 4, *range(5, 13)]
    assert whole[4]["rollbacks"] == [{"failed": 7, "to": 4}]
    kept = checkpoint.state(checkpoint.newest(Path("runs/whole")))
    assert kept["numerics"]["shift"] == 112 - 64 and kept["step"] == 12
    for step in (4, 8):
        name = f"runs/from{step}"
        shutil.copytree("runs/whole", name)
        for later in range(step + 4, 13, 4):
            shutil.rmtree(f"{name}/checkpoints/{later:09d}")
        train(name, *given)
        assert rows(name) == whole and same(exported(name), exported("runs/whole"))


def test_a_run_past_its_limits_stops_with_a_reason_and_continues_when_one_is_raised(place, group):
    given = poisoned("nan", 80, 111)
    with pytest.raises(FloatingPointError, match="numerics.skip=1 and numerics.rollbacks=0"):
        train("runs/a", given, "numerics.skip=1")
    assert rows("runs/a")[-1]["step"] == 6
    train("runs/a", given, "numerics.skip=2")
    assert [r["step"] for r in rows("runs/a") if "event" in r] == [6, 7]
    with pytest.raises(FloatingPointError, match="no checkpoint to go back to"):
        train("runs/b", poisoned("nan", 0), "numerics.rollbacks=1")


def test_weights_that_are_not_finite_are_never_saved(place, group, monkeypatch):
    from prepretrain.objectives.mae import MAE

    plain, calls = MAE.forward, []

    def spoilt(self, batch):
        figures = plain(self, batch)
        calls.append(1)
        if len(calls) == 6:  # after its use, so that loss and gradient are finite
            self.model.encoder.norm.bias.data.fill_(float("nan"))
        return figures

    monkeypatch.setattr(MAE, "forward", spoilt)
    given = ["checkpoint={every: 3it, keep: 1}", "numerics.rollbacks=1", "length=9it"]
    train("runs/back", *given)
    assert [r["step"] for r in rows("runs/back")] == [1, 2, 3, 3, *range(4, 10)]
    assert all(bool(t.isfinite().all()) for t in exported("runs/back").values())
    calls.clear()
    with pytest.raises(FloatingPointError, match="weights after step 6 are not finite.*not saved"):
        train("runs/a", *given[:1], "length=9it")
    assert [p.name for p in checkpoint.listed(Path("runs/a"))] == ["000000003"]


def test_a_spike_is_logged_and_left_out_if_asked(place, group):
    few = "numerics={window: 4, sigma: 6.0}"
    train("runs/logged", poisoned("large", 96, 111), few)
    assert [r["event"] for r in rows("runs/logged") if r["step"] == 7] == ["spike"]
    train("runs/left", poisoned("large", 96, 111), few, "numerics.skip_spikes=true")
    left = {r["step"]: r for r in rows("runs/left")}
    assert (
        left[7]["event"] == "spike, left out" and left[7]["grad_norm"] > 10 * left[6]["grad_norm"]
    )
    assert left[8]["loss"] < 2 * left[6]["loss"]


def launched(*arguments: str) -> subprocess.CompletedProcess:
    trusted = {"PYTHONPATH": ENV["PYTHONPATH"], "PREPRETRAIN_PLUGINS": "faulty"}
    return command("launch.py", *arguments, **trusted)


def test_a_replay_names_the_first_part_and_the_images_that_are_not_finite(place, group):
    with pytest.raises(FloatingPointError, match="--replay runs/a/dumps/000000006"):
        train("runs/a", poisoned("inner", 88, 88), "batch_per_process=8")
    done = launched("--replay", "runs/a/dumps/000000006")
    assert done.returncode == 0, done.stderr
    good, bad = (line for line in done.stdout.splitlines() if line.startswith("process"))
    assert "part 0" in good and "all finite" in good
    assert "part 1" in bad and "model.encoder.blocks.1.mlp.spoilt (forward)" in bad
    dump = json.loads(Path("runs/a/dumps/000000006/dump.json").read_text())
    keys = dump["processes"][0]["batches"][1]["key"]
    assert " ".join(keys) in done.stdout
    said = launched("--replay", "runs/a")
    assert said.returncode == 1 and "holds no dump" in said.stderr


def _with_few_files(*arguments: str) -> subprocess.CompletedProcess:
    """launch.py in a process that may open 300 files."""
    Path("few.py").write_text(
        "import resource, runpy\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n"
        f"runpy.run_path({str(ROOT / 'tools/launch.py')!r}, run_name='__main__')\n"
    )
    return command(str(Path("few.py").absolute()), *arguments)


def test_the_doctor_checks_machine_and_data_and_says_what_is_wrong(place):
    done = launched("--doctor", "--stage", "small.yaml", "--procs", "2", "data.workers=1")
    found = json.loads(done.stdout.splitlines()[-1])
    names = ["shared memory", "open files", "disk", "clocks", "collectives", "decoding"]
    assert [c["name"] for c in found["checks"]] == [*names, "first batches"] * 2, done.stderr
    wrong = [c for c in found["checks"] if not c["ok"]]
    assert done.returncode == bool(wrong) and found["ok"] == (not wrong)
    few = _with_few_files("--doctor")
    assert few.returncode == 1 and "WRONG  open files" in few.stdout and "ulimit -n" in few.stdout


def two(folder: str, *overrides: str) -> tuple[list[int], list[str], float]:
    """Runs the small stage in two processes that know nothing of each other's parents, as on two
    machines; their exit statuses and errors, and the seconds from the failure to the last's end."""
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}
    where["MASTER_PORT"] = str(ports.free())
    where["PYTHONPATH"] = ENV["PYTHONPATH"]
    given = ("launch.py", "--stage", "small.yaml", "--out", folder, *overrides)
    started = [start(Path(f"said-{r}"), *given, **where, RANK=str(r)) for r in range(2)]
    metrics, failed = Path(folder, "metrics.jsonl"), None
    try:
        while any(p.exitcode is None for p in started):
            reached = metrics.exists() and '"step": 5' in metrics.read_text()
            failed = failed or (time.monotonic() if reached else None)
            if failed and [p for p in started if p.exitcode is not None]:
                stopped = [p for p in started if _state(p.pid) == "T"]
                if len(stopped) == 1 and sum(p.exitcode is None for p in started) == 1:
                    stopped[0].kill()  # nobody but the launcher can end one that stands still
            assert failed is None or time.monotonic() - failed < 60, "somebody waits for ever"
            time.sleep(0.05)
    finally:
        for one in started:
            one.kill()
    said = [Path(f"said-{rank}.err").read_text() for rank in range(2)]
    assert failed is not None, said[0]
    took = time.monotonic() - failed
    return [p.exitcode for p in started], said, took


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return ""


def _slow(*given) -> object:
    return pytest.param(*given, marks=pytest.mark.faults)


@pytest.mark.parametrize(
    "harm, rank", [("kill", 1), _slow("kill", 0), _slow("stop", 1), _slow("stop", 0)]
)
def test_a_process_that_dies_or_stands_still_is_named_and_the_others_end_within_30_seconds(
    place, harm, rank
):
    statuses, said, took = two("runs/a", poisoned(harm, 80, 95, rank=rank))
    assert took < 30 and statuses[1 - rank] in (1, heartbeat.LOST)
    assert f"process {rank} has ended or stands still" in said[1 - rank], said[1 - rank]


@pytest.mark.faults
def test_a_process_that_hangs_ends_all_within_the_time_with_the_stacks_of_each(place):
    statuses, said, took = two("runs/a", poisoned("hang", 80, 95, rank=1), "hang=8")
    assert statuses == [heartbeat.HUNG, heartbeat.HUNG] and took < 30
    stacks = [Path(f"runs/a/stacks/{rank}.txt").read_text() for rank in range(2)]
    assert "poison.py" in stacks[1] and "poison.py" not in stacks[0]
    assert all(
        f"process {r} has not moved" in stacks[r] and "step 6" in stacks[r] for r in range(2)
    )


STRESS = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "checkpoint_stress.py")]


@pytest.mark.parametrize(
    "given",
    [
        "--kills 3 --steps 8 --flips 40",
        _slow("--kills 50 --flips 500"),
        _slow("--kills 50 --background"),
        _slow("--kills 20 --steps 20 --procs 2 --background"),
    ],
)
def test_a_run_killed_at_random_instants_never_loses_or_spoils_its_last_checkpoint(given):
    done = subprocess.run([*STRESS, *given.split()], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["failures"] == []


@pytest.mark.parametrize(
    "given", ["--images 300000 --batches 300 --workers 2", _slow("--images 10000000")]
)
def test_loading_from_many_images_stays_under_one_gigabyte_in_all_processes_and_does_not_grow(
    given,
):
    command = [sys.executable, str(ROOT / "benchmarks" / "host_memory.py"), *given.split()]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_saved_in_the_background_is_the_step_it_is_named_after(place, group):
    train("runs/plain")
    train("runs/behind", "checkpoint.async_save=true")
    assert rows("runs/behind") == rows("runs/plain")
    for step in (4, 8, 12):
        one, two = (
            checkpoint.open_tensors(Path(f"runs/{name}/checkpoints/{step:09d}"))
            for name in ("plain", "behind")
        )
        assert one[0] == two[0] and all(torch.equal(one[1](k), two[1](k)) for k in one[0])
        assert one[2] == two[2]
    assert sorted(p.name for p in Path("runs/behind/checkpoints").iterdir()) == [
        "000000004",
        "000000008",
        "000000012",
    ]


def test_a_save_in_the_background_that_fails_ends_the_run_at_once_with_the_reason(
    place, group, monkeypatch
):
    from prepretrain.training import fit as loop

    def wait(where: str) -> None:
        """Until the second checkpoint, of step 8, has failed."""
        if where == "step 10":
            [one.join() for one in threading.enumerate() if one.name == "checkpoint"]

    monkeypatch.setattr(loop.heartbeat, "beat", wait)

    plain, saved = loop.checkpoint.dcp.async_save, []

    def occupied(content, *, checkpoint_id, **given):
        saved.append(checkpoint_id)
        if len(saved) == 2:  # a folder stands where a file is to be written
            Path(checkpoint_id, ".metadata.tmp").mkdir()
        return plain(content, checkpoint_id=checkpoint_id, **given)

    loop.checkpoint.dcp.async_save = occupied
    try:
        with pytest.raises(OSError, match="000000008: could not be saved.*Earlier.*intact"):
            train("runs/a", "checkpoint.async_save=true")
    finally:
        loop.checkpoint.dcp.async_save = plain
    assert rows("runs/a")[-1]["step"] == 10
    assert checkpoint.newest(Path("runs/a")).name == "000000004"
    assert not list(Path("runs/a/checkpoints").glob("*.tmp-*"))


def test_a_worker_that_dies_during_a_save_is_not_reported_as_a_full_disk(place, group, monkeypatch):
    def dies(*_, **__):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(checkpoint.dcp, "save", dies)
    with pytest.raises(RuntimeError, match="could not be saved.*worker.*Start the same") as caught:
        train("runs/a")
    assert "Make room" not in str(caught.value) and not isinstance(caught.value, OSError)


def test_the_last_few_and_the_permanent_checkpoints_are_kept(place, group):
    train("runs/a", "checkpoint={every: 2it, keep: 2, permanent: 5it}")
    kept = [int(p.name) for p in checkpoint.listed(Path("runs/a"))]
    assert kept == [5, 8, 10, 12]  # not 10 of the last, which is permanent anyway
    with pytest.raises(ValueError, match="checkpoint.keep: 0 must be at least 1"):
        train("runs/b", "checkpoint.keep=0")


def test_damaged_newer_checkpoints_are_not_kept_in_place_of_a_good_one(place, group):
    train("runs/a")
    for step in (8, 12):
        next(Path(f"runs/a/checkpoints/{step:09d}").glob("*.distcp")).write_bytes(b"")
    train("runs/a", "checkpoint={every: 3it, keep: 1}", "length=12it")
    assert [p.name for p in checkpoint.listed(Path("runs/a"))] == ["000000012"]
    assert checkpoint.newest(Path("runs/a")).name == "000000012"


@pytest.mark.parametrize("mixed", ["a file", "all but the manifest", "the whole folder"])
def test_files_of_two_steps_are_no_checkpoint(place, group, mixed, caplog, monkeypatch):
    train("runs/a")
    old, new = (Path(f"runs/a/checkpoints/{step:09d}") for step in (4, 12))
    for file in sorted(old.iterdir()):
        if mixed == "the whole folder" or file.name != checkpoint.MANIFEST:
            if mixed != "a file" or file.suffix == ".distcp":
                shutil.copy(file, new / file.name)
    monkeypatch.setattr(logging.getLogger("prepretrain"), "propagate", True)
    assert checkpoint.newest(Path("runs/a")).name == "000000008"
    assert "000000012: damaged, so it is not used" in caplog.text


def test_a_checkpoint_of_a_newer_format_is_refused_and_an_older_one_is_read(place, group):
    train("runs/a", "length=8it")
    saved = checkpoint.newest(Path("runs/a"))

    def rewritten(**changes) -> None:
        state = json.loads((saved / checkpoint.STATE).read_text()) | changes
        state = {k: v for k, v in state.items() if v is not None}
        (saved / checkpoint.STATE).write_text(json.dumps(state))
        manifest = json.loads((saved / checkpoint.MANIFEST).read_text())
        manifest[checkpoint.STATE] = checkpoint.describe(saved / checkpoint.STATE)
        (saved / checkpoint.MANIFEST).write_text(json.dumps(manifest))

    rewritten(format=checkpoint.FORMAT + 1)
    with pytest.raises(ValueError, match="is of format 3.*Update prepretrain"):
        train("runs/a", "length=8it")
    rewritten(format=None, numerics=None)  # as they were before formats had numbers
    train("runs/a", "length=8it")
    assert checkpoint.state(saved)["step"] == 8


def _read_only(rank: int, where: str) -> None:
    os.chdir(where)
    distributed.init()
    plain = checkpoint.save

    def late(folder, step, *given, **named):
        if step == 8 and rank == 0:  # what root, too, cannot write to
            shutil.move("runs/a/checkpoints", "runs/a/moved")
            Path("runs/a/checkpoints").write_text("")
        return plain(folder, step, *given, **named)

    checkpoint.save = late
    with pytest.raises(OSError, match="000000008: could not be saved .*process 0.*intact"):
        train("runs/a")
    distributed.shutdown()


def test_a_folder_that_cannot_be_written_ends_the_run_on_every_process_with_the_reason(place):
    processes(2, _read_only, str(place))
    Path("runs/a/checkpoints").unlink()
    shutil.move("runs/a/moved", "runs/a/checkpoints")
    assert checkpoint.newest(Path("runs/a")).name == "000000004"


def _continued(rank: int, where: str, name: str) -> None:
    os.chdir(where)
    distributed.init()
    train(name, "batch_size=12")
    distributed.shutdown()


@pytest.mark.faults
def test_a_run_goes_on_with_any_other_number_of_processes(place):
    processes(4, _continued, str(place), "runs/by4")
    want = [row["loss"] for row in rows("runs/by4")]
    for world in (1, 2, 3, 4):
        name = f"runs/then{world}"
        shutil.copytree("runs/by4", name)
        for step in (8, 12):
            shutil.rmtree(f"{name}/checkpoints/{step:09d}")
        processes(world, _continued, str(place), name)
        assert_close([row["loss"] for row in rows(name)], want, rtol=1e-5, atol=1e-6)


def test_the_launcher_notices_a_dead_process_and_ends_the_others(place):
    done = launched(
        *("--stage", "small.yaml", "--procs", "2", "--out", "runs/a"),
        poisoned("kill", 80, 95, rank=1),
    )
    ended = time.time()
    assert done.returncode == 1 and "process" in done.stderr and "failed" in done.stderr
    failed = Path("runs/a/metrics.jsonl").stat().st_mtime  # the last step that was logged
    assert ended - failed < 30
    assert rows("runs/a")[-1]["step"] == 5


def test_each_row_of_the_reliability_page_names_a_test():
    here = Path(__file__).parent
    tests = re.findall(
        r"^def (test_\w+)", "\n".join(p.read_text() for p in here.glob("*.py")), re.M
    )
    lines = (here.parent / "docs/reliability.md").read_text().splitlines()
    last = [line.split("|")[-2] for line in lines if re.match(r"\|.*\| `\w+`[^|]*\|$", line)]
    names = [name for column in last for name in re.findall(r"`(\w+)`", column)]
    assert len(names) > 25
    assert not [name for name in names if not any(name in test for test in tests)]
