"""A step never makes the host wait for a device; and read a step late, a run is what it was."""

import json
import os
import signal
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import processes, sees_a_gpu
from test_detection import HEAD as RCNN
from test_detection import STAGES
from test_faults import exported, poisoned, same
from test_text import BPE
from test_train import rows, train
from torch import Tag
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prepretrain import plugin
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.distributed import checkpoint, shard
from prepretrain.distributed import group as distributed
from prepretrain.models.dense import boxes
from prepretrain.models.export import save
from prepretrain.models.model import Model
from prepretrain.training import fit as loop
from prepretrain.training import optim
from prepretrain.training.feed import Feed
from prepretrain.training.outcome import Gradients, Outcome
from prepretrain.training.schedule import Schedule

VIT, SMALL = {"encoder": "vit_test8", "drop_path": 0.1}, {"decoder_width": 32, "decoder_heads": 2}
HEAD, NARROW = {"classes": 3}, {"channels": 8, "auxiliary_channels": 6}
MIXED = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "erasing": 0.5}
OBJECTIVES = {  # name: (objective, its options, its model)
    "mae": ("mae", SMALL, VIT),
    "simmim": ("simmim", {"decoder_depth": 1, "cell": 8}, {**VIT, "final_norm": False}),
    "simmim of windows": ("simmim", {"cell": 8}, {"encoder": "swinv2_test8"}),
    "feature_mae": (
        "feature_mae",
        {"teacher": "teacher", "teacher_options": {"image_size": 64}},
        VIT,
    ),
    "hashtag": ("hashtag", {"vocabulary": "tags.json"}, VIT),
    "clip": ("clip", {"chunk": 2}, {**VIT, "text": BPE}),
    "clip, sigmoid": ("clip", {"loss": "sigmoid"}, {**VIT, "text": BPE, "joint": {"bias": True}}),
    "lit": ("lit", {}, {**VIT, "text": BPE}),
    "classify": ("classify", MIXED, {**VIT, "head": HEAD}),
    "detection": (
        "detection",
        {"federated": 1},
        {**VIT, "head": {"name": "mask_rcnn", "classes": 3, "loss": "sigmoid", **RCNN}},
    ),
    "detection by stages": (
        "detection",
        {},
        {**STAGES, "head": {"name": "cascade_mask_rcnn", "classes": 3, **RCNN}},
    ),
    "classify, tokens": ("classify", {}, {**VIT, "head": {**HEAD, "pool": "mean"}}),
    "segmentation": (
        "segmentation",
        {},
        {
            **VIT,
            "depth": 4,
            "final_norm": False,
            "head": {"name": "upernet", "classes": 3, **NARROW},
        },
    ),
    "depth": ("depth", {"freeze": True}, {**VIT, "head": {"name": "linear_depth"}}),
    "video": (
        "video",
        {"draws": 2, **MIXED},
        {**VIT, "frames": 4, "final_norm": False, "head": {**HEAD, "pool": "mean", "norm": True}},
    ),
}
IMAGES, PARTS = 4, 2


@pytest.fixture
def parts(tmp_path, monkeypatch) -> None:
    """The current directory holds a teacher and a vocabulary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    furnish_parts()


def furnish_parts() -> None:
    """Makes what `parts` promises in the current directory."""
    model = Model(encoder="vit_test8")
    shard.initialise(model, 0)
    save(model, Path("teacher"), "made by the tests")
    Vocabulary(["cat", "sea"], [5, 4], source="abc", images=9, min_count=1).save(Path("tags.json"))


def built(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """An objective on the meta device, and a batch for it on the CPU."""
    objective, options, model = OBJECTIVES[name]
    options = dict(options)
    if objective == "detection":
        pytest.importorskip("faster_coco_eval")
    if objective == "feature_mae":
        options |= {"decoder_depth": 1, "resample": True, **SMALL}
    with torch.device("meta"):
        made = plugin.build("objectives", objective, Model(**model), **options)
    tops = {"image": 256, "tags": 2, "cut": 2, "label": 3, "tokens": 400}
    tops |= {"classes": 3, "seed": 2**62, "bits": 256, "label_map": 3, "clip": 256}
    side = made.model.encoder.image_size[0]
    values = {
        "noise": torch.rand,
        "depth": lambda shape: torch.rand(shape) * 9 + 0.5,
        "size": lambda shape: torch.full(shape, side),
        "boxes": lambda shape: torch.rand(shape).sort(-1).values * side,
    }
    batch = {
        k: values[k](v.shape) if k in values else torch.randint(tops[k], v.shape).to(v.dtype)
        for k, v in made.example(IMAGES).items()
    }
    if "classes" in batch:
        batch["classes"][1:, 3:] = -1
        batch["classes"][-1] = -1
    return made, batch | {"key": [""] * IMAGES, "position": [0] * IMAGES, "bad": []}


class Waits(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU: values that it reads, shapes that
    depend on values, and copies from its own memory that is not pinned."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.seen = device, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        by_numbers = func is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.int64
        if {Tag.data_dependent_output, Tag.dynamic_output_shape} & {*func.tags} and not by_numbers:
            self.seen[str(func)] += 1
        crosses = {t.device.type for t in made} == {self.device} != {t.device.type for t in given}
        crosses &= any(t.device.type == "cpu" and t.dim() for t in given)
        # a number that is assigned by index lies on the host where the device is a GPU
        if crosses or (func is torch.ops.aten.index_put_.default and not args[2].dim()):
            self.seen[f"{func} from the host"] += 1
        return result


class Ready:
    """Stands in for a Stream: one batch for ever, and something to do before each."""

    fingerprint, accumulate, max_bad, batch_size = "ready", PARTS, 0.01, IMAGES * PARTS

    def __init__(self, batch: dict, before=lambda number: None):
        self.batch, self.before = batch, before

    def batches(self, consumed: int = 0):
        number = 0
        while True:
            self.before(number)
            yield dict(self.batch)
            number += 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_the_loop_reads_nothing_of_its_tensors_on_the_host(
    name, parts, group, monkeypatch
):
    monkeypatch.setattr(loop, "_reads_late", lambda: True)
    monkeypatch.setattr(boxes, "counts_freely", lambda tensor: False)
    objective, batch = built(name)
    shard.shard(objective, precision="fp32")
    objective.prepare(lambda module: shard.shard(module, precision="fp32"))
    shard.initialise(objective, 0)
    waits = Waits("cpu")

    def before(number: int) -> None:
        if number == 2 * PARTS:
            waits.__enter__()
        elif number == 4 * PARTS:
            waits.__exit__(None, None, None)

    optimizer = optim.build(objective, lr=1e-3, weight_decay=0.05, ema=0.99)
    how = {"folder": Path(), "seed": 0, "options": {}, "clip": 0.1, "log_every": 1}
    how |= {"save_every": None}
    loop.fit(objective, Ready(batch, before), optimizer, Schedule(1e-3, 5), **how)
    assert len(rows(Path())) == 5
    assert not waits.seen


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "detection by stages"])
def test_a_step_stays_on_its_device(name, parts, group, monkeypatch):
    # "lazy" is the one kind of device besides the CPU that autograd knows without a driver
    device = torch.device("lazy")
    monkeypatch.setattr(distributed, "device", lambda: device)
    monkeypatch.setattr(torch, "lazy", torch.cpu, raising=False)  # recomputation asks for it
    monkeypatch.setattr(
        sys.modules["torch.optim.optimizer"],
        "_get_fused_kernels_supported_devices",
        lambda: ["lazy"],
    )
    objective, batch = built(name)
    for module in (objective, *objective.frozen()):
        shard.wrap(module)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in (objective, *objective.frozen()):
            shard.materialise(module)
        optimizer = optim.build(objective, lr=1e-3, weight_decay=0.05, ema=0.99)
        gradients = Gradients([p for one in optimizer.param_groups for p in one["params"]])
        there = {
            k: fake.from_tensor(v[:2]).to(device) if hasattr(v, "to") else v
            for k, v in batch.items()
        }
        feed = Feed(Ready(there).batches(), nullcontext)
        for number in range(2):
            with Waits("lazy") if number else nullcontext() as waits:  # the first makes the state
                figures, *_ = loop._gradients(objective, feed, PARTS)
                outcome = Outcome(figures, gradients.norms(), stop=False, bad=1)
                left_out = outcome.left_out(3.0)
                gradients.clip(outcome.norm, 0.1)
                optim.step(optimizer, left_out)
                optimizer.zero_grad()
    assert not waits.seen
    assert outcome.row.device == device and outcome.norm.device == device


def test_the_two_tests_above_would_see_a_wait():
    with Waits("cpu") as waits:
        values = torch.tensor([1.0, 0.0])
        assert float(values[0]) and values[0] > 0
        values.nonzero()
        values[values > 0]
        values[torch.tensor([1, 0])]
        values[torch.tensor([1, 0])] = 2.0
    assert sum(waits.seen.values()) == 5
    with FakeTensorMode(), Waits("lazy") as waits:
        there = torch.zeros(2, device="lazy")
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            float(there[0])
        assert not waits.seen
        torch.tensor([1.0, 0.0], device="lazy")
        there.copy_(torch.zeros(2))
        with pytest.raises(RuntimeError, match="device"):
            there + torch.zeros(2)
    assert sum(waits.seen.values()) == 2


KNN = "evaluators=[{name: knn, data: colours, every: 5it, pool: mean, k: 3}]"
LATE = {  # what is read a step late, and what it decides
    "plain": ["log_every=3it", "optim={ema: 0.9, clip: 0.1}", "checkpoint.every=5it", KNN],
    "skipped": [
        poisoned("inner", 88, 88),
        "numerics.skip=1",
        "batch_per_process=8",
        "optim.ema=0.9",
    ],
    "rolled back": [poisoned("nan", 80, 111), "numerics={skip: 1, rollbacks: 1}"],
    "spikes": [poisoned("large", 96, 111), "numerics={window: 4, skip_spikes: true}"],
    "sgd": [poisoned("nan", 0, 15), "numerics.skip=1", "optim={name: sgd, ema: 0.9}"],
}


def told(folder: str) -> tuple[list[dict], list[dict]]:
    """A run's metrics, and its dumps but for the gradients, which are none."""
    dumps = [
        json.loads(path.read_text()) for path in sorted(Path(folder).glob("dumps/*/dump.json"))
    ]
    return rows(folder), dumps


def tensors(folder: str) -> list[dict]:
    """The tensors of all of a run's checkpoints, and of those in its dumps."""
    found = sorted({*checkpoint.listed(Path(folder)), *Path(folder).glob("dumps/*/checkpoints/0*")})
    opened = [checkpoint.open_tensors(path) for path in found]
    return [{name: get(name) for name in names} for names, get, _ in opened]


SLOW = ("plain", "skipped")  # of which the others and two processes have what matters most


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=[pytest.mark.faults] if k in SLOW else []) for k in LATE]
)
def test_a_run_whose_figures_are_read_a_step_late_is_the_same(name, place, group, monkeypatch):
    train("runs/once", *LATE[name])
    monkeypatch.setattr(loop, "_reads_late", lambda: True)
    train("runs/late", *LATE[name])
    assert str(told("runs/late")) == str(told("runs/once"))  # as text, in which nan is nan
    assert same(exported("runs/late"), exported("runs/once"))
    pairs = list(zip(tensors("runs/late"), tensors("runs/once"), strict=True))
    assert pairs and all(same(*pair) for pair in pairs)


def test_a_step_that_is_not_finite_ends_a_run_that_reads_late_before_the_weights_change(
    place, group, monkeypatch
):
    train("runs/five", "length=12it", "optim.warmup=2it", "checkpoint.every=5it")
    monkeypatch.setattr(loop, "_reads_late", lambda: True)
    steps, weights, plain = [], [], optim.step

    def watched(optimizer, left_out):
        plain(optimizer, left_out)
        steps.append(left_out.item())
        weights.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])

    monkeypatch.setattr(optim, "step", watched)
    given = [poisoned("nan", 80, 95), "checkpoint.every=5it"]
    with pytest.raises(FloatingPointError, match="step 6 is not finite.*are those of step 5"):
        train("runs/a", *given)
    assert steps == [0.0] * 5 + [1.0]  # the seventh was computed, and never taken
    assert all(torch.equal(*pair) for pair in zip(weights[4], weights[5]))
    assert [p.name for p in checkpoint.listed(Path("runs/a"))] == ["000000005"]
    assert [row["step"] for row in rows("runs/a")] == [1, 2, 3, 4, 5]
    assert [p.name for p in Path("runs/a/dumps").iterdir()] == ["000000006"]


def _late_in_two(rank: int, where: str) -> None:
    os.chdir(where)
    distributed.init()
    for name, late in (("late", True), ("once", False)):
        loop._reads_late = lambda late=late: late
        skip = [poisoned("nan", 80, 95, rank=1), "numerics.skip=1", "shard.group=null"]
        train(f"runs/{name}_skipped", *skip, "optim.ema=0.9")
        back = [poisoned("nan", 80, 95, rank=1), "numerics.rollbacks=1", "shard.group=1"]
        train(f"runs/{name}_back", *back)
    distributed.shutdown()


def test_two_processes_that_read_late_agree_on_what_one_of_them_alone_met(place):
    processes(2, _late_in_two, str(place))
    for how in ("skipped", "back"):
        assert str(told(f"runs/late_{how}")) == str(told(f"runs/once_{how}"))
        assert same(exported(f"runs/late_{how}"), exported(f"runs/once_{how}"))
    (dump,) = told("runs/late_skipped")[1]
    losses = [process["figures"]["loss"] for process in dump["processes"]]
    assert isinstance(losses[0], float) and losses[1] == "nan"


def test_a_signal_stops_a_run_that_reads_late_a_step_later_and_all_is_saved(
    place, group, monkeypatch
):
    monkeypatch.setattr(loop, "_reads_late", lambda: True)
    plain, asked = loop.seed_all, []

    def noted(seed, step):
        plain(seed, step)
        asked.append(step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "seed_all", noted)
    with pytest.raises(loop.Stopped, match="after step 6 and saved"):
        train("runs/a", "checkpoint.every=20it", "length=20it")
    assert asked[-1] == 5 and [row["step"] for row in rows("runs/a")] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in checkpoint.listed(Path("runs/a"))] == ["000000006"]


def adam(sharded: bool) -> list[torch.Tensor]:
    """Weights and state after steps of which one is left out: of ours, and of torch's own class."""
    objective, batch = built("mae")
    shard.shard(objective, precision="fp32", group=None if sharded else 1)
    shard.initialise(objective, 0)
    ours = optim.build(objective, lr=1e-2, weight_decay=0.05)
    kind = torch.optim.AdamW
    groups = [{k: v for k, v in one.items() if k != "lr_scale"} for one in ours.param_groups]
    theirs = kind(groups, fused=True)
    found = []
    for optimizer in (ours, theirs):
        shard.initialise(objective, 0)
        for number in range(3):
            torch.manual_seed(number)
            objective.eval()(batch)["loss"].backward()
            optim.step(optimizer, torch.tensor(float(number == 1)))
            optimizer.zero_grad()
        kept = [dict(optimizer.state[p]) for p in objective.parameters() if p in optimizer.state]
        found.append((kept, [p.detach().clone() for p in objective.parameters()]))
    return found


def _adam_in_two(rank: int) -> None:
    distributed.init()
    for sharded in (True, False):
        (state, weights), (same_state, same_weights) = adam(sharded)
        for one, two in zip(state, same_state, strict=True):
            assert one.keys() == two.keys() and float(one["step"]) == float(two["step"]) == 2
            for name in one:
                assert type(one[name]) is type(two[name])  # sharded as the parameter is
                assert torch.equal(distributed.local(one[name]), distributed.local(two[name]))
        for one, two in zip(weights, same_weights, strict=True):
            assert torch.equal(distributed.local(one), distributed.local(two))
    distributed.shutdown()


def test_adamw_on_the_shards_is_torchs_on_dtensors_bitwise_and_so_is_what_it_keeps():
    processes(2, _adam_in_two)


def test_batches_are_asked_for_ahead_on_a_gpu_alone_and_come_in_order(monkeypatch):
    asked = []

    def numbered():
        for number in range(9):
            asked.append(number)
            yield {"image": torch.tensor([number]), "key": [str(number)]}

    feed = Feed(numbered(), nullcontext)
    assert feed.take()["key"] == ["0"]
    feed.prepare()
    assert asked == [0]
    monkeypatch.setattr(distributed, "on_gpu", lambda: True)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    for name in ("Stream", "stream", "current_stream"):  # a CPU's do nothing
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cpu, name))
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda value, stream: kept.append(value))
    asked.clear()
    feed = Feed(numbered(), nullcontext)
    assert feed.take()["key"] == ["0"] and asked == [0]
    feed.prepare()
    assert asked == [0, 1]
    assert [feed.take()["key"] for _ in range(2)] == [["1"], ["2"]] and len(kept) == 3


@pytest.mark.skipif(not sees_a_gpu(), reason="needs a GPU")
def test_a_gpu_finds_each_batch_whole(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", sees_a_gpu)

    def pinned():
        for number in range(40):
            yield {"image": torch.full((1 << 22,), number, dtype=torch.uint8).pin_memory()}

    feed = Feed(pinned(), nullcontext)
    sums = []
    for _ in range(39):
        image = feed.take()["image"]
        sums.append(image.long().sum())
        feed.prepare()
    assert [int(value) >> 22 for value in sums] == list(range(39))
