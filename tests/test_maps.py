"""Images with a map each: label maps and depth maps, and how image and map are moved together."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prepretrain.data.batch import collate
from prepretrain.data.card import load_card, open_data
from prepretrain.data.census import maps as census
from prepretrain.data.dense.maps import VOID, Fitted, Jitter, Scaled, distorted
from prepretrain.data.random import Random
from prepretrain.data.sources.depth_maps import DepthMaps
from prepretrain.data.sources.label_maps import LabelMaps
from prepretrain.data.sources.synthetic import Synthetic
from prepretrain.data.transforms import BadImage

CLASSES = ["left", "right"]
_SHARED = Path(
    os.environ.get("PREPRETRAIN_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data"
)


def saved(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path)


def furnish(folder: Path, count: int = 3, size: tuple[int, int] = (31, 47)) -> Path:
    """Pictures that are dark at the left and bright at the right, and their maps: 1, 2, and 0 above."""
    for i in range(count):
        height, width = size[0] + i, size[1] - i
        right = np.arange(width) >= width // 2
        picture = np.where(right, 200, 30)[None, :, None].repeat(height, 0).repeat(3, 2)
        labels = np.where(right, 2, 1)[None].repeat(height, 0)
        labels[:4] = 0
        saved(folder / f"images/{i}.png", picture.astype("uint8"))
        saved(folder / f"maps/{i}.png", labels.astype("uint8"))
    return folder


def opened(folder: Path, **options) -> LabelMaps:
    given = {"classes": CLASSES, "offset": 1, "void": (0,), **options}
    return LabelMaps(path=str(folder / "images"), maps=str(folder / "maps"), **given)


def seen(source, transform, index: int = 0, seed: int = 0) -> dict:
    return transform(source[index] | {"random": Random(seed, 0, index)})


def test_a_map_says_the_class_of_each_pixel_by_the_cards_numbers(tmp_path):
    source = opened(furnish(tmp_path))
    labels = source[0]["label_map"]
    assert source.fields == ("image", "label_map") and labels.dtype == np.uint8
    assert (labels[:4] == VOID).all() and labels[4:, 0].max() == 0 and labels[4:, -1].min() == 1
    swapped = opened(tmp_path, offset=0, ids=(2, 1))
    assert (swapped[0]["label_map"][4:] == 1 - labels[4:]).all()
    assert swapped.fingerprint != source.fingerprint
    assert set(source.only(["label_map"])[0]) == {"key", "label_map"}


def test_images_and_maps_are_paired_by_name_by_endings_or_by_a_list(tmp_path):
    furnish(tmp_path)
    Path(tmp_path, "images/1.png").rename(tmp_path / "images/b_photo.png")
    Path(tmp_path, "maps/1.png").rename(tmp_path / "maps/b_label.png")
    (tmp_path / "list.txt").write_text("images/0.png maps/0.png 518.8\nimages/2.png maps/2.png 1\n")
    named = opened(tmp_path, endings=("_photo.png", "_label.png"))
    assert len(named) == 1 and named.key(0) == "b_photo.png"
    given = {"classes": CLASSES, "offset": 1, "void": (0,), "listing": str(tmp_path / "list.txt")}
    listed = LabelMaps(path=str(tmp_path), maps=str(tmp_path), **given)
    assert [listed.key(i) for i in range(2)] == ["images/0.png", "images/2.png"]
    (tmp_path / "list.txt").write_text("2\n0\n")
    bare = opened(tmp_path, listing=given["listing"], endings=(".png", ".png"))
    assert bare.key(0) == "2.png" and bare[0]["label_map"].shape == (33, 45)


def test_an_image_without_its_map_and_a_map_without_its_image_are_named(tmp_path):
    furnish(tmp_path)
    Path(tmp_path, "maps/1.png").rename(tmp_path / "maps/7.png")
    with pytest.raises(ValueError, match="images: 1 images have no map: 1.png"):
        opened(tmp_path)
    Path(tmp_path, "images/1.png").unlink()
    with pytest.raises(ValueError, match="maps: 1 maps have no image: 7.png"):
        opened(tmp_path)
    (tmp_path / "list.txt").write_text("0.png 0.png\n2.png 9.png\n")
    with pytest.raises(ValueError, match="1 of 2 images have no map; there is no 9.png"):
        opened(tmp_path, listing=str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("0.png 0.png\n2.png None 7.2\n")
    with pytest.raises(ValueError, match=r"1 images have no map \(None\): 2.png"):
        opened(tmp_path, listing=str(tmp_path / "list.txt"))


SIZE = (31, 47)


@pytest.mark.parametrize(
    "pixels, said",
    [
        (np.ones((31, 40), "uint8"), r"1.png: is 40 x 31 pixels, and its image 46 x 32"),
        (np.ones((32, 46, 3), "uint8"), "1.png: has 3 channels. A map has one number"),
        (np.ones((32, 46), "uint16"), "1.png: has numbers of uint16, and a label map has 8 bits"),
        (np.full((32, 46), 7, "uint8"), r"1.png: holds 7 \(1,472 pixels\), which stand for none"),
        (np.zeros((32, 46), "uint8"), "1.png: has no pixel of a class"),
    ],
)
def test_a_label_map_that_cannot_be_used_is_named_with_what_is_wrong(tmp_path, pixels, said):
    saved(furnish(tmp_path) / "maps/1.png", pixels)
    source = opened(tmp_path)
    with pytest.raises(BadImage, match=said) as error:
        source[1]
    assert error.value.key == "1.png"
    with pytest.raises(ValueError, match=said):
        source.check_maps()


def test_a_map_with_a_palette_must_have_the_cards_colours(tmp_path):
    furnish(tmp_path)
    picture = Image.open(tmp_path / "maps/0.png")
    picture.putpalette([9, 9, 9, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "maps/0.png")
    assert (opened(tmp_path)[0]["label_map"][4:] < 2).all()
    assert opened(tmp_path, palette=[[255, 0, 0], [0, 255, 0]])[0]
    with pytest.raises(
        BadImage, match=r"shows 2 as \[0, 255, 0\], and the card says \[0, 0, 255\]"
    ):
        opened(tmp_path, palette=[[255, 0, 0], [0, 0, 255]])[0]


def test_numbers_that_do_not_fit_are_refused_when_a_card_is_opened(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    split = "train: {source: label_maps, path: images, maps: maps}\n"
    for line, said in [
        ("classes: [a, b]\nvalues: {ids: [1]}", "must be 2 different numbers"),
        (
            "classes: [a, b]\nvalues: {offset: 1, void: [2]}",
            "void: 2 is the number of a class, too",
        ),
        ("classes: [a, b]\nvalues: {offset: 255}", "2 classes from 255 on do not fit"),
        ("classes: [a, b]\nvalues: {palette: [[1, 2, 3]]}", "palette: must be 2 colours"),
        ("classes: [a, b]\nvalues: {vold: [0]}", "vold: unknown option. Did you mean source.void"),
        ("classes: [a, b]\nvalues: [0]", "values: .* must be a mapping"),
        ("values: {void: [0]}", "classes: are missing; label maps hold numbers"),
    ]:
        (tmp_path / "mine.yaml").write_text(f"{line}\n{split}")
        with pytest.raises(ValueError, match=said):
            open_data(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text(
        f"classes: [a, b]\nvalues: {{offset: 1, void: [0]}}\n{split}"
    )
    assert len(open_data(str(tmp_path / "mine.yaml"))) == 3


@pytest.mark.parametrize("card", ["ade20k", "cityscapes", "camvid", "voc", "pascal_context"])
def test_the_cards_that_we_ship_say_what_the_numbers_of_their_maps_mean(card, tmp_path):
    made = load_card(card)
    options = {k: v for k, v in made.values.items() if k != "endings"}
    source = opened(furnish(tmp_path), classes=made.classes, **{"offset": 0, "void": (), **options})
    labels = source.table[source.table < VOID]
    assert sorted(labels[labels >= 0]) == list(range(len(made.classes)))
    assert not source.palette or len(source.palette) == len(made.classes)


def test_camvid_is_as_its_card_says(monkeypatch):
    if not (_SHARED / "camvid").exists():
        pytest.skip(f"{_SHARED}/camvid is not there: set PREPRETRAIN_SHARED_DATA")
    monkeypatch.setenv("PREPRETRAIN_DATA", str(_SHARED))
    source = open_data("camvid:test")
    source.check_maps()
    assert len(source) == 233 and source[0]["label_map"].shape == (360, 480)


def test_image_and_map_move_together_whatever_the_size(tmp_path):
    source = opened(furnish(tmp_path))
    for canvas in [(16, 24), (33, 21), (96, 96)]:  # the last is larger than any image
        jitter = Jitter("label_map", canvas, short=32, scale=(0.5, 2.0))
        shown = set()
        for seed in range(12):
            row = seen(source, jitter, seed % 3, seed)
            labels, (height, width) = row["label_map"], row["size"].tolist()
            inside = labels[:height, :width]
            assert row["image"].shape == (3, *canvas) and labels.shape == canvas
            assert (labels[height:] == VOID).all() and (labels[:, width:] == VOID).all()
            assert not row["image"][:, height:].any() and not row["image"][:, :, width:].any()
            bright = row["image"][0, :height, :width] > 115
            wrong = (bright != (inside == 1)) & (inside != VOID)
            assert wrong.float().mean() < 0.07  # the edge is blurred
            shown |= set(inside.unique().tolist())
        assert {0, 1} <= shown
    again = seen(source, jitter, 2, 5)
    assert all(
        torch.equal(value, seen(source, jitter, 2, 5)[name]) for name, value in again.items()
    )


def test_a_part_is_drawn_again_while_one_class_has_most_of_it(tmp_path):
    source = opened(furnish(tmp_path, size=(40, 80)))
    free, bound = (
        Jitter("label_map", (16, 16), short=40, scale=(1, 1), most=most) for most in (1.0, 0.75)
    )

    def alike(jitter) -> int:
        rows = [seen(source, jitter, seed=seed)["label_map"] for seed in range(30)]
        shares = [torch.bincount(r[r != VOID].flatten(), minlength=2).float() for r in rows]
        return sum(bool((s.max() / s.sum()) > 0.75) for s in shares)

    assert alike(free) > 15 > alike(bound)


def test_colours_are_distorted_by_the_samples_own_key_and_the_map_is_not(tmp_path):
    source = opened(furnish(tmp_path))
    plain, other = (
        Jitter("label_map", (96, 96), short=32, scale=(1, 1), distort=way) for way in (False, True)
    )
    differing = 0
    for seed in range(6):
        one, two = seen(source, plain, seed=seed), seen(source, other, seed=seed)
        assert torch.equal(one["label_map"], two["label_map"])
        assert not two["image"][:, int(two["size"][0]) :].any()
        differing += not torch.equal(one["image"], two["image"])
    assert differing >= 4
    red = torch.tensor([250, 10, 10], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    found = [distorted(red, np.random.default_rng(seed)).float() for seed in range(40)]
    assert all(one.shape == (3, 8, 8) and (one[0] > one[1:].max(0).values).all() for one in found)
    assert len({tuple(one[:, 0, 0].tolist()) for one in found}) > 20


def test_a_test_sees_the_whole_picture_at_each_scale_and_the_map_as_it_is(tmp_path):
    source = opened(furnish(tmp_path))
    scaled = Scaled("label_map", short=16, canvas=(32, 32), scales=(1.0, 2.0))
    batch = collate([seen(source, scaled, i) for i in range(2)])
    assert batch["size_0"].tolist() == [[16, 24], [16, 23]]
    assert batch["size_1"].tolist() == [[32, 49], [32, 46]]
    assert batch["label_map"].shape == (2, 32, 47) and batch["original"][1].tolist() == [32, 46]
    assert (batch["label_map"][0, 31] == VOID).all()
    whole = seen(source, Fitted("label_map", (32, 32)))
    assert whole["size"].tolist() == [21, 32] and whole["label_map"].shape == (32, 32)


def depths(folder: Path, pixels: np.ndarray, ending: str = "png", **options) -> DepthMaps:
    saved(folder / "images/0.png", np.zeros((*pixels.shape, 3), "uint8"))
    saved(folder / f"depths/0.{ending}", pixels)
    given = {"path": str(folder / "images"), "maps": str(folder / "depths"), "range": (0.5, 10.0)}
    return DepthMaps(**{**given, **options})


def test_a_depth_map_is_read_in_metres_and_zero_is_not_known(tmp_path):
    pixels = np.array([[1000, 2500, 0], [9000, 0, 500]], "uint16")
    found = depths(tmp_path / "png", pixels, scale=0.001)[0]["depth"]
    assert found.dtype == np.float32 and np.allclose(found, [[1, 2.5, 0], [9, 0, 0.5]])
    metres = pixels.astype("float32") / 1000
    assert np.allclose(depths(tmp_path / "npy", metres, "npy")[0]["depth"], found)
    assert np.allclose(depths(tmp_path / "tif", metres, "tif")[0]["depth"], found)
    jitter = Jitter("depth", (4, 4), short=2, scale=(1, 1))
    row = seen(depths(tmp_path / "png", pixels, scale=0.001), jitter)
    assert row["depth"].shape == (4, 4) and not row["depth"][2:].any()


@pytest.mark.parametrize(
    "pixels, ending, said",
    [
        (np.zeros((2, 3), "uint16"), "png", "no depth is known"),
        (np.array([[1.0, np.nan, 2.0]], "float32"), "npy", "1 of 3 depths are NaN or infinite"),
        (
            np.array([[1200, 9000]], "uint16"),
            "png",
            "1200 to 9000 m, .* in millimetres it is 0.001",
        ),
        (np.array([[1.0, -2.0]], "float32"), "npy", "depths are -2 to 1 m, and the card says 0.5"),
    ],
)
def test_a_depth_map_that_cannot_be_is_named_with_what_is_wrong(tmp_path, pixels, ending, said):
    with pytest.raises(BadImage, match=said):
        depths(tmp_path, pixels, ending)[0]


def test_all_maps_of_a_card_are_counted_drawn_and_the_bad_ones_named(tmp_path, monkeypatch):
    furnish(tmp_path, 4)
    saved(tmp_path / "maps/2.png", np.full((33, 45), 7, "uint8"))
    split = f"train: {{source: label_maps, path: {tmp_path}/images, maps: {tmp_path}/maps}}"
    said = f"classes: [left, right]\nvalues: {{offset: 1, void: [0]}}\n{split}\n"
    (tmp_path / "mine.yaml").write_text(said)
    card = load_card(tmp_path / "mine.yaml")
    source = card.open("train")
    found = census.count(source)
    assert [bad.key for bad in found.bad] == ["2.png"] and found.images_of[0] == 3
    assert found.pixels[VOID] == 4 * (47 + 46 + 44)
    lines = list(found.lines(source.classes))
    assert "(void)" in lines[-1] and "in       3 images" in lines[0]
    sheet = census.draw(card, source, [0, 3])
    assert sheet.width > 2 * 320 and sheet.height > 2 * 200
    pixels = np.array([[1000, 2500, 0], [9000, 0, 500]], "uint16")
    deep = census.count(depths(tmp_path / "deep", pixels, scale=0.001))
    assert next(deep.lines(None)) == "depths of 0.5 to 9 m; 66.7% of the pixels are known"
    with pytest.raises(ValueError, match="have no maps"):
        census.count(Synthetic(images=2, size=32))
