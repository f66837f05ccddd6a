"""What goes wrong in long runs: values that are not finite, processes that die or hang, and damage to
checkpoints. A run never goes on wrongly, never waits for ever, and never loses its last good save."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import processes
from safetensors.torch import load_file
from test_train import rows, train

from prepretrain import checkpoint, distributed, watch

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, str(ROOT / "tools" / "launch.py")]
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


def test_a_run_that_may_bear_no_more_stops_with_a_reason_and_goes_on_when_it_may(place, group):
    given = poisoned("nan", 80, 111)
    with pytest.raises(FloatingPointError, match="numerics.skip=1 and numerics.rollbacks=0"):
        train("runs/a", given, "numerics.skip=1")
    assert rows("runs/a")[-1]["step"] == 6
    train("runs/a", given, "numerics.skip=2")
    assert [r["step"] for r in rows("runs/a") if "event" in r] == [6, 7]
    with pytest.raises(FloatingPointError, match="no checkpoint to go back to"):
        train("runs/b", poisoned("nan", 0), "numerics.rollbacks=1")


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
    return subprocess.run([*LAUNCH, *arguments], env=ENV, capture_output=True, text=True)


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


def test_the_doctor_checks_machine_and_data_and_says_what_is_wrong(place):
    done = launched("--doctor", "--stage", "small.yaml", "--procs", "2", "data.workers=1")
    found = json.loads(done.stdout.splitlines()[-1])
    names = ["shared memory", "open files", "disk", "clocks", "collectives", "decoding"]
    assert [c["name"] for c in found["checks"]] == [*names, "first batch"] * 2, done.stderr
    wrong = [c for c in found["checks"] if not c["ok"]]
    assert done.returncode == bool(wrong) and found["ok"] == (not wrong)
    few = subprocess.run(
        ["bash", "-c", f"ulimit -n 300; {' '.join(LAUNCH)} --doctor"],
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert few.returncode == 1 and "WRONG  open files" in few.stdout and "ulimit -n" in few.stdout


def two(folder: str, *overrides: str) -> tuple[list[int], list[str], float]:
    """Runs the small stage in two processes that know nothing of each other's parents, as on two
    machines; their exit statuses and errors, and the seconds from the failure to the last's end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}
        where["MASTER_PORT"] = str(free.getsockname()[1])
    command = [*LAUNCH, "--stage", "small.yaml", "--out", folder, *overrides]
    started = []
    for rank in range(2):
        with Path(f"said-{rank}").open("w") as file:
            env = {**ENV, **where, "RANK": str(rank)}
            started.append(subprocess.Popen(command, env=env, stderr=file))
    metrics, failed = Path(folder, "metrics.jsonl"), None
    try:
        while any(p.poll() is None for p in started):
            reached = metrics.exists() and '"step": 5' in metrics.read_text()
            failed = failed or (time.monotonic() if reached else None)
            if failed and [p for p in started if p.poll() is not None]:
                stopped = [p for p in started if _state(p.pid) == "T"]
                if len(stopped) == 1 and sum(p.poll() is None for p in started) == 1:
                    stopped[0].kill()  # nobody but the launcher can end one that stands still
            assert failed is None or time.monotonic() - failed < 60, "somebody waits for ever"
            time.sleep(0.05)
    finally:
        for one in started:
            one.kill()
    assert failed is not None, Path("said-0").read_text()
    took = time.monotonic() - failed
    return [p.wait() for p in started], [Path(f"said-{r}").read_text() for r in range(2)], took


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return ""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("harm", ["kill", "stop"])
def test_a_process_that_dies_or_stands_still_is_named_and_the_others_end_within_30_seconds(
    place, harm, rank
):
    statuses, said, took = two("runs/a", poisoned(harm, 80, 95, rank=rank))
    assert took < 30 and statuses[1 - rank] in (1, watch.LOST)
    assert f"process {rank} has ended or stands still" in said[1 - rank], said[1 - rank]


def test_a_process_that_hangs_ends_all_within_the_time_with_the_stacks_of_each(place):
    statuses, said, took = two("runs/a", poisoned("hang", 80, 95, rank=1), "hang=8")
    assert statuses == [watch.HUNG, watch.HUNG] and took < 30
    stacks = [Path(f"runs/a/stacks/{rank}.txt").read_text() for rank in range(2)]
    assert "poison.py" in stacks[1] and "poison.py" not in stacks[0]
    assert all(f"process {r} has not moved" in stacks[r] and "step 6" in stacks[r] for r in range(2))
