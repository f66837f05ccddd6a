"""Certificates of leaks: each evaluator's metrics without leaks are those of a split of the other images."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import test_detection_evaluator as detectors
import test_segmentation_evaluator as segmenters
import test_video as clips
import torch
from conftest import listed
from PIL import Image
from test_copies import encoded, picture
from test_curation import column, recipe, write_shard
from test_depth import card_of_rooms
from test_features import tiny_model
from test_maps import saved
from test_robustness import KINDS, sets, share  # noqa: F401
from test_text import BPE

from prepretrain.curation import commands
from prepretrain.curation.engine import Machines
from prepretrain.data.card import Card, load_card
from prepretrain.data.sources.base import Source
from prepretrain.data.subset import Subset
from prepretrain.evaluation import corruptions, leaks
from prepretrain.evaluation.evaluators.base import WITHOUT_LEAKS, Evaluator, build
from prepretrain.evaluation.features import extract
from prepretrain.models.heads.base import Depths
from prepretrain.models.model import Model


def without(found: dict[str, float]) -> dict[str, float]:
    """The metrics without leaks, by the metrics' names."""
    ends = {name: name.removesuffix(WITHOUT_LEAKS) for name in found}
    return {end: found[name] for name, end in ends.items() if name != end}


def of_others(protocol: Evaluator, leaked: list[int]) -> Evaluator:
    """The evaluator, whose split holds the other images alone."""
    opened = protocol.open

    def others(split: str) -> Source:
        source = opened(split)
        kept = [number for number in range(len(source)) if number not in leaked]
        return Subset(source, kept) if split == protocol.certified else source

    protocol.open = others
    return protocol


class Shade(Depths):
    """Says the farther, the darker a pixel is; reads the image itself."""

    def forward(self, maps):
        return (1 - maps[0].mean(1, keepdim=True)).clamp(0.1) * 5


def depths() -> Model:
    """A model that says depths without training."""
    model = Model(encoder="vit_test8", final_norm=False)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.head = Shade(model.encoder, (0.5, 10.0), (1,))
    model.read = lambda image: [image]
    return model


def detector() -> Model:
    model = detectors.made().to_empty(device="cpu")
    torch.nn.Module.apply(model, detectors._zero)
    model.init_non_persistent_buffers()
    return detectors.knowing(model)


def sides(folder: Path) -> str:
    (folder / "sides").mkdir()
    return segmenters.card_of(folder / "sides", 6)


def rooms(folder: Path) -> str:
    card_of_rooms(folder)
    return "rooms"


def objects(folder: Path) -> str:
    (folder / "objects").mkdir()
    return detectors.furnish(folder / "objects")


LOOKED_AT = {"pictures": 1, "corruptions": ["contrast"], "severities": [2]}
CLASSIFIER = partial(tiny_model, head={"classes": 3})
TEXTS = partial(tiny_model, text=BPE, joint={"width": 16})
# the card or who makes it, the model, and the options
EVALUATORS: dict[str, tuple[str | Callable[[Path], str], Callable[[], Model], dict]] = {
    "accuracy": ("colours", CLASSIFIER, {}),
    "knn": ("colours", tiny_model, {"k": 3}),
    "linear": ("colours", tiny_model, {"protocol": "ridge"}),
    "lowshot": ("colours", tiny_model, {"shots": [1, 2], "seeds": 2}),
    "zeroshot": ("colours", TEXTS, {"templates": "simple"}),
    "retrieval": ("scenes", TEXTS, {"split": "train"}),
    "detection": (objects, detector, {**LOOKED_AT, "feature_batch": 2}),
    "segmentation": (sides, segmenters.knowing, LOOKED_AT),
    "segmentation_knn": (sides, partial(tiny_model), {"k": 2, "layer": 1}),
    "depth": (rooms, depths, {**LOOKED_AT, "cap": (0.5, 10)}),
    "video": (
        partial(clips.furnish),
        partial(clips.made),
        {"stride": 1, "clips": 2, "pictures": 0},
    ),
}


def timeless(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name != "fps"}


def certified(name: str, leaked: list[int], folder: Path) -> tuple[Evaluator, Model]:
    """An evaluator in whose list these images leaked, and a model for it."""
    furnished, make, options = EVALUATORS[name]
    card = furnished if isinstance(furnished, str) else furnished(folder)
    protocol = build(name, cache=True, data=card, **options)
    found = {
        f"{protocol.card.name}:{protocol.certified}": (protocol.open(protocol.certified), leaked)
    }
    made = build(name, cache=True, data=card, **options, leaks=listed(folder / "out", found))
    return made, make().eval()


@pytest.mark.parametrize("name", EVALUATORS)
def test_a_metric_without_leaks_is_that_of_a_split_of_the_other_images(name, place, group):
    protocol, model = certified(name, [0, 2, 3], place)
    protocol.open_data()
    found = timeless(protocol.run(model, place / "certified"))
    protocol.leaks = None
    plain = timeless(protocol.run(model, place / "plain"))
    assert {key: found[key] for key in plain} == plain and without(plain) == {}
    assert found["leaked_images"] == 3
    others, some = of_others(protocol, [0, 2, 3]).run(model, place / "others"), without(found)
    assert protocol.quoted(plain) in some
    assert some == pytest.approx({key: others[key] for key in some})


@pytest.mark.parametrize("name", ["knn", "segmentation"])
def test_without_a_leak_all_is_as_before_and_of_images_that_all_leaked_nothing_is_left(
    name, place, group
):
    protocol, model = certified(name, [], place)
    found, whole = protocol.run(model, place / "none"), protocol.open(protocol.certified)
    alone = without(found)
    assert found["leaked_images"] == 0 and alone == {key: found[key] for key in alone} != {}
    address = f"{protocol.card.name}:{protocol.certified}"
    listed(place / "out", {address: (whole, [*range(len(whole))])})
    found = protocol.run(model, place / "all")
    assert found["leaked_images"] == len(whole) and without(found) == {}


def test_of_some_images_those_that_leaked_are_counted(place, group):
    protocol, model = certified("segmentation", [0, 1, 3], place)  # of six
    protocol.images = 3
    assert protocol.run(model, place)["leaked_images"] == 1  # 0, 2 and 4 are measured
    protocol.images = 2
    assert protocol.run(model, place)["leaked_images"] == 2  # 0 and 3: none is left
    assert without(protocol.run(model, place)) == {}


def test_an_evaluator_that_does_not_say_whose_images_it_measures_takes_no_leaks(place, monkeypatch):
    monkeypatch.syspath_prepend(place)
    Path("lab").mkdir()
    Path("lab/mine.py").write_text(
        "from prepretrain.evaluation.evaluators.base import Evaluator\n\n\n"
        "class Mine(Evaluator):\n    headline = 'top1'\n"
    )
    with pytest.raises(ValueError, match=r"leaks: 'out' .*\(Evaluator.certified\); lab.mine does"):
        build("lab.mine", cache=False, data="colours", leaks="out")


def test_each_set_and_each_corrupted_copy_of_a_robustness_has_leaks_of_its_own(
    sets,  # noqa: F811
    group,
    monkeypatch,
):
    model = tiny_model(head={"classes": 3}).eval()
    options = {"classifier": "own", "sets": ["twice", "many"], "official": "bad_c"}
    options |= {"corruptions": ["contrast", "fog"], "severities": [1, 3], "table": "cifar"}
    keys = ["blue/000", "green/001", "red/002"]
    rng = np.random.default_rng(1)
    for kind in KINDS:
        for severity in corruptions.SEVERITIES:
            for key in keys:
                file = Path(f"data/c/{kind}/{severity}/{key}.jpg")
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file)
    plain = build("robustness", cache=False, data="colours", **options)
    leaked = {"colours": [0, 5, 41], "twice": [1, 2], "many": [0, 3]}
    cards = {card.name: card for card in (plain.card, *plain.sets)}
    searched = {f"{n}:val": (cards[n].open("val"), leaked[n]) for n in cards}
    folder = listed(Path("out"), searched)
    protocol = build("robustness", cache=False, data="colours", **options, leaks=folder)
    protocol.open_data()
    found, whole = protocol.run(model, Path()), plain.run(model, Path())
    assert {key: found[key] for key in whole} == whole
    assert found["leaked_images"] == 3 and found["twice/leaked_images"] == 2
    assert found["many/leaked_images"] == 1  # the other has no right answer, and is not measured
    opened = Card.open

    def open_others(card: Card, split: str, **which) -> Source:
        source = opened(card, split, **which)
        kept = [number for number in range(len(source)) if number not in leaked.get(card.name, ())]
        return Subset(source, kept)

    others = build("robustness", cache=False, data="colours", **options)
    others.official, others.corruptions = None, ("contrast",)
    with monkeypatch.context() as patched:
        patched.setattr(Card, "open", open_others)
        expected, alone = others.run(model, Path()), without(found)
    for name in ("top1", "twice/top1", "twice/top1_unrestricted", "many/top1"):
        assert alone[name] == pytest.approx(expected[name]), name
    assert alone["corruption/contrast/3/top1"] == expected["corruption/contrast/3/top1"]
    tops = [alone[f"corruption/{name}/top1"] for name in ("contrast", "fog")]
    assert alone["mean_corruption_error"] == pytest.approx(100 - fmean(tops))
    source = protocol.official.open("val", corruption="fog", severity=2)
    scores, labels = extract(model, source, pool="scores", share=1.0)
    assert alone["bad_c/fog/2/top1"] == share(scores[1:].argmax(1) == labels[1:])  # not of blue/000
    assert "bad_c/fog/error" in alone
    (Path("data/c/gaussian_noise/1") / f"{keys[0]}.jpg").rename(
        "data/c/gaussian_noise/1/blue/9.jpg"
    )
    with pytest.raises(ValueError, match="have a key that none of colours:val has, 'blue/9' first"):
        protocol.run(model, Path())
    listed(Path("out"), {"colours:val": searched["colours:val"]})
    with pytest.raises(ValueError, match="were looked for, not of twice:val"):
        protocol.open_data()


def film(path: Path, pictures: list[Image.Image], *, rate: int, each: int, codec: str) -> bytes:
    """A video file of pictures, `each` frames of one."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *pictures[0].size, "yuv420p"
        stream.bit_rate = 4_000_000
        for picture in pictures:
            for _ in range(each):
                out.mux(stream.encode(av.VideoFrame.from_image(picture)))
        out.mux(stream.encode())
    return path.read_bytes()


def test_near_copies_are_found_in_sets_of_objects_maps_captions_and_videos(place):
    """Of each set the second picture is in the training data, of the videos as one and as an image."""
    pytest.importorskip("av", reason="the extra `video` is not installed")
    save = lambda number, file: (
        file.parent.mkdir(parents=True, exist_ok=True) or picture(number).save(file)
    )
    for number in range(3):
        save(number, Path(f"data/objects/{number}.png"))
        save(10 + number, Path(f"data/maps/images/{number}.png"))
        saved(Path(f"data/maps/maps/{number}.png"), np.ones((120, 160), "uint8"))
        save(20 + number, Path(f"data/depths/images/{number}.png"))
        saved(Path(f"data/depths/maps/{number}.png"), np.full((120, 160), 900, "uint16"))
        for frame in range(5):
            save(
                40 + 5 * number + frame,
                Path(f"data/frames/{'ab'[number % 2]}/{number}/{frame}.png"),
            )
    images = [{"id": i + 1, "file_name": f"{i}.png", "height": 120, "width": 160} for i in range(3)]
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [9, 9, 30, 20], "area": 600}
    box["segmentation"] = [[9, 9, 39, 9, 39, 29, 9, 29]]
    objects = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
    Path("data/objects.json").write_text(json.dumps(objects))
    texts = [{"jpg": encoded(picture(30 + i)), "txt": b"a picture"} for i in range(3)]
    write_shard(Path("data/texts/00000.tar"), texts)
    cards = {
        "objects": "val: {source: coco, path: objects, listing: objects.json}",
        "maps": "classes: [a, b]\nval: {source: label_maps, path: maps/images, maps: maps/maps}",
        "depths": "values: {scale: 0.001, range: [0.5, 10]}\n"
        "val: {source: depth_maps, path: depths/images, maps: depths/maps}",
        "texts": "val: {source: shards, path: texts}",
        "frames": "val: {source: video, path: frames, rate: 5}",
        "web": "train: {source: shards, path: web}\nfilms: {source: shards, path: films}",
    }
    for name, text in cards.items():
        Path(f"datasets/{name}.yaml").write_text(f"{text}\n")
    halfway = 40 + 5 * 1 + 2  # the third frame of the second video
    smaller = [picture(n).resize((128, 96)) for n in (1, 11, 21, 31, halfway, 99)]
    write_shard(Path("data/web/00000.tar"), [{"jpg": encoded(one, quality=80)} for one in smaller])
    against = [f"{name}:val" for name in list(cards)[:5]]
    stages = {"meta": {}, "look": {}, "leaks": {"against": against}}
    commands.run("web", recipe(place, **stages), Path("out"), None, Machines())
    found = leaks.content_of(Path("out"))["sets"]
    order = load_card("frames").open("val")
    numbers = [order.key(i) for i in range(3)].index("b/1")
    assert {name: one["leaked"] for name, one in found.items()} == {
        name: [numbers if name == "frames:val" else 1] for name in against
    }
    for name, kind in (
        ("objects", "detection"),
        ("depths", "depth"),
        ("texts", "retrieval"),
        ("frames", "video"),
    ):
        build(kind, cache=False, data=name, leaks="out").open_data()

    films = [
        film(
            Path(f"{n}.mp4"),
            [picture(40 + 5 * n + i).resize((128, 96)) for i in range(5)],
            rate=10,
            each=2,
            codec="mpeg4",
        )
        for n in (0, 2)
    ]
    write_shard(Path("data/films/00000.tar"), [{"mp4": one} for one in (*films, b"no film")])
    stages["leaks"] = {"against": ["frames:val"]}
    commands.run("web:films", recipe(place, **stages), Path("films"), None, Machines())
    found = leaks.content_of(Path("films"))["sets"]["frames:val"]
    assert [order.key(number) for number in found["leaked"]] == ["a/0", "a/2"]
    looked = column(Path("films"), "look", "error")
    assert looked[:2] == [None, None] and "unreadable" in looked[2]
