"""A study: planned whole before it starts, no step and no run twice, and what fails fails alone."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from prepretrain import config, jsonl
from prepretrain.runs import run as runs
from prepretrain.scaling import commands, plan, progress, study, table

STUDY = {
    "stage": "small.yaml",
    "set": {
        "optim": {"schedule": "step", "milestones": ["75%"], "warmup": "1it"},
        "validation": {"data": "colours:val", "every": "100%", "images": 8},
        "checkpoint": {"every": "100%"},
    },
    "axes": {"data.subset": ["50%", "100%"], "length": ["4it", "8it", "12it"]},
}
KNN = {"stage": "eval/knn", "data": "colours", "evaluator": {"k": 3, "workers": 0}}


def write(**changed) -> str:
    """A study's file, in the current directory."""
    Path("study.yaml").write_text(yaml.safe_dump({**STUDY, **changed}, sort_keys=False))
    return "study.yaml"


def planned(**changed) -> list[plan.Planned]:
    return plan.plan(study.read(write(**changed)))


def go(**changed) -> None:
    """Runs a study, two runs at a time."""
    commands.run(write(**changed), None, 1, 1, jobs=2, slurm=None, hours=1)


def trained(folder: Path) -> list[int]:
    """The steps that a run has trained itself."""
    rows = jsonl.rows(folder / "metrics.jsonl")
    return [row["step"] for row in rows if "loss" in row]


def test_lengths_share_a_trunk_whose_steps_are_counted_once(place):
    found = {one.name: one for one in planned()}
    assert list(found)[:2] == ["50pct-12it", "100pct-12it"]  # trunks come first
    assert found["50pct-12it"].branches == ("4it", "8it")
    branch = found["50pct-8it"]
    assert branch.trunk.name == "50pct-12it" and (branch.steps, branch.own_steps) == (8, 2)
    facts = plan.facts(study.read("study.yaml"), list(found.values()), 1)
    assert (facts["steps"], facts["steps_without_trunks"]) == (2 * (12 + 2 + 1), 2 * 24)
    assert facts["comparison"].startswith("equal updates") and facts["hours"] is None
    assert json.dumps(facts) and "38% saved" in plan.said(facts)


def test_runs_of_a_cosine_share_nothing_and_epochs_or_neither_are_told(place):
    cosine = {"optim": {"schedule": "cosine", "milestones": [], "warmup": "1it"}}
    found = planned(set=cosine, axes={"data.subset": ["50%", "100%"], "length": ["2ep", "4ep"]})
    assert all(one.trunk is None for one in found)
    said = plan.fairness(study.read("study.yaml"), found)
    assert said.startswith("equal epochs: more data have more updates")
    pairs = {"a": {"data.subset": "50%", "length": "9it"}, "b": {"length": "12it"}}
    found = planned(axes={"pair": pairs})
    assert plan.fairness(study.read("study.yaml"), found).startswith("neither equal updates nor")


def test_hours_come_from_given_speeds(place):
    axes = {"model": {"a": {"model.width": 32}, "b": {"model.width": 64}}, "length": ["12it"]}
    one, two = planned(axes=axes, images_per_second={"a": 16, "b": 8})
    assert (one.hours, two.hours) == (12 / 3600, 24 / 3600)
    assert two.flops > one.flops == 3 * one.shape.size["flops_per_image"] * 12 * 16


def test_many_runs_are_planned_by_their_few_shapes(place, monkeypatch):
    checked, calls = runs.checked, []
    monkeypatch.setattr(runs, "checked", lambda *given: calls.append(given) or checked(*given))
    lengths = [f"{4 * n}it" for n in range(1, 6)]
    found = planned(axes={"seed": list(range(10)), "data.subset": [30, 60], "length": lengths})
    assert len(found) == 100 and len(calls) == 1
    assert sum(one.trunk is None for one in found) == 20


@pytest.mark.parametrize(
    "changed, said",
    [
        (
            {"axes": {"optim.speed": [1, 2]}},
            r"optim.speed: unknown key.*\(2 values: optim.speed: 1",
        ),
        ({"axes": {"data.subset": [30, 61]}}, r"data.subset.images: 61 of 60 .*\(1 run: 61\)"),
        (
            {"axes": {"optim": {"a": {"optim.lr": 1}}, "optim.lr": [1, 2]}},
            "axes optim and optim.lr both set optim.lr",
        ),
        ({"axes": {"length": ["4it", "4it"]}}, "axes.length: names a value twice"),
        ({"axes": {"objective": [{"name": "mae"}]}}, "axes.objective: a value of several parts"),
        ({"axes": {"length": []}}, "axes.length: is a list of the key's values"),
        ({"axes": {"length": ["4 it", "4_it"]}}, "two runs are called 4_it"),
        ({"axis": {}}, "no key 'axis'. Did you mean 'axes'"),
        ({"stage": None}, "stage: is missing"),
        ({"stage": "eval/knn", "axes": {"seed": [1]}, "set": {}}, "eval/knn does not train"),
        ({"images_per_second": 0}, "images_per_second.*|is a number above 0"),
        ({"evaluations": [{"data": "colours"}]}, "stage: is missing, as in"),
        ({"evaluations": [{**KNN, "evaluator": {"k": 99}}]}, "knn.k: colours:train has 60 images"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_before_anything_starts(place, changed, said):
    with pytest.raises(ValueError, match=re.compile(said, re.DOTALL)):
        go(**changed)
    assert not Path("runs").exists()


def test_all_errors_are_said_at_once(place):
    wrong = {"data.subset": [30, 61], "model": {"a": {"model.width": 33}, "b": {"model.width": 32}}}
    with pytest.raises(ValueError) as raised:
        planned(axes=wrong)
    assert "61 of 60" in str(raised.value) and "33" in str(raised.value)


def test_a_study_runs_once_grows_and_leaves_out_what_failed(place):
    lengths = {"length": ["8it", "12it"]}
    rates = {"rate": {"low": {"optim.lr": 1e-2}, "wild": {"optim.lr": 1e30}}, **lengths}
    with pytest.raises(RuntimeError, match=r"(?s)2 of 4 runs failed.*wild-12it: .*FloatingPoint"):
        go(axes=rates, evaluations=[KNN])
    folder, found = Path("runs/study"), study.read("study.yaml")
    states = {one.name: one for one in progress.states(found, plan.plan(found))}
    assert states["wild-8it"].why == "its trunk wild-12it failed"
    assert [states[name].what for name in ("low-8it", "wild-12it")] == ["done", "failed"]
    assert trained(folder / "low-12it") == list(range(1, 13))
    assert trained(folder / "low-8it") == [7, 8]  # only what its trunk has not
    commands.collect("study.yaml", None, 1, 1)
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    assert [row["run"] for row in rows] == ["low-12it", "low-8it"]
    runs_, left = table.read(folder / "runs.csv", metrics=("knn/colours",))
    assert runs_.iterations.tolist() == [12, 8] and not left and (runs_.loss > 0).all()
    # it grows by a length for which the trunk, which has ended, kept nothing: that run is alone
    low = {"rate": {"low": {"optim.lr": 1e-2}}, "length": ["4it", "8it", "12it"]}
    before = {p: p.stat().st_mtime_ns for p in folder.glob("low-*/**/*") if p.is_file()}
    go(axes=low, evaluations=[KNN])
    assert trained(folder / "low-4it") == [1, 2, 3, 4]
    assert before == {p: p.stat().st_mtime_ns for p in before}
    with pytest.raises(ValueError, match="(?s)was edited after.*low-12it: optim.lr: 0.01 -> 0.02"):
        go(axes={"rate": {"low": {"optim.lr": 2e-2}}, **lengths})


def test_a_longer_length_becomes_the_trunk_of_what_has_not_begun(place):
    for one in planned(axes={"length": ["8it", "12it"]}):
        one.run.folder.mkdir(parents=True)
        begun = replace(one.config, model=one.shape.plan.config.model)
        config.write(config.plain(begun), one.run.folder / "config.yaml")
    found = planned(axes={"length": ["8it", "12it", "24it", "20it"]})
    trunks = {one.name: one.trunk and one.trunk.name for one in found}
    assert trunks == {"8it": "12it", "12it": None, "20it": "24it", "24it": None}
    assert not any(one.stale for one in found)


def test_a_run_cut_off_is_stopped_and_goes_on(place):
    one = planned(axes={"length": ["12it"]})[0]
    one.run.folder.mkdir(parents=True)
    (one.run.folder / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    (state,) = progress.states(study.read("study.yaml"), [one])
    assert (state.what, state.step, state.of) == ("stopped", 5, 12)
    with pytest.raises(ValueError, match="no run is done"):
        commands.collect("study.yaml", None, 1, 1)
