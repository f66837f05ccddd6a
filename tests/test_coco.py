"""Sets of images with objects: what a json file of COCO's form may say, and what it may not."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prepretrain import plugin
from prepretrain.data.card import load_card
from prepretrain.data.census import objects as census
from prepretrain.data.dense import masks
from prepretrain.data.dense.boxes import jittered
from prepretrain.data.io import long_json
from prepretrain.data.loader import Stream
from prepretrain.data.random import Random
from prepretrain.data.subset import Subset
from prepretrain.data.transforms import BadImage

_SHARED = os.environ.get("PREPRETRAIN_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data"
COCO = Path(_SHARED) / "coco"
needs_coco = pytest.mark.skipif(
    not COCO.is_dir(), reason="needs photos of COCO: PREPRETRAIN_SHARED_DATA is not there"
)


def content() -> dict:
    """Three images with ids and categories that have gaps, one of them without an object."""
    square = [[2, 2, 10, 2, 10, 10, 2, 10]]
    objects = [
        {"id": 7, "image_id": 30, "category_id": 5, "bbox": [2, 2, 8, 8], "segmentation": square},
        {"id": 3, "image_id": 10, "category_id": 90, "bbox": [0.5, 1, 4.25, 5], "area": 12.5},
        {"id": 9, "image_id": 10, "category_id": 5, "bbox": [1, 2, 3, 4], "iscrowd": 1},
    ]
    runs = {"size": [24, 32], "counts": [0, 24, 744]}
    objects[1]["segmentation"], objects[2]["segmentation"] = square, runs
    return {
        "info": {"said": "ü [{"},
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": 24, "width": 32}
            for number in (30, 10, 20)
        ],
        "annotations": objects,
        "categories": [{"id": 90, "name": "dog"}, {"id": 5, "name": "café"}],
    }


def write(folder: Path, said: dict, **options) -> Path:
    """A folder of images, and the json file in it."""
    for one in said.get("images", []):
        if isinstance(one.get("file_name"), str):
            Image.new("RGB", (32, 24), (9, 9, 9)).save(folder / one["file_name"])
    path = folder / "objects.json"
    path.write_text(json.dumps(said, **options))
    return path


def opened(folder: Path, said: dict, **options):
    return plugin.build(
        "sources", "coco", path=str(folder), listing=str(write(folder, said, **options))
    )


def test_a_sample_holds_the_objects_of_its_image_and_classes_are_the_places_of_sorted_ids(tmp_path):
    source = opened(tmp_path, content())
    assert source.classes == ["café", "dog"] and len(source) == 3
    assert [source.key(i) for i in range(3)] == ["10.png", "20.png", "30.png"]
    first = source[0]
    assert first["boxes"].tolist() == [[0.5, 1, 4.75, 6], [1, 2, 4, 6]]
    assert first["classes"].tolist() == [1, 0] and first["classes"].dtype == np.int64
    assert first["crowds"].tolist() == [False, True]
    assert first["areas"].tolist() == [12.5, 12]
    assert first["image_id"] == 10 and first["size"] == (24, 32)
    assert masks.bitmap(first["masks"][1], 24, 32).sum() == 24
    assert source[1]["boxes"].shape == (0, 4) and source[1]["masks"] == []
    assert type(source).class_names(path="", listing=str(tmp_path / "objects.json")) == [
        "café",
        "dog",
    ]


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_the_order_and_the_spacing_of_a_file_change_no_sample(tmp_path, options):
    said = content()
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    plain = opened(tmp_path / "a", said)
    turned = {key: said[key][::-1] if isinstance(said[key], list) else said[key] for key in said}
    turned = dict(reversed(turned.items()))
    again = opened(tmp_path / "b", turned, **options)
    assert again.classes == plain.classes
    if "indent" not in options:
        assert again.fingerprint == plain.fingerprint
    for one, two in zip(plain, again):
        assert repr(one) == repr(two)


def test_a_changed_mask_changes_the_fingerprint(tmp_path):
    said = content()
    before = opened(tmp_path, said).fingerprint
    said["annotations"][0]["segmentation"][0][0] = 3
    assert opened(tmp_path, said).fingerprint != before


def test_the_classes_that_an_image_shows_are_known_without_it(tmp_path):
    source = opened(tmp_path, content())
    (tmp_path / "10.png").unlink()
    assert [Subset(source, [i]).classes_shown(0) for i in range(3)] == [[1], [], [0]]
    assert [super(type(source), source).classes_shown(i) for i in (1, 2)] == [[], [0]]


def test_only_the_fields_that_are_asked_for_are_read(tmp_path):
    said = content()
    said["annotations"][0]["segmentation"] = [[1, 2, 3]]
    source = opened(tmp_path, said)
    (tmp_path / "30.png").unlink()
    assert source.only(("classes",))[2].keys() == {"key", "classes"}


def test_lvis_says_what_is_not_in_an_image_and_what_may_be(tmp_path):
    said = content()
    for one in said["images"]:
        name = one.pop("file_name")
        one["coco_url"] = f"http://images/train2017/{name}"
        one["neg_category_ids"], one["not_exhaustive_category_ids"] = [90], []
    said["images"][1]["neg_category_ids"] = []
    said["images"][1]["not_exhaustive_category_ids"] = [90, 5]
    said["categories"][0] |= {"frequency": "r", "image_count": 4, "def": "…"}
    (tmp_path / "train2017").mkdir()
    for number in (10, 20, 30):
        Image.new("RGB", (32, 24)).save(tmp_path / f"train2017/{number}.png")
    source = opened(tmp_path, said)
    assert source[0]["negative"].tolist() == [] and source[2]["negative"].tolist() == [1]
    assert source[0]["not_exhaustive"].tolist() == [1, 0] and source[0]["key"] == "train2017/10.png"
    assert source.categories[1] == {"id": 90, "name": "dog", "frequency": "r", "image_count": 4}


def damage(kind: str, index: int, **changes):
    def change(said: dict) -> None:
        said[kind][index] |= changes

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (
            damage("annotations", 0, bbox=[1, 2, float("nan"), 4]),
            "image 30, annotation 7: .*finite",
        ),
        (damage("annotations", 0, bbox=[1, 2, -3, 4]), "image 30, annotation 7: .*is negative"),
        (damage("annotations", 0, bbox=[1, 2, 3]), "image 30, annotation 7: "),
        (damage("annotations", 0, bbox=None), "image 30, annotation 7: TypeError"),
        (damage("annotations", 0, area=-1), "image 30, annotation 7: .*is negative"),
        (damage("annotations", 0, iscrowd=3), "image 30, annotation 7: iscrowd 3"),
        (
            damage("annotations", 0, category_id=6),
            "image 30, annotation 7: its category id 6 is not",
        ),
        (damage("annotations", 0, category_id="5"), "image 30, annotation 7: .*'5' is no whole"),
        (damage("annotations", 0, image_id=31), "image 31, annotation 7: its image id 31 is not"),
        (damage("annotations", 0, id=3), "annotation id 3 stands for several"),
        (damage("annotations", 0, id=1 << 70), "annotation 1180591620717411303424: .*64 bits"),
        (damage("images", 0, id=10), "image id 10 stands for 30.png and for 10.png"),
        (damage("images", 0, file_name="10.png"), "names '10.png' twice"),
        (damage("images", 0, file_name="../10.png"), "'../10.png' lies outside"),
        (damage("images", 0, file_name=7), "image 30: AttributeError"),
        (damage("images", 0, width=0), r"image 30: its height and width are \(24, 0\)"),
        (damage("images", 0, height="24"), "image 30: ValueError: '24' is no whole number"),
        (damage("categories", 0, id=5), "category id 5 stands for several"),
        (damage("images", 0, neg_category_ids=[4]), "image 30: names category 4"),
        (lambda said: said["annotations"][0].pop("bbox"), "annotation 7: lacks 'bbox'"),
        (lambda said: said["annotations"].insert(0, [1]), "the annotation .1."),
        (lambda said: said["images"][0].pop("height"), "image 30: lacks 'height'"),
        (lambda said: said.pop("categories"), "holds no categories"),
        (lambda said: said["annotations"].clear(), "holds no annotations"),
    ],
)
def test_what_is_wrong_in_a_file_is_refused_with_its_name_and_its_ids(tmp_path, change, message):
    said = content()
    change(said)
    if "'../" in message:
        (tmp_path / "in").mkdir()
    folder = tmp_path / "in" if "'../" in message else tmp_path
    with pytest.raises(ValueError, match=f"objects.json: .*{message}"):
        opened(folder, said)


def test_images_that_are_not_there_are_named_all_at_once(tmp_path):
    path = write(tmp_path, content())
    (tmp_path / "10.png").unlink(), (tmp_path / "30.png").unlink()
    with pytest.raises(ValueError, match="objects.json: 2 of its 3 images are not.*10.png, 30.png"):
        plugin.build("sources", "coco", path=str(tmp_path), listing=str(path))


def test_boxes_past_their_image_and_without_area_are_counted_and_kept_for_metrics(tmp_path, caplog):
    said = content()
    said["annotations"][0]["bbox"] = [20, 10, 40, 5]
    said["annotations"][1]["bbox"] = [40, 1, 4, 5]
    said["annotations"][2]["bbox"] = [1, 1, 0, 5]
    source = opened(tmp_path, said)
    assert "2 of 3 objects have no area within their image" in caplog.text
    assert "annotation 3 of image 10" in caplog.text
    assert "1 of 3 objects have boxes that go past" in caplog.text
    assert source[0]["boxes"].tolist() == [[40, 1, 44, 6], [1, 1, 1, 6]]


def test_masks_are_a_field_only_where_every_object_has_one(tmp_path, caplog):
    said = content()
    said["annotations"][0]["segmentation"] = []
    source = opened(tmp_path, said)
    assert "masks" not in source.fields
    assert "has no masks, as 1 of 3 objects have none: image 30, annotation 7" in caplog.text


@pytest.mark.parametrize(
    "mask, message",
    [
        ([[1, 2, 3, 4]], "has 2 points, and needs three"),
        ([[1, 2, 3, 4, 5, 6, 7]], "is no polygon"),
        ([[1, 2, 3, 4, 5, float("inf")]], "far beyond its image, to inf"),
        ([[1, 2, 3, 4, 5, 1e9]], "far beyond its image"),
        ([[1, 2, 3, 4, 5, float("nan")]], "far beyond its image, to nan"),
        ([["a"] * 6], "is no polygon"),
        ("x", "is no mask"),
        ({"size": [32, 24], "counts": [768]}, r"of size \[32, 24\], and the image of \[24, 32\]"),
        ({"size": [24, 32], "counts": [9, 9]}, "count 18 pixels, and 768 are there"),
        ({"size": [24, 32], "counts": [800, -32]}, "run lengths count"),
        ({"size": [24, 32], "counts": "00"}, "count 0 pixels"),
        ({"size": [24, 32], "counts": "\x00"}, "are no run lengths"),
        ({"size": [24, 32]}, "run lengths count None"),
    ],
)
def test_a_mask_that_is_none_is_a_bad_image_that_names_file_image_and_annotation(
    tmp_path, mask, message
):
    said = content()
    said["annotations"][0]["segmentation"] = mask
    source = opened(tmp_path, said)
    source[0]
    with pytest.raises(
        BadImage, match=f"30.png: bad mask: .*objects.json: image 30, annotation 7: .*{message}"
    ):
        source[2]


def test_a_bad_mask_ends_no_run_but_is_counted(tmp_path):
    said = content()
    said["annotations"][0]["segmentation"] = [[1, 2]]
    source = opened(tmp_path, said).only(("image", "masks"))
    stream = Stream(source, lambda sample: {"n": len(sample["masks"])}, batch_size=3, seed=0)
    batch = next(stream.batches())
    assert [bad["cause"] for bad in batch["bad"]] == ["bad mask"]


def test_run_lengths_compressed_or_not_and_polygons_are_the_same_pixels():
    pixels = np.zeros((7, 5), dtype=bool)
    pixels[1:4, 1:5], pixels[6, 0] = True, True
    plain = {"size": [7, 5], "counts": [6, 1, 1, 3, 4, 3, 4, 3, 4, 3, 3]}
    assert np.array_equal(masks.bitmap(plain, 7, 5), pixels)
    coder = pytest.importorskip("faster_coco_eval.core.mask")
    coded = masks.encode(torch.from_numpy(np.stack([pixels, ~pixels])))
    assert isinstance(coded[0]["counts"], str) and json.dumps(coded)
    for one, expected in zip(coded, (pixels, ~pixels)):
        masks.check(one, 7, 5)
        assert np.array_equal(masks.bitmap(one, 7, 5), expected)
        assert np.array_equal(coder.decode(one).astype(bool), expected)
    square = [[1, 1, 5, 1, 5, 4, 1, 4]]
    expected = coder.decode(coder.merge(coder.frPyObjects(square, 7, 5))).astype(bool)
    assert np.array_equal(masks.bitmap(square, 7, 5), expected) and expected.sum() == 12


def test_compressed_run_lengths_of_any_form_are_read_as_cocos_tools_do():
    coder = pytest.importorskip("faster_coco_eval.core.mask")
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.99):
        pixels = np.asfortranarray(rng.random((211, 173)) < share).astype(np.uint8)
        coded = coder.encode(pixels)
        text = coded["counts"]
        coded = {"size": [211, 173], "counts": text if isinstance(text, str) else text.decode()}
        assert np.array_equal(masks.bitmap(coded, 211, 173), pixels.astype(bool))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_a_file_is_read_in_parts_of_any_length(tmp_path, monkeypatch, block):
    monkeypatch.setattr(long_json, "_BLOCK", block)
    said = content() | {"version": 12.5, "none": None, "empty": []}
    for options in ({}, {"indent": 1}, {"ensure_ascii": False}):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(said, **options))
        read = {key: [] for key in said}
        for key, one, start, end in long_json.elements(path):
            read[key].append(one)
            assert json.loads(path.read_bytes()[start:end]) == one
        expected = {k: v if isinstance(v, list) else [v] for k, v in said.items()}
        assert read == expected


_OPENED = """
import resource, sys
from prepretrain.data.sources.coco import Coco
for name in ("small", "large"):
    source = Coco(path=sys.argv[1], listing=f"{sys.argv[1]}/{name}.json")
    assert len(source[99]["masks"]) == 20
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.faults
def test_a_file_of_hundreds_of_megabytes_takes_no_more_memory_than_a_small_one(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "height": 24, "width": 32} for i in range(100)]
    for one in images:
        (tmp_path / one["file_name"]).touch()
    for name, points in (("small", 10), ("large", 20_000)):
        polygon = json.dumps([[2, 2, 10, 2, 10, 10] * points])
        with open(tmp_path / f"{name}.json", "w") as file:
            file.write(f'{{"images": {json.dumps(images)}, "annotations": [')
            for number in range(2000):
                one = f'"image_id": {number // 20}, "category_id": 5, "bbox": [2, 2, 8, 8]'
                end = "," if number < 1999 else '], "categories": [{"id": 5, "name": "cat"}]}'
                file.write(f'{{"id": {number}, {one}, "segmentation": {polygon}}}{end}')
    assert (tmp_path / "large.json").stat().st_size > 800e6
    command = [sys.executable, "-c", _OPENED, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    small, large = (int(kilobytes) * 1024 for kilobytes in said)
    assert large - small < 60e6


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"a": [1, 2', '{"a": [1 2]}', '{"a" 1}', '{"a": [1,]}', '{"a": tru}', "{", "\x00"]
    + ['{"a": ' + "[" * 100_000],
)
def test_what_is_no_mapping_of_json_is_refused_with_the_place(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="a.json: not readable as JSON at byte"):
        list(long_json.elements(path))


def test_two_splits_with_other_categories_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    said = content()
    write(tmp_path, said)
    said["categories"][0]["name"] = "wolf"
    (tmp_path / "val.json").write_text(json.dumps(said))
    card = tmp_path / "card.yaml"
    card.write_text(
        "train: {source: coco, path: '', listing: objects.json}\n"
        "val: {source: coco, path: '', listing: val.json}\n"
    )
    with pytest.raises(ValueError, match="classes are not those of split 'val'.*only here dog"):
        load_card(card).open("train")


@needs_coco
def test_photos_of_coco_are_read_with_all_their_objects():
    pytest.importorskip("faster_coco_eval")
    listing = COCO / "annotations/instances_train.json"
    source = plugin.build("sources", "coco", path=str(COCO / "images"), listing=str(listing))
    said = json.loads(listing.read_text())
    assert len(source) == 123 and source.classes == [one["name"] for one in said["categories"]]
    samples = [source[i] for i in range(len(source))]
    assert sum(len(sample["boxes"]) for sample in samples) == len(said["annotations"])
    for sample in samples:
        for mask, area, crowd in zip(sample["masks"], sample["areas"], sample["crowds"]):
            pixels = masks.bitmap(mask, *sample["size"]).sum()
            assert crowd or abs(pixels - area) <= 0.3 * area + 40


def test_a_census_counts_images_objects_and_classes_and_names_what_is_bad(tmp_path):
    said = content()
    said["annotations"][0]["bbox"] = [40, 2, 8, 8]
    said["annotations"][0]["segmentation"] = [[1, 2]]
    source = opened(tmp_path, said)
    Image.new("RGB", (30, 24)).save(tmp_path / "20.png")
    found = census.count(source, decode=True)
    assert found.objects.tolist() == [1, 1] and found.images_of.tolist() == [1, 1]
    assert found.of_image.tolist() == [1, 0, 1]
    assert (found.crowds, found.without_area) == (1, 1)
    assert found.sizes == {"small": 2, "medium": 0, "large": 0}
    assert [(bad.key, bad.cause) for bad in found.bad] == [
        ("20.png", "other size"),
        ("30.png", "bad mask"),
    ]
    assert [bad.cause for bad in census.count(source).bad] == ["bad mask"]
    with pytest.raises(ValueError, match="have no objects.*datasets/objects.yaml"):
        census.count(source.only(["image"]))


def test_a_sheet_of_ground_truth_shows_each_object_in_its_place(tmp_path):
    pytest.importorskip("faster_coco_eval")
    source = opened(tmp_path, content())
    drawn = census.draw_truth(source[2], source.classes)
    assert drawn.shape == (3, 360, 480)
    red = (drawn[0].int() - drawn[1].int()) > 30  # of class 0, on grey
    rows, columns = red.any(1).nonzero()[:, 0], red.any(0).nonzero()[:, 0]
    edges = [int(edge) / 15 for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
    assert edges == pytest.approx([2, 2, 10, 10], abs=0.3)
    page = census.ground_truth_sheet(source, [0, 1, 2], columns=2)
    assert page.width > 2 * 480 and page.height > 2 * 360


def test_the_check_of_a_card_prints_the_counts_and_writes_a_sheet(tmp_path, monkeypatch, capsys):
    pytest.importorskip("faster_coco_eval")
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    write(tmp_path, content())
    (tmp_path / "card.yaml").write_text("train: {source: coco, path: '', listing: objects.json}\n")
    out = tmp_path / "sheet.png"
    arguments = ["objects.py", str(tmp_path / "card.yaml"), "--decode", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    runpy.run_path(str(Path(__file__).parents[1] / "datasets/objects.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "3 images, 1 without an object\n2 objects, of 2 of 2 classes\n1 crowds" in said
    assert "0 images are bad" in said and out.stat().st_size


VALUES = [None, True, -1, 0, 7, 1 << 70, 1e308, float("nan"), float("-inf"), 0.5, "", "x", "5"]
VALUES += [[], [1], [[]], [["a"]], {}, {"size": 1}, {"size": [24, 32], "counts": [768]}, "\ud800"]


def damaged(said: dict, rng: np.random.Generator) -> bytes:
    """A file of which one value is another, one is gone, or some bytes are others."""
    kind = rng.integers(3)
    if kind < 2:
        one = said
        while isinstance(one, (dict, list)) and one:
            keys = list(one) if isinstance(one, dict) else list(range(len(one)))
            key = keys[rng.integers(len(keys))]
            if not isinstance(one[key], (dict, list)) or rng.random() < 0.3:
                break
            one = one[key]
        if isinstance(one, (dict, list)) and one:
            if kind:
                del one[key]
            else:
                one[key] = VALUES[rng.integers(len(VALUES))]
    content = bytearray(json.dumps(said, ensure_ascii=bool(rng.random() < 0.5)).encode())
    if kind == 2:
        for place in rng.integers(len(content), size=rng.integers(1, 4)):
            content[place] = rng.integers(256)
        content = content[: rng.integers(1, len(content) + 1)] if rng.random() < 0.3 else content
    return bytes(content)


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.faults)])
def test_a_damaged_file_is_refused_by_its_name_or_each_image_is_read_or_bad(tmp_path, count):
    path = write(tmp_path, content())
    coded = pytest.importorskip("faster_coco_eval.core.mask")
    assert coded
    outcomes = {"refused": 0, "read": 0, "bad": 0}
    for number in range(count):
        try:
            path.write_bytes(damaged(content(), np.random.default_rng(number)))
        except UnicodeEncodeError:  # half a pair of UTF-16, which no file holds
            continue
        try:
            source = plugin.build("sources", "coco", path=str(tmp_path), listing=str(path))
        except ValueError as error:
            assert "objects.json" in str(error), (number, error)
            outcomes["refused"] += 1
            continue
        for index in range(len(source)):
            try:
                sample = source[index] | {"random": Random(0, 0, index)}
                jittered(sample, 32)
                outcomes["read"] += 1
            except BadImage:
                outcomes["bad"] += 1
    assert all(outcomes.values())
