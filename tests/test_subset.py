"""Random subsets: nested, of any source, and part of what a run is."""

import numpy as np
import pytest

from prepretrain import config
from prepretrain.data.card import load_card
from prepretrain.data.order import Order
from prepretrain.data.sources.base import Source
from prepretrain.data.subset import choice
from prepretrain.runs.launch import launch
from prepretrain.runs.plan import Plan


class Numbered(Source):
    """1,000 images of four classes of 100 to 400, in shards of 300, 200, 0 and 500."""

    fields, fingerprint, groups = ("image", "label"), "numbered", [300, 200, 0, 500]

    def label(self, index: int) -> int:
        return int(np.searchsorted([100, 300, 600], index, side="right"))


def chosen(given) -> set[int]:
    """The numbers of the images of a subset."""
    return set(choice(given, "data.subset").of(Numbered(), "data.subset").indexes.tolist())


@pytest.mark.parametrize("more", [{}, {"per_class": True}, {"classes": 3}], ids=str)
def test_each_smaller_subset_lies_within_each_larger_one(more):
    parts = [chosen({"images": n, **more}) for n in (7, "10%", "30%", 333)]
    assert all(small < large for small, large in zip(parts, parts[1:]))
    assert len(parts[0]) == 7 and len(parts[3]) == 333
    assert chosen({"images": 333, **more, "seed": 1}) != parts[3]


def test_a_subset_is_drawn_from_all_images_alike():
    counts = np.zeros(1000)
    for seed in range(200):
        counts[list(chosen({"images": "25%", "seed": seed}))] += 1
    assert abs(counts[:500].mean() - 50) < 2 and 4 < counts.std() < 8.5  # binomial: 6.1


def test_per_class_takes_the_same_share_of_each_and_one_at_least():
    labels = lambda given: [Numbered().label(i) for i in chosen(given)]
    count = lambda given: np.bincount(labels(given), minlength=4).tolist()
    assert count({"images": "10%", "per_class": True}) == [10, 20, 30, 40]
    assert count({"images": 4, "per_class": True}) == [1, 1, 1, 1]


def test_a_number_of_classes_is_all_their_images_and_those_classes_of_fewer():
    two, three = (chosen({"classes": n}) for n in (2, 3))
    assert two < three and {Numbered().label(i) for i in three} >= {
        Numbered().label(i) for i in two
    }
    assert len({Numbered().label(i) for i in three}) == 3


def test_a_subset_keeps_the_shards_and_is_told_apart_by_its_fingerprint():
    half, all_ = (choice(n, "x").of(Numbered(), "x") for n in ("50%", "100%"))
    assert len(half.groups) == 3 and sum(half.groups) == 500
    assert [half.groups[0], sum(half.groups[:2])] == [(half.indexes < n).sum() for n in (300, 500)]
    assert isinstance(all_, Numbered)
    again, other = (
        choice({"images": 500, "seed": s}, "x").of(Numbered(), "x").fingerprint for s in (0, 1)
    )
    assert half.fingerprint == again != other
    positions = np.arange(500)
    _, found, _ = Order(half.groups, seed=0, window=2)(positions)
    assert sorted(found) == positions.tolist()


@pytest.mark.parametrize(
    "given, said",
    [
        ("1001", r"x.images: 1001 of 1,000 images cannot be taken"),
        ("110%", r"110% of 1,000 images cannot"),
        ("-5%", r"-5% of 1,000 images cannot"),
        ("nan%", r"nan% is no share|'nan%' is no share"),
        ("few", r"'few' is no share, as 10%"),
        ({"classes": 9}, "x.classes: 9, and there are 4"),
        ({"image": 3}, "x.image: unknown option. Did you mean x.images"),
    ],
    ids=str,
)
def test_a_subset_that_cannot_be_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        choice(given, "x").of(Numbered(), "x")


def test_classes_of_images_without_labels_are_refused():
    source = Numbered().only(["image"])
    with pytest.raises(ValueError, match="x: per_class and classes need images with labels"):
        choice({"classes": 2}, "x").of(source, "x")


def test_a_run_trains_on_its_subset_and_does_not_go_on_with_another(place, group):
    launch("small.yaml", ["data.subset=50%", "length=2ep"], out="runs/half")
    made, source, _ = Plan(
        config.load("small.yaml", ["data.subset=50%", "length=2ep"]), 1
    ).open_data()
    assert made.images == len(source) == 30 and made.schedule.steps == 4
    with pytest.raises(ValueError, match="data.subset: 50% -> 20"):
        launch("small.yaml", ["data.subset=20", "length=2ep"], out="runs/half")
    with pytest.raises(ValueError, match="data.subset.images: 61 of 60 images"):
        launch("small.yaml", ["data.subset=61"], dry_run=True)


def test_a_subset_of_tagged_images_has_the_vocabulary_of_all(place, group):
    asked = ["data.train=scenes", "data.subset=40", "model.positions=learned"]
    asked += ["objective={name: hashtag, vocabulary: tags.json, tags: null}"]
    _, source, order = Plan(config.load("small.yaml", asked), 1).open_data()
    assert len(source) == 40 and order.length <= 40


def test_a_cards_split_holds_a_subset(place):
    text = (
        "train: {source: folder, path: photos, images: 60, subset: {images: 10%, per_class: true}}"
    )
    (place / "few.yaml").write_text(f"{text}\nval: {{source: folder, path: photos}}\n")
    card = load_card("few.yaml")
    train = card.open("train")
    assert card.images == {"train": 6, "val": None} and len(card.open("val")) == 60
    assert sorted(train.labels()) == [0, 0, 1, 1, 2, 2]
    (place / "few.yaml").write_text(text.replace("10%", "100"))
    with pytest.raises(ValueError, match="few.yaml: train.subset.images: 100 of 60 images"):
        load_card("few.yaml").open("train")
