"""Low-shot: which images are chosen, what is measured on them, and that nothing is trained twice."""

import json
import os
import statistics
from pathlib import Path

import pytest
import torch
from conftest import processes
from sklearn.linear_model import LogisticRegression
from test_evaluators import clouds
from test_features import tiny_model

from prepretrain import plugin
from prepretrain.data.card import load_card
from prepretrain.data.sources.base import Source
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.evaluators.base import tops
from prepretrain.evaluation.evaluators.lowshot import Lowshot, _scaled, summary
from prepretrain.evaluation.probing import subsets, tuning
from prepretrain.runs.plan import build_evaluator

LISTS = Path(
    os.environ.get("PREPRETRAIN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"),
    "imagenet_meta",
    "msn_lowshot",
)
QUICK = {
    "pool": "mean",
    "epochs": 3,
    "warmup": 0,
    "precision": "fp32",
    "seeds": 2,
    "workers": 0,
}


@pytest.fixture
def group():
    distributed.init()
    yield
    distributed.shutdown()


class Named(Source):
    """Images with these keys, none of which is ever read."""

    fields = ("image", "label")

    def __init__(self, keys: list[str]):
        self.keys, self.groups, self.fingerprint = keys, [len(keys)], "named"

    def key(self, index: int) -> str:
        return self.keys[index]


def test_logistic_mean_and_deviation_equal_a_computation_by_hand(place):
    (train, labels), (val, answers) = clouds(120, 3, 1.0, 0), clouds(90, 3, 1.0, 1)
    rows = [subsets.choose(labels, 3, 4, seed) for seed in range(3)]
    chosen = {("4shot", seed): rows[seed] for seed in range(3)}
    evaluator = Lowshot(data="colours", shots=(4,), seeds=3)
    ranks = evaluator.measure(train, labels, chosen, val, answers, 3)
    found = summary({job: tops(rank, 3) for job, rank in ranks.items()})
    each = []
    for seed in range(3):
        other = LogisticRegression(C=1 / 0.0025, fit_intercept=False, tol=1e-8, max_iter=5000)
        other.fit(_scaled(train[rows[seed]]).numpy(), labels[rows[seed]].numpy())
        each.append(100 * other.score(_scaled(val).numpy(), answers.numpy()))
    assert found == {
        "top1_4shot": pytest.approx(statistics.fmean(each)),
        "top1_4shot_std": pytest.approx(statistics.stdev(each)),
    }


def test_the_choice_of_images_depends_on_seed_and_class_and_nests():
    labels = torch.arange(40) % 4
    few, many = subsets.choose(labels, 4, 2, 7), subsets.choose(labels, 4, 5, 7)
    assert labels[few].bincount().tolist() == [2] * 4 and len(set(many.tolist())) == 20
    assert set(few.tolist()) <= set(many.tolist())
    assert subsets.choose(labels, 4, 2, 8).tolist() != few.tolist()
    without = subsets.choose(
        labels[labels != 3], 3, 2, 7
    )  # another class's images do not change a class's choice
    assert torch.arange(40)[labels != 3][without].tolist() == few[:6].tolist()


def test_a_class_with_too_few_images_is_an_error_unless_at_most():
    labels = torch.tensor([0, 0, 0, 1])
    with pytest.raises(
        ValueError,
        match=r"scenes:train has fewer than 2 images in 1 of 2 classes \(class 1 has 1\)",
    ):
        subsets.choose(labels, 2, 2, 0, data="scenes")
    assert labels[subsets.choose(labels, 2, 2, 0, at_most=True)].tolist() == [0, 0, 1]


def test_a_share_takes_that_much_of_each_class_and_at_least_one_image():
    labels = torch.tensor([0] * 200 + [1] * 3 + [2] * 50)
    rows = subsets.choose_percent(labels, 3, 4.0, 0)
    assert labels[rows].bincount().tolist() == [8, 1, 2]
    assert set(rows.tolist()) <= set(subsets.choose(labels, 3, 9, 0, at_most=True).tolist())
    assert rows.tolist() != subsets.choose_percent(labels, 3, 4.0, 1).tolist()


def test_images_are_found_by_file_name_with_folders_or_without_extension():
    lists = {"a": ["n1_5.JPEG", "n2_7.JPEG"], "b": ["n2_7.JPEG"]}
    for keys in (["n1/n1_5.JPEG", "x/y.JPEG", "n2/n2_7.JPEG"], ["s0/n1_5", "z", "n2_7"]):
        found = subsets.find(Named(keys), lists, data="im:train", folder=Path("nowhere"))
        assert {path: rows.tolist() for path, rows in found.items()} == {"a": [0, 2], "b": [2]}
    by_key = subsets.find(
        Named(["a/1.png", "b/1.png"]), {"l": ["b/1.png"]}, data="im", folder=Path("nowhere")
    )
    assert by_key["l"].tolist() == [1]


def test_names_that_are_not_there_are_one_error_and_all_of_them_in_a_file(tmp_path):
    names = [f"{i:02d}.png" for i in range(40)]
    with pytest.raises(ValueError, match="im:train: 31 of the 40 images named in 2 lists") as error:
        subsets.find(
            Named([*(f"c/{n}" for n in names[:10]), "d/09.png"]),
            {"one.txt": names[:15], "two.txt": names},
            data="im:train",
            folder=tmp_path / "lowshot",
        )
    assert "09.png (2 times), 10.png" in str(error.value) and "29.png" not in str(error.value)
    missing = (tmp_path / "lowshot" / "missing.txt").read_text().splitlines()
    assert missing == ["09.png (2 times)", *names[10:]]


def test_lists_that_make_no_sense_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no list here"):
        subsets.read_lists(str(tmp_path))
    (tmp_path / "a.txt").write_text("x.png\ny.png\nx.png\n")
    with pytest.raises(ValueError, match="a.txt names x.png twice"):
        subsets.read_lists(str(tmp_path / "*.txt"))
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match="a.txt is empty"):
        subsets.read_lists(str(tmp_path))


def test_msns_lists_hold_what_they_are_counted_to_hold():
    if not LISTS.is_dir():
        pytest.skip(f"MSN's lists are not at {LISTS}")
    lists = subsets.read_lists(str(LISTS))
    names = sorted({name for part in lists.values() for name in part})
    classes = sorted({name.split("_")[0] for name in names})
    labels = torch.tensor([classes.index(name.split("_")[0]) for name in names])
    keys = [f"{name.split('_')[0]}/{name}" for name in names]
    found = subsets.find(Named(keys), lists, data="imagenet:train", folder=Path("nowhere"))
    held = {
        "/".join(Path(path).parts[-2:]): subsets.per_class(labels[rows], 1000)
        for path, rows in found.items()
    }
    assert len(held) == 10 and held.pop("imagenet_subsets1/1percent.txt") == (12, 13)
    assert held.pop("imagenet_subsets3/3imgs_class.txt") == (5, 5), "its name says 3"
    assert all(count == (int(Path(p).name[0]),) * 2 for p, count in held.items())


def lists_of(place: Path, *counts: tuple[int, int, int], start: int = 0) -> None:
    """place/lists/{i}.txt with that many images of blue, green and red."""
    (place / "lists").mkdir(exist_ok=True)
    for i, count in enumerate(counts):
        names = [f"{3 * (j + i + start) + c:03d}.png" for c in range(3) for j in range(count[c])]
        (place / "lists" / f"{i}.txt").write_text("\n".join(names))


def test_lists_are_grouped_by_the_images_they_hold_of_a_class(place):
    lists_of(place, (2, 2, 2), (2, 2, 2), (4, 4, 4))
    results = Lowshot(data="colours", pool="mean", lists="lists").run(tiny_model(), place)
    assert set(results) == {"top1_2shot", "top1_2shot_std", "top1_4shot", "images"}
    assert Lowshot.quoted(results) == "top1_4shot"
    source = load_card("colours").open("train")
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    chosen = Lowshot(data="colours", lists="lists").choose(source, labels, 3, place)
    assert [source.key(int(i)) for i in chosen["2shot", 1]][:2] == ["blue/003.png", "blue/006.png"]
    lists_of(place, (2, 2, 3))
    with pytest.raises(ValueError, match="0.txt holds 2 to 3 images of a class"):
        Lowshot(data="colours", lists="lists/0.txt").run(tiny_model(), place)
    allowed = Lowshot(data="colours", pool="mean", lists="lists/0.txt", at_most=True)
    assert "top1_3shot" in allowed.run(tiny_model(), place)


def test_a_share_and_part_of_val_are_measured(place):
    evaluator = Lowshot(data="colours", pool="mean", percent=10, val_images=7, seeds=2)
    results = evaluator.run(tiny_model(), place)
    assert set(results) == {"top1_10percent", "top1_10percent_std", "images"}
    assert results["images"] == 7 and evaluator.headline == Lowshot.quoted(results)
    both = Lowshot(data="colours", pool="mean", percent=10, shots=(1, 2), seeds=1)
    assert Lowshot.quoted(both.run(tiny_model(), place)) == "top1_2shot" == both.headline


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("linear", {"lr": 100.0}),
        ("vpt", {"lr": 100.0}),
        ("vpt_deep", {"optimizer": "adamw", "lr": 0.1}),
        ("lora", {"optimizer": "adamw", "lr": 0.1}),
        ("adaptformer", {"optimizer": "adamw", "lr": 0.1}),
    ],
)
def test_every_method_learns_three_colours_from_five_images_each(method, changes, place, group):
    options = {**QUICK, "epochs": 20, "warmup": 2, "seeds": 1, "crop_scale": [0.5, 1.0], **changes}
    name, evaluator = build_evaluator(
        {"name": "lowshot", "method": method, "shots": [5], **options}, "colours"
    )
    assert name == f"lowshot/colours/{method}"
    evaluator.check(tiny_model())
    results = evaluator.run(tiny_model(), place)
    assert results["images"] == 60 and results["top1_5shot"] > 60, results


def test_an_evaluation_that_was_cut_off_trains_only_what_is_missing(place, group, monkeypatch):
    evaluator = Lowshot(data="colours", method="vpt", shots=(1, 2), **QUICK)
    trained, train = [], tuning.Tuning.train

    def counted(self, images, seed, folder, stop=3):
        if len(trained) == stop:
            raise KeyboardInterrupt
        trained.append(folder.name)
        train(self, images, seed, folder)

    monkeypatch.setattr(tuning.Tuning, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluator.run(tiny_model(), place)
    assert trained == ["vpt_1shot_0", "vpt_2shot_0", "vpt_1shot_1"]
    monkeypatch.setattr(tuning.Tuning, "train", lambda *a: counted(*a, stop=9))
    results = evaluator.run(tiny_model(), place)
    assert trained[3:] == ["vpt_2shot_1"]
    assert results == evaluator.run(tiny_model(), place) and len(trained) == 4
    whole = Lowshot(data="colours", method="vpt", shots=(1, 2), **QUICK).run(
        tiny_model(), place / "other"
    )
    assert whole == results, "not what a run without a break gives"
    del trained[:]
    other = tiny_model()
    other.encoder.cls_token.data += 0.1
    evaluator.run(other, place)
    assert len(trained) == 4, "other weights, so that nothing measured before is of use"


def test_training_leaves_a_log_and_a_result_but_no_checkpoint(place, group):
    Lowshot(data="colours", method="lora", shots=(2,), **QUICK).run(tiny_model(), place)
    folder = place / "lowshot" / "colours" / "lora_2shot_1"
    assert {p.name for p in folder.iterdir()} == {"metrics.jsonl", "tensorboard", "result.json"}
    found = json.loads((folder / "result.json").read_text())
    assert found["method"] == "lora" and 0 <= found["found"]["top1"] <= 100


def _run(rank: int, folder: str) -> None:
    os.chdir(folder)
    distributed.init()
    read, labels = [], Source.labels
    Source.labels = lambda source: read.append(source) or labels(source)
    for method in ("lora", "vpt"):
        evaluator = Lowshot(data="colours", method=method, shots=(2,), val_images=13, **QUICK)
        results = evaluator.run(tiny_model(), Path("two"))
        Path(f"{method}_{rank}.json").write_text(json.dumps(results))
    assert bool(read) == (rank == 0), "labels are read once, and sent to the others"
    distributed.shutdown()


def test_two_processes_measure_what_one_does(place, group):
    processes(2, _run, str(place))
    for method in ("lora", "vpt"):
        evaluator = Lowshot(data="colours", method=method, shots=(2,), val_images=13, **QUICK)
        expected = evaluator.run(tiny_model(), place / "one")
        for rank in range(2):
            found = json.loads((place / f"{method}_{rank}.json").read_text())
            assert found == pytest.approx(expected, abs=1e-9) and found["images"] == 13


def test_an_image_that_cannot_be_read_is_an_error_not_another_image(place, group):
    broken = place / "data" / "photos" / "red" / "002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (place / "list.txt").write_text("000.png\n001.png\n002.png\n")
    evaluator = Lowshot(data="colours", method="vpt", lists="list.txt", **QUICK)
    with pytest.raises(ValueError, match="quarantine.jsonl: names images"):
        evaluator.run(tiny_model(), place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": []}, "shots"),
        ({"shots": [0, 1]}, "shots"),
        ({"shots": [1, 1]}, "shots"),
        ({"seeds": 0}, "seeds"),
        ({"l2": 0.0}, "l2"),
        ({"workers": -1}, "workers"),
        ({"method": "prompt"}, "method"),
        ({"percent": 0.0}, "percent"),
        ({"lists": "x", "shots": [1]}, "lists: 'x' does not fit; it says which images"),
        ({"lists": "x", "percent": 1.0}, "lists"),
        ({"val_images": 0}, "val_images"),
        ({"method": "vpt", "layer": 3}, "layer: 3 does not fit; it is for method=logistic"),
        ({"adapter": {"tokens": 3}}, "adapter: .* it is for a method with one, not logistic"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"lr": 0.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 5}, "warmup: 10 does not fit; it must be 0 to 4"),
        ({"batch_size": 0}, "batch_size"),
        ({"crop_scale": [0.5, 0.2]}, "crop_scale"),
        ({"precision": "fp16"}, "precision"),
        ({"feature_batch": 0}, "feature_batch"),
    ],
)
def test_an_option_that_does_not_fit_is_named(options, message, place):
    with pytest.raises(ValueError, match=message):
        plugin.build("evaluators", "lowshot", data="colours", **options)


def test_an_adapter_that_does_not_fit_the_model_is_found_before_anything_is_read(place):
    evaluator = Lowshot(data="colours", method="lora", adapter={"tokens": 3})
    with pytest.raises(ValueError, match="adapter.tokens: unknown option"):
        evaluator.check(tiny_model())
