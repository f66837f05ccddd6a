"""Reports read runs' folders, draw pictures that open, and write tables that say what was
measured."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from prepretrain import report


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
    report.curves([run("a"), run("b")], tmp_path / "out" / "curves.png", keys=("loss", "lr"))
    picture = np.asarray(Image.open(tmp_path / "out" / "curves.png").convert("RGB"))
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3)}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)} <= colours, (
        "the two runs' lines are not both in the picture"
    )


def test_a_key_that_no_line_holds_is_named_with_its_run(run, tmp_path):
    with pytest.raises(ValueError, match="a: no line of metrics.jsonl holds 'accuracy'"):
        report.curves([run("a")], tmp_path / "x.png", keys=("accuracy",))


def test_a_folder_that_is_no_run_and_a_torn_line_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no metrics.jsonl"):
        report.curves([tmp_path / "nowhere"], tmp_path / "x.png")
    torn = run("torn")
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "ima')
    with pytest.raises(ValueError, match="metrics.jsonl:50: not a line of JSON"):
        report.metrics(torn)


def test_smoothing_keeps_length_level_and_a_single_point():
    np.testing.assert_allclose(report.smooth(np.array([3.0])), [3.0])
    np.testing.assert_allclose(report.smooth(np.full(100, 0.5)), 0.5)
    straight = np.exp(-np.arange(200) / 20)
    np.testing.assert_allclose(report.smooth(straight)[:190], straight[:190], rtol=1e-6)
    np.testing.assert_allclose(
        report.smooth(np.linspace(-1, 1, 99))[:90], np.linspace(-1, 1, 99)[:90], atol=1e-9
    )


def test_a_table_quotes_the_headline_of_each_evaluation(run):
    runs = [
        run(
            "mae",
            {"linear/demo": {"top1": 51.239, "top5": 90.0, "images": 100}, "parameters": 5400000},
        ),
        run("wsp", {"lowshot/demo": {"top1_1shot": 20.0, "top1_5shot": 44.44, "images": 100}}),
    ]
    rows = report.rows(runs)
    assert rows == [
        {"run": "mae", "linear/demo top1": "51.24", "parameters": "5,400,000"},
        {"run": "wsp", "lowshot/demo top1_5shot": "44.44"},
    ]
    lines = report.table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are not aligned"
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "run",
        "linear/demo top1",
        "parameters",
        "lowshot/demo top1_5shot",
    ]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == ["wsp", "–", "–", "44.44"]


def test_a_run_without_results_is_named(run):
    with pytest.raises(ValueError, match="a: there is no results.json"):
        report.rows([run("a")])


def versions(*images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of a picture."""
    return dict(zip(("original", "masked", "reconstructed"), images))


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_reconstructions_show_every_image_three_times(count, tmp_path):
    colours = [torch.randint(20, 230, (3, 1, 1), dtype=torch.uint8) for _ in range(count)]
    images = torch.stack([colour.expand(3, 16, 16) for colour in colours])
    report.reconstructions(versions(images, images, images), tmp_path / "r.png")
    picture = np.asarray(Image.open(tmp_path / "r.png").convert("RGB")).reshape(-1, 3).astype(int)
    for colour in colours:
        same = (abs(picture - colour.flatten().numpy()) <= 1).all(1).sum()
        assert same > 3 * 200**2, "an image is missing from the grid"


def test_reconstructions_of_other_shapes_or_types_are_refused(tmp_path):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="'masked' must be uint8"):
        report.reconstructions(versions(images, images.float(), images), tmp_path / "r.png")
    with pytest.raises(ValueError, match="'reconstructed' must be uint8"):
        report.reconstructions(versions(images, images, images[:1]), tmp_path / "r.png")
