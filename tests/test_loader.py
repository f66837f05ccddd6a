import errno
import hashlib
import itertools
import multiprocessing
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import processes

from prepretrain.data.batch import Ragged, collate
from prepretrain.data.loader import Stream, evaluation_batches
from prepretrain.data.order import Order, permute
from prepretrain.data.random import Random
from prepretrain.data.sources.base import Source
from prepretrain.data.subset import Subset
from prepretrain.data.transforms import BadImage


class Numbers(Source):
    """Images that are their own number, some of them bad."""

    def __init__(self, n, groups=None, bad=()):
        self.groups = groups or [n]
        self.bad = set(bad)
        self.fingerprint = f"numbers-{n}"

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImage("unreadable", key=f"k{index}")
        return {"key": f"k{index}", "image": bytes([index % 256]), "label": index}


def transform(sample):
    rng = sample["random"]
    return {
        "image": torch.full((3, 4, 4), sample["image"][0], dtype=torch.uint8),
        "noise": torch.from_numpy(rng("mask").random(5)),
        "label": sample["label"],
        "tags": Ragged(torch.arange(sample["label"] % 3), fill=-1),
        "text": sample["key"] + ("!" if rng("caption").random() < 0.5 else "?"),
    }


def taken(stream, count, consumed=0):
    return list(itertools.islice(stream.batches(consumed), count))


def merged(batches):
    """The parts of one global batch, as one."""
    out = {}
    for name in batches[0]:
        values = [batch[name] for batch in batches]
        if isinstance(values[0], torch.Tensor):
            # Ragged fields are padded to the longest of their own part.
            width = max(v.shape[-1] for v in values)
            pad = lambda v: torch.nn.functional.pad(v, (0, width - v.shape[-1]), value=-1)
            out[name] = torch.cat([pad(v) if v.ndim == 2 else v for v in values])
        else:
            out[name] = sum(values, [])
    return out


def global_batches(
    source,
    count,
    *,
    world=1,
    accumulate=1,
    workers=0,
    consumed=0,
    seed=3,
    size=8,
    window=0,
    repeats=None,
):
    ranks = [
        taken(
            Stream(
                source,
                transform,
                batch_size=size,
                seed=seed,
                accumulate=accumulate,
                workers=workers,
                window=window,
                repeats=repeats,
                rank=rank,
                world=world,
            ),
            count * accumulate,
            consumed,
        )
        for rank in range(world)
    ]
    return [
        merged(
            [ranks[r][step * accumulate + part] for r in range(world) for part in range(accumulate)]
        )
        for step in range(count)
    ]


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            same = torch.equal if isinstance(a[name], torch.Tensor) else lambda x, y: x == y
            assert same(a[name], b[name]), name


@pytest.mark.parametrize(
    "world, accumulate, workers",
    [
        (1, 1, 1),
        (1, 1, 2),
        (1, 1, 3),
        (2, 1, 0),
        (2, 1, 2),
        (4, 1, 0),
        (4, 1, 1),
        (2, 2, 3),
        (1, 4, 0),
        (4, 2, 0),
    ],
)
def test_global_batches_are_the_same_for_any_number_of_ranks_and_workers(
    world, accumulate, workers
):
    source = Numbers(21, bad=(4, 17))
    plain = global_batches(source, 6)
    split = global_batches(source, 6, world=world, accumulate=accumulate, workers=workers)
    assert_equal(plain, split)
    assert any(batch["bad"] for batch in plain)


@pytest.mark.parametrize("consumed", [0, 8, 16, 13, 21, 24, 1_000_003])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_at_exactly_the_next_image(consumed, workers):
    source = Numbers(21, bad=(4,))
    stream = lambda: Stream(source, transform, batch_size=8, seed=0, workers=workers)
    whole = taken(stream(), 6, consumed)
    rest = taken(stream(), 4, consumed + 16)
    assert_equal(whole[2:], rest)
    assert whole[0]["position"] == list(range(consumed, consumed + 8))


@pytest.mark.parametrize("window", [0, 1, 2, 5])
@pytest.mark.parametrize("groups", [[23], [5, 0, 9, 1, 8], [1] * 23])
def test_an_epoch_holds_every_image_once_also_across_its_end(groups, window):
    order = Order(groups, seed=1, window=window)
    epochs, indexes, copies = order(np.arange(23 * 3))
    assert (epochs == np.arange(69) // 23).all()
    for epoch in range(3):
        assert sorted(indexes[epochs == epoch]) == list(range(23))
    assert not (indexes[:23] == indexes[23:46]).all()
    one_by_one = [int(order(np.array([p]))[1][0]) for p in range(69)]
    assert one_by_one == indexes.tolist()


REPEATS = {
    "whole": np.array([0, 1, 2, 5] * 5 + [0, 1, 3.0]),
    "shares": np.linspace(0, 2.2, 23),
    "mixed": np.array([0.25, 1, 0, 0.5, 1.75, 2] * 3 + [1e-9, 1 - 1e-9, 1, 3.5, 0]),
    "little": np.array([0.0] * 20 + [0.2, 0.3, 0.1]),
}


@pytest.mark.parametrize("groups, window", [([23], 0), ([5, 0, 9, 1, 8], 2), ([1] * 23, 5)])
@pytest.mark.parametrize("repeats", REPEATS.values(), ids=REPEATS.keys())
def test_an_epoch_holds_every_image_as_often_as_asked_for(repeats, groups, window):
    order = Order(groups, seed=1, window=window, repeats=repeats)
    assert abs(order.length - repeats.sum()) < 1
    epochs, indexes, copies = order(np.arange(order.length * 9))
    counts = np.stack([np.bincount(indexes[epochs == e], minlength=23) for e in range(9)])
    assert (np.abs(counts - repeats) <= 1).all() and (counts.sum(1) == order.length).all()
    whole = repeats == np.floor(repeats)
    assert (counts[:, whole] == repeats[whole]).all()
    for epoch in range(9):
        places = zip(indexes[epochs == epoch].tolist(), copies[epochs == epoch].tolist())
        assert sorted(places) == [(i, c) for i in range(23) for c in range(counts[epoch, i])]
    one_by_one = [[int(part[0]) for part in order(np.array([p]))] for p in range(9)]
    assert one_by_one == np.stack([epochs, indexes, copies], 1)[:9].tolist()


def test_images_come_as_often_as_asked_for_on_average():
    repeats = np.random.default_rng(0).uniform(0, 3, 500)
    order = Order([500], seed=0, repeats=repeats)
    counts = np.bincount(order(np.arange(order.length * 600))[1], minlength=500) / 600
    assert np.abs(counts - repeats).max() < 0.08  # four deviations of a share of one half


@pytest.mark.parametrize("window", [0, 3])
def test_an_order_in_which_each_image_comes_once_is_the_one_without_repeats(window):
    groups, positions = [50, 0, 30, 20], np.arange(300)
    plain = Order(groups, seed=5, window=window)(positions)
    once = Order(groups, seed=5, window=window, repeats=np.ones(100))(positions)
    assert all((a == b).all() for a, b in zip(plain, once))


def test_sums_of_many_repeats_lose_no_image():
    repeats = np.where(np.arange(300_000) % 3, 1.0, 0.1)
    repeats[-2] = 0  # a sum of 199,999 whole ones and of 100,000 times 0.1
    order = Order([300_000], seed=0, repeats=repeats)
    _, indexes, _ = order(np.arange(order.length))
    counts = np.bincount(indexes, minlength=300_000)
    assert order.length == 209_999 and counts.max() == 1
    assert (counts[repeats == 1] == 1).all() and counts[-2] == 0


@pytest.mark.parametrize(
    "repeats, message",
    [
        (np.ones(4), r"weights: there are 4, and there are 5 images"),
        (np.array([1, 1, -0.5, 1, 1]), r"weights\[2\]: -0.5 must be finite and at least 0"),
        (np.array([1, 1, 1, np.nan, 1]), r"weights\[3\]: nan"),
        (np.zeros(5), "sum, 0, is no length"),
    ],
)
def test_repeats_that_make_no_order_are_refused(repeats, message):
    with pytest.raises(ValueError, match=message):
        Order([5], seed=0, repeats=repeats)


@pytest.mark.parametrize("world, accumulate, workers", [(1, 1, 2), (2, 2, 0), (4, 1, 0)])
def test_batches_with_repeats_are_the_same_for_any_number_of_ranks_and_from_any_image_on(
    world, accumulate, workers
):
    source, repeats = Numbers(23, groups=[5, 0, 9, 1, 8], bad=(4, 17)), REPEATS["mixed"]
    given = {"window": 2, "repeats": repeats}
    plain = global_batches(source, 6, **given)
    how = {"world": world, "accumulate": accumulate, "workers": workers}
    assert_equal(plain, global_batches(source, 6, **given, **how))
    assert_equal(plain[2:], global_batches(source, 4, consumed=16, **given, **how))  # mid-epoch
    taken_from = {key for batch in plain for key in batch["key"]}
    assert "k2" not in taken_from and any(batch["bad"] for batch in plain)


def test_copies_of_an_image_in_an_epoch_have_crops_and_masks_of_their_own():
    stream = Stream(Numbers(3), transform, batch_size=6, seed=0, repeats=np.array([1, 2, 3.0]))
    batch = next(stream.batches())
    assert sorted(batch["label"].tolist()) == [0, 1, 1, 2, 2, 2]
    assert len({tuple(noise) for noise in batch["noise"].tolist()}) == 6
    plain = next(Stream(Numbers(3), transform, batch_size=3, seed=0).batches())
    for label, noise in zip(plain["label"], plain["noise"]):
        assert (batch["noise"] == noise).all(1).sum() == 1  # a first copy is what it was
        assert batch["label"][(batch["noise"] == noise).all(1)] == label


def test_a_window_reads_from_few_shards_at_a_time():
    groups = [10] * 40
    _, indexes, _ = Order(groups, seed=0, window=4)(np.arange(400))
    shards = indexes // 10
    for start in range(0, 400, 40):
        assert len(set(shards[start : start + 40])) == 4
    assert len(set(shards[:10])) > 1


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 100, 1000, 1023, 1024, 1025, 99_991])
def test_the_permutation_is_exact_for_any_length(n):
    out = permute(np.arange(n), n, Random(0, 0, 0)("order"))
    assert sorted(out) == list(range(n))


def test_the_permutation_looks_random():
    orders = np.array([permute(np.arange(20), 20, Random(s, 0, 0)("order")) for s in range(4000)])
    counts = np.stack([np.bincount(column, minlength=20) for column in orders.T])
    assert counts.min() > 120 and counts.max() < 290
    long = permute(np.arange(100_000), 100_000, Random(0, 0, 0)("order"))
    assert abs(np.corrcoef(long[1:], long[:-1])[0, 1]) < 0.02
    assert (np.diff(long) == 1).sum() < 10


def test_billions_of_images_need_no_memory():
    order = Order([10_000_000_000], seed=0)
    _, indexes, _ = order(np.arange(5_000_000_000, 5_000_001_000))
    assert len(set(indexes.tolist())) == 1000
    assert 4e9 < indexes.mean() < 6e9


def test_bad_images_are_replaced_counted_and_named():
    batches = taken(Stream(Numbers(10, bad=(3,)), transform, batch_size=5, seed=0), 2)
    bad = batches[0]["bad"] + batches[1]["bad"]
    assert [(b["key"], b["cause"]) for b in bad] == [("k3", "unreadable")]
    at = (batches[0]["position"] + batches[1]["position"]).index(bad[0]["position"])
    keys = batches[0]["key"] + batches[1]["key"]
    assert len(keys) == 10 and "k3" not in keys and keys[at] in [f"k{i}" for i in range(10)]


def test_each_bad_image_of_an_epoch_has_a_substitute_of_its_own():
    stream = Stream(Numbers(500, bad=range(40)), transform, batch_size=500, seed=0)
    (batch,) = taken(stream, 1)
    replaced = {one["position"] for one in batch["bad"]}
    substitutes = [key for key, p in zip(batch["key"], batch["position"]) if p in replaced]
    assert len(substitutes) == 40 and len(set(substitutes)) > 30  # one in ten may meet another


def test_data_that_is_all_bad_stops_the_stream():
    stream = Stream(Numbers(4, bad=range(4)), transform, batch_size=4, seed=0)
    with pytest.raises(RuntimeError, match="100 bad images in a row"):
        next(stream.batches())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_transform_is_counted_by_its_name_and_stops_what_always_fails(workers):
    def broken(sample):
        if sample["label"] != 3:
            return transform(sample)
        raise ZeroDivisionError("of the user's")

    def always(sample):
        raise KeyError("colour")

    stream = lambda how: Stream(Numbers(8), how, batch_size=8, seed=0, workers=workers).batches()
    (bad,) = [one for one in next(stream(broken))["bad"]]
    assert (bad["cause"], bad["key"]) == ("ZeroDivisionError in the transform", "k3")
    assert bad["detail"] == "of the user's"
    with pytest.raises(RuntimeError, match="k[0-9]+: KeyError in the transform: 'colour'"):
        next(stream(always))


class Failing(Numbers):
    """Numbers of which one raises an error when it is read."""

    def __init__(self, error):
        super().__init__(8)
        self.error = error

    def __getitem__(self, index):
        if index == 3:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "error, cause",
    [
        (RecursionError("deep"), "RecursionError in the source"),
        (FileNotFoundError(errno.ENOENT, "gone"), "FileNotFoundError in the source"),
        (OSError("image file is truncated"), "OSError in the source"),
        (MemoryError("full"), None),
        (OSError(errno.EIO, "the disk"), None),
        (OSError(errno.EMFILE, "too many files"), None),
    ],
)
def test_no_image_ends_a_run_and_the_machines_own_errors_do(error, cause):
    stream = Stream(Failing(error), transform, batch_size=8, seed=0)
    if cause is None:
        with pytest.raises(RuntimeError, match=f"image 3: {type(error).__name__}"):
            next(stream.batches())
    else:
        assert [one["cause"] for one in next(stream.batches())["bad"]] == [cause]
    with pytest.raises((ValueError, RuntimeError), match="image 3"):
        list(evaluation_batches(Failing(error), transform, batch_size=4))


def test_a_sample_without_a_field_that_is_asked_for_is_a_bad_image():
    class Unlabelled(Numbers):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample if index != 3 else {k: v for k, v in sample.items() if k != "label"}

    batch = next(Stream(Unlabelled(8), transform, batch_size=8, seed=0).batches())
    assert [(one["key"], one["cause"]) for one in batch["bad"]] == [("k3", "no label")]


def test_a_batch_that_cannot_be_shared_out_is_refused_with_a_size_that_can():
    with pytest.raises(ValueError, match="batch_size: 10 .* 4 processes x 2 parts.* multiple of 8"):
        Stream(Numbers(9), transform, batch_size=10, seed=0, accumulate=2, rank=0, world=4)


def test_a_source_without_images_is_refused():
    with pytest.raises(ValueError, match="no image"):
        Stream(Numbers(0, groups=[0]), transform, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="no image"):
        evaluation_batches(Numbers(0, groups=[0]), transform, batch_size=4)


def test_the_stream_says_which_order_it_is():
    make = lambda n=9, seed=0, **k: Stream(Numbers(n), transform, batch_size=3, seed=seed, **k)
    assert make().fingerprint() == make(workers=2, accumulate=3).fingerprint()
    assert (
        len(
            {
                make().fingerprint(),
                make(n=8).fingerprint(),
                make(seed=1).fingerprint(),
                make(window=1).fingerprint(),
                make(repeats=np.ones(9)).fingerprint(),
                make(repeats=np.full(9, 2.0)).fingerprint(),
            }
        )
        == 6
    )
    assert make().length == 9
    assert [make().epoch_of(p) for p in (0, 8, 9, 27)] == [0, 0, 1, 3]
    twice = make(repeats=np.full(9, 2.0))
    assert twice.length == 18 and twice.epoch_of(17) == 0


@pytest.mark.parametrize(
    "n, world, size, workers",
    [(10, 1, 4, 0), (10, 3, 4, 0), (11, 4, 2, 1), (3, 4, 8, 0), (1, 2, 5, 0), (9, 2, 256, 2)],
)
def test_an_evaluation_counts_each_image_once_with_as_many_batches_on_each_rank(
    n, world, size, workers
):
    ranks = [
        list(
            evaluation_batches(
                Numbers(n), transform, batch_size=size, workers=workers, rank=rank, world=world
            )
        )
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for batch in itertools.chain(*ranks):
        rows = len(batch["mask"])
        assert all(len(batch[name]) == rows for name in ("image", "label", "key", "position"))
        assert batch["mask"].dtype == torch.bool
        seen += batch["label"][batch["mask"]].tolist()
        assert [p >= 0 for p in batch["position"]] == batch["mask"].tolist()
    assert seen == list(range(n))


@pytest.mark.parametrize("size, started", [(8, 0), (4, 2), (2, 3)])
def test_an_evaluation_starts_no_more_workers_than_it_has_batches_and_none_for_one(size, started):
    before = len(multiprocessing.active_children())
    batches = evaluation_batches(Numbers(8), transform, batch_size=size, workers=3)
    next(batches)
    assert len(multiprocessing.active_children()) - before == started
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_never_replaces_a_bad_image(workers):
    with pytest.raises(ValueError, match="k3: unreadable.* counts every image"):
        list(evaluation_batches(Numbers(6, bad=(3,)), transform, batch_size=4, workers=workers))


def test_collate_stacks_pads_and_lists():
    batch = collate(
        [
            {"x": torch.zeros(2), "n": 1, "tags": Ragged(torch.tensor([5, 6]), -1), "s": "a"},
            {"x": torch.ones(2), "n": 2, "tags": Ragged(torch.arange(0), -1), "s": "b"},
        ]
    )
    assert batch["x"].tolist() == [[0, 0], [1, 1]]
    assert batch["n"].dtype == torch.int64 and batch["n"].tolist() == [1, 2]
    assert batch["tags"].dtype == torch.int64 and batch["tags"].tolist() == [[5, 6], [-1, -1]]
    assert batch["s"] == ["a", "b"]
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    assert torch.equal(collate([{"image": image} for image in images])["image"], images)


class Boxed:
    """A sample to an image of its own size, and as many boxes and masks as its label says."""

    def __init__(self, objects):
        self.objects = objects

    def __call__(self, sample):
        label, count = sample["label"], self.objects[sample["label"]]
        return {
            "image": Ragged(torch.full((3, 4 + label, 9 - label), label, dtype=torch.uint8), 255),
            "boxes": Ragged(torch.full((count, 4), label / 2), float("nan")),
            "masks": Ragged(torch.ones((count, 4 + label, 9 - label), dtype=torch.bool), False),
        }


@pytest.mark.parametrize("objects", [(2, 0, 3, 1), (0, 0, 0, 0)])
@pytest.mark.parametrize("workers", [0, 1])
def test_images_boxes_and_masks_of_different_sizes_are_padded_to_the_largest(objects, workers):
    twice = Subset(Numbers(4), [*range(4), *range(4)])  # workers do not start for one batch
    batch, _ = evaluation_batches(twice, Boxed(objects), batch_size=4, workers=workers)
    longest = max(1, *objects)
    assert batch["image"].shape == (4, 3, 7, 9) and batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["boxes"].shape == (4, longest, 4) and batch["boxes"].dtype == torch.float32
    assert batch["masks"].shape == (4, longest, 7, 9) and batch["masks"].dtype == torch.bool
    for row, count in enumerate(objects):
        height, width = 4 + row, 9 - row
        want = torch.full((3, 7, 9), 255, dtype=torch.uint8)
        want[:, :height, :width] = row
        assert torch.equal(batch["image"][row], want)
        assert (batch["boxes"][row, :count] == row / 2).all()
        assert batch["boxes"][row, count:].isnan().all()
        assert batch["masks"][row].sum() == count * height * width
        assert batch["masks"][row, :count, :height, :width].all()
    assert batch["image"].is_shared() == bool(workers)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"a": 1}, {"b": 1}], "fields"),
        ([{"a": 0.5}], "float"),
        ([{"a": ["x"]}], "list"),
        ([{"a": [1, 2]}], "a: list. A field is a tensor, a Ragged"),
        ([{"a": torch.zeros(2)}, {"a": 1}], "Tensor, int"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}], r"\(2,\).*\(3,\).*Ragged\(tensor, fill"),
        ([{"a": Ragged(torch.zeros(2), 0)}, {"a": Ragged(torch.zeros(2, 2), 0)}], "a: .*must be"),
        ([{"a": Ragged(torch.zeros(2), 0)}, {"a": Ragged(torch.zeros(2), 1)}], "a: .*must be"),
        (
            [{"a": Ragged(torch.zeros(2, dtype=torch.uint8), -1)}],
            "fill=-1, which is no torch.uint8",
        ),
    ],
)
def test_collate_refuses_what_is_no_batch(rows, message):
    with pytest.raises(ValueError, match=message):
        collate(rows)


def test_the_loader_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state()
    taken(Stream(Numbers(8), transform, batch_size=4, seed=0, workers=1), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_an_error_in_a_worker_ends_them_all_before_it_is_raised():
    def broken(sample: dict) -> dict:
        raise ValueError("no picture")

    for start in (
        lambda: Stream(Numbers(8), broken, batch_size=4, seed=0, workers=2).batches(),
        lambda: evaluation_batches(Numbers(8), broken, batch_size=4, workers=2),
    ):
        batches = start()
        assert len(multiprocessing.active_children()) == 2
        with pytest.raises((RuntimeError, ValueError), match="no picture"):
            next(batches)
        assert not multiprocessing.active_children()


def _leave_them(rank: int) -> None:
    _leave_them.loading = Stream(Numbers(8), transform, batch_size=4, seed=0, workers=2).batches()
    next(_leave_them.loading)


def test_a_process_ends_while_its_workers_are_still_loading():
    processes(1, _leave_them)  # or waits for ever
    script = (
        "import sys; sys.path[:0] = ['tests', '.']; import test_loader; test_loader._leave_them(0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_signal_to_the_group_asks_the_main_process_and_leaves_the_workers_alive():
    script = textwrap.dedent("""
        import os, signal, sys
        sys.path[:0] = ["tests", "."]
        from test_loader import Numbers, transform
        from prepretrain.data.loader import Stream
        asked = []
        signal.signal(signal.SIGUSR2, lambda *_: asked.append(1))
        signal.signal(signal.SIGTERM, lambda *_: asked.append(2))
        os.setpgrp()
        batches = Stream(Numbers(8), transform, batch_size=4, seed=0, workers=2).batches()
        next(batches)
        for number in (signal.SIGUSR2, signal.SIGTERM):
            os.killpg(0, number)
            for _ in range(20):
                next(batches)
        assert asked == [1, 2], asked
        print("served")
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.strip() == "served", done.stderr


def test_randomness_is_philox_keyed_by_seed_and_purpose_and_counted_by_epoch_image_and_copy():
    for seed, epoch, index, copy in ((0, 0, 0, 0), (7, 3, 1 << 40, 2), (-1, 1, 5, 0)):
        purpose = int.from_bytes(hashlib.blake2b(b"crop", digest_size=8).digest(), "little")
        key = purpose << 64 | seed & (1 << 64) - 1
        counter = epoch << 192 | index << 128 | copy << 64
        other = np.random.Generator(np.random.Philox(key=key, counter=counter))
        drawn = Random(seed, epoch, index, copy)("crop")
        assert drawn.random(9).tolist() == other.random(9).tolist()
