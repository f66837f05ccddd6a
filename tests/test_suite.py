"""A suite measures what is asked, each of it once, and says what failed."""

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import command, processes

from prepretrain import config
from prepretrain.runs import results, suite
from prepretrain.runs.launch import _jobs, launch

ROOT = Path(__file__).parents[1]

# An evaluator outside the package: it notes each time that it runs, and can be made to fail.
WITNESS = """
import os
from pathlib import Path
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.evaluators.base import Evaluator

class Witness(Evaluator):
    headline, splits = "seen", ("val",)

    def __init__(self, *, data: str, note: str = "seen", kill: bool = False, alone: bool = False):
        super().__init__(data=data)
        self.note, self.kill, self.alone = note, kill, alone

    def run(self, model, folder):
        if self.kill and not Path("mended").exists():
            os._exit(9)
        if self.alone and distributed.rank() == 1:
            raise OSError("the disk of process 1")
        distributed.barrier()
        if distributed.is_main():
            with open("witness.txt", "a") as file:
                file.write(self.note + "\\n")
        return {"seen": 100.0, "images": len(self.card.open("val"))}
"""
FINETUNE = """base: small.yaml
objective: {name: classify}
model: {positions: learned, head: {classes: 3}}
length: 2it
optim: {warmup: 0it}
evaluators: [{name: lowshot, data: colours, every: 100%, shots: [2], seeds: 2, workers: 0}]
"""
LINEAR = {"stage": "eval/linear", "data": "colours", "evaluator": {"protocol": "lbfgs"}}
LOWSHOT = {"stage": "eval/lowshot", "data": "colours", "evaluator": {"shots": [1], "seeds": 2}}
TUNE = {"stage": "finetune.yaml", "data": {"train": "colours"}}
TOO_MANY = {**LOWSHOT, "label": "many", "evaluator": {"shots": [99]}}


def witness(note: str, **options) -> dict:
    """An entry of the evaluator above, with results of its own."""
    evaluator = {"name": "lab.witness", "note": note, **options}
    return {"stage": "witness.yaml", "label": note, "evaluator": evaluator}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Where the first test that trains leaves its run for the others."""
    return tmp_path_factory.mktemp("kept") / "mae"


@pytest.fixture
def trained(place, kept, monkeypatch) -> Path:
    """A run of the small stage, a stage that fine-tunes, and one of the evaluator outside."""
    Path("lab").mkdir()
    Path("lab/witness.py").write_text(WITNESS)
    Path("finetune.yaml").write_text(FINETUNE)
    Path("witness.yaml").write_text("evaluator: {name: lab.witness}\ndata: colours\n")
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "lab.witness", raising=False)
    monkeypatch.delitem(sys.modules, "lab", raising=False)
    if not kept.exists():
        launch("small.yaml", ["length=4it"], out=str(kept))
    return shutil.copytree(kept, Path("runs/mae"))


def asked(*entries: dict, **keys) -> str:
    """The stage of a suite of these entries."""
    Path("suite.yaml").write_text(json.dumps({"suite": entries, **keys}))
    return "suite.yaml"


def start(*entries: dict, init: str = "runs/mae", **flags) -> dict:
    """The results of a suite, which runs here unless flags say otherwise."""
    folder = launch(asked(*entries), [], init=init, **flags)
    return read(folder / "results.json")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def witnessed() -> list[str]:
    """What the evaluator outside noted, in order."""
    return Path("witness.txt").read_text().split() if Path("witness.txt").exists() else []


def test_a_suite_gives_the_numbers_of_its_stages_and_fine_tunes_beside_the_run(trained):
    found = start(LINEAR, LOWSHOT, TUNE)
    tuned = read(trained / "finetune_colours" / "results.json")
    assert found["finetune/colours"] == {"lowshot/colours": tuned["lowshot/colours"]}
    assert tuned["images"] == 32 and (trained / "finetune_colours" / "export").is_dir()
    launch(
        "eval/linear", ["data=colours", "evaluator.protocol=lbfgs"], init="runs/mae", out="alone"
    )
    assert found["linear/colours"] == read(Path("alone/results.json"))["linear/colours"]
    assert found["images"] == 64, "the run's own results are gone"
    record = read(trained / "evaluations.json")
    assert record["linear/colours"]["options"]["evaluator"]["protocol"] == "lbfgs"
    assert record["linear/colours"]["model"] == record["finetune/colours"]["model"]


def test_a_suite_that_was_killed_is_continued_and_measures_nothing_twice(trained):
    stage = asked(witness("a"), witness("b"), TUNE, witness("c", kill=True), witness("d"))
    done = command("launch.py", "--stage", stage, "--init", "runs/mae", PYTHONPATH=os.getcwd())
    assert done.returncode == 9, done.stderr
    assert witnessed() == ["a", "b"]
    Path("mended").touch()
    before = (trained / "finetune_colours" / "metrics.jsonl").read_text()
    launch(stage, [], init="runs/mae")
    assert witnessed() == ["a", "b", "c", "d"]
    assert (trained / "finetune_colours" / "metrics.jsonl").read_text() == before
    found = read(trained / "results.json")
    assert all(f"lab.witness/colours/{note}" in found for note in "abcd")


def test_a_training_that_was_cut_off_is_not_taken_for_done(trained):
    start(TUNE)
    record = read(trained / "evaluations.json")
    record["finetune/colours"]["unfinished"] = True
    (trained / "evaluations.json").write_text(json.dumps(record))
    (trained / "results.json").write_text(json.dumps({"finetune/colours": {"older/colours": {}}}))
    assert list(start(TUNE)["finetune/colours"]) == ["lowshot/colours"]


def test_a_training_that_failed_has_no_result(trained):
    broken = {**TUNE, "data": {"train": "colours", "max_bad": 0.0}}
    next(Path("data/photos").rglob("*.png")).write_bytes(b"no image")
    with pytest.raises(RuntimeError, match="1 of 1 entries of the suite failed"):
        start(broken)
    assert "finetune/colours" not in read(trained / "results.json")
    assert read(trained / "evaluations.json")["finetune/colours"]["unfinished"]


def test_other_options_are_measured_anew(trained):
    start(witness("a"))
    start({**witness("a"), "evaluator": {"name": "lab.witness", "note": "a", "kill": False}})
    assert witnessed() == ["a"], "a default that is named is no other option"
    start({**witness("a"), "evaluator": {"name": "lab.witness", "note": "z"}})
    assert witnessed() == ["a", "z"]


def test_other_weights_are_measured_anew_and_the_same_in_an_export_are_not(trained):
    launch("small.yaml", ["seed=1", "length=2it", "optim.warmup=0it"], out="runs/other")
    shutil.copytree("runs/mae/export", "weights")
    start(witness("a"))
    start(witness("a"), TUNE, init="weights", out="runs/mae")
    assert witnessed() == ["a"]
    shutil.rmtree("weights")
    shutil.copytree("runs/other/export", "weights")
    with pytest.raises(ValueError, match="other weights than --init holds now(?s:.*)finetune_col"):
        start(witness("a"), TUNE, init="weights", out="runs/mae")
    assert witnessed() == ["a"], "a suite that cannot go on has begun"
    start(witness("a"), {**TUNE, "label": "again"}, init="weights", out="runs/mae")
    assert witnessed() == ["a", "a"]


def test_other_data_or_another_card_are_measured_anew(trained):
    start(witness("a"))
    start(witness("a"))
    assert witnessed() == ["a"]
    image = next(Path("data/photos").rglob("*.png"))
    image.write_bytes(image.read_bytes())  # of the same size, as one that was mended may be
    start(witness("a"))
    assert witnessed() == ["a", "a"]
    card = Path("datasets/colours.yaml")
    card.write_text(card.read_text() + "templates: ['a {} square']\n")
    start(witness("a"))
    start(witness("a"))
    assert witnessed() == ["a", "a", "a"]


def test_what_is_measured_in_training_names_no_weights(trained):
    every = "evaluators=[{name: lowshot, data: colours, every: 100%, shots: [2]}]"
    launch("small.yaml", ["length=2it", "optim.warmup=0it", every], out="runs/other")
    record = read(Path("runs/other/evaluations.json"))["lowshot/colours"]
    assert record["model"] is None and record["options"]["evaluator"]["shots"] == [2]


def test_a_failing_entry_loses_no_other_and_is_tried_again(trained):
    for _ in range(2):
        with pytest.raises(
            RuntimeError,
            match=r"1 of 3 entries.*(?s:.*)suite\[1\] \(eval/lowshot\): ValueError: lowshot.shots",
        ):
            start(witness("a"), TOO_MANY, witness("b"))
    assert witnessed() == ["a", "b"]
    log = (trained / "log.txt").read_text()
    assert (
        log.count("suite[1] (eval/lowshot) failed") == 2 and "same options, weights and data" in log
    )


@pytest.mark.parametrize(
    "entries, said",
    [
        (
            [LINEAR, {**LINEAR, "evaluator": {}}],
            r"suite\[2\].*under linear/colours, as those of suite\[1\]",
        ),
        ([TUNE, {**TUNE, "optim": {"lr": 1}}], r"suite\[2\].*under finetune/colours.*`label`"),
        (
            [TUNE, {**TUNE, "label": "b", "out": "runs/mae/finetune_colours"}],
            "under runs/mae/finetune_",
        ),
        ([{"data": "colours"}], "stage: is missing"),
        ([{**LINEAR, "out": "x"}], "out: an evaluation writes into the suite's folder"),
        ([{**TUNE, "init": "runs/x"}], "init: every entry starts from the suite's --init"),
        ([{**LINEAR, "label": "a/b"}], "label: 'a/b' does not fit"),
        ([{"stage": "suite.yaml"}], "is a suite itself"),
        ([], "suite: is empty"),
    ],
)
def test_an_entry_that_does_not_fit_is_named_before_anything_runs(trained, entries, said):
    with pytest.raises(ValueError, match=said):
        start(witness("a"), *entries) if entries else start()
    assert not witnessed()


def test_all_errors_come_at_once_with_their_numbers(trained, capsys):
    wrong = [
        {**LINEAR, "evaluator": {"protocl": "mae"}},
        witness("fine"),
        {"stage": "eval/zeroshot", "data": "colours"},
        {**TUNE, "batch_size": "many"},
        {"stage": "eval/liner"},
        {**LINEAR, "data": "colour"},
    ]
    for flags in ({}, {"dry_run": True}, {"procs": 2}):
        with pytest.raises(ValueError) as raised:
            start(*wrong, **flags)
        said = str(raised.value)
        assert [f"suite[{i}]" in said for i in range(6)] == [True, False, True, True, True, True]
        assert "Did you mean evaluator.protocol" in said and "batch_size: 'many'" in said
    assert not witnessed()


def test_missing_data_are_known_before_anything_runs_and_said_by_a_dry_run(trained, capsys):
    card = Path("datasets/colours.yaml").read_text().replace("photos", "gone")
    Path("datasets/gone.yaml").write_text(card)
    stage = asked(witness("a"), {**LINEAR, "data": "gone"})
    with pytest.raises(ValueError, match=r"suite\[1\].*there is nothing at data/gone"):
        launch(stage, [], init="runs/mae")
    assert not witnessed()
    launch(stage, [], init="runs/mae", dry_run=True)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["entries"]
    assert [entry["data"].split(",")[0] for entry in said] == ["checked", "not here"]


def test_a_dry_run_shows_every_config_and_the_facts_of_every_entry(trained, capsys):
    launch(asked(LINEAR, TUNE), [], init="runs/mae", dry_run=True)
    out = capsys.readouterr().out
    assert "# suite[0] (eval/linear)" in out and "protocol: lbfgs" in out and "classes: 3" in out
    entries = json.loads(out.splitlines()[-1])["entries"]
    assert [entry["results"] for entry in entries] == ["linear/colours", "finetune/colours"]
    assert entries[1]["steps"] == 2 and entries[1]["folder"] == "runs/mae/finetune_colours"
    assert not (trained / "evaluations.json").exists()


def _in_two(rank: int, stage: str) -> None:
    launch(stage, [], init="runs/mae", out="runs/two")


def test_two_processes_give_the_numbers_of_one(trained):
    one = start(LINEAR, LOWSHOT, TUNE, out="runs/one")
    processes(2, _in_two, asked(LINEAR, LOWSHOT, TUNE, device="cpu"))
    two = read(Path("runs/two/results.json"))
    assert list(one) == list(two)
    for key in ("linear/colours", "lowshot/colours"):
        assert two[key] == pytest.approx(one[key])
    inner = (found["finetune/colours"]["lowshot/colours"] for found in (one, two))
    assert next(inner) == pytest.approx(next(inner), abs=4)  # one image of 60 is 1.7 percent


def _suite(rank: int, entries: list[dict], seconds: int) -> None:
    suite.PATIENCE = type(suite.PATIENCE)(seconds=seconds)
    sys.path.insert(0, os.getcwd())
    try:
        suite.start(config.load(asked(*entries), [], "runs/mae"), Path("runs/mae"))
    except RuntimeError as error:
        Path(f"said.{rank}").write_text(str(error))


def test_an_error_of_all_processes_loses_no_other_entry_and_of_one_alone_does_not_hang(trained):
    entries = [witness("a"), TOO_MANY, witness("b"), witness("c", alone=True), witness("d")]
    processes(2, _suite, entries, 8)
    assert witnessed() == ["a", "b"]
    assert "OSError: the disk of process 1" in Path("said.1").read_text()
    assert "failed on some processes and not on others" in Path("said.0").read_text()


def _add(rank: int, folder: Path) -> None:
    for i in range(50):
        results.add(folder, {f"{rank}/{i}": {}})


def test_jobs_that_write_at_the_same_time_lose_no_result(tmp_path):
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=_add, args=(rank, tmp_path)) for rank in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(read(tmp_path / "results.json")) == 100


def test_a_suite_is_one_job_or_one_each(place):
    given = [witness("a"), witness("b")]
    one = config.check(config.Suite, {"suite": given}, "")
    each = config.check(config.Suite, {"suite": given, "jobs": "each"}, "")
    assert [job.suite for job in _jobs(one)] == [given]
    assert [job.suite for job in _jobs(each)] == [given[:1], given[1:]]


def test_the_suite_that_we_ship_names_stages_and_keys_that_there_are(trained):
    with pytest.raises(ValueError) as raised:
        launch("eval/suite", [], init="runs/mae")
    said = str(raised.value).splitlines()[1:]
    assert len(said) == 5 and all("there is nothing at" in line for line in said)
