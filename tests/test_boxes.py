"""Image, boxes and masks that move together."""

import io
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors import safe_open

from prepretrain.data.batch import collate
from prepretrain.data.dense import boxes, masks
from prepretrain.data.random import Random
from prepretrain.data.transforms import BadImage

GOLDEN = Path(os.environ.get("PREPRETRAIN_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN /= "roi_heads_reference.safetensors"
SIZE = (60, 80)
DRAWN = [(10, 6, 34, 30), (44, 20, 72, 52)]  # boxes, filled in red and in blue
COLOURS = [(255, 0, 0), (0, 0, 255)]


def picture(size=SIZE) -> Image.Image:
    image = Image.new("RGB", size[::-1], (0, 90, 0))
    draw = ImageDraw.Draw(image)
    for (left, top, right, bottom), colour in zip(DRAWN, COLOURS):
        draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
    return image


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def polygon(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


def runs(box):
    """The run lengths of a box in a picture of SIZE."""
    mask = np.zeros(SIZE, dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
    return {"size": list(SIZE), "counts": np.diff([0, *edges, flat.size]).tolist()}


def sample(index=0, *, kind="boxes", **changes) -> dict:
    """Two drawn objects and a crowd around all."""
    one = {
        "key": str(index),
        "image": encoded(picture()),
        "size": SIZE,
        "boxes": np.array([*DRAWN, (0, 0, 80, 60)], dtype=np.float64),
        "classes": np.array([4, 7, 4]),
        "crowds": np.array([False, False, True]),
        "random": Random(3, 0, index),
    }
    if kind == "polygons":
        one["masks"] = [polygon(*box) for box in DRAWN] + [runs((0, 0, 80, 60))]
    elif kind == "runs":
        one["masks"] = [runs(box) for box in DRAWN] + [runs((0, 0, 80, 60))]
    return one | changes


def found(image: torch.Tensor, colour: tuple) -> torch.Tensor | None:
    """The box around the pixels of a colour, which lies within half a pixel of where its own edge is."""
    near = (image.int() - torch.tensor(colour)[:, None, None]).abs().sum(0) < 200
    rows, columns = near.any(1).nonzero()[:, 0], near.any(0).nonzero()[:, 0]
    if not len(rows):
        return None
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def needs(kind: str) -> None:
    if kind == "polygons":
        pytest.importorskip("faster_coco_eval")


@pytest.mark.parametrize("kind", ["boxes", "polygons", "runs"])
@pytest.mark.parametrize("canvas", [96, (64, 160)])
def test_pixels_boxes_and_masks_move_together(kind, canvas):
    needs(kind)
    seen = []
    for index in range(40):
        row = boxes.jittered(sample(index, kind=kind), canvas)
        height, width = row["size"].tolist()
        assert (row["image"][:, height:] == 0).all() and (row["image"][:, :, width:] == 0).all()
        classes = row["classes"].tensor.tolist()
        for label, colour in zip((4, 7), COLOURS):
            there = found(row["image"], colour)
            if label not in classes:
                assert there is None or (there[2:] - there[:2]).min() <= 1
                continue
            place = classes.index(label)
            box = row["boxes"].tensor[place]
            if (box[2:] - box[:2]).min() < 3:
                continue  # nothing of its own colour is left
            assert (there - box).abs().max() <= 1.01, (index, there, box)
            seen.append(label)
            if kind != "boxes":
                bits = torch.from_numpy(np.unpackbits(row["bits"].tensor[place].numpy(), axis=1))
                whole = torch.zeros_like(bits)
                left, top, right, bottom = box.int().tolist()
                whole[top:bottom, left:right] = 1
                assert torch.equal(bits, whole)
    assert len(seen) > 40


def test_at_scale_one_the_picture_is_unchanged_and_mirroring_twice_is_nothing():
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    plain = boxes.jittered_by(SIZE, SIZE, 1.0, 0.3)
    assert plain == boxes.fit(SIZE, SIZE)
    assert torch.equal(plain.image(pixels), pixels)
    corners = np.array(DRAWN, dtype=np.float64)
    assert np.array_equal(plain.boxes(corners), corners)
    mirror = boxes.jittered_by(SIZE, SIZE, 1.0, 0.3, mirrored=True)
    assert torch.equal(mirror.image(pixels), pixels.flip(-1))
    assert mirror.boxes(corners)[0].tolist() == [46, 6, 70, 30]
    assert np.array_equal(mirror.boxes(mirror.boxes(corners)), corners)
    flat = runs(DRAWN[0])
    assert np.array_equal(mirror.mask(flat)[0], plain.mask(flat)[0][:, ::-1])


def test_a_polygon_has_the_pixels_that_it_has_on_the_whole_canvas():
    pytest.importorskip("faster_coco_eval")
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = rng.uniform(-20, 100, (2, 5, 2)) * rng.uniform(0.1, 1)
        place = boxes.jitter(SIZE, (64, 72), rng, (0.1, 2.0))
        mask, top, left = place.mask(points.reshape(2, 10).tolist())
        drawn = np.zeros(place.extent, dtype=bool)
        drawn[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        moved = np.stack(place._points(points[..., 0], points[..., 1]), axis=-1)
        assert np.array_equal(drawn, masks.bitmap(moved.reshape(2, 10).tolist(), *place.extent))


def test_a_row_is_a_function_of_the_samples_key_alone():
    first, again, other = (boxes.jittered(sample(i), 96) for i in (1, 1, 2))
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["boxes"].tensor, again["boxes"].tensor)
    assert not torch.equal(first["image"], other["image"])


def test_half_of_the_pictures_are_mirrored_and_scales_are_spread_evenly():
    places = [boxes.jitter(SIZE, 64, Random(0, 0, i)("jitter"), (0.1, 2.0)) for i in range(2000)]
    assert 900 < sum(place.mirrored for place in places) < 1100
    widths = np.array([place.scaled[1] for place in places]) / 64
    assert abs(widths.mean() - 1.05) < 0.03 and widths.min() < 0.12 and widths.max() > 1.97
    cut = [place for place in places if place.corner != (0, 0)]
    assert cut and all(place.extent[1] == 64 for place in cut)


def test_crowds_and_what_is_not_seen_are_left_out_and_an_image_without_objects_stays():
    far = np.array([(90, 0, 99, 9), (5, 5, 5, 20), (70, 50, 200, 200), (1, 1, 9, 9)], float)
    one = sample(boxes=far, classes=np.arange(4), crowds=np.array([0, 0, 0, 1], bool))
    row = boxes.jittered(one, SIZE, scale=(1.0, 1.0))
    assert row["classes"].tensor.tolist() == [2]
    assert row["boxes"].tensor[0].tolist() in ([70, 50, 80, 60], [0, 50, 10, 60])
    none = sample(boxes=far[:0], classes=np.arange(0), crowds=np.zeros(0, bool), masks=[])
    row = boxes.jittered(none, 64)
    assert row["boxes"].tensor.shape == (0, 4) and row["bits"].tensor.shape == (0, 64, 8)


@pytest.mark.parametrize("kind", ["boxes", "runs"])
def test_a_batch_of_images_with_none_and_with_many_objects_is_padded(kind):
    many = sample(1, kind=kind)
    for name in ("boxes", "classes", "crowds"):
        many[name] = np.concatenate([many[name][:1]] * 200)
    if kind == "runs":
        many["masks"] = many["masks"][:1] * 200
    none = sample(2, kind=kind)
    none |= {
        name: none[name][:0] for name in ("boxes", "classes", "crowds", "masks") if name in none
    }
    batch = collate([boxes.jittered(one, 64, scale=(1, 1)) for one in (many, none)])
    assert batch["boxes"].shape == (2, 200, 4) and batch["size"].tolist() == [[48, 64]] * 2
    assert (batch["classes"][0] == 4).all() and (batch["classes"][1] == -1).all()
    if kind == "runs":
        assert batch["bits"].shape == (2, 200, 64, 8) and not batch["bits"][1].any()


def test_a_test_sees_the_whole_picture_changed_before_or_not():
    place = partial(boxes.fit, canvas=128)
    row = boxes.seen_whole(sample(), place)
    row["image"] = row["image"].tensor
    assert row["size"].tolist() == [96, 128] and row["original"].tolist() == [60, 80]
    placement = boxes.fit(SIZE, 128)
    moved = torch.from_numpy(placement.boxes(np.array(DRAWN, dtype=np.float64)))
    assert (moved - found(row["image"], COLOURS[0])).abs().amax(1).min() <= 1
    known = boxes.fitted(sample(), 128)
    assert torch.equal(known["image"], row["image"]) and torch.equal(known["size"], row["size"])
    assert torch.equal(known["boxes"].tensor, moved.float())
    changed = boxes.seen_whole(sample(), place, lambda image, random: 255 - image)["image"].tensor
    assert torch.equal(changed[:, :96], 255 - row["image"][:, :96]) and not changed[:, 96:].any()


def test_a_short_and_a_long_side_are_kept_on_a_canvas_of_whole_cells():
    for size, scaled, canvas in [
        ((60, 80), (800, 1067), (800, 1088)),
        ((90, 48), (1333, 711), (1344, 736)),
        ((1, 5000), (1, 1333), (32, 1344)),
    ]:
        placement = boxes.fit_sides(size, (800, 1333), 32)
        assert placement.scaled == placement.extent == scaled and placement.canvas == canvas


def test_a_line_of_pixels_stays_one():
    for size in ((1, 5000), (5000, 1)):
        assert min(boxes.jittered_by(size, 64, 0.1, 0.5).extent) == 1
        assert min(boxes.fit(size, 64).extent) == 1


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_photo_that_exif_turns_lies_as_its_annotations_were_drawn(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = picture()
    data = encoded(stored, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = torch.from_numpy(np.array(shown)).permute(2, 0, 1)
    assert torch.equal(boxes.upright(data, shown.size[::-1]), expected)
    if turn > 4:  # labelled as it is stored
        unturned = torch.from_numpy(np.array(stored)).permute(2, 0, 1)
        assert torch.equal(boxes.upright(data, SIZE), unturned)


def test_a_photo_of_another_size_than_its_annotations_say_is_a_bad_image():
    with pytest.raises(
        BadImage, match="other size: 80 x 60 pixels, and its annotations are of 80 x 61"
    ):
        boxes.jittered(sample(size=(61, 80)), 64)
    with pytest.raises(BadImage, match="unreadable"):
        boxes.seen_whole(sample(image=b"no image"), partial(boxes.fit, canvas=64))


@pytest.mark.skipif(not GOLDEN.is_file(), reason="no numbers of detectron2 in PREPRETRAIN_GOLDEN")
def test_jitter_and_resizing_for_a_test_are_detectron2s():
    with safe_open(GOLDEN, "np") as file:
        said = json.loads(file.metadata()["jitter"])
    for case in said["cases"]:
        size = (case["height"], case["width"])
        placement = boxes.jittered_by(size, 1024, case["scale"], case["u"])
        assert list(placement.scaled) == case["resized"]
        assert list(placement.corner) == case["crop_xy"][::-1]
        assert list(placement.extent) == case["out"]
        height, width = case["out"]
        expected = np.array(case["box_out_unclipped"]).clip(0, [width, height] * 2)
        assert np.allclose(placement.boxes(np.array([case["box_in"]])), expected, atol=1e-9)
    for case in said["test_resize"]:
        size = (case["height"], case["width"])
        assert list(boxes.fit(size, 1024).scaled) == case["shape_1024"]
        assert list(boxes.fit(size, 1280).scaled) == case["shape_1280"]
