"""Whether a run fits: simulated steps against closed forms, real processes, and each other."""

import json
import os
from dataclasses import FrozenInstanceError
from functools import partial
from math import ceil
from pathlib import Path

import pytest
import torch
from conftest import command, processes

from prepretrain import config, plugin
from prepretrain.data.loader import loading
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.models.model import Model
from prepretrain.objectives.clip import CLIP
from prepretrain.objectives.mae import MAE
from prepretrain.runs import capacity, doctor, memory, run
from prepretrain.runs.plan import Plan, build_evaluator, build_objective
from prepretrain.training import optim


def build(encoder: str = "vit_test8") -> MAE:
    """A small MAE without storage; its position tables do not learn."""
    with torch.device("meta"):
        model = Model(encoder=encoder, positions="fixed")
        return MAE(model, decoder_depth=1, decoder_width=32, decoder_heads=2)


def rows(parameter: torch.Tensor, group: int) -> int:
    """Numbers of a parameter that process 0 keeps: the first of `group` parts along its first
    dimension, or along another that divides evenly where the first is shorter than the group."""
    if len(parameter) < group and any(length % group == 0 for length in parameter.shape):
        return parameter.numel() // group
    return ceil(len(parameter) / group) * parameter[0].numel()


@pytest.mark.parametrize("world, group", [(1, None), (8, None), (8, 2), (8, 1)])
def test_weights_gradients_and_moments_are_those_of_a_shard_to_the_byte(world, group):
    inside = min(group or world, world)
    objective = build()
    trained = [p for p in objective.parameters() if p.requires_grad]
    found = memory.simulate(build, images=2, world=world, group=group).bytes
    state = sum(rows(p, inside) for p in trained) * 4
    buffers = sum(b.numel() for b in objective.buffers())  # a process has them whole
    weights = sum(rows(p, inside) for p in objective.parameters())
    assert found["parameters"] == (weights + buffers) * 4
    assert found["gradients"] == state
    assert found["optimizer"] == 2 * state + 4 * len(trained)  # AdamW counts steps


@pytest.mark.parametrize("group, parts", [(None, 1), (None, 2), (2, 1)])
def test_what_is_sent_is_what_the_collectives_of_each_parameter_send(group, parts):
    world, inside = 4, group or 4
    objective = build()
    blocks = {id(p) for block in shard.blocks(objective) for p in block.parameters()}
    gathered = sum(
        rows(p, inside) * 2 * (inside - 1) * (2 if id(p) in blocks else 1)  # bf16, both passes
        for p in objective.parameters()
    )
    trained = sum(rows(p, inside) * 4 for p in objective.parameters() if p.requires_grad)
    sent = memory.simulate(build, images=2, accumulate=parts, world=world, group=group).sent
    assert sent["allgather"] == gathered * parts
    assert sent["reduce_scatter"] == trained * (inside - 1)  # float32, once however many parts
    copies = world // inside
    assert sent["allreduce"] == round(trained * 2 * (copies - 1) / copies)


def test_each_way_to_recompute_holds_fewer_activations_and_computes_more():
    none, block, offload = (
        memory.simulate(lambda: build("vit_mini8"), images=64, world=2, recompute=how)
        for how in ("none", "block", "offload")
    )
    held = [one.bytes["activations"] for one in (none, block, offload)]
    for how, most in zip(
        ("none", "block", "offload"), held
    ):  # a third of so small a model's are pictures
        assert 0.5 < memory.activations(build("vit_mini8"), 64, recompute=how) / most < 1.4
    assert held[0] > 1.5 * held[1] > 1.5 * held[2]
    assert none.flops < block.flops < offload.flops < 1.4 * none.flops


def test_a_training_step_takes_three_forward_passes():
    given = config.load("wsp", ["model.encoder=vit_mini8", "model.image_size=64"])
    images = 4
    found = memory.simulate(lambda: build_objective(given), images=images, world=1)
    assert found.flops / images / Plan(given, 1).size["flops_per_image"] == pytest.approx(
        3, rel=0.02
    )


def test_weights_that_are_kept_are_gathered_once_and_several_blocks_together():
    objective, world = build("vit_mini8"), 4
    resharded, kept = (
        memory.simulate(lambda: build("vit_mini8"), images=2, world=world, reshard=reshard)
        for reshard in (True, False)
    )
    whole = sum(rows(p, world) * 2 * (world - 1) for p in objective.parameters())
    assert kept.sent["allgather"] == whole < resharded.sent["allgather"]
    numbers = {one.kind: one.number for one in resharded.collectives}
    units = 2 if shard.together(objective.model.encoder.blocks) == 4 else 4 + 1
    assert numbers == {"allgather": 2 * units + 2, "reduce_scatter": units + 2}  # two roots


@pytest.mark.parametrize(
    "size, gigabytes, expected",
    [
        ("vit_b16", 80, (1, False)),
        (
            "vit_2b14",
            90,
            (2, True),
        ),  # half of 31 GB and 4 GB gathered would do, with less than 66 GB
        ("vit_2b14", 50, (2, True)),
        ("vit_2b14", 140, (1, False)),
        ("vit_6.5b14", 80, (4, True)),
        ("vit_6.5b14", 8, (64, True)),
    ],
)
def test_by_default_the_fewest_gpus_that_hold_a_model_well_share_it(size, gigabytes, expected):
    given = config.load("wsp", [f"base=size/{size}.yaml", "shard.group=null"])
    how = Plan(given, 64).sharding(gigabytes * 1e9, 8)
    assert (how.group, how.reshard) == expected
    assert f"shard.group {how.group} of 64" in how.reasons[0] and "33%" in how.reasons[0]
    asked = config.load("wsp", [f"base=size/{size}.yaml", "shard={group: 16, reshard: true}"])
    how = Plan(asked, 64).sharding(gigabytes * 1e9, 8)
    assert (how.group, how.reshard) == (16, True) and "as configured" in how.reasons[0]
    assert Plan(given, 64).sharding(None, 8).group is None  # a CPU's processes share its memory


def test_a_group_stays_in_a_node_or_takes_whole_ones(place):
    given = config.load("wsp", ["model.encoder=vit_6.5b14"])
    plan = Plan(given, 32)
    state = plan.state_bytes(1)
    chosen = [plan.sharding(3 * state / g, 4).group for g in (1, 2, 3, 4, 5, 9, 33)]
    assert chosen == [1, 2, 4, 4, 8, 16, 32]


NARROW = "model.head={channels: 8, auxiliary_channels: 6}"
DEEP = {
    "wsp": (["model.encoder=vit_test8", "model.depth=12"], 4, 2),
    "finetune": (["model.encoder=vit_test8", "model.depth=12", "data.train=cifar10"], 1, 1),
    "mae": (["base=[]", "model.encoder=vit_test8", "model.depth=24"], 4, 1),
    # its head reads blocks by their numbers
    "finetune/ade20k_upernet_b": (["model.encoder=vit_test8", "model.depth=12", NARROW], 1, 1),
}
QUICK = [("wsp", "block"), ("finetune", "none"), ("finetune/ade20k_upernet_b", "none")]
REST = [(stage, how) for stage in DEEP for how in ("none", "block", "offload")]
REST = [pytest.param(*pair, marks=pytest.mark.faults) for pair in REST if pair not in QUICK]


@pytest.mark.parametrize("stage, how", [*QUICK, *REST])
def test_a_deep_model_is_known_to_the_byte_from_shallow_ones(stage, how):
    overrides, world, parts = DEEP[stage]
    given = capacity.load(stage, [*overrides, "model.image_size=32"])
    small = {"images": 2, "accumulate": parts, "world": world, "group": min(2, world)}
    every, few = (
        memory.simulate(partial(build_objective, given), recompute=how, shorten=short, **small)
        for short in (False, True)
    )
    assert few == every


def test_accumulated_gradients_are_whole_until_they_are_sent():
    once = memory.simulate(build, images=2, world=8).bytes
    twice = memory.simulate(build, images=1, accumulate=2, world=8).bytes
    trained = sum(p.numel() for p in build().parameters() if p.requires_grad)
    assert twice["gradients"] >= trained * 2 > once["gradients"]


def test_fp8_holds_as_much_as_bf16():
    pytest.importorskip("torchao")
    fp8, bf16 = (memory.simulate(build, images=2, world=1, precision=p) for p in ("fp8", "bf16"))
    assert fp8.peak == bf16.peak and fp8.bytes == bf16.bytes


def test_a_group_that_does_not_divide_the_processes_is_refused():
    with pytest.raises(ValueError, match="shard.group: 3 must divide the number of processes, 8"):
        memory.simulate(build, images=1, world=8, group=3)
    assert not torch.distributed.is_initialized()


def test_a_batch_that_does_not_divide_among_the_processes_is_refused_when_a_plan_is_made():
    given = config.load("demo/mae", ["batch_size=16"])
    with pytest.raises(ValueError, match="batch_size: 16 does not divide among 6 processes"):
        Plan(given, 6)


def captioned() -> CLIP:
    """A small CLIP on the meta device."""
    with torch.device("meta"):
        tower = {
            "name": "open_clip",
            "architecture": "ViT-B-16",
            "width": 32,
            "layers": 1,
            "heads": 2,
        }
        return CLIP(Model(encoder="vit_test8", text=tower, joint={"width": 8}))


def state_of(rank: int, expected: dict[str, int]) -> None:
    """Trains two real steps, and compares what this process then holds with what was simulated; and
    counts activations of an objective that exchanges features, as a run does that has started."""
    before = memory.activations(captioned(), 2)
    distributed.init()
    assert memory.activations(captioned(), 2) == before and distributed.world() == 2
    objective = build()
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    optimizer = optim.build(objective.train(), lr=1e-3, weight_decay=0.0)
    batch = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in objective.example(2).items()}
    objective(batch)["loss"].backward()
    gradients = [p.grad.to_local() for p in objective.parameters() if p.grad is not None]
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values()]
    moments = [v.to_local() if hasattr(v, "to_local") else v for v in moments]
    held = [p.to_local() for p in objective.parameters()] + list(objective.buffers())
    if rank == 0:
        for kind, some in (("parameters", held), ("gradients", gradients), ("optimizer", moments)):
            assert sum(t.numel() * t.element_size() for t in some) == expected[kind], kind
    distributed.shutdown()


def test_two_real_processes_hold_what_was_simulated():
    processes(2, state_of, memory.simulate(build, images=2, world=2, precision="fp32").bytes)


SMALL = ["model.encoder=vit_mini8", "batch_size=64", "shard.precision=bf16"]


def estimate(bytes_: float, *overrides: str, gpus: int = 2) -> dict:
    """Of the small stage, on GPUs with so much memory left after the reserve."""
    given = capacity.load("small.yaml", [*SMALL, *overrides])
    return capacity.estimate(given, machine(bytes_), gpus=gpus, images=1e6)


def machine(bytes_: float, **rates: float) -> capacity.Machine:
    """With so much memory left after the reserve, and slow."""
    gigabytes = bytes_ / 1e9 / (1 - capacity.RESERVE)
    return capacity.Machine(gigabytes, **{"tflops": 1.0, "mfu": 0.5, **rates})


@pytest.fixture
def once(monkeypatch):
    """Each way to run is simulated once in a test, which asks for the same one on several machines."""
    simulated, plain = {}, capacity._attempt

    def remembered(given: config.Training, gpus: int) -> capacity.Attempt:
        way = repr((given, gpus))
        simulated[way] = simulated.get(way) or plain(given, gpus)
        return simulated[way]

    monkeypatch.setattr(capacity, "_attempt", remembered)


def test_the_first_settings_that_fit_are_named_and_fit_as_they_are(place, once):
    as_given = estimate(1e9)
    assert as_given["fits"] and as_given["overrides"] == [] and len(as_given["tried"]) == 1
    assert sum(as_given["bytes_at_peak"].values()) == as_given["peak_bytes"]
    less = estimate(0.9 * as_given["peak_bytes"])
    assert less["fits"] and less["overrides"] == ["shard.recompute=block"]
    pasted = estimate(0.9 * as_given["peak_bytes"], *less["overrides"])
    assert pasted["overrides"] == [] and pasted["bytes"] == less["bytes"]
    cost = less["training_flops_per_image"]
    assert less["images_per_second"] == pytest.approx(2 * 0.5e12 / cost, rel=1e-3)


def test_a_step_takes_as_long_as_the_slowest_of_what_it_does(place, once):
    given = capacity.load("small.yaml", [*SMALL, "shard.group=2"])
    quick = {"tflops": 1e6, "bandwidth": 1e6, "inside": 1e6, "between": 1e6}
    found = capacity.estimate(given, machine(1e9, **quick, per_node=2), gpus=4, images=1e6)
    inside = sum(one["bytes"] for one in found["collectives"] if one["kind"] != "allreduce")
    between = sum(one["bytes"] for one in found["collectives"] if one["kind"] == "allreduce")
    assert found["communicated_bytes_inside"] == inside > 0  # a group is a node
    assert found["communicated_bytes_between"] == between > 0
    for slow, name, amount in (
        ("tflops", "compute", found["training_flops_per_image"] * 16 / 1e12 / 0.5),
        ("bandwidth", "memory", found["traffic_bytes"] / 1e9 / capacity.REACHED),
        ("inside", "network", inside / 1e9 / capacity.REACHED),
        ("between", "network", between / 1e9 / capacity.REACHED),
    ):
        rates = machine(1e9, **{**quick, slow: 1e-3}, per_node=2)
        slowed = capacity.estimate(given, rates, gpus=4, images=1e6)
        assert slowed["limited_by"] == name
        assert slowed["seconds_per_step"] == pytest.approx(amount / 1e-3, rel=1e-3)
        assert slowed["images_per_second"] == pytest.approx(64 / slowed["seconds_per_step"])


def test_a_ring_over_nodes_leaves_each_once_for_each_of_its_gpus():
    eight = capacity.Machine(per_node=4)
    split = eight.split(memory.Collective("allgather", tuple(range(8)), 1, 800))
    assert split == (800, 200)
    assert eight.split(memory.Collective("allreduce", (0, 4), 1, 800)) == (0, 800)
    assert eight.split(memory.Collective("allreduce", (0, 1, 2), 1, 800)) == (800, 0)


def test_smaller_parts_and_larger_groups_come_last(place):
    given = capacity.load("small.yaml", ["shard.group=1", "batch_size=8", "shard.recompute=block"])
    found = capacity.estimate(given, machine(Plan(given, 2).state_bytes()), gpus=2)
    tried = [(one["group"], one["recompute"], one["accumulate"]) for one in found["tried"]]
    assert tried[:3] == [(1, "block", 1), (1, "offload", 1), (1, "offload", 2)]
    assert found["fits"] and tried[-1][0] == 2 and "shard.group=2" in found["overrides"]


def test_a_fine_tuning_that_mixes_pairs_is_planned_in_parts_of_two_images_or_more(place, once):
    given = ["objective={name: classify, mixup: 0.8}", "batch_size=8"]
    given += ["model={encoder: vit_test8, head: {classes: 3}}"]
    mixing = capacity.load("small.yaml", given)
    found = capacity.estimate(mixing, machine(1e4), gpus=1)
    assert not found["fits"] and found["gpus_needed"] is None
    found = capacity.estimate(mixing, machine(Plan(mixing, 1).state_bytes()), gpus=1)
    assert {one["batch_per_process"] for one in found["tried"]} >= {8, 2}
    assert min(one["batch_per_process"] for one in found["tried"]) == 2


def test_what_fits_nowhere_says_so_and_the_tool_exits_with_1(place):
    done = command("plan.py", "--stage", "small.yaml", "--gpus", "4", "--memory", "0.00001")
    assert done.returncode == 1 and "It does not fit" in done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["fits"] and found["gpus_needed"] is None
    assert set(found["bytes"]) == set(memory.KINDS)


def test_what_cannot_work_is_refused_before_anything_is_simulated(place):
    with pytest.raises(ValueError, match="batch_size: 64 does not divide among 7 processes"):
        estimate(1e9, gpus=7)
    with pytest.raises(ValueError, match="shard.group: 3 must divide the number of processes, 4"):
        estimate(1e9, "shard.group=3", gpus=4)
    with pytest.raises(ValueError, match="--gpus 0"):
        estimate(1e9, gpus=0)
    with pytest.raises(ValueError, match="--stage eval/linear: evaluates"):
        capacity.load("eval/linear", ["data=colours"])


def test_frozen_weights_have_neither_gradients_nor_moments_in_the_dry_run(place):
    plan = Plan(config.load("small.yaml", []), 2)
    trained = sum(p.numel() for p in plan.objective.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in plan.objective.parameters() if not p.requires_grad)
    assert frozen and plan.state_bytes() == (trained * 16 + frozen * 4) // 2
    sgd = Plan(config.load("small.yaml", ["optim.name=sgd", "optim.ema=0.9"]), 2)
    assert sgd.state_bytes() == plan.state_bytes()  # one moment and the average


@pytest.mark.parametrize("name", plugin.names("optimizers"))
def test_an_optimizer_keeps_as_much_as_it_says(name):
    weight = torch.nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.ones(3, 4)
    group = {"params": [weight], "lr": 0.1, "weight_decay": 0.1}
    optimizer = plugin.build("optimizers", name, [group])
    optimizer.step()
    kept = [v for v in optimizer.state[weight].values() if v.shape == weight.shape]
    assert len(kept) == optimizer.state_tensors


@pytest.mark.parametrize("name", plugin.names("optimizers"))
def test_what_an_optimizer_keeps_is_in_the_simulated_step(name):
    optimizer = partial(optim.build, name=name, lr=0.1, weight_decay=0.1)
    found = memory.simulate(build, images=2, world=2, optimizer=optimizer)
    trained = sum(rows(p, 2) for p in build().parameters() if p.requires_grad)
    tensors = 1 if name in ("sgd", "lars", "muon") else 2
    assert found.bytes["optimizer"] // (4 * trained) == tensors
    # one all-gather of the forward and one of the backward pass of each unit, and Muon's of matrices
    matrices = [p for p in build().parameters() if p.requires_grad and p.ndim == 2]
    numbers = {one.kind: one.number for one in found.collectives}
    units = numbers["reduce_scatter"]
    assert numbers["allgather"] == 2 * units - 2 + len(matrices) * (name == "muon")
    assert (numbers.get("allreduce", 0) > 0) == (name in ("lars", "lamb"))  # of norms


def test_the_doctor_asks_for_the_shared_memory_that_all_batches_ahead_take(place):
    given = config.load("small.yaml", ["batch_size=64", "data.workers=4", "batch_per_process=16"])
    plan = Plan(given, 2)
    batch = sum(v.numel() * v.element_size() for v in plan.objective.example(16).values())
    assert doctor.batches_gib(plan) == batch * 4 * 3 / 2**30


def test_a_run_out_of_memory_ends_with_what_would_fit(place, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    needed = estimate(1e9, gpus=1)["peak_bytes"]
    monkeypatch.setattr(run, "fit", full)
    monkeypatch.setattr(run, "_gpu_memory", lambda: (needed, 0.6 * needed))
    with pytest.raises(ValueError, match="Tried to allocate 2.00 GiB") as raised:
        run.start(capacity.load("small.yaml", SMALL), Path("runs/full"))
    assert "Other programs hold 0.0 GB" in str(raised.value)
    way = str(raised.value).partition("it fits with ")[2].rstrip(".").split()
    assert way and all(
        key in ("shard.recompute", "batch_per_process") for key, _ in map(pairs, way)
    )
    assert estimate(0.4 * 0.9 * needed, *way, gpus=1)["overrides"] == []


def pairs(override: str) -> list[str]:
    """A key and its value."""
    return override.split("=")


def test_a_deterministic_run_asks_for_such_kernels_and_gives_them_back(place, monkeypatch):
    seen = []

    def look(*_, **__):
        flags = torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]
        seen.append((*flags, torch.backends.cuda.mem_efficient_sdp_enabled()))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "fit", look)
    with pytest.raises(KeyboardInterrupt):
        run.start(capacity.load("small.yaml", ["deterministic=true"]), Path("runs/same"))
    assert seen == [(True, ":4096:8", False)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


def test_more_shards_than_stay_open_without_a_window_are_a_warning(place):
    plan, source, _ = Plan(config.load("small.yaml", []), 1).open_data()
    assert not any("data.window" in warning for warning in plan.warnings())
    for window, warns in ((0, True), (64, False)):
        given = config.load("small.yaml", [f"data.window={window}"])
        said = Plan(given, 1, len(source), shards=(2000, 256)).warnings()
        assert any("all 2,000 shards" in one and "window=64" in one for one in said) == warns


def test_a_plan_cannot_be_changed_and_opening_the_data_gives_another(place):
    plan = Plan(config.load("small.yaml", ["length=2ep"]), 1)
    assert plan.schedule is None
    opened, source, _ = plan.open_data()
    assert opened.images == len(source) == 60 and opened.schedule.steps == 8
    assert plan.images is None and plan.schedule is None
    with pytest.raises(FrozenInstanceError):
        plan.counted = 60


def test_what_measures_within_a_training_decodes_in_as_many_processes_as_it_loads(place):
    knn = "{name: knn, pool: mean, every: 100%}"
    overrides = ["data.workers=3", f"evaluators=[{knn}, {knn[:-1]}, workers: 1}}]"]
    plan, *_ = Plan(config.load("small.yaml", overrides), 1).open_data()
    assert [evaluator.workers for *_, evaluator in plan.evaluators()] == [3, 1]
    for name in plugin.names("evaluators"):  # alone: as many as a training by default
        assert build_evaluator({"name": name}, "colours")[1].workers == loading(None)
