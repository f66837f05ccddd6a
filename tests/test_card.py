import io
import json
import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prepretrain.data.card import MissingData, card_names, load_card, open_data
from prepretrain.data.tags.vocabulary import Vocabulary

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
    assert len(mine.open("train")) == len(open_data(path)) == 3
    with pytest.raises(ValueError, match="no split 'vale'. Did you mean 'val'.*train, val"):
        open_data(path + ":vale")


def test_cards_are_found_by_name_here_and_in_the_repository(tmp_path, monkeypatch):
    assert {"cifar10", "demo", "imagefolder", "shards", "web"} <= set(card_names())
    monkeypatch.chdir(tmp_path)
    assert load_card("cifar10").classes[0] == "airplane"
    (tmp_path / "datasets").mkdir()
    card(tmp_path / "datasets", "train: {source: synthetic, images: 2, size: 16}")
    assert len(open_data("mine:train")) == 2
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
    assert mine.description and mine.licence
    for split in mine.splits:
        variant = {"corruption": "fog", "severity": 3} if mine.corruptions(split) else {}
        nothing = rf"{name}.yaml: {split}: there is nothing at {tmp_path}"
        with pytest.raises(MissingData, match=nothing):
            mine.open(split, **variant)


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
        ("source: shards, path: 'photos/{0..3}.tar'", "0.tar: there is no such .tar shard"),
        ("source: parquet, path: 's3://bucket/x'", "local disks"),
        ("source: shards, path: 'ftp://host/x'", "local disks and s3"),
    ],
)
def test_what_a_card_declares_is_checked_against_the_data(photos, options, message):
    path = card(photos, f"train: {{{options}}}")
    with pytest.raises(ValueError, match=f"mine.yaml: train.*{message}"):
        open_data(path)


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    "last", ["description: *a8", "classes: *a8", "licence: {x: *a8}", "x: &x [*x]"]
)
def test_aliases_that_stand_for_more_than_fits_into_memory_are_refused(photos, last):
    with pytest.raises(ValueError, match="mine.yaml: not readable as YAML: aliases stand for more"):
        load_card(card(photos, ("" if "&x" in last else ALIASES) + last))


def test_aliases_as_people_use_them_are_read(photos):
    mine = load_card(
        card(photos, "classes: &c [cat, dog]\nval: {source: folder, path: photos, classes: *c}")
    )
    assert mine.splits["val"]["classes"] == mine.classes


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 600, "not readable as YAML"),
        ("1: {source: folder, path: photos}", "the key 1 is no text"),
        ("train: {source: folder, path: photos, 2: 3}", "train: the key 2 is no text"),
        ("vocabulary: [1]\ntrain: {source: folder, path: photos}", "vocabulary: .* is not a text"),
        ("answers: {a: 1}\ntrain: {source: folder, path: photos}", "answers: .* is not a text"),
        (
            "description: [a]\ntrain: {source: folder, path: photos}",
            "description: .* is not a text",
        ),
    ],
)
def test_what_is_no_card_is_refused_whatever_it_is(photos, text, message):
    with pytest.raises(ValueError, match=f"mine.yaml: {message}"):
        load_card(card(photos, text))


def test_a_card_in_another_encoding_is_refused_by_name(photos):
    path = card(photos, "train: {source: folder, path: photos}")
    Path(path).write_bytes(
        "description: café\ntrain: {source: folder, path: photos}".encode("latin-1")
    )
    with pytest.raises(ValueError, match="mine.yaml: not readable as YAML"):
        load_card(path)


def test_labels_that_would_mean_other_classes_are_refused(photos):
    path = card(photos, "classes: [cat, dog, owl]\ntrain: {source: folder, path: photos}")
    with pytest.raises(ValueError, match="names 3 classes, and the data has 2"):
        open_data(path)


# What labels stand for.


def put(folder, *names, size=8):
    """Small JPEGs at these paths, each of another size of file."""
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size + number, size)).save(file, "JPEG")


def test_splits_with_other_classes_are_refused_by_what_tells_them_apart(tmp_path):
    for name in ("train/hat", "train/pants", "train/shoes", "val/pants", "val/shoes"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.jpg")
    splits = {split: f"source: folder, path: {tmp_path}/{split}" for split in ("train", "val")}

    def opened(**options):
        given = {split: f"{where}{options.get(split, '')}" for split, where in splits.items()}
        text = "\n".join(f"{split}: {{{where}}}" for split, where in given.items())
        return [load_card(card(tmp_path, text)).open(split) for split in splits]

    with pytest.raises(
        ValueError, match="train: its classes are not those of split 'val'.*only here"
    ):
        opened()
    listed = ", classes: [hat, pants, shoes]"
    with pytest.raises(ValueError, match="no folder for the classes hat"):
        opened(train=listed, val=listed)[1]
    (tmp_path / "val/hat").mkdir()
    train, val = opened(train=listed, val=listed)
    assert [train.label(i) for i in range(3)] == [0, 1, 2] and [val.label(0), val.label(1)] == [
        1,
        2,
    ]
    with pytest.raises(ValueError, match="label 0 is hat, and shoes in 'val'"):
        opened(train=listed, val=", classes: [shoes, pants, hat]")
    (tmp_path / "val/hat").rmdir()
    path = card(tmp_path, f"train: {{{splits['train']}}}\nval: {{source: folder, path: absent}}")
    assert load_card(path).open("train").classes == ["hat", "pants", "shoes"]


def test_a_path_may_be_a_list(tmp_path, monkeypatch):
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            info = tarfile.TarInfo(f"{name}.jpg")
            tar.addfile(info, io.BytesIO())
    source = load_card(card(tmp_path, "train: {source: shards, path: [b.tar, a.tar]}")).open(
        "train"
    )
    assert [source.key(i) for i in range(2)] == ["b", "a"]
    missing = load_card(card(tmp_path, "train: {source: shards, path: [b.tar, none.tar]}"))
    with pytest.raises(MissingData, match="there is nothing at .*none.tar"):
        missing.open("train")


def test_a_cards_classes_can_be_groups_of_another_cards_classes(photos):
    groups = "groups: {of: imagenet1k, classes: [6, [409, 530]]}\n"
    mine = load_card(card(photos, groups + "train: {source: folder, path: photos}"))
    assert mine.groups.of == "imagenet1k" and mine.groups.classes == [[6], [409, 530]]
    assert len(mine.open("train")) == 3
    mine = load_card(card(photos, "train: {source: folder, path: photos}"))
    assert mine.groups is None
    mine = load_card(
        card(photos, groups.replace("6, ", "6, 7, ") + "train: {source: folder, path: photos}")
    )
    with pytest.raises(ValueError, match="groups 3 classes, and the data has 2"):
        mine.open("train")


@pytest.mark.parametrize(
    "groups, message",
    [
        ("[1, 2]", "mapping with of and classes"),
        ("{of: imagenet1k}", "mapping with of and classes"),
        ("{of: imagenet1k, classes: [1], more: 2}", "mapping with of and classes"),
        ("{of: imagenet1kk, classes: [1]}", "no card 'imagenet1kk'. Did you mean 'imagenet1k'"),
        ("{of: imagenet1k, classes: []}", r"classes: \[\] is not a list of numbers"),
        ("{of: imagenet1k, classes: [1, []]}", r"classes\[1\]: \[\]: is no number"),
        ("{of: imagenet1k, classes: [1, -2]}", r"classes\[1\]: \[-2\]: is no number"),
        ("{of: imagenet1k, classes: [1, two]}", r"classes\[1\]: \['two'\]: is no number"),
        ("{of: imagenet1k, classes: [true]}", r"classes\[0\]: \[True\]: is no number"),
        ("{of: imagenet1k, classes: [7, [8, 7]]}", "class 7 is in group 0 and in group 1"),
        ("{of: imagenet1k, classes: [7]}", "there are 1, and 2 classes"),
    ],
)
def test_groups_that_mean_nothing_are_refused(photos, groups, message):
    text = f"groups: {groups}\nclasses: [a, b]\ntrain: {{source: folder, path: photos}}"
    with pytest.raises(ValueError, match=message):
        load_card(card(photos, text))


ANSWERS = "answers: real.json\nval: {source: folder, path: val}"
NUMBERED = "ILSVRC2012_val_0000000"


def test_answers_come_in_the_order_of_the_source_not_of_the_file(photos):
    data = photos / "data"
    put(data / "val", f"n01/{NUMBERED}4.JPEG", f"n02/{NUMBERED}1.JPEG", f"n02/{NUMBERED}3.JPEG")
    (data / "real.json").write_text("[[1], [2, 20], [], [4, 40], [5]]")
    mine = load_card(card(photos, ANSWERS))
    assert mine.answers == data / "real.json"
    assert mine.open_answers("val") == [[4, 40], [1], []]
    keys = [mine.open("val").key(i) for i in range(3)]
    assert [key[-6] for key in keys] == ["4", "1", "3"]
    (data / "val" / f"n02/{NUMBERED}3.JPEG").rename(data / "val" / f"n01/{NUMBERED}2_n00000001.jpg")
    assert mine.open_answers("val") == [[2, 20], [4, 40], [1]]


@pytest.mark.parametrize(
    "name, answers, message",
    [
        ("cat.JPEG", "[[1]]", "cat.JPEG' is no file name with a number at its end"),
        (f"{NUMBERED}3.JPEG", "[[1], [2]]", f"{NUMBERED}3.JPEG' has number 3, .* holds 1 to 2"),
        (f"{NUMBERED}0.JPEG", "[[1], [2]]", "has number 0"),
        (f"{NUMBERED}1.JPEG", "[[1], [2]]", "have the same number, 1"),
        (f"{NUMBERED}2.JPEG", "{", "real.json: .*not readable as JSON"),
        (f"{NUMBERED}2.JPEG", "[1, 2]", "real.json: is no list that holds a list"),
        (f"{NUMBERED}2.JPEG", "[[1], [-1]]", "real.json: is no list that holds a list"),
    ],
)
def test_answers_that_cannot_be_matched_are_refused_by_name(photos, name, answers, message):
    put(photos / "data" / "val", f"n01/{NUMBERED}1.JPEG", f"n02/{name}")
    (photos / "data" / "real.json").write_text(answers)
    with pytest.raises(ValueError, match=f"mine.yaml: val: .*{message}"):
        load_card(card(photos, ANSWERS)).open_answers("val")


def test_answers_that_are_not_there_say_where_they_belong(photos):
    mine = load_card(card(photos, ANSWERS))
    with pytest.raises(MissingData, match="answers: there is nothing at .*data/real.json"):
        mine.open_answers("val")
    mine = load_card(card(photos, "val: {source: folder, path: photos}"))
    with pytest.raises(ValueError, match="val: the card has no answers"):
        mine.open_answers("val")


def test_rows_of_a_shard_are_not_taken_for_the_numbers_of_files(photos):
    (photos / "data" / "real.json").write_text("[[1], [2], [3]]")
    mine = load_card(
        card(photos, "answers: real.json\nval: {source: synthetic, images: 2, size: 16}")
    )
    with pytest.raises(ValueError, match="'000000000' is no file name"):
        mine.open_answers("val")


# Corruptions.

CORRUPTED = """val:
  source: folder
  path: c/{corruption}/{severity}
  corruption: [fog, snow]
  severity: [1, 2]
  images: 1
"""


def test_a_split_of_corruptions_is_opened_one_at_a_time(photos):
    put(photos / "data" / "c", "fog/1/n01/a.JPEG", "fog/2/n01/b.JPEG", "snow/2/n01/c.JPEG")
    mine = load_card(card(photos, CORRUPTED))
    assert mine.corruptions() == {"fog": [1, 2], "snow": [1, 2]}
    assert mine.open("val", corruption="fog", severity=2).key(0) == "n01/b.JPEG"
    assert mine.open("val", corruption="snow", severity=2).key(0) == "n01/c.JPEG"
    assert mine.missing() == {"snow": [1]}
    for options, message in (
        ({}, "no corruption 'None'.*fog, snow"),
        ({"corruption": "fgo", "severity": 1}, "no corruption 'fgo'. Did you mean 'fog'"),
        ({"corruption": "fog", "severity": 3}, "no severity 3. There are: 1, 2"),
        ({"corruption": "fog"}, "no severity None"),
    ):
        with pytest.raises(ValueError, match=f"mine.yaml: val: {message}"):
            mine.open("val", **options)


def test_all_missing_corruptions_are_named_at_once(photos):
    put(photos / "data" / "c", "fog/2/n01/b.JPEG")
    mine = load_card(card(photos, CORRUPTED))
    expected = "val: there is nothing at .*c/snow/1. All that is missing: fog 1; snow 1, 2.$"
    with pytest.raises(MissingData, match=expected):
        mine.open("val", corruption="snow", severity=1)


def test_only_a_split_of_corruptions_is_asked_for_one(photos):
    mine = load_card(card(photos, "val: {source: folder, path: photos}"))
    assert mine.corruptions() == {} and mine.missing() == {}
    with pytest.raises(ValueError, match="val: has no corruptions, so there is no 'fog'"):
        mine.open("val", corruption="fog", severity=1)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("{severity}", "1", "{severity} in the path and a list severity"),
        ("  corruption: [fog, snow]\n", "", "{corruption} in the path and a list corruption"),
        ("[1, 2]", "[]", "{severity} in the path and a list severity"),
        ("[1, 2]", "[1, high]", "severity: .* are not all numbers"),
        ("[fog, snow]", "[fog, off]", "corruption: .* are not all texts"),
    ],
)
def test_corruptions_and_the_path_are_declared_together(photos, old, new, message):
    with pytest.raises(ValueError, match=f"mine.yaml: val.*{message}"):
        load_card(card(photos, CORRUPTED.replace(old, new)))


# The cards of this repository, compared with the lists that their makers published.

SHARED = Path(os.environ.get("PREPRETRAIN_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
META = SHARED / "imagenet_meta"
published = pytest.mark.skipif(
    not META.is_dir(), reason="needs the published lists: PREPRETRAIN_SHARED_DATA is not there"
)


@published
@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_the_groups_of_imagenet_a_and_r_are_the_published_lists(name):
    lines = (META / "timm_info" / f"{name}_indices.txt").read_text().split()
    groups = load_card(name).groups
    assert groups.of == "imagenet1k" and groups.classes == [[int(line)] for line in lines]
    assert len(groups.classes) == 200
    # Sorted folders are sorted synsets, and these have the order of the indices.
    synsets = (META / "timm_info" / f"{name}_synsets.txt").read_text().split()
    assert synsets == sorted(synsets)
    all_synsets = (META / "timm_info" / "imagenet_synsets.txt").read_text().split()
    assert [all_synsets.index(one) for one in synsets] == [row[0] for row in groups.classes]


@published
def test_the_groups_of_objectnet_are_the_published_mapping():
    mapping = json.loads((META / "objectnet" / "folder_to_imagenet_indices.json").read_text())
    mine = load_card("objectnet")
    assert dict(zip(mine.classes, mine.groups.classes)) == mapping
    assert len(mapping) == 113 and mine.splits["val"]["classes"] == mine.classes
    folders = json.loads((META / "objectnet" / "folder_to_objectnet_label.json").read_text())
    assert set(mine.classes) < set(folders) and len(folders) == 313


@published
def test_the_published_real_labels_are_read_and_some_are_empty(photos):
    file = META / "timm_info" / "imagenet_real_labels.json"
    put(photos / "data" / "val", "n01/ILSVRC2012_val_00000002.JPEG", f"n02/{NUMBERED}1.JPEG")
    mine = load_card(card(photos, ANSWERS.replace("real.json", str(file))))
    assert mine.open_answers("val") == [[970, 795], []]


def test_imagenet_c_declares_nineteen_corruptions_in_five_severities():
    corruptions = load_card("imagenet_c").corruptions()
    assert len(corruptions) == 19 and set(map(tuple, corruptions.values())) == {(1, 2, 3, 4, 5)}
    assert {"gaussian_noise", "jpeg_compression", "saturate"} < set(corruptions)


def test_a_flat_imagenet_val_is_refused_by_what_was_expected_and_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    put(tmp_path / "imagenet1k" / "val", f"{NUMBERED}1.JPEG", f"{NUMBERED}2.JPEG")
    expected = (
        f"val: expected 1,000 folders, one a class, and found none, but 2 images.*{NUMBERED}1"
    )
    for name in ("imagenet1k", "imagenet_real"):
        with pytest.raises(ValueError, match=expected):
            load_card(name).open("val")


def test_imagenet_v2_gives_the_folders_number_as_the_label(tmp_path, monkeypatch):
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    for label in range(1000):
        (tmp_path / "imagenet_v2" / str(label)).mkdir(parents=True)
    put(tmp_path / "imagenet_v2", "2/a.jpeg", "10/a.jpeg", "999/a.jpeg")
    source = load_card("imagenet_v2").splits["val"] | {"images": None}
    text = f"val: {json.dumps({k: v for k, v in source.items() if v is not None})}"
    source = load_card(card(tmp_path, text)).open("val")
    assert {source.key(i): source.label(i) for i in range(3)} == {
        "2/a.jpeg": 2,
        "10/a.jpeg": 10,
        "999/a.jpeg": 999,
    }
    with pytest.raises(ValueError, match="declares images: 10000, and the data holds 3"):
        load_card("imagenet_v2").open("val")


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
    vocabulary, source = Vocabulary.load(tags), open_data("demo:train")
    vocabulary.check(source)
    assert len(source) == 60 and min(vocabulary.counts) >= 4
    (kept,) = tags.parent.glob("hashtags.json.rarest-*.npy")
    want = [max(vocabulary.ids(source.hashtags(i)), default=-1) for i in range(60)]
    counts = np.array([*vocabulary.counts, -1])
    assert (counts[np.load(kept)] == counts[want]).all() and f"; {want.count(-1)} images" in counted
    assert "cifar10" in script("datasets/hashtags.py", "cifar10", "--min-count", "4", "--out", "x")


def test_packing_keeps_the_bytes_labels_and_dotted_keys_of_a_folder(tmp_path, script):
    for name in ("cat/a.b.jpg", "cat/a.c.png", "dog/x.jpg", "dog/y.gif", "dog/z.tif", "dog/zz.bmp"):
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    made = script(
        "datasets/make_shards.py", "folder", f"path={tmp_path}/in", "--out", str(tmp_path / "out")
    )
    assert "6 images in 1 shards" in made
    path = card(tmp_path, f"train: {{source: shards, path: {tmp_path}/out}}")
    source = open_data(path)
    assert [source.label(i) for i in range(3)] == [0, 0, 1]
    assert source[0]["image"] == (tmp_path / "in/cat/a.b.jpg").read_bytes()
    kinds = [Image.open(io.BytesIO(source[i]["image"])).format for i in range(6)]
    assert kinds == ["JPEG", "PNG", "JPEG", "GIF", "TIFF", "BMP"]


def test_a_folder_of_photos_gets_its_hashtags_from_its_classes(tmp_path, script, monkeypatch):
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path / "data"))
    for name in ("red fox/a.jpg", "red fox/b.jpg", "owl/c.jpg"):
        file = tmp_path / "data/photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    mine = card(tmp_path, "train: {source: folder, path: photos}")
    counting = ("datasets/hashtags.py", str(mine), "--min-count", "1", "--out", str(tmp_path / "v"))
    assert "make_shards.py folder path=… --class-tags" in script(*counting)
    packing = ["datasets/make_shards.py", "folder", "path=photos", "--class-tags"]
    made = script(*packing, "--out", str(tmp_path / "data/packed"))  # a path as in a card
    assert "3 images in 1 shards, with image, label, hashtags" in made
    card(tmp_path, "train: {source: shards, path: packed}")
    assert "2  red fox" in script(*counting)
    flat = script(
        "datasets/make_shards.py",
        "folder",
        f"path={tmp_path}/data/photos/owl",
        "--class-tags",
        "--out",
        "x",
    )
    assert "--class-tags: the source has no classes" in flat


def test_what_cannot_be_packed_leaves_nothing_behind(tmp_path, script):
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.png", "c.tif"):
        (tmp_path / "in" / name).write_bytes(b"" if name == "b.png" else b"no image")
    made = script(
        "datasets/make_shards.py", "folder", f"path={tmp_path}/in", "--out", str(tmp_path / "out")
    )
    assert (
        "3 of 3 images cannot be packed: a.jpg: no image of a kind that shards hold; b.png" in made
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    wrong = script("datasets/make_shards.py", "synthetic", "images", "--out", str(tmp_path / "o"))
    assert "images: is not key=value" in wrong


def lines(path):
    return [line.rsplit(" ", 1) for line in path.read_text().splitlines()]


def test_the_most_frequent_classes_are_split_at_random_into_lists(tmp_path, script):
    for name, count in {"ape": 3, "bee": 1, "cat": 4, "dog": 3}.items():
        put(tmp_path / "in", *(f"{name}/{i}.jpg" for i in range(count)))
    path = card(tmp_path, f"train: {{source: folder, path: {tmp_path}/in}}")
    call = ("datasets/subset.py", path, "--classes", "3", "--val", "2", "--out")
    printed = script(*call, str(tmp_path / "a"))
    assert "train.txt: 8 of 11 images" in printed and "val.txt: 2 of 11 images" in printed
    train, val = (lines(tmp_path / "a" / f"{part}.txt") for part in ("train", "val"))
    whole = {name for name, _ in train} | {name for name, _ in val}
    assert len(whole) == 10 and not any(name.startswith("bee") for name in whole)
    assert {name[:3]: label for name, label in train + val} == {"ape": "0", "cat": "1", "dog": "2"}
    script(*call, str(tmp_path / "again"))
    script(*call, str(tmp_path / "other"), "--seed", "1")
    text = [(tmp_path / f / "val.txt").read_text() for f in ("a", "again", "other")]
    assert text[0] == text[1] != text[2]
    assert "a: exists already" in script(*call, str(tmp_path / "a"))
    listed = f"{{source: listed, path: {tmp_path}/in, listing: {tmp_path}/a/train.txt}}"
    source = open_data(card(tmp_path, f"train: {listed}"))
    assert [[source.key(i), str(source.label(i))] for i in range(8)] == train


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--classes", "3", "--val", "1"), "--classes 3: there are 2 classes"),
        (("--classes", "2", "--val", "3"), "--val 3: these classes hold 3 images"),
    ],
)
def test_a_subset_that_cannot_be_chosen_leaves_nothing_behind(photos, script, arguments, message):
    path = card(photos, "train: {source: folder, path: photos}")
    out = photos / "out"
    said = script("datasets/subset.py", path, *arguments, "--out", str(out))
    assert message in said and not out.exists()
