"""The page of a scaling study says what its table says, refuses nothing that it can leave out, and
runs nothing that stands in a table."""

import json
import re
import runpy
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from prepretrain.reports import study_page, study_pictures
from prepretrain.reports.study import arrange
from prepretrain.runs.launch import launch
from prepretrain.scaling import analysis, proxy, two_stage, verdict
from prepretrain.scaling.laws import TooFew
from prepretrain.scaling.table import read

EVIL = "<img src=x onerror=alert(1)>"
NAMES = ("small", f"$x {EVIL}")


def rows(models=NAMES, amounts=(1000, 10000), lengths=(100, 200)) -> str:
    """A table in which the runs on the least data overfit, but for the shortest."""
    lines = ["model,data,iterations,params,images,val_loss,top1,run,seed"]
    for m, model in enumerate(models):
        for d, images in enumerate(amounts):
            for t, length in enumerate(lengths):
                loss = 0.5 - 0.02 * m - 0.03 * d + (0.01 if d == 0 else -0.01) * t
                size, value = 1e6 * 4**m, 90 - 20 * loss
                lines.append(
                    f"{model},web-{d},{length},{size},{images},{loss},{value},r{m}{d}{t},0"
                )
    return "\n".join(lines) + "\n"


class Marks(HTMLParser):
    """Counts the tags of a page, and keeps what its elements link to."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.links, self.ids = [], set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        own = dict(attributes)
        self.ids |= {own.get("id")}
        self.links |= {own.get(name) for name in ("href", "src", "xlink:href")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the folder of a page, its text, what was found)."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "runs.csv").write_text(rows() + "small,web-1,400,1e6,10000,nan,70,,0\n")
    command = ["report", "--csv", str(folder / "runs.csv"), "--out", str(folder / "out")]
    with redirect_stdout(StringIO()) as said, patch.object(sys, "argv", ["scaling.py", *command]):
        runpy.run_path(str(Path(__file__).parents[1] / "tools/scaling.py"), run_name="__main__")
    found = json.loads(said.getvalue().splitlines()[-1])
    return folder / "out", (folder / "out/index.html").read_text(), found


def test_a_page_needs_nothing_else_and_runs_nothing_of_its_table(made):
    _, page, _ = made
    marks = Marks(page)
    assert "img" not in marks.tags and "&lt;img src=x" in page
    assert marks.tags.count("script") == 2 and "default-src 'none'" in page
    inside = {link for link in marks.links if link and not link.startswith("data:")}
    assert inside and {link.removeprefix("#") for link in inside} <= marks.ids
    assert not re.search(r"(?:src|href)=.https?:", page)


def test_a_page_holds_the_numbers_that_the_analysis_gives(made, tmp_path):
    folder, page, found = made
    text = re.search(r'<script type="application/json" id="answers">(.*?)</script>', page)[1]
    assert json.loads(text) == found
    analysed = verdict.analyse(folder.parent / "runs.csv")
    assert found["metrics"]["top1"] == json.loads(json.dumps(analysed))
    other = analysed["correlations"]["other"]
    low, high = other["pearson_interval"]
    assert f"<td>{other['pearson']:.2f} ({low:.2f} to {high:.2f})</td>" in page
    assert (folder / "correlations.png").stat().st_size > 1000


def test_what_the_runs_do_not_support_is_said_and_not_drawn(made):
    folder, page, found = made
    assert found["metrics"]["top1"]["correlations"]["overfit"] is None  # two runs
    assert "No line of runs that overfit: fewer than 3" in page
    assert "no axis takes 3 values" in page and not (folder / "forecast.png").exists()
    assert "Rows left out: 1" in page and "&#39;val_loss&#39; has no finite number" in page
    assert 'id="forecast"' not in page and 'id="reconstructions"' not in page


def test_every_point_leads_to_its_run_and_says_its_facts(made):
    _, page, _ = made
    pattern = r'<a href="#run-(\d+)" class="run" tabindex="-1" aria-labelledby="facts-(\d+)"'
    points = re.findall(pattern, page)
    assert {int(run) for run, _ in points} == set(range(8)) and all(a == b for a, b in points)
    facts = "small, web-0, 200 iterations: val_loss 0.5100, top1 79.80, overfits"
    assert f'<span id="facts-1" hidden>{facts}</span>' in page
    assert page.count('<figure class="panel"') == page.count('role="group"')


def test_a_table_without_losses_or_sizes_still_gives_a_page(tmp_path):
    (tmp_path / "runs.csv").write_text("model,data,iterations,top1\na,web,1k,70\nb,web,1k,71\n")
    study_page.report(tmp_path / "runs.csv", tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "The table has no losses" in page and "the images in the data are not known" in page


@pytest.mark.faults
def test_a_page_of_500_runs_is_below_three_megabytes(tmp_path):
    grid = rows([f"model-{i}" for i in range(5)], np.logspace(4, 8, 10), range(100, 1100, 100))
    header, *lines = grid.splitlines()
    more = [f"{line},{0.3 + i % 50 / 1000},{30 + i % 40}" for i, line in enumerate(lines)]
    (tmp_path / "runs.csv").write_text("\n".join([f"{header},train_loss,knn", *more]) + "\n")
    study_page.report(tmp_path / "runs.csv", tmp_path, metrics=["top1", "knn"], budget=2)
    assert (tmp_path / "index.html").stat().st_size < 3e6


def test_seeds_of_a_run_are_averaged_and_one_seed_that_stands_twice_is_refused(tmp_path):
    text = rows(("small",))
    path = tmp_path / "runs.csv"
    other = [f"{line[:-1]}1".replace(",80.0,", ",81.0,") for line in text.splitlines()[1:]]
    path.write_text(text + "\n".join(other) + "\n")
    table, _ = read(path)
    assert len(table) == 4 and table.cells[0]["seed"] == "0, 1"
    assert table.metrics["top1"].tolist() == pytest.approx([80.5, 79.8, 80.6, 80.8])
    path.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(ValueError, match="2 rows are of small, web-0, 100 iterations"):
        read(path)


def stages(tmp_path, text: str) -> two_stage.Runs:
    """The runs of a table of that text."""
    (tmp_path / "two.csv").write_text(text)
    return two_stage.read(tmp_path / "two.csv", ["top1"])[0]


TWO = """images_before,iterations,flops,top1,seed
0,100,1e12,50,0
0,100,1e12,52,1
0,400,4e12,60,0
0,400,4e12,62,1
800,100,2e12,58,0
800,100,2e12,60,1
800,800,9e12,70,0
"""


def test_pre_pretraining_is_compared_at_equal_flops_and_at_equal_lengths(tmp_path):
    part = two_stage.compare(stages(tmp_path, TWO), "top1")
    (flops,), (length,) = part["equal_flops"], part["equal_length"]
    assert flops["gain"] == pytest.approx(59 - 56) and length["gain"] == pytest.approx(59 - 51)
    assert flops["times"] == pytest.approx(4**0.8 / 2)  # alone, 59 is 0.8 of the way from 51 to 61
    assert (
        part["beyond"] == {"equal_flops": 1, "equal_length": 1}
        and length["low"] < 8 < length["high"]
    )
    assert length["high"] - 8 == pytest.approx(3.182 * np.sqrt(2), rel=1e-3)  # t of 3, deviation √2
    assert "above zero in 0 and below zero in 0 of 1 comparisons" in " ".join(two_stage.words(part))


def test_without_both_kinds_of_runs_or_with_wrong_numbers_nothing_is_compared(tmp_path):
    with pytest.raises(TooFew, match="no run with pre-pretraining"):
        two_stage.compare(stages(tmp_path, "\n".join(TWO.splitlines()[:5])), "top1")
    with pytest.raises(ValueError, match="has no column 'flops'. There are: images_before"):
        stages(tmp_path, TWO.replace("flops", "cost"))
    with pytest.raises(ValueError, match="iterations must be at least 1. One is -100"):
        stages(tmp_path, TWO.replace("0,100,", "0,-100,"))


def test_candidates_are_ranked_by_loss_and_the_study_says_how_far_to_trust_it(place, group):
    launch("small.yaml", [], out="long")
    shutil.copytree("long", "short")
    for step in (8, 12):  # what is left is the checkpoint of step 4
        shutil.rmtree(f"short/checkpoints/{step:09d}")
    (place / "runs.csv").write_text(rows(("small", "base", "large")))
    table, _ = verdict.open_table("runs.csv", [], ["top1"], [])
    found = proxy.rank(["short", "long"], "colours:val", table)
    assert [row["run"] for row in found["ranking"]] == ["long", "short"]
    assert found["trust"]["correlations"]["other"]["spearman"] == pytest.approx(-1, abs=0.01)
    assert found["trust"]["pairs"]["right"] in (None, 1.0)
    assert any("too few to rely on" in text for text in found["verdicts"])  # 9 runs
    pictured(place, table)
    config = (place / "long/config.yaml").read_text()
    (place / "long/config.yaml").write_text(config.replace("name: mae", "name: simmim"))
    with pytest.raises(ValueError, match="their losses cannot be compared"):
        proxy.rank(["short", "long"], "colours:val")
    (place / "export").mkdir()
    with pytest.raises(ValueError, match="an export holds the encoder only"):
        proxy.rank(["short", "export"], "colours:val")


def pictured(place, table) -> None:
    """The run that overfits most is drawn beside the best of its model, where both are here."""
    (place / "r001").symlink_to(place / "short")
    (place / "r011").symlink_to(place / "short")
    answers = {"top1": verdict.answer(table, "top1")}
    study = replace(arrange(table, answers, place), over=analysis.overfit(table))
    chart = study_pictures.pictures(study, ["colours:val"], place)
    assert chart.images["colours:val"][1:4] == b"PNG" and "overfits" in chart.words[0]
    assert study_pictures.overfitting_pair(study) == (1, 3)
