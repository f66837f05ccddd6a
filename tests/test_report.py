"""Reports read runs' folders, draw pictures that open, and write tables that say what was
measured."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from prepretrain.reports import curves, reconstructions, tables
from prepretrain.zoo import published


@pytest.fixture
def run(tmp_path):
    """Makes a run's folder with a loss that falls."""

    def make(name: str, results: dict | None = None):
        folder = tmp_path / name
        folder.mkdir()
        rows = [
            {"step": s, "images": 64 * s, "seconds": s, "loss": 1 + 1 / s, "lr": 1e-3}
            for s in range(1, 50)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if results is not None:
            (folder / "results.json").write_text(json.dumps(results))
        return folder

    return make


def test_curves_of_several_runs_and_keys_are_one_picture(run, tmp_path):
    curves.draw([run("a"), run("b")], tmp_path / "out" / "curves.png", keys=("loss", "lr"))
    picture = np.asarray(Image.open(tmp_path / "out" / "curves.png").convert("RGB"))
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3)}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)} <= colours, (
        "the two runs' lines are not both in the picture"
    )


def test_runs_of_different_objectives_have_panels_of_their_own(run, tmp_path):
    pair = [run("a"), run("b")]
    widths = []
    for objective in ("mae", "hashtag"):
        for folder, name in zip(pair, ("mae", objective)):
            (folder / "config.yaml").write_text(f"objective: {{name: {name}}}\n")
        curves.draw(pair, tmp_path / "c.png")
        widths.append(Image.open(tmp_path / "c.png").width)
    assert widths[1] == 2 * widths[0]


def test_a_key_that_no_line_holds_is_named_with_its_run(run, tmp_path):
    with pytest.raises(ValueError, match="a: no line of metrics.jsonl holds 'accuracy'"):
        curves.draw([run("a")], tmp_path / "x.png", keys=("accuracy",))


def test_a_folder_that_is_no_run_is_named_and_a_torn_line_is_left_out(run, tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no metrics.jsonl"):
        curves.draw([tmp_path / "nowhere"], tmp_path / "x.png")
    torn = run("torn")
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "ima')
    rows = curves.metrics(torn, ["loss"])
    assert len(rows) == 49 and rows[0].keys() == {"step", "images", "loss"}


def test_smoothing_keeps_length_level_and_a_single_point():
    np.testing.assert_allclose(curves.smooth(np.array([3.0])), [3.0])
    np.testing.assert_allclose(curves.smooth(np.full(100, 0.5)), 0.5)
    straight = np.exp(-np.arange(200) / 20)
    np.testing.assert_allclose(curves.smooth(straight)[:190], straight[:190], rtol=1e-6)
    np.testing.assert_allclose(
        curves.smooth(np.linspace(-1, 1, 99))[:90], np.linspace(-1, 1, 99)[:90], atol=1e-9
    )


def test_a_table_quotes_the_headline_of_each_evaluation(run):
    runs = [
        run(
            "mae",
            {"linear/demo": {"top1": 51.239, "top5": 90.0, "images": 100}, "parameters": 5400000},
        ),
        run("wsp", {"lowshot/demo": {"top1_1shot": 20.0, "top1_5shot": 44.44, "images": 100}}),
    ]
    rows = tables.rows(runs)
    assert rows == [
        {
            "run": "mae",
            "linear/demo top1": "51.24",
            "parameters": 5400000,
            "protocol": "linear/demo: not recorded",
        },
        {
            "run": "wsp",
            "lowshot/demo top1_5shot": "44.44",
            "protocol": "lowshot/demo: not recorded",
        },
    ]
    lines = tables.table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are not aligned"
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "run",
        "linear/demo top1",
        "parameters",
        "lowshot/demo top1_5shot",
        "protocol",
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2][2] == "5,400,000" and cells[3][:4] == ["wsp", "–", "–", "44.44"]


ASKED = {
    "linear/demo": {
        "options": {
            "evaluator": {"name": "linear", "data": "demo", "protocol": "lbfgs", "pool": "class"},
            "model": {"image_size": 448},
        },
        "model": "0" * 64,
    },
    "lowshot/demo": {
        "options": {
            "evaluator": {"name": "lowshot", "data": "demo", "shots": None},
            "model": {},
        },
        "model": None,
    },
    "finetune/demo": {
        "options": {
            "objective": {"name": "classify"},
            "length": "9ep",
            "batch_size": 64,
            "optim": {"lr": 5e-4},
        },
        "model": "0" * 64,
    },
}


@pytest.fixture
def evaluated(run):
    """A run with evaluations of its own and of a fine-tuning, and what was asked for them."""
    folder = run(
        "mae",
        {
            "linear/demo": {"top1": 51.239, "images": 100},
            "lowshot/demo": {"top1_10shot": 40.0, "images": 100},
            "finetune/demo": {"linear/demo": {"top1": 77.7}, "lowshot/demo": {"top1_10shot": 66.6}},
            "val_loss": 0.123456,
            "images": 64000,
        },
    )
    (folder / "evaluations.json").write_text(json.dumps(ASKED))
    return folder


def test_a_guessers_row_has_a_share_of_a_cards_classes_and_a_mean_has_its_deviation(run, capsys):
    found = {"top1_10shot": 40.0, "top1_10shot_std": 2.345}
    folder = run("mae", {"linear/demo": {"top1": 51.2}, "lowshot/demo": found})
    tables.compare([folder], guesser=True)
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")][:3] for line in lines]
    assert cells[2:] == [["chance", "10.00", "10.00"], ["mae", "51.20", "40.00 ± 2.35"]]


def test_a_table_says_what_was_asked_but_for_defaults_and_what_a_fine_tuning_reached(evaluated):
    (row,) = tables.rows([evaluated], ["ours"])
    assert row == {
        "run": "ours",
        "linear/demo top1": "51.24",
        "lowshot/demo top1_10shot": "40.00",
        "finetune/demo linear/demo top1": "77.70",
        "finetune/demo lowshot/demo top1_10shot": "66.60",
        "val_loss": "0.1235",
        "images": 64000,
        "protocol": "linear/demo: protocol=lbfgs, model.image_size=448; lowshot/demo: defaults; "
        "finetune/demo: classify 9ep, batch 64, lr 0.0005",
    }
    with pytest.raises(ValueError, match="--names: 2 names for 1 runs"):
        tables.rows([evaluated], ["a", "b"])


def read(path) -> list[dict[str, str]]:
    """The rows of a .csv, without the fields that are empty."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_a_csv_parses_back_to_the_rows(evaluated, tmp_path):
    rows = tables.rows([evaluated], groups=["maws", "swag"])
    tables.write_table(rows, tmp_path / "out" / "table.csv")
    found = read(tmp_path / "out" / "table.csv")
    assert found == [{key: str(value) for key, value in row.items()} for row in rows]
    assert int(found[0]["images"]) == 64000
    with pytest.raises(ValueError, match="table.txt is neither .md nor .csv"):
        tables.write_table(rows, tmp_path / "table.txt")


def test_published_numbers_have_a_row_each_and_one_column_that_no_number_of_ours_is_in(
    evaluated, tmp_path, capsys
):
    path = tmp_path / "table.md"
    tables.compare([evaluated], path, groups=published.groups())
    assert path.read_text() == capsys.readouterr().out
    lines = [[c.strip() for c in line[2:-2].split(" | ")] for line in path.read_text().splitlines()]
    names, rows = lines[0], lines[2:]
    own = [*tables.rows([evaluated])[0]]
    assert names == [*own[:-1], "published", "metric", "protocol"]
    assert len({len(line) for line in rows} | {len(names)}) == 1
    assert rows[0][-3:-1] == ["–", "–"] and "–" not in rows[0][:-3]
    assert len({(row[0], row[-2]) for row in rows}) == len(rows), "two numbers of one name"
    for name, *ours, value, metric, source in rows[1:]:
        assert set(ours) == {"–"} and float(value) and name and source
        if "SimMIM" not in metric:
            kinds = re.findall(r"fine-tuned|linear|\d-shot|zero-shot", metric)
            data = re.findall("ImageNet-1k top|ImageNetV2|-ReaL|ObjectNet|iNat|Food", metric)
            assert len(kinds) == len(data) == 1, metric


def test_published_numbers_are_those_of_their_tables():
    found = {}
    for row in published.find("maws"):
        for metric, value in row.metrics.items():
            found.setdefault((row.name, metric), []).append((value, row.checked))
    assert found["maws/vit_l16", "ImageNet-1k top-1, linear probe at 224"] == [(86.1, True)]
    assert found["maws/vit_2b14", "iNaturalist 2018 top-1, 10-shot, VPT"] == [(80.3, False)]
    assert found["maws/vit_h14", "ObjectNet top-1, fine-tuned on ImageNet-1k at 518"] == [
        (72.6, False)
    ]
    assert found["maws/vit_2b14", "Food-101, zero-shot, size not given"] == [(96.2, True)]
    assert all(len(values) == 1 for values in found.values()), "two numbers under one name"


def test_a_group_that_nobody_published_is_named_with_the_nearest(evaluated):
    with pytest.raises(ValueError, match="no group 'mawz'. Did you mean 'maws'?"):
        tables.rows([evaluated], groups=["mawz"])


def test_a_run_without_results_is_named(run):
    with pytest.raises(ValueError, match="a: there is no results.json"):
        tables.rows([run("a")])


def versions(*images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of a picture."""
    return dict(zip(("original", "masked", "reconstructed"), images))


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_reconstructions_show_every_image_three_times(count, tmp_path):
    colours = [torch.randint(20, 230, (3, 1, 1), dtype=torch.uint8) for _ in range(count)]
    images = torch.stack([colour.expand(3, 16, 16) for colour in colours])
    reconstructions.draw(versions(images, images, images), tmp_path / "r.png")
    picture = np.asarray(Image.open(tmp_path / "r.png").convert("RGB")).reshape(-1, 3).astype(int)
    for colour in colours:
        same = (abs(picture - colour.flatten().numpy()) <= 1).all(1).sum()
        assert same > 3 * 200**2, "an image is missing from the grid"


def test_reconstructions_of_other_shapes_or_types_are_refused(tmp_path):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="'masked' must be uint8"):
        reconstructions.draw(versions(images, images.float(), images), tmp_path / "r.png")
    with pytest.raises(ValueError, match="'reconstructed' must be uint8"):
        reconstructions.draw(versions(images, images, images[:1]), tmp_path / "r.png")
