"""What a person who tries the program meets: warnings before time is spent, defaults that suit a
laptop, and exports that nothing of another library's can lose."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_features import tiny_model
from test_train import train

from prepretrain import config, evaluate, load
from prepretrain.data import transforms
from prepretrain.data.card import load_card
from prepretrain.data.loader import loading
from prepretrain.distributed import shard
from prepretrain.models import export
from prepretrain.reports import tables
from prepretrain.runs import plan, results, run
from prepretrain.runs.launch import launch

CLASSES = ["objective={name: classify}", "model={encoder: vit_test8, head: {classes: 3}}"]


def test_preprocess_makes_of_a_file_or_a_picture_what_the_evaluators_see(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    model = tiny_model()
    want = transforms.resize_center_crop(torch.from_numpy(pixels).permute(2, 0, 1), 32)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        assert torch.equal(model.preprocess(given), want)
    assert model.preprocess(Image.fromarray(pixels[..., 0])).shape == (3, 32, 32)  # grey
    assert model.features(model.preprocess(tmp_path / "a.png")[None]).shape == (1, 32)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="b.png: unreadable"):
        model.preprocess(tmp_path / "b.png")
    with pytest.raises(ValueError, match="`preprocess` makes them"):
        model.features(want[None] / 255)


def test_a_wrong_val_is_found_before_anything_of_train_is_computed(place, monkeypatch):
    Path("datasets/odd.yaml").write_text(
        "train: {source: folder, path: photos}\nval: {source: folder, path: nowhere}\n"
    )
    monkeypatch.setattr(
        "prepretrain.evaluation.evaluators.base.extract", lambda *_, **__: pytest.fail("computed")
    )
    for name in ("knn", "linear"):
        with pytest.raises(ValueError, match="odd.yaml: val: there is nothing at"):
            evaluate(tiny_model(), name, data="odd", pool="mean")
    given = ["evaluators=[{name: knn, data: odd, every: 50%, pool: mean}]"]
    with pytest.raises(ValueError, match="odd.yaml: val: there is nothing at"):
        train("runs/a", *given)


def test_a_dry_run_says_in_words_what_will_be_and_warns_of_what_hardly_anybody_means(place, capsys):
    launch("small.yaml", ["batch_size=240"], dry_run=True)
    *lines, last = capsys.readouterr().out.splitlines()
    said, facts = "\n".join(lines), json.loads(last)
    assert "mae on colours:train: 60 images, 3 classes (20 images each)" in said
    assert "12 steps of 240 images, 48.0 epochs, 2,880 images in all" in said
    assert facts["summary"] in said and len(facts["warnings"]) == 2
    assert "240 is more than the 60 images of data.train" in facts["warnings"][0]
    assert "length: 12it is 12 steps" in facts["warnings"][1]
    launch("small.yaml", ["length=200it"], dry_run=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["warnings"] == []


def test_what_mixes_pairs_gets_an_even_number_of_images_or_is_refused_beforehand(place):
    assert plan.accumulation(6, 1, 3, 2) == 3 and plan.accumulation(16, 2, 4, 2) == 2
    for given in (["batch_size=9"], ["batch_size=8", "batch_per_process=1"]):
        with pytest.raises(ValueError, match="batch_size: .* takes a multiple of 2, as mixup"):
            launch("small.yaml", [*CLASSES, "objective.mixup=0.8", *given], dry_run=True)


def test_an_encoder_of_ones_own_that_no_other_library_has_is_trained_and_exported(
    place, group, monkeypatch
):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    own = [
        "objective={name: classify}",
        "model={encoder: faulty.bare, head: {classes: 3, pool: mean}}",
    ]
    Path("own.yaml").write_text(Path("small.yaml").read_text().replace(", positions: fixed", ""))
    Path("runs/a").mkdir(parents=True)
    run.train(config.load("own.yaml", [*own, "length=4it"]), Path("runs/a"))
    assert load("runs/a").features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "mean").shape == (
        1,
        16,
    )
    assert not Path("runs/a/export/config.json").exists()


@pytest.mark.parametrize(
    "given, said",
    [
        (["length=100"], "length: '100' is no duration. Write '90ep'"),
        (["epochs=10"], "epochs: unknown key.*write length=90ep"),
        (["data.train=data/photos"], "no card 'data/photos', but a folder data/photos.*path: /"),
        (["model.text={name:"], "quote it, as in 'model.text={name: value}'"),
        (["optim.warmup=12it"], "leave nothing of the run's 12. Give a share"),
    ],
)
def test_a_slip_gets_a_way_out(place, given, said):
    with pytest.raises(ValueError, match=said):
        launch("small.yaml", given, dry_run=True)


def test_an_evaluation_says_where_its_data_and_options_stand(place):
    for given, said in (
        (["k=5"], "evaluator.k"),
        (["data.train=colours"], "is no card. An evaluation reads one: data=CARD"),
        (["data=colours:val"], "here a card is named without a split, as 'colours'"),
    ):
        with pytest.raises(ValueError, match=said):
            launch("eval/knn", given, init="x", dry_run=True)
    Path("file").touch()
    with pytest.raises(ValueError, match="--out: file is a file"):
        launch("small.yaml", [], out="file", dry_run=True)


@pytest.mark.parametrize("text", ["", "null", "[]", '{"a": ', "[" * 9999, "\0" * 50])
def test_a_damaged_file_of_a_run_is_named(tmp_path, text):
    for name, read in (
        ("results.json", lambda: tables.measured(tmp_path)),
        ("evaluations.json", lambda: results.read(tmp_path)),
        ("config.yaml", lambda: config.read_training(tmp_path / "config.yaml")),
    ):
        for old in tmp_path.iterdir():
            old.unlink()
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            read()


@pytest.mark.parametrize("line", ["vocabulary: [1]", "answers: {a: 1}", "train: {source: x, 1: 2}"])
def test_a_card_with_odd_values_is_named(tmp_path, line):
    path = tmp_path / "card.yaml"
    path.write_text(f"val: {{source: folder, path: x}}\n{line}\n")
    with pytest.raises(ValueError, match=f"card.yaml: {line.partition(':')[0]}"):
        load_card(path)


def test_whatever_another_librarys_export_meets_the_weights_are_written(tmp_path, monkeypatch):
    def meets(*_):
        raise KeyError("norm.weight")

    monkeypatch.setattr(export, "_timm_config", meets)
    model = tiny_model()
    export.save(model, tmp_path / "a", "here")
    for name, tensor in load(str(tmp_path / "a" / "model.safetensors")).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["model.json", "model.safetensors"]


def test_defaults_suit_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert loading(None) == 4 and loading(0) == 0 and loading(9) == 9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert loading(None) == 3
    for bf16 in (True, False):
        monkeypatch.setattr(shard, "_has_bf16", lambda bf16=bf16: bf16)
        if not torch.cuda.is_available():
            assert shard.chosen("auto") == ("bf16" if bf16 else "fp32")
        assert shard.chosen("bf16") == "bf16" and shard.chosen("fp32") == "fp32"
