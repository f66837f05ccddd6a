import io
import json
import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from prepretrain.card import MissingData, card_names, load_card, open_source
from prepretrain.hashtags import Vocabulary

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A data folder with two classes of photos, and a card for it."""
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path / "data"))
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg"):
        file = tmp_path / "data" / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    return tmp_path


def card(folder, text):
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


def test_a_card_says_what_a_dataset_is_and_opens_its_splits(photos):
    path = card(
        photos,
        """
        description: photos
        licence: CC0
        classes: [cat, dog]
        vocabulary: photos/tags.json
        train: {source: folder, path: photos, images: 3}
        val: {source: synthetic, images: 4, size: 16}
    """,
    )
    mine = load_card(path)
    assert (mine.name, mine.description, mine.licence) == ("mine", "photos", "CC0")
    assert mine.classes == ["cat", "dog"]
    assert mine.vocabulary == photos / "data" / "photos" / "tags.json"
    assert mine.images == {"train": 3, "val": 4}
    assert len(mine.open("train")) == len(open_source(path)) == 3
    with pytest.raises(ValueError, match="no split 'vale'. Did you mean 'val'.*train, val"):
        open_source(path + ":vale")


def test_cards_are_found_by_name_here_and_in_the_repository(tmp_path, monkeypatch):
    assert {"cifar10", "demo", "imagefolder", "shards", "web"} <= set(card_names())
    monkeypatch.chdir(tmp_path)
    assert load_card("cifar10").classes[0] == "airplane"
    (tmp_path / "datasets").mkdir()
    card(tmp_path / "datasets", "train: {source: synthetic, images: 2, size: 16}")
    assert len(open_source("mine:train")) == 2
    with pytest.raises(ValueError, match="'cifar'. Did you mean 'cifar10'.*datasets/cifar.yaml"):
        load_card("cifar")
    with pytest.raises(ValueError, match="no card at none.yaml"):
        load_card("none.yaml")


@pytest.mark.parametrize("name", [p.stem for p in sorted((REPOSITORY / "datasets").glob("*.yaml"))])
def test_every_card_of_the_repository_is_whole_and_says_where_data_is_missing(
    name, tmp_path, monkeypatch
):
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    mine = load_card(name)
    assert mine.description and mine.licence and "train" in mine.splits
    with pytest.raises(MissingData, match=rf"{name}.yaml: train: there is nothing at {tmp_path}"):
        mine.open("train")


def test_a_run_can_be_planned_before_the_data_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    web = load_card("web")
    assert web.images["train"] == 3_000_000_000
    with pytest.raises(ValueError, match="web.yaml: train: .*PREPRETRAIN_DATA"):
        web.open("train")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds nothing"),
        ("- a", "holds list"),
        ("description: x", "no split"),
        ("a: [", "YAML"),
        ("train: photos", "train: a split is a mapping with a source"),
        ("train: {path: x}", "train: a split is a mapping with a source"),
        ("licens: x\ntrain: {source: folder, path: photos}", "licens: a split is"),
        ("train: {source: folder, path: photos, images: -1}", "train.images: -1"),
        ("train: {source: folder, path: photos, images: many}", "train.images: 'many'"),
        ("classes: [a, a]\ntrain: {source: folder, path: photos}", "different names"),
        ("classes: [a, no]\ntrain: {source: folder, path: photos}", "False is not a text.*quotes"),
    ],
)
def test_a_bad_card_is_refused_by_file_and_key(photos, text, message):
    with pytest.raises(ValueError, match=f"mine.yaml: .*{message}|mine.yaml: {message}") as caught:
        load_card(card(photos, text))
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ("source: folder, path: photos, images: 5", "declares images: 5, and the data holds 3"),
        ("source: foldr, path: photos", "no source 'foldr'. Did you mean 'folder'"),
        ("source: folder, path: photos, clases: [a]", "clases: unknown option.*classes"),
        ("source: folder", "missing source.path"),
        ("source: folder, path: none", "nothing at .*none"),
        ("source: shards, path: 'none/{0..3}.tar'", "nothing at .*none/"),
        ("source: shards, path: 'photos/{0..3}.tar'", "0.tar: there is no such shard"),
        ("source: shards, path: 's3://bucket/x'", "local disks"),
    ],
)
def test_what_a_card_declares_is_checked_against_the_data(photos, options, message):
    path = card(photos, f"train: {{{options}}}")
    with pytest.raises(ValueError, match=f"mine.yaml: train.*{message}"):
        open_source(path)


def test_labels_that_would_mean_other_classes_are_refused(photos):
    path = card(photos, "classes: [cat, dog, owl]\ntrain: {source: folder, path: photos}")
    with pytest.raises(ValueError, match="names 3 classes, and the data has 2"):
        open_source(path)


# The scripts: the first as a person runs it, the rest in this process, which is faster.


def run(*arguments, data):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PREPRETRAIN_DATA": str(data)},
    )


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script; give what it printed, or the message with which it stopped."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", list(arguments))
        monkeypatch.setattr(sys, "path", sys.path[:])
        monkeypatch.setenv("WDS_SECURE", "1")
        try:
            runpy.run_path(str(REPOSITORY / arguments[0]), run_name="__main__")
        except SystemExit as stop:
            return str(stop.code)
        return capsys.readouterr().out

    return call


def test_scenes_are_packed_into_shards_counted_and_opened_by_their_card(
    tmp_path, script, monkeypatch
):
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    out = tmp_path / "demo" / "train"
    pack = (
        "datasets/make_shards.py",
        "synthetic",
        "images=60",
        "size=16",
        "--out",
        str(out),
        "--per-shard",
        "25",
    )
    made = run(*pack, data=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "60 images in 3 shards, with image, label, hashtags, text" in made.stdout
    assert len(list(out.glob("*.tar.index"))) == 3
    with tarfile.open(out / "00002.tar") as tar:
        assert tar.getnames()[:4] == [f"000000050.{e}" for e in ("cls", "jpg", "json", "txt")]
        details = json.load(tar.extractfile("000000050.json"))
    assert details["key"] == "000000050" and isinstance(details["hashtags"], list)
    before = (out / "00000.tar").read_bytes()
    assert "exists already" in script(*pack)
    assert (out / "00000.tar").read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["train"]

    tags = tmp_path / "demo" / "hashtags.json"
    counted = script("datasets/hashtags.py", "demo", "--min-count", "4", "--out", str(tags))
    assert "of 60 images" in counted and "have none of them" in counted
    vocabulary, source = Vocabulary.load(tags), open_source("demo:train")
    vocabulary.check(source)
    assert len(source) == 60 and min(vocabulary.counts) >= 4
    assert "cifar10" in script("datasets/hashtags.py", "cifar10", "--min-count", "4", "--out", "x")


def test_packing_keeps_the_bytes_labels_and_dotted_keys_of_a_folder(tmp_path, script):
    for name in ("cat/a.b.jpg", "cat/a.c.png", "dog/x.jpg"):
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    made = script(
        "datasets/make_shards.py", "folder", f"path={tmp_path}/in", "--out", str(tmp_path / "out")
    )
    assert "3 images in 1 shards" in made
    path = card(tmp_path, f"train: {{source: shards, path: {tmp_path}/out}}")
    source = open_source(path)
    assert [source.label(i) for i in range(3)] == [0, 0, 1]
    assert source[0]["image"] == (tmp_path / "in/cat/a.b.jpg").read_bytes()
    assert Image.open(io.BytesIO(source[1]["image"])).format == "PNG"


def test_what_cannot_be_packed_leaves_nothing_behind(tmp_path, script):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.bmp")
    made = script(
        "datasets/make_shards.py", "folder", f"path={tmp_path}/in", "--out", str(tmp_path / "out")
    )
    assert "a.bmp: neither JPEG, PNG nor WebP" in made
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    wrong = script("datasets/make_shards.py", "synthetic", "images", "--out", str(tmp_path / "o"))
    assert "images: is not key=value" in wrong
