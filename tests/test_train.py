"""The loop's promises: the same run for any number of processes, and for one that was killed."""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import command, processes, start
from safetensors.torch import load_file
from torch.testing import assert_close

from prepretrain import config
from prepretrain.data.card import load_card
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.distributed import checkpoint
from prepretrain.distributed import group as distributed
from prepretrain.runs import run
from prepretrain.training import log, signals

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
CLOCKS = (
    "seconds",
    "images_per_second",
    "data_wait",
)  # the only figures that differ between equal runs


def rows(folder: Path) -> list[dict]:
    """A run's metrics without its clocks."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def train(folder: str, *overrides: str, init: str | None = None) -> None:
    """A run of the small stage in this process."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    run.train(config.load("small.yaml", list(overrides), init), Path(folder))


MODES = {"sharded": "shard.group=null", "replicated": "shard.group=1"}
HASHTAG = [
    "objective={name: hashtag, vocabulary: tags.json}",
    "data.train=scenes",
    "model={encoder: vit_test8}",
]


def _in_two(rank: int, where: str) -> None:
    os.chdir(where)
    distributed.init()
    for name, override in MODES.items():
        train(f"runs/two_{name}", override)
    for name, override in MODES.items():
        train(f"runs/two_tags_{name}", override, *HASHTAG, "objective.resample=0.3")
    train("runs/two_parts", "batch_per_process=3")
    distributed.shutdown()


def test_one_process_two_sharded_two_replicated_and_accumulation_give_equal_losses(place, group):
    train("runs/one")
    train("runs/one_tags", *HASHTAG, "objective.resample=0.3")
    next(Path("data").glob("tags.json.rarest-*")).unlink()  # each process reads a share of the tags
    processes(2, _in_two, str(place))
    want = [row["loss"] for row in rows("runs/one")]
    norms = [row["grad_norm"] for row in rows("runs/one")]
    assert len(want) == 12 and want[-1] < want[0]
    for name in ("two_sharded", "two_replicated", "two_parts"):
        got = rows(f"runs/{name}")
        assert_close([row["loss"] for row in got], want, rtol=1e-5, atol=1e-6)
        assert_close([row["grad_norm"] for row in got], norms, rtol=1e-3, atol=1e-6)
        assert [row["images"] for row in got] == [16 * (i + 1) for i in range(12)]
    for name in MODES:
        got = [r["loss"] for r in rows(f"runs/two_tags_{name}")]
        assert_close(got, [r["loss"] for r in rows("runs/one_tags")], rtol=1e-5, atol=1e-6)
    shutil.copytree("runs/two_sharded", "runs/continued")
    for step in (8, 12):
        shutil.rmtree(f"runs/continued/checkpoints/{step:09d}")
    train("runs/continued")  # saved by two processes, continued by one
    assert_close([row["loss"] for row in rows("runs/continued")], want, rtol=1e-5, atol=1e-6)


PAIRS = {"runs/pairs": [], "runs/pairs_in_parts": ["batch_per_process=2"]}


def _in_pairs(rank: int, where: str) -> None:
    os.chdir(where)
    distributed.init()
    for folder, overrides in PAIRS.items():
        train(folder, "shard.group=2", "length=6it", "checkpoint.every=3it", *overrides)
    distributed.shutdown()


def test_four_processes_that_shard_in_pairs_and_replicate_across_give_the_losses_of_one(
    place, group
):
    train("runs/one", "length=6it")
    processes(4, _in_pairs, str(place))
    want = [row["loss"] for row in rows("runs/one")]
    for folder in PAIRS:
        assert_close([r["loss"] for r in rows(folder)], want, rtol=1e-5, atol=1e-6)
    shutil.rmtree("runs/pairs/checkpoints/000000006")
    train("runs/pairs", "length=6it", "checkpoint.every=3it")  # one process goes on with it
    assert_close([r["loss"] for r in rows("runs/pairs")], want, rtol=1e-5, atol=1e-6)


def test_a_run_killed_at_any_step_and_started_again_is_bitwise_the_uninterrupted_one(place):
    given = ["launch.py", "--stage", "small.yaml", "model.drop_path=0.2"]
    given += ["length=60it", "checkpoint.every=7it"]
    assert command(*given, "--out", "runs/whole").returncode == 0
    target = 10 + time.time_ns() % 40
    killed = start(Path("said"), *given, "--out", "runs/killed")
    metrics = Path("runs/killed/metrics.jsonl")
    while killed.exitcode is None and (
        not metrics.exists() or metrics.read_text().count("\n") < target
    ):
        time.sleep(0.01)
    assert killed.exitcode is None, "the run ended before it could be killed"
    killed.kill()
    killed.join()
    assert command(*given, "--out", "runs/killed").returncode == 0
    assert rows("runs/killed") == rows("runs/whole")
    assert [row["step"] for row in rows("runs/killed")] == list(range(1, 61))
    one, two = (load_file(f"runs/{name}/export/model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[k], two[k]) for k in one) and one.keys() == two.keys()


def trains(*more: str):
    """A run of 400 steps in a process of its own, once it has taken five."""
    given = ["--stage", "small.yaml", "length=400it", "checkpoint.every=400it", "--out", "runs/a"]
    started = start(Path("said"), "launch.py", *given, *more)
    metrics = Path("runs/a/metrics.jsonl")
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert started.exitcode is None, Path("said.err").read_text()
        time.sleep(0.01)
    return started


@pytest.mark.parametrize(
    "number, more",
    [
        (signal.SIGTERM, []),
        (signal.SIGINT, ["data.workers=1"]),  # Ctrl-C, which a terminal sends to workers, too
        pytest.param(signal.SIGINT, ["--procs", "2"], marks=pytest.mark.faults),
    ],
)
def test_a_signal_saves_at_the_end_of_the_step_and_the_same_command_goes_on(place, number, more):
    started = trains(*more)
    for child in _children(started.pid) if more == ["data.workers=1"] else []:
        os.kill(child, number)
    os.kill(started.pid, number)
    started.join()
    assert started.exitcode == 75, Path("said.err").read_text()
    assert "The same command continues it" in Path("said.err").read_text()
    saved = checkpoint.listed(Path("runs/a"))
    assert len(saved) == 1 and 5 <= int(saved[0].name) < 400
    assert rows("runs/a")[-1]["step"] == int(saved[0].name)


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_a_second_ctrl_c_leaves_at_once(monkeypatch):
    left, before = [], signal.getsignal(signal.SIGINT)  # a shell's background ignores it
    monkeypatch.setattr(signals.os, "_exit", left.append)
    asked = signals.Signals()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)  # the same, which a launcher passes on
    assert asked.received == signal.SIGINT and not left
    asked.pressed -= 10
    signal.raise_signal(signal.SIGINT)
    asked.restore()
    assert left == [130] and signal.getsignal(signal.SIGINT) == before


def test_signals_are_the_main_threads_and_a_loop_in_another_runs_without(monkeypatch):
    made = []
    thread = threading.Thread(target=lambda: made.append(signals.Signals()))
    thread.start()
    thread.join()
    assert made[0].old == {}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
@pytest.mark.parametrize("how", ["removed", "taken over"])
def test_a_run_whose_folder_is_no_longer_its_own_ends_and_writes_nothing_more(
    place, group, how, monkeypatch
):
    from prepretrain.objectives.mae import MAE

    plain, calls = MAE.forward, []

    def lost(self, batch):
        calls.append(1)
        if len(calls) == 6 and how == "removed":
            shutil.rmtree("runs/a")
        elif len(calls) == 6:
            Path("runs/a/owner.json").write_text('{"job": null, "host": "node7", "pid": 1}')
        return plain(self, batch)

    monkeypatch.setattr(MAE, "forward", lost)
    with pytest.raises(ValueError, match="runs/a: is no longer this run's: owner.json"):
        train("runs/a", "length=8it")
    if how == "removed":
        assert not Path("runs/a/checkpoints").exists() and not Path("runs/a/export").exists()
    else:
        assert [p.name for p in Path("runs/a/checkpoints").iterdir()] == ["000000004"]
        assert "node7" in Path("runs/a/owner.json").read_text()


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(
    place, group, monkeypatch
):
    from prepretrain.objectives.mae import MAE

    plain, calls = MAE.forward, []

    def poisoned(self, batch):
        calls.append(1)
        return {
            k: v * float("nan") if len(calls) == 6 else v for k, v in plain(self, batch).items()
        }

    monkeypatch.setattr(MAE, "forward", poisoned)
    with pytest.raises(
        FloatingPointError, match="step 6 is not finite.*weights are those of step 5"
    ):
        train("runs/a", "checkpoint.every=5it")
    assert [p.name for p in checkpoint.listed(Path("runs/a"))] == ["000000005"]
    assert rows("runs/a")[-1]["step"] == 5


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_torn_checkpoint_is_detected_and_the_one_before_it_used(
    place, group, damage, caplog, monkeypatch
):
    train("runs/whole")
    shutil.copytree("runs/whole", "runs/torn")
    shutil.rmtree("runs/torn/checkpoints/000000012")
    victim = next(Path("runs/torn/checkpoints/000000008").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(content if damage == "flipped" else content[:-100])
    monkeypatch.setattr(logging.getLogger("prepretrain"), "propagate", True)
    assert checkpoint.newest(Path("runs/torn")).name == "000000004"
    assert "damaged" in caplog.text and victim.name in caplog.text
    train("runs/torn")
    assert rows("runs/torn") == rows("runs/whole")


def test_no_space_while_saving_leaves_the_earlier_checkpoint_and_says_so(place):
    code = """
import resource, sys
from pathlib import Path
from prepretrain import config
from prepretrain.distributed import checkpoint, group
from prepretrain.runs import run
from prepretrain.training import log
group.init()
save = checkpoint.save
def limited(*arguments, **options):
    if arguments[1] == 8:  # from here on a file may grow to 10 kB only, as on a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    return save(*arguments, **options)
checkpoint.save = limited
try:
    run.train(config.load("small.yaml", []), Path("runs/a"))
except OSError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.exit(f"said: {error}")
"""
    Path("runs/a").mkdir(parents=True)
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert (
        "could not be saved" in done.stderr and "Earlier checkpoints are intact" in done.stderr
    ), done.stderr
    assert [p.name for p in Path("runs/a/checkpoints").iterdir()] == ["000000004"]
    assert checkpoint.newest(Path("runs/a")).name == "000000004"


def test_bad_images_are_replaced_counted_and_listed_and_past_the_stated_share_stop_the_run(
    place, group, caplog
):
    for broken in ("red/002", "green/001"):
        Path(f"data/photos/{broken}.png").write_bytes(b"no picture")
    train("runs/a", "length=20it", "data.max_bad=0.2", "checkpoint.every=10it")
    listed = [json.loads(line) for line in Path("runs/a/quarantine.jsonl").read_text().splitlines()]
    assert {one["cause"] for one in listed} == {"unreadable"} and len(listed) >= 8
    assert all(any(k in one["key"] for k in ("002", "001")) for one in listed)
    assert rows("runs/a")[-1]["bad_images"] == len(listed)
    assert sum("was replaced" in warning for warning in caplog.messages) == 1  # of each cause
    assert checkpoint.state(checkpoint.newest(Path("runs/a")))["bad"] == {"unreadable": len(listed)}
    with pytest.raises(ValueError, match="data.max_bad: .* images were replaced .*unreadable"):
        train("runs/b", "length=200it", "data.max_bad=0.001")


def test_photos_without_a_known_hashtag_are_left_out_of_the_order_and_told(place, group):
    scenes = load_card("scenes").open("train")
    rare = Vocabulary.count(
        (scenes.hashtags(i) for i in range(120)), source=scenes.fingerprint, min_count=12
    )
    rare.save(Path("data/tags.json"))
    without = sum(not rare.ids(scenes.hashtags(i)) for i in range(120))
    log.setup(Path("."))
    given = [*HASHTAG, "length=2ep", "data.max_bad=0.0", "checkpoint.every=5it"]
    train("runs/a", *given)
    told = Path("log.txt").read_text()
    assert without and f"{without} of 120 images have no known tag: left out" in told
    assert f"{120 - without} images an epoch" in told
    steps = math.ceil((120 - without) * 2 / 16)
    assert rows("runs/a")[-1]["step"] == steps and "bad_images" not in rows("runs/a")[-1]
    assert not Path("runs/a/quarantine.jsonl").exists()
    whole = rows("runs/a")
    shutil.rmtree(f"runs/a/checkpoints/{steps:09d}")
    train("runs/a", *given)  # from within the second epoch
    assert rows("runs/a") == whole


def test_a_run_is_not_continued_with_another_config_and_the_keys_that_differ_are_named(
    place, group
):
    train("runs/a", "length=4it")
    with pytest.raises(ValueError, match=r"optim.lr: 0.01 -> 0.02"):
        train("runs/a", "length=4it", "optim.lr=2e-2")
    train(
        "runs/a", "length=4it", "data.workers=1", "shard.recompute=block"
    )  # what changes no result may differ


def test_a_run_is_not_continued_with_other_data(place, group):
    train("runs/a", "length=8it")
    shutil.rmtree("runs/a/checkpoints/000000008")
    next(Path("data/photos/red").glob("*.png")).unlink()
    with pytest.raises(ValueError, match="data.train: is not what"):
        train("runs/a", "length=8it")


def test_recomputation_changes_no_loss(place, group):
    train("runs/plain", "length=3it")
    for override in ("shard.recompute=block", "shard.recompute=offload"):
        folder = "runs/" + override.replace("=", "_")
        train(folder, "length=3it", override)
        assert_close(
            [r["loss"] for r in rows(folder)],
            [r["loss"] for r in rows("runs/plain")],
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_compilation_changes_no_loss_but_for_rounding(place, group):
    small = ["length=3it", "model.depth=1", "objective.decoder_depth=0"]
    train("runs/plain", *small)
    train("runs/compiled", *small, "shard.compile=true")
    assert_close(
        [r["loss"] for r in rows("runs/compiled")],
        [r["loss"] for r in rows("runs/plain")],
        rtol=1e-4,
        atol=1e-5,
    )


def test_stage_two_starts_from_stage_ones_encoder_at_another_image_size(place, group):
    train("runs/mae")
    stage_two = [
        "objective={name: classify}",
        "model.head={classes: 3}",
        "model={image_size: 48, positions: learned}",
    ]
    train(
        "runs/two", *stage_two, "length=1it", "optim.warmup=0it", "optim.lr=1e-9", init="runs/mae"
    )
    one, two = (load_file(f"runs/{name}/export/model.safetensors") for name in ("mae", "two"))
    assert two["pos_embed"].shape[1] == 37 and one["pos_embed"].shape[1] == 17
    assert_close(
        one["blocks.0.attn.qkv.weight"], two["blocks.0.attn.qkv.weight"], rtol=0, atol=1e-6
    )


def test_evaluators_run_within_a_run_and_leave_training_as_it_was(place, group):
    train("runs/plain")
    train("runs/watched", "evaluators=[{name: linear, data: colours, every: 50%, protocol: lbfgs}]")
    watched = rows("runs/watched")
    assert [r["loss"] for r in watched if "loss" in r] == [r["loss"] for r in rows("runs/plain")]
    assert [r["step"] for r in watched if "linear/colours/top1" in r] == [6, 12]


OPTIMIZERS = {  # with rates at which the small stage's loss falls
    "sgd": ["optim.name=sgd", "optim.lr=0.5"],
    "lars": ["optim.name=lars", "optim.lr=20"],
    "lamb": ["optim.name=lamb", "optim.lr=0.1"],
    "muon": ["optim.name=muon", "optim.lr=0.02"],
}
BRIEF = ["length=6it", "checkpoint.every=3it", "optim.ema=0.9"]


def _in_two_by(rank: int, where: str) -> None:
    os.chdir(where)
    distributed.init()
    for name, overrides in OPTIMIZERS.items():
        train(f"runs/two_{name}", *overrides, *BRIEF)
    distributed.shutdown()


def test_every_optimizer_trains_resumes_bitwise_and_is_the_same_on_two_processes(place, group):
    processes(2, _in_two_by, str(place))
    for name, overrides in OPTIMIZERS.items():
        train(f"runs/{name}", *overrides, *BRIEF)
        whole = rows(f"runs/{name}")
        losses = [row["loss"] for row in whole]
        assert losses[-1] < losses[0]
        two = [row["loss"] for row in rows(f"runs/two_{name}")]
        assert_close(two, losses, rtol=1e-4, atol=1e-5)
        exported = load_file(f"runs/{name}/export/model.safetensors")
        shutil.rmtree(f"runs/{name}/export")
        shutil.rmtree(f"runs/{name}/checkpoints/000000006")
        train(f"runs/{name}", *overrides, *BRIEF)
        assert rows(f"runs/{name}") == whole
        again = load_file(f"runs/{name}/export/model.safetensors")
        assert all(torch.equal(again[k], v) for k, v in exported.items())
