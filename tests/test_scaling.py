"""The analysis of a scaling study: planted laws come back, published tables give their findings."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import command

from prepretrain.scaling import analysis, forecast, laws, verdict
from prepretrain.scaling.table import Table, number, read

ROOT = Path(__file__).parents[1]
RUNS = Path(os.environ.get("PREPRETRAIN_GOLDEN", ROOT / "tests/golden"), "simmim_scaling_runs.csv")
SIZES = {"ImageNet-1K": 1281167.0, "ImageNet-22K": 14197122.0}
published = pytest.mark.skipif(not RUNS.exists(), reason=f"{RUNS} is not there")

ROWS = """model,data,iterations,val_loss,top1
small,web,1k,0.50,70
small,web,2k,0.48,71
small,web 10%,1k,0.52,69
small,web 10%,2k,0.53,68
"""


def written(tmp_path: Path, text: str = ROWS) -> Path:
    """A CSV file of that text."""
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return path


def grid(params=(1.0,), images=(1.0,), iterations=(1.0,)) -> Table:
    """A run for each combination of the axes, without values."""
    n, d, t = (
        a.ravel().astype(float) for a in np.meshgrid(params, images, iterations, indexing="ij")
    )
    return Table(n.astype(str), d.astype(str), t, None, {}, n, d)


def test_a_csv_of_other_names_and_units_is_read(tmp_path):
    text = "arch,set,steps,loss,acc,params\nb,web 10%,125k,0.5,80,86M\nl,web,1.5M,0.4,,0.3B\n"
    columns = {"model": "arch", "data": "set", "iterations": "steps", "val_loss": "loss"}
    table, left_out = read(written(tmp_path, text), columns, ("acc",), {"web": 2e6})
    assert table.iterations.tolist() == [125e3] and table.params.tolist() == [86e6]
    assert table.images.tolist() == [2e5]
    assert left_out == [f"{tmp_path}/runs.csv, line 3: left out, as 'acc' has no finite number"]


@pytest.mark.parametrize(
    "text, options, said",
    [
        (ROWS.replace("val_loss,top1", "top1,top1"), {}, "two columns are called 'top1'"),
        (ROWS.replace("top1", "top5"), {}, "has no column 'top1'. There are: model, data"),
        (ROWS.replace("0.53", "high"), {}, "line 5, column 'val_loss': 'high' is no number"),
        (ROWS.replace("0.53,68", "0.53"), {}, "line 5: 4 fields under 5 columns"),
        (ROWS + "small,web,1000,0.4,72\n", {}, "2 rows are of small, web, 1000 iterations"),
        (ROWS.replace("2k", "-2k"), {}, "iterations must be above 0. One is -2000"),
        (ROWS.splitlines()[0], {}, "holds no run"),
        ("", {}, "has no column 'model'"),
        (ROWS, {"columns": {"loss": "val_loss"}}, "--columns: there is no 'loss'. There are: "),
        (ROWS, {"columns": {"val_loss": "loss"}}, "has no column 'loss'"),
        (ROWS, {"sizes": {"other": 5.0}}, "--sizes: lacks 'web'. Give its images"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused_by_name(tmp_path, text, options, said):
    with pytest.raises(ValueError, match=said):
        read(written(tmp_path, text), **options)


@pytest.mark.parametrize(
    "text, value", [("1281167", 1281167), ("125k", 125e3), ("1.06B", 1.06e9), ("3e-4", 3e-4)]
)
def test_numbers_have_units(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "options, said",
    [
        ({"budget": float("nan")}, "--budget: nan is no finite number above 0"),
        ({"budget": -1.0}, "--budget: -1 is no finite"),
        ({"factor": float("inf")}, "--factor: inf is no finite number of at least 1"),
        ({"factor": 0.5}, "--factor: 0.5 is no finite"),
    ],
)
def test_a_limit_that_no_forecast_has_is_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        verdict.analyse(written(tmp_path), **options)


def test_a_run_overfits_if_a_shorter_one_has_the_lower_loss(tmp_path):
    table, _ = read(written(tmp_path))
    assert analysis.overfit(table).tolist() == [False, False, False, True]


@published
def test_the_63_published_runs_give_their_papers_correlations_and_best_runs():
    table, left_out = read(RUNS, sizes=SIZES)
    groups = analysis.groups(table, "top1", table.loss)
    assert (len(table), int(analysis.overfit(table).sum()), left_out) == (63, 14, [])
    # arXiv 2206.04664, Tables 7 (a) and 3
    assert groups["overfit"]["pearson"] == pytest.approx(-0.79, abs=0.02)
    assert groups["other"]["pearson"] == pytest.approx(-0.90, abs=0.01)
    best = analysis.best(table, "top1")["SwinV2-Huge"]
    assert [round(v, 1) for v in best.values()] == [84.3, 85.7, 86.3, 86.3]


@published
def test_the_larger_published_runs_are_forecast_better_than_by_naive_rules():
    table, _ = read(RUNS, sizes=SIZES)
    for values, falls in ((table.loss, True), (table.metrics["top1"], False)):
        scores = forecast.grade(table, values, falls=falls)
        naive = min(scores["last value"]["crps"], scores["linear in logarithms"]["crps"])
        assert scores["law"]["crps"] < 0.6 * naive and scores["runs"] == 27
        assert 0.7 <= scores["law"]["coverage"] <= 0.9


def test_encoders_five_times_apart_make_no_forecast_wild_and_narrow_intervals_are_called_so():
    table, _ = read(ROOT / "benchmarks/results/cifar10_scaling.csv", metrics=("knn/photos",))
    scores = forecast.grade(table, table.metrics["knn/photos"], falls=False, factor=6)
    assert scores["law"]["crps"] < scores["linear in logarithms"]["crps"] < 1.1
    found = {"forecast": {"knn/photos": scores}, "saturation": {}, "moves": {}}
    found |= {"overfit_runs": 0, "correlations": {"other": None}}
    (said,) = verdict.words(found, {})
    assert "45 % inside" in said and said.endswith("but its intervals are too narrow.")


def test_the_published_web_data_stop_helping_below_ten_million_images():
    path = ROOT / "benchmarks/published/delving_deeper_table2.csv"
    for metric in ("top1", "linear"):
        found = verdict.analyse(path, metric=metric)
        change = found["saturation"][metric]["change_point"]
        assert 1e6 < change["low"] < change["at"] < change["high"] < 1e7 and change["p"] < 0.01
        assert "validation loss" in found["not_said"]["overfitting"]


def test_planted_laws_come_back_within_their_intervals():
    table = grid(images=np.logspace(4, 7, 7))
    last, known = table.take(np.array([6])), table.take(np.arange(6))
    inside, floors = 0, 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        y = 0.4 + 0.05 * (table.images / 3e5) ** -rng.uniform(0.2, 0.5)
        y = y + 0.001 * rng.standard_normal(7)
        law = laws.fit(known, y[:6], falls=True)
        low, high = forecast.interval(law.draw(last))[:, 0]
        inside += low <= y[6] <= high
        low, high = np.percentile(law.floor(), [2.5, 97.5])
        floors += low <= 0.4 <= high
    assert 0.7 <= inside / 25 <= 0.96 and floors >= 22


def test_a_metric_that_rises_has_the_same_law_upside_down():
    table = grid(params=np.logspace(6, 9, 5), images=np.logspace(4, 7, 5))
    y = 0.4 + 0.1 * (table.params / 1e7) ** -0.3 + 0.1 * (table.images / 1e5) ** -0.4
    loss, accuracy = laws.fit(table, y, falls=True), laws.fit(table, 1 - y, falls=False)
    np.testing.assert_allclose(loss.predict(table), y, atol=2e-3)
    np.testing.assert_allclose(accuracy.predict(table), 1 - loss.predict(table), atol=1e-4)


def test_a_change_point_is_found_where_it_is_and_not_where_there_is_none():
    rng = np.random.default_rng(0)
    images, models = np.tile(np.logspace(4, 8, 6), 3), np.repeat(["a", "b", "c"], 6)
    level = np.repeat([1.0, 2.0, 3.0], 6) + 0.01 * rng.standard_normal(18)
    found = laws.change_point(images, level + np.log(np.minimum(images, 1e6)) / 10, models)
    assert found.low < 1e6 < found.high and found.high / found.low < 3 and found.p < 0.01
    rises = laws.change_point(images, level + np.log(images) / 10, models)
    assert rises.p > 0.05 and rises.slope_p < 1e-9 and abs(rises.slope - 0.1) < 1e-2


@pytest.mark.parametrize(
    "slope, said", [(0, "That top1 changes with data is not shown"), (-1, "top1 gets worse with")]
)
def test_data_that_buy_nothing_are_said_to_buy_nothing(slope, said):
    models = np.repeat(["a", "b"], 6)
    images = np.tile(np.geomspace(1e5, 1e8, 6), 2)
    noise = 0.3 * np.random.default_rng(2).standard_normal(12)
    runs = Table(
        models,
        images.astype(str),
        np.full(12, 100.0),
        None,
        {"top1": slope * np.log(images) + noise},
        images=images,
    )
    words = verdict.answer(runs, "top1")["verdicts"]
    assert any(one.startswith(said) for one in words), words


def test_the_score_of_a_normal_forecast_is_the_closed_one():
    draws = np.random.default_rng(0).standard_normal((20000, 1))
    # Gneiting and Raftery 2007: the CRPS of a standard normal at its mean
    closed = (np.sqrt(2) - 1) / np.sqrt(np.pi)
    assert forecast.crps(draws, np.zeros(1))[0] == pytest.approx(closed, abs=3e-3)
    assert forecast.crps(np.full((5, 1), 2.0), np.zeros(1))[0] == pytest.approx(2)


def test_the_next_run_is_the_one_that_the_law_gains_most_by():
    table = grid(params=np.logspace(6, 8, 4), images=np.logspace(4, 6, 4))
    y = 0.4 + 0.01 * (table.params / 1e7) ** -0.3 + 0.2 * (table.images / 1e5) ** -0.4
    found = forecast.moves(table, y, falls=True, budget=8, factor=3)
    assert [move["axis"] for move in found] == ["images", "params"]
    assert all(move["times"] == 3 and move["capped"] for move in found)
    gain = 0.2 * (10**-0.4 - 30**-0.4)
    assert found[0]["low"] < gain < found[0]["high"] or found[0]["gain"] == pytest.approx(
        gain, rel=0.1
    )
    with pytest.raises(ValueError, match="--budget: 0.5 buys 0.5 of the best run"):
        forecast.moves(table, y, falls=True, budget=0.5)


def test_nothing_is_said_from_too_few_runs(tmp_path):
    found = verdict.analyse(written(tmp_path))
    assert found["pearson"] == {
        "overfit": None,
        "other": pytest.approx(-0.98, abs=0.1),
        "all": pytest.approx(-1, abs=0.1),
    }
    assert found["forecast"] == {"val_loss": None, "top1": None}
    assert "images" in found["not_said"]["saturation of top1"]
    assert any("No forecast of top1" in sentence for sentence in found["verdicts"])
    with pytest.raises(laws.TooFew, match="4 runs for a law with 3 parameters over images"):
        laws.fit(grid(images=(1, 2, 3, 4)), np.arange(4.0), falls=False)
    with pytest.raises(laws.TooFew, match="no axis takes 3 values"):
        laws.fit(grid(images=(1, 2)), np.arange(2.0), falls=False)


def test_the_command_prints_verdicts_and_then_one_json_object(tmp_path):
    given = ("scaling.py", "analyse", "--csv", str(written(tmp_path)))
    done = command(*given)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["runs"] == 4 and found["overfit_runs"] == 1
    assert done.stdout.startswith("1 of 4 runs overfit")
    wrong = command(*given, "--metric", "top5")
    assert wrong.returncode == 1 and wrong.stderr.startswith("scaling: ")
