"""Copies of images: found by hashes whatever the number of images, and which of them is kept."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps
from test_curation import column, recipe, write_shard, write_yaml

from prepretrain.curation import commands, copies
from prepretrain.curation.engine import Machines
from prepretrain.curation.hashes import COLOURS, SCHEMA, WORDS, distance, hashes
from prepretrain.curation.stages import duplicates

duckdb = pytest.importorskip("duckdb", reason="the extra `data` is not installed")
HERE = Machines()


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture of its own for each seed, with details."""
    coarse = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **how) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def hashed(image: Image.Image) -> dict[str, int]:
    return hashes(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def bits(one: dict[str, int], other: dict[str, int], way: str = "") -> int:
    """How many bits of the fine hash differ; way: "_flipped" looks at the other's mirror image."""
    of = lambda found, end: np.array([found[f"{word}{end}"] for word in WORDS], np.uint64)
    return int(distance(of(one, ""), of(other, way)))


def test_a_hash_survives_scaling_and_encoding_and_tells_pictures_apart():
    image = picture(1)
    again = Image.open(io.BytesIO(encoded(image, quality=40)))
    smaller = image.resize((80, 60), Image.Resampling.BICUBIC)
    found = hashed(image)
    assert list(found) == SCHEMA.names
    assert bits(found, hashed(again)) <= 31 and bits(found, hashed(smaller)) <= 31
    assert bits(found, hashed(picture(2))) > 60
    assert found["thumb"] == hashed(Image.open(io.BytesIO(encoded(image, "PNG"))))["thumb"]
    assert found["thumb"] != hashed(again)["thumb"]


def test_the_hash_of_a_mirror_image_is_known_without_mirroring():
    image = picture(3)
    mirrored = hashed(ImageOps.mirror(image))
    assert bits(mirrored, hashed(image), "_flipped") <= 4
    assert bits(mirrored, hashed(image)) > 60


@pytest.mark.parametrize("coarse", [0, 3, 8])
def test_every_pair_within_the_distance_is_found_once_and_no_other(coarse):
    random = np.random.default_rng(5)
    words = random.integers(0, 2**64, (40, 5), dtype=np.uint64).repeat(10, axis=0)
    for _ in range(4):  # up to four bits of each word
        words ^= np.uint64(1) << random.integers(0, 64, words.shape, dtype=np.uint64)
    table = pa.table(
        {"number": np.arange(400), **dict(zip(("coarse", *WORDS), words.T, strict=True))}
        | {name: np.zeros(400, np.uint64) for name in COLOURS}
    )
    database = duckdb.connect()
    database.register("one", table)
    database.register("other", table.append_column("flipped", pa.array([False] * 400)))
    found = copies.near_pairs(
        database, "one", "other", copies.Alike(coarse=coarse, fine=20), ordered=True
    )
    far = distance(words[:, None, :1], words[None, :, :1])
    fine = distance(words[:, None, 1:], words[None, :, 1:])
    expected = np.argwhere(np.triu((far <= coarse) & (fine <= 20), 1))
    assert np.array_equal(np.stack([found["one"], found["other"]], 1), expected)
    assert np.array_equal(found["distance"], fine[tuple(expected.T)])


def test_the_same_picture_in_another_colour_is_no_near_copy():
    image = picture(4)
    red, green, blue = image.split()
    recoloured = Image.merge("RGB", (green, red, blue))
    hue = lambda found: (
        np.array([found[name] for name in COLOURS], "<u8").view(np.uint8).astype(int)
    )
    of = lambda one: np.abs(hue(hashed(image)) - hue(hashed(one))).max()
    assert of(recoloured) > 8 >= of(Image.open(io.BytesIO(encoded(image, quality=30))))
    assert of(ImageOps.mirror(image)) <= 1


@pytest.mark.parametrize("distance, images", [(0, 10), (4, 10**9), (8, 10**6), (16, 1000)])
def test_masks_are_all_choices_of_some_blocks_of_bits(distance, images):
    masks = copies.masks(distance, images)
    assert len(set(masks)) == len(masks)
    random = np.random.default_rng(0)
    for _ in range(200):
        changed = sum(1 << int(bit) for bit in random.choice(64, distance, replace=False))
        assert any(mask & changed == 0 for mask in masks)


def test_what_is_dropped_is_like_something_that_is_kept():
    chain = np.arange(5) * 10  # each is like the next alone
    pairs = copies.Pairs(
        one=chain[:-1],
        other=chain[1:],
        distance=np.array([3, 1, 3, 1]),
        flipped=np.zeros(4, bool),
    )
    dropped_by = pairs.keep(np.arange(5))
    assert (dropped_by >= 0).tolist() == [False, True, False, True, False]
    assert dropped_by[[1, 3]].tolist() == [0, 2]
    assert pairs.groups().tolist() == [0] * 5


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """(folder of a card, the card): two shards with a file twice, the same pixels in another file, a
    smaller copy, a mirrored one, and a file that is no picture."""
    folder, image = tmp_path_factory.mktemp("copies"), picture(11)
    file = encoded(image, quality=90)
    remarked = encoded(image, quality=90, comment=b"another file")
    small = encoded(image.resize((80, 60), Image.Resampling.BICUBIC), quality=60)
    mirrored = encoded(ImageOps.mirror(image.resize((120, 90))), quality=80)
    shards = [
        [small, encoded(picture(12)), b"no picture", file],
        [remarked, mirrored, file, encoded(picture(13)), b"no picture"],
    ]
    for number, files in enumerate(shards):
        write_shard(folder / f"shards/{number:05d}.tar", [{"jpg": data} for data in files])
    split = {"source": "shards", "path": str(folder / "shards")}
    return folder, write_yaml(folder / "card.yaml", {"train": split})


def test_copies_are_dropped_in_favour_of_the_largest_picture(curated):
    folder, card = curated
    out, stages = folder / "out", {"meta": {}, "look": {}, "duplicates": {}}
    commands.run(card, recipe(folder, **stages), out, None, HERE)
    assert column(out, "duplicates", "reason") == [
        *("near-copy", None, None, None),
        *("same pixels", "mirrored near-copy", "same file", None, "same file"),
    ]
    group = column(out, "duplicates", "group")
    assert group == [0, None, 2, 0, 0, 0, 0, None, 2]
    kept = list(zip(column(out, "duplicates", "kept_shard"), column(out, "duplicates", "kept_row")))
    nobody = (None, None)
    assert kept == [(0, 3), *[nobody] * 3, (0, 3), (0, 3), (0, 3), nobody, (0, 2)]
    assert column(out, "duplicates", "kept")[0] == "0003"
    assert column(out, "duplicates", "distance")[4] == 0


def test_mirror_images_are_told_apart_where_that_is_asked_for(curated):
    folder, card = curated
    stages = {"meta": {}, "look": {}, "duplicates": {"mirrored": False}}
    commands.run(card, recipe(folder, **stages), folder / "turned", None, HERE)
    assert column(folder / "turned", "duplicates", "reason")[5] is None


def test_what_an_earlier_stage_drops_is_kept_in_favour_of_nothing(curated):
    folder, card = curated
    rules = {"meta.bytes": {"below": len(encoded(picture(11), quality=90)) - 1}}
    stages = {
        "meta": {},
        "look": {},
        "filter": {"rules": rules},
        "duplicates": {"after": ["filter"]},
    }
    commands.run(card, recipe(folder, **stages), folder / "after", None, HERE)
    reason = column(folder / "after", "duplicates", "reason")
    assert reason[:4] == ["mirrored near-copy", None, None, None] and reason[4] is reason[6] is None
    assert column(folder / "after", "duplicates", "kept_row")[0] == 1  # the mirrored one


def test_a_picture_that_is_there_many_times_makes_few_pairs(tmp_path, monkeypatch):
    files = [encoded(picture(20), quality=quality) for quality in range(76, 94)]
    files += [encoded(ImageOps.mirror(picture(20)), quality=95), encoded(picture(21))]
    write_shard(tmp_path / "shards/00000.tar", [{"jpg": data} for data in files])
    split = {"source": "shards", "path": str(tmp_path / "shards")}
    card, pairs = write_yaml(tmp_path / "card.yaml", {"train": split}), []

    def counted(*given, **how):
        found = copies.near_pairs(*given, **how)
        pairs.append(len(found["one"]))
        return found

    monkeypatch.setattr(duplicates, "near_pairs", counted)
    monkeypatch.setattr(duplicates, "_CROWD", 4)
    stages = {"meta": {}, "look": {}, "duplicates": {}}
    commands.run(card, recipe(tmp_path, **stages), tmp_path / "out", None, HERE)
    reasons = column(tmp_path / "out", "duplicates", "reason")
    assert reasons.count(None) == 2 and reasons[19] is None
    assert {"near-copy", "mirrored near-copy"} <= set(reasons)
    assert len(set(column(tmp_path / "out", "duplicates", "kept_row")) - {None}) == 1
    assert sum(pairs) < 3 * 20


def test_a_distance_that_no_hash_has_is_refused(curated):
    folder, card = curated
    stages = {"meta": {}, "look": {}, "duplicates": {"coarse": 65}}
    with pytest.raises(ValueError, match="coarse: 65"):
        commands.run(card, recipe(folder, **stages), folder / "never", None, HERE)
