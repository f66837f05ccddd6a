"""How often images come: mixes, files of weights, laws of tags, and changes of all that in a run."""

import hashlib
import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import processes
from test_loader import Numbers, assert_equal, taken, transform
from test_sources import flat, sample, write_tar

from prepretrain import config, plugin
from prepretrain.data.loader import Change, Stream
from prepretrain.data.order import Interleaved, Order
from prepretrain.data.sampling import bounds, mix, resample, weights
from prepretrain.data.sampling.bounds import Bounds
from prepretrain.data.sampling.mix import Mix
from prepretrain.data.sources.base import Source
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.distributed import group as distributed
from prepretrain.objectives.mae import MAE
from prepretrain.runs import run
from prepretrain.runs.launch import launch
from prepretrain.runs.plan import Plan

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("resampling.json").read_text())


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Per degree of freedom; about 1 for independent draws, less for more even ones."""
    return float((((counts - expected) ** 2) / expected).sum() / (len(counts) - 1))


class Tagged(Source):
    """Images that have tags alone."""

    def __init__(self, tags):
        self.tags, self.groups, self.fingerprint = tags, [len(tags)], "tagged"
        self.fields = ("image", "hashtags")

    def hashtags(self, index):
        return self.tags[index]


def counted(tags, folder):
    """A source of tagged images, and the file of their vocabulary."""
    file = folder / "tags.json"
    Vocabulary.count(tags, source="tagged", min_count=1).save(file)
    return Tagged(tags), file


def factors(tags, folder, others=None, **asked):
    source, file = counted(tags, folder)
    law = resample.resample(asked, "data.resample")
    return law.weights(file, source, others, "data.resample")[:]


def test_repeat_factors_are_those_of_detectron2(tmp_path):
    golden = GOLDEN["repeat_factors"]
    tags = [[f"c{c}" for c in set(one)] for one in golden["categories"]]
    for case in golden["cases"]:
        found = factors(tags, tmp_path, law="repeat_factor", t=case["threshold"])
        np.testing.assert_allclose(found, case["repeat_factors"], rtol=1e-6)
    for threshold, mean in golden["mean_repeat_by_threshold"].items():
        found = factors(tags, tmp_path, law="repeat_factor", t=float(threshold))
        assert found.mean() == pytest.approx(mean, rel=1e-6)


def test_the_cap_of_a_tag_is_metaclips_and_so_is_its_threshold_in_another_language():
    golden = GOLDEN["metaclip"]
    counts = {name: np.array(one["counts"]) for name, one in golden["languages"].items()}
    tail = resample.tail_of(counts["en"], golden["t_en"])
    assert tail == pytest.approx(golden["p_from_t_en"], rel=1e-12)
    assert resample.threshold_of(counts["zh"], tail) == golden["languages"]["zh"]["t"]
    for name, one in golden["languages"].items():
        some = counts[name] > 0
        found = resample.cap(counts[name][some] / 1000, one["t"] / 1000)
        np.testing.assert_allclose(found, np.array(one["probability"])[some], rtol=1e-12)
    table = np.array(golden["table"]["counts"])
    for threshold, tail in golden["table"]["t_to_p"].items():
        assert resample.tail_of(table, float(threshold)) == pytest.approx(tail, rel=1e-12)
    for tail, threshold in golden["table"]["p_to_t"].items():
        assert resample.threshold_of(table, float(tail)) == threshold


def test_an_image_has_the_factor_of_its_rarest_tag_and_one_without_tags_comes_once(tmp_path):
    tags = [["a"], ["a", "b"], ["a", "b", "c"], [], ["a"]]
    f = {"a": 4 / 5, "b": 2 / 5, "c": 1 / 5}
    root = lambda tag: np.sqrt(0.5 / f[tag])
    found = factors(tags, tmp_path, law="inverse_sqrt", t=0.5)
    np.testing.assert_allclose(found, [root("a"), root("b"), root("c"), 1, root("a")])
    assert factors(tags, tmp_path, law="cap", t=2).tolist() == [0.5, 1, 1, 1, 0.5]
    assert factors(tags, tmp_path, law="repeat_factor", t=0.8).max() == 2


@pytest.mark.parametrize(
    "law, epoch", [("repeat_factor", 5 / 3), ("inverse_sqrt", 1), ("cap", 0.6)]
)
def test_a_threshold_is_found_for_an_epoch_of_a_given_length(law, epoch, tmp_path):
    rng = np.random.default_rng(0)
    tags = [[f"t{i}" for i in set(np.minimum(rng.zipf(1.4, 3), 50).tolist())] for _ in range(900)]
    kept = weights.of((np.arange(900) % 9 > 0).astype(np.float32))
    found = factors(tags, tmp_path, others=kept, law=law, epoch=epoch)
    assert (found * kept[:]).sum() == pytest.approx(epoch * 800, rel=1e-9)
    with pytest.raises(ValueError, match="data.resample.epoch: no t of the law"):
        factors(tags, tmp_path, law=law, epoch={"repeat_factor": 0.5}.get(law, 1e40))


def test_a_law_without_a_threshold_or_with_two_is_refused():
    with pytest.raises(ValueError, match="data.resample: none of t, epoch and tail is given"):
        resample.resample({"law": "cap"}, "data.resample")
    with pytest.raises(ValueError, match="data.resample: t and epoch of t, epoch and tail"):
        resample.resample({"law": "cap", "t": 1, "epoch": 1}, "data.resample")
    with pytest.raises(ValueError, match="data.resample.t: 0.* must be finite and above 0"):
        resample.resample({"law": "cap", "t": 0}, "data.resample")


DRAWN = np.random.default_rng(7).pareto(1.5, 5000)


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """The sums of however few images are in files."""
    monkeypatch.setattr(bounds, "IN_MEMORY", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepretrain" / "weights"


def test_an_order_is_what_it_was_when_its_sums_were_whole_in_memory():
    order = Order([2000, 3000], seed=4, window=1, repeats=DRAWN)
    digest = "50a9fe9fe503e2cee4def90e3a37d1d5157aa5aabd6096b62f234f52800e4f6a"
    assert order.parts() == [4, 1, digest] and order.length == 9877
    found = [one.tolist() for one in order(np.array([0, 1, 7000, 20000]))]
    assert found == [[0, 0, 0, 2], [601, 1806, 3764, 1586], [0, 4, 0, 30]]


def test_sums_in_a_file_are_those_in_memory_and_are_computed_once(on_disk, monkeypatch):
    for values in (DRAWN, DRAWN * 100, np.r_[0, 0, 1.39, np.zeros(300)]):
        monkeypatch.setattr(bounds, "IN_MEMORY", 10_000)
        within = Order([len(values)], seed=1, repeats=values)
        monkeypatch.setattr(bounds, "IN_MEMORY", 0)
        monkeypatch.setattr(weights, "CHUNK", 128)
        kept = Order([len(values)], seed=1, repeats=values)
        positions = np.arange(0, 3 * kept.length, 1 + kept.length // 1000)
        assert kept.parts() == within.parts()
        assert all((a == b).all() for a, b in zip(kept(positions), within(positions)))
    assert len(list(on_disk.glob("*.sums"))) == 3
    monkeypatch.setattr(bounds, "_Total", None)  # nothing is computed again
    assert Order([len(values)], seed=1, repeats=values).parts() == kept.parts()


def test_sums_that_are_damaged_or_have_no_room_are_refused_by_name(on_disk, monkeypatch):
    Order([5000], seed=0, repeats=DRAWN)
    file = next(on_disk.glob("*.sums"))
    os.truncate(file, 6000)
    with pytest.raises(ValueError, match=f"{file.name}: is damaged: .* Remove it"):
        Order([5000], seed=0, repeats=DRAWN)
    file.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match="cannot be written: .*No space.* XDG_CACHE_HOME"):
        Order([5000], seed=0, repeats=DRAWN)
    assert not list(on_disk.glob("*.sums")) and not list(on_disk.glob(".*"))


def test_a_million_draws_are_as_many_of_each_image_as_its_weight_says():
    values = np.random.default_rng(1).uniform(0.05, 4, 20_000)
    order = Order([20_000], seed=2, repeats=values)
    counts = np.bincount(order(np.arange(1_000_000))[1], minlength=20_000)
    assert chi_square(counts, 1e6 * values / values.sum()) < 1  # of draws, within their noise


def test_a_million_draws_of_a_mix_are_in_the_shares_of_its_parts_and_of_their_weights():
    sizes, shares = [30_000, 4000, 700], [0.7, 0.25, 0.05]
    values = [np.random.default_rng(i).uniform(0.05, 4, n) for i, n in enumerate(sizes)]
    orders = [Order([n], seed=3, repeats=one) for n, one in zip(sizes, values)]
    mixed = Interleaved(orders, sizes, shares)
    counts = np.bincount(mixed(np.arange(1_000_000))[1], minlength=34_700)
    expected = [1e6 * share * one / one.sum() for share, one in zip(shares, values)]
    assert chi_square(counts, np.concatenate(expected)) < 1
    sets, own = mixed.places(np.arange(8 * 1024))
    per_block = np.stack([np.bincount(one, minlength=3) for one in sets.reshape(8, 1024)])
    assert np.abs(per_block - 1024 * np.array(shares)).max() <= 1
    for number in range(3):  # one place after another of its own order
        assert sorted(own[sets == number]) == list(range((sets == number).sum()))


def test_rare_parts_of_a_mix_come_evenly_over_a_cycle():
    orders = [Order([n], seed=0) for n in (1000, 10)]
    mixed = Interleaved(orders, [1000, 10], [1, 1e-4])
    sets, own = mixed.places(np.arange((1 << 24) - 1024, (1 << 24) + 1024))
    assert mixed.counts.tolist() == [16775538, 1678] and mixed.counts.sum() == 1 << 24
    rare = np.cumsum(mixed._sizes[:, 1])
    assert np.abs(rare - 1678 / 16384 * np.arange(1, 16385)).max() < 4
    assert own[sets == 0].max() - own[sets == 0].min() == (sets == 0).sum() - 1


def mixed_stream(**how):
    parts = [Numbers(21, bad=(4, 17)), Numbers(5, groups=[2, 3])]
    orders = [
        Order(parts[0].groups, seed=3, window=1, repeats=np.linspace(0, 2, 21)),
        Order(parts[1].groups, seed=3, window=1),
    ]
    order = Interleaved(orders, [21, 5], [3, 1])
    source = Mix(["one", "two"], parts)
    later = Change(24, parts[0], Order([21], seed=9, repeats=np.full(21, 1.5)))
    return Stream(source, transform, batch_size=12, order=order, changes=[later], **how)


@pytest.mark.parametrize("world, workers", [(2, 0), (3, 0), (1, 1), (1, 2), (1, 3)])
def test_a_mix_with_weights_and_a_change_is_the_same_on_any_ranks_and_workers(world, workers):
    plain = taken(mixed_stream(), 4)
    ranks = [taken(mixed_stream(rank=r, world=world, workers=workers), 4) for r in range(world)]
    for step, batch in enumerate(plain):
        keys = [rank[step]["key"] for rank in ranks]
        noise = np.concatenate([rank[step]["noise"] for rank in ranks])
        assert (
            list(itertools.chain(*keys)) == batch["key"] and (noise == batch["noise"].numpy()).all()
        )
    rest = taken(mixed_stream(), 2, consumed=24)
    assert_equal(plain[2:], rest)
    assert any(batch["bad"] for batch in plain)


def test_a_bad_image_of_a_mix_is_named_with_its_part_and_replaced_by_one_of_it():
    parts = [Numbers(30, bad=range(25)), Numbers(30)]
    order = Interleaved([Order([30], seed=0), Order([30], seed=0)], [30, 30], [1, 1])
    stream = Stream(Mix(["one", "two"], parts), transform, batch_size=256, order=order)
    (batch,) = taken(stream, 1)
    assert {key.partition("/")[0] for key in batch["key"]} == {"one", "two"}
    assert (
        sum(key.startswith("one/") for key in batch["key"])
        == (order.places(np.arange(256))[0] == 0).sum()
    )
    assert {bad["key"].partition("/")[0] for bad in batch["bad"]} == {"one"}


def test_a_streams_fingerprint_covers_the_changes_that_have_begun_and_no_others():
    source, order = Numbers(9), Order([9], seed=0)
    change = Change(6, source, Order([9], seed=1))
    make = lambda *changes: Stream(source, transform, batch_size=3, order=order, changes=changes)
    plain, other = make(), make(change)
    assert [plain.fingerprint(p) == other.fingerprint(p) for p in (0, 3, 6, 7)] == [1, 1, 1, 0]
    moved = make(change._replace(position=9))
    assert moved.fingerprint(12) not in (plain.fingerprint(12), other.fingerprint(12))


def test_an_epoch_that_no_number_holds_is_refused():
    with pytest.raises(ValueError, match="data.train: .* images are more than an epoch can hold"):
        Order([1 << 62, 1 << 62], seed=0)
    halves = [Order([1 << 62], seed=0), Order([1 << 62], seed=0)]
    with pytest.raises(ValueError, match="data.train: .* images are more than an epoch can hold"):
        Interleaved(halves, [1 << 62, 1 << 62], [1, 1])
    with pytest.raises(ValueError, match="weights: their sum, 6e\\+14, is no length of an epoch"):
        Order([3], seed=0, repeats=np.full(3, 2e14))
    with pytest.raises(ValueError, match="weights: their sum, .*, is no length of an epoch"):
        Order([3], seed=0, repeats=np.full(3, 1e300))


@pytest.fixture
def crawl(tmp_path, monkeypatch):
    """Two shards of 3 and 2 images, and a folder of weights beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREPRETRAIN_DATA", raising=False)
    for number, names in enumerate((("a", "b", "c"), ("d", "e"))):
        path = tmp_path / "data" / "crawl" / f"{number:05d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tar(path, flat(*(sample(name) for name in names)))
    write_keep(tmp_path, 0, [1.0, 0.0, 1.39])
    write_keep(tmp_path, 1, [2.0, 1.61])
    (tmp_path / "datasets").mkdir()
    split = "{source: shards, path: crawl, keep: curated/keep}"
    (tmp_path / "datasets" / "crawl.yaml").write_text(f"train: {split}\nall: {split}\n")
    return tmp_path


def write_keep(place, number, values, **columns):
    values = np.asarray(values, np.float32)
    table = {
        "row": np.arange(len(values)),
        "keep": values != 0,
        "reason": [None if value else "blurred" for value in values.tolist()],
        "weight": values,
    }
    path = place / "data" / "curated" / "keep" / f"{number:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table | columns), path)


def crawled():
    return plugin.build("sources", "shards", path="data/crawl", keep="data/curated/keep")


def test_a_split_has_the_weights_of_the_files_beside_its_shards(crawl):
    source = crawled()
    np.testing.assert_array_equal(source.weights[:], np.float32([1, 0, 1.39, 2, 1.61]))
    order = Order(source.groups, seed=0, repeats=source.weights)
    counts = np.bincount(order(np.arange(order.length * 100))[1], minlength=5)
    assert order.length == 6 and counts[[0, 1, 3]].tolist() == [100, 0, 200]
    assert 125 < counts[2] < 153 and counts[2] + counts[4] == 300


def test_weights_of_many_images_are_read_into_a_file_once(crawl, on_disk):
    whole = crawled().weights[:]
    assert len(list(on_disk.glob("*.weights"))) == 1
    (crawl / "data/curated/keep/00001.parquet").touch()  # as old as its time says: read again
    np.testing.assert_array_equal(crawled().weights[:], whole)
    assert len(list(on_disk.glob("*.weights"))) == 2


def manifest(place, **changed):
    shards = [
        {"path": str(path), "bytes": path.stat().st_size, "samples": samples} | changed
        for path, samples in zip(sorted((place / "data/crawl").glob("*.tar")), (3, 2))
    ]
    (place / "data/curated/manifest.json").write_text(json.dumps({"shards": shards}))


KEEP = "curated/keep/0000[01].parquet"
BAD_WEIGHTS = {
    "negative": (
        lambda p: write_keep(p, 1, [2, -1]),
        f"{KEEP}: weight of row 1: -1.0 must be finite",
    ),
    "nan": (
        lambda p: write_keep(p, 1, [np.nan, 1]),
        f"{KEEP}: weight of row 0: nan must be finite",
    ),
    "shorter": (lambda p: write_keep(p, 0, [1, 1]), f"{KEEP}: has 2 rows, and its shard 3 samples"),
    "longer": (lambda p: write_keep(p, 1, [1] * 3), f"{KEEP}: has 3 rows, and its shard 2 samples"),
    "missing": (
        lambda p: (p / "data/curated/keep/00001.parquet").unlink(),
        f"{KEEP}: is missing, so .* is not of shard .*00001.tar",
    ),
    "mixed up": (
        lambda p: write_keep(p, 1, [1, 1], row=[1, 0]),
        f"{KEEP}: row of row 0: 1 must be a row for each sample in order",
    ),
    "kept at 0": (
        lambda p: write_keep(p, 1, [1, 1], keep=[True, False]),
        f"{KEEP}: weight of row 1: 1.0 must be 0 where keep is false",
    ),
    "no table": (
        lambda p: (p / "data/curated/keep/00001.parquet").write_bytes(b"no"),
        f"{KEEP}: cannot be read",
    ),
    "no weight": (
        lambda p: pq.write_table(
            pa.table({"keep": [True] * 2}), p / "data/curated/keep/00001.parquet"
        ),
        f"{KEEP}: cannot be read: .* needs the columns keep .bool. and weight",
    ),
    "all zero": (
        lambda p: [write_keep(p, n, [0] * (3 - n)) for n in (0, 1)],
        "curated/keep: all weights are 0, so no image is left",
    ),
    "other sizes": (lambda p: manifest(p, bytes=9), "manifest.json: is another's: .*00000.tar"),
    "other names": (lambda p: manifest(p, path="x.tar"), "manifest.json: is another's: .*x.tar"),
}


@pytest.mark.parametrize("damage, said", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_that_are_none_or_of_another_card_are_refused_by_file_and_row(crawl, damage, said):
    manifest(crawl)
    assert len(crawled().weights) == 5
    damage(crawl)
    with pytest.raises(ValueError, match=said):
        crawled()


TWO = "data.train=[{card: colours, share: 3}, {card: scenes, share: 1}]"
TAGGED = "objective={name: hashtag, vocabulary: tags.json}"


@pytest.mark.parametrize(
    "train, said",
    [
        ("[]", "data.train: is an empty list"),
        (
            "[{card: colours, share: 0}, {card: scenes, share: 0}]",
            "data.train: the shares of all parts",
        ),
        (
            "[{card: colours, share: -1}]",
            r"data.train\[0\].share: -1.* must be finite and at least 0",
        ),
        ("[{card: colours, share: .nan}]", r"data.train\[0\].share: nan must be finite"),
        ("[{card: colours}]", r"data.train\[0\].share: is missing"),
        ("[{card: colour, share: 1}]", "no card 'colour'. Did you mean 'colours'"),
        ("[{card: colours, share: 1, part: 2}]", r"data.train\[0\].part: unknown option"),
        ("[{card: colours, share: 1}, {card: empty, share: 1}]", "empty.* holds no image|no image"),
        (
            "[{card: colours, share: 1}, {card: scenes, share: 1e-9}]",
            r"\[1\].share: 1e-09 is less than",
        ),
    ],
)
def test_a_mix_that_cannot_be_is_refused_by_its_key(place, train, said):
    empty = place / "data" / "empty"
    empty.mkdir()
    write_tar(empty / "0.tar", [])
    (place / "datasets/empty.yaml").write_text("train: {source: shards, path: empty}\n")
    with pytest.raises(ValueError, match=said):
        launch("small.yaml", [f"data.train={train}"], dry_run=True)


def test_labels_that_mean_another_thing_in_another_part_are_refused(place):
    names = [mix.Part(card="colours"), mix.Part(card="scenes")]
    with pytest.raises(ValueError, match="the classes of scenes are not those of colours"):
        sources = [part.card.open(part.split) for part in names]
        mix.check_classes(names, sources, ["label"])
    mix.check_classes(names, sources, ["image"])


def test_a_plan_tells_the_share_and_the_epochs_of_each_part_of_a_mix(place, capsys):
    asked = [TWO, "length=2ep", "data.changes=[{from: 50%, train: scenes}]"]
    plan, source, order = Plan(config.load("small.yaml", asked), 1).open_data()
    assert plan.images == len(source) == 180 and order.length == 180
    told = plan.told()
    assert "mae on colours:train + scenes:train: 180 images" in told
    assert "colours:train: 75.00% of the images, 276 in all, 4.60 epochs of 60" in told
    assert "scenes:train: 25.00% of the images, 92 in all, 0.77 epochs of 120" in told
    assert "from 50% on: train=scenes" in told
    (change,) = plan.open_changes()
    assert change.position == 12 * 16 and len(change.source) == 120
    with pytest.raises(ValueError, match="data.subset: 10% of a mix"):
        Plan(config.load("small.yaml", [TWO, "data.subset=10%"]), 1)
    part = "data.train=[{card: colours, share: 1, subset: 10%}, {card: scenes, share: 1}]"
    assert Plan(config.load("small.yaml", [part]), 1).open_data()[0].part_images == (6, 120)


@pytest.mark.parametrize(
    "changes, said",
    [
        ("[{train: scenes}]", r"data.changes\[0\].from: is missing"),
        ("[{from: 3it, lr: 1}]", r"data.changes\[0\].lr: unknown key"),
        ("[{from: 12it, train: scenes}]", "12it is step 12; it must come after step 0, and before"),
        ("[{from: 6it, train: scenes}, {from: 5it, train: colours}]", r"\[1\].from: 5it is step 5"),
        ("[{from: 3it, train: nothing}]", r"data.changes\[0\]: no card 'nothing'"),
    ],
)
def test_a_change_of_the_data_that_cannot_be_is_refused_by_its_key(place, changes, said):
    with pytest.raises(ValueError, match=said):
        launch("small.yaml", [f"data.changes={changes}"], dry_run=True)


def losses(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def train(folder, *overrides):
    Path(folder).mkdir(parents=True, exist_ok=True)
    run.train(config.load("small.yaml", [*overrides, "length=8it"]), Path(folder))


def test_a_mix_whose_shares_change_is_bitwise_the_same_after_a_stop_and_only_as_declared(
    place, group
):
    change = (
        "data.changes=[{from: 5it, train: [{card: colours, share: 1}, {card: scenes, share: 9}]}]"
    )
    train("runs/plain", TWO)
    train("runs/whole", TWO, change)
    assert losses("runs/whole")[:5] == losses("runs/plain")[:5]
    assert losses("runs/whole")[5:] != losses("runs/plain")[5:]
    keep_steps("runs/plain", 4)
    train("runs/plain", TWO, change)  # declared of a step to come
    assert losses("runs/plain") == losses("runs/whole")
    with pytest.raises(ValueError, match="data.train: .*colours.* -> "):
        train("runs/plain", "data.train=scenes")


def keep_steps(folder, steps):
    """The run as it was after some of its steps."""
    for checkpoint in Path(folder, "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > steps:
            checkpoint.rename(Path(folder).parent / f"gone-{os.urandom(4).hex()}")


WEIGHTED = [
    "data.train=scenes",
    "data.resample={law: repeat_factor, epoch: 1.5, vocabulary: tags.json}",
    f"data.changes=[{{from: 3it, resample: null, train: {TWO[11:]}}}, {{from: 5it, train: colours}}]",
    "checkpoint.every=2it",
]


def _trained(rank: int, where: str, folder: str, deadly: int | None) -> None:
    """Trains, and says which pixels were at which position; killed as soon as it has met one."""
    os.chdir(where)
    distributed.init()
    forward = MAE.forward

    def told(self: MAE, batch: dict) -> dict:
        positions = batch.get("position", [])  # none in the example, by which FLOPs are counted
        with open(f"{folder}.{rank}.txt", "a") as file:
            for position, key, image in zip(positions, batch.get("key", []), batch["image"]):
                digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
                print(position, key, digest, file=file)
        if deadly in positions:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, batch)

    MAE.forward = told
    train(folder, *WEIGHTED)
    distributed.shutdown()


def read_images(folder):
    """What was at each position, over all processes and repeated steps; each position once."""
    lines = {line for file in Path().glob(f"{folder}.*.txt") for line in file.open()}
    images = {int(position): rest for position, *rest in map(str.split, lines)}
    assert len(images) == len(lines)
    return images


def _of_ranks(before, after):
    marks = [] if before == after else [pytest.mark.faults]
    return pytest.param(before, after, marks=marks)


@pytest.mark.parametrize("before, after", [_of_ranks(1, 1), _of_ranks(1, 2), _of_ranks(2, 1)])
def test_a_killed_run_goes_on_bitwise_through_weights_mixes_and_changes(place, before, after):
    processes(1, _trained, str(place), "runs/whole", None)
    with pytest.raises(RuntimeError):
        processes(before, _trained, str(place), "runs/killed", 48)
    assert max(read_images("runs/killed")) < 64
    processes(after, _trained, str(place), "runs/killed", None)
    whole, killed = read_images("runs/whole"), read_images("runs/killed")
    assert whole == killed and sorted(whole) == list(range(8 * 16))
    # other ranks add up in another order, and Adam makes much of rounding where a gradient is 0
    np.testing.assert_allclose(
        losses("runs/whole"), losses("runs/killed"), rtol=0 if before == after else 1e-5
    )
    if before == after:
        one, other = (Path(f"runs/{name}/export/model.safetensors") for name in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes()


def test_a_change_of_steps_that_were_trained_is_refused(place, group):
    train("runs/one")
    keep_steps("runs/one", 4)
    with pytest.raises(ValueError, match="data.train: is not what .* declare the change"):
        train("runs/one", "data.changes=[{from: 2it, train: scenes}]")


def test_the_hashtag_objectives_own_option_is_read_as_the_law_that_took_its_place(place, group):
    old = "objective={name: hashtag, vocabulary: tags.json, resample: 0.3}"
    asked = ["data.train=scenes", "model={encoder: vit_test8}"]
    law = "data.resample={by: hashtags, law: repeat_factor, t: 0.3, vocabulary: tags.json}"
    read = config.load("small.yaml", [old, *asked])
    assert config.plain(read) == config.plain(config.load("small.yaml", [TAGGED, law, *asked]))
    _, source, order = Plan(read, 1).open_data()
    assert order.parts()[-1] == digest_of_before(source)
    with pytest.raises(ValueError, match="objective.resample: 0.3 stands beside data.resample"):
        config.load("small.yaml", [old, law, *asked])
    with pytest.raises(ValueError, match="data.resample.t: 0.* must be finite and above 0"):
        zero = "objective={name: hashtag, vocabulary: tags.json, resample: 0}"
        Plan(config.load("small.yaml", [zero, *asked]), 1).open_data()


def digest_of_before(source):
    """What the fingerprint of a run of the objective's own option was made of."""
    vocabulary = Vocabulary.load("data/tags.json")
    rare = np.array([vocabulary.rarest(source.hashtags(i)) for i in range(len(source))])
    shares = np.array(vocabulary.counts) / vocabulary.images
    values = np.where(rare >= 0, np.maximum(1, np.sqrt(0.3 / shares))[rare], 0)
    return Order(source.groups, seed=0, repeats=values).parts()[-1]


def test_stage_two_trains_on_a_mix_whose_tags_were_counted_together(place):
    (place / "datasets/more.yaml").write_text(
        "train: {source: synthetic, images: 60, size: 40, seed: 1}\n"
    )
    both = mix.open_together("scenes+more:train")
    tags = [both.hashtags(i) for i in range(len(both))]
    Vocabulary.count(tags, source=both.fingerprint, min_count=2).save("data/both.json")
    asked = ["data.train=[{card: scenes, share: 1}, {card: more, share: 1}]"]
    asked += ["objective={name: hashtag, vocabulary: both.json}", "model.positions=learned"]
    asked += ["data.resample={law: inverse_sqrt, epoch: 1.5}"]
    first = Plan(config.load("small.yaml", asked), 1)
    plan, source, order = first.open_data()
    known = sum(bool(Vocabulary.load("data/both.json").ids(one)) for one in tags)
    assert abs(plan.images - 1.5 * known) <= 1 and plan.objective is first.objective
    assert source.key(0).startswith("scenes/") and source.key(120).startswith("more/")
    with pytest.raises(ValueError, match="was counted from data"):
        Plan(config.load("small.yaml", [*asked, "objective.vocabulary=tags.json"]), 1).open_data()


def test_a_mix_of_parts_without_what_an_objective_needs_is_refused(place):
    with pytest.raises(ValueError, match="data.train=scenes.colours: has no hashtags.* image"):
        mixed = "data.train=[{card: scenes, share: 1}, {card: colours, share: 1}]"
        Plan(config.load("small.yaml", [mixed, TAGGED, "model.positions=learned"]), 1).open_data()


def test_stage_one_repeats_images_of_rare_tags_by_the_cards_vocabulary(place):
    (place / "datasets/scenes.yaml").write_text(
        "vocabulary: tags.json\ntrain: {source: synthetic, images: 120, size: 40, seed: 0}\n"
    )
    law = "data.resample={law: repeat_factor, epoch: 1.5}"
    plan, _, order = Plan(config.load("small.yaml", ["data.train=scenes", law]), 1).open_data()
    assert plan.images == order.length == 180
    with pytest.raises(
        ValueError, match="data.resample.vocabulary: is missing.*hashtags.py colours"
    ):
        Plan(config.load("small.yaml", [law]), 1).open_data()


def test_bounds_of_one_image_find_it():
    assert isinstance(found := bounds.bounds(weights.of(np.array([3.0]))), Bounds)
    assert found.length == 3 and found.image_of(np.array([1, 3 << 24])).tolist() == [0, 0]
