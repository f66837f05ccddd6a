"""Learning rates against closed forms, and an optimizer's options against what torch makes of them."""

from collections import Counter
from math import cos, pi

import pytest
import torch
from test_train import rows, train
from torch.testing import assert_close

from prepretrain import config, plugin
from prepretrain.distributed import checkpoint, shard
from prepretrain.models.load import load
from prepretrain.models.model import Model
from prepretrain.objectives.classify import Classify
from prepretrain.runs.plan import Plan, build_objective, build_optimizer
from prepretrain.training import ledger, optim
from prepretrain.training.schedule import Schedule

PEAK, END, WARMUP, STEPS = 2.0, 0.5, 10, 30
RATES = {  # after the warm-up: step to rate
    "cosine": lambda step: END + (PEAK - END) * (1 + cos(pi * (step - WARMUP) / 20)) / 2,
    "linear": lambda step: PEAK + (END - PEAK) * (step - WARMUP) / 20,
    "step": lambda step: PEAK * (1.0 if step < 15 else 0.3 if step < 22 else 0.3**2),
}


@pytest.mark.parametrize("shape", RATES)
def test_the_rate_of_every_step_is_its_shapes_closed_form_after_a_linear_warm_up(shape):
    milestones = (15, 22) if shape == "step" else ()
    schedule = Schedule(PEAK, STEPS, WARMUP, shape, END, milestones, decay=0.3)
    found = [schedule.lr(step) for step in range(STEPS)]
    assert found[0] == 0 and found[WARMUP] == PEAK == max(found)
    assert found[:WARMUP] == pytest.approx([PEAK * step / WARMUP for step in range(WARMUP)])
    want = [RATES[shape](step) for step in range(WARMUP, STEPS)]
    assert found[WARMUP:] == pytest.approx(want)
    if shape != "step":
        assert schedule.lr(20) == pytest.approx((PEAK + END) / 2)  # halfway
        assert found[-1] > END == pytest.approx(schedule.lr(STEPS))  # which no step has


def test_without_a_warm_up_the_first_step_has_the_peak():
    assert Schedule(PEAK, STEPS).lr(0) == PEAK


def test_a_schedule_sets_each_groups_rate_by_its_scale_and_says_the_rate_at_scale_1():
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [w], "lr_scale": scale} for w, scale in zip(weights, (1.0, 0.25))]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    assert Schedule(PEAK, STEPS, WARMUP).apply(optimizer, 5) == 1.0
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.25]


@pytest.mark.parametrize("shape", RATES)
def test_a_config_gives_the_schedule_that_it_describes_and_the_metrics_hold_its_rates(
    shape, place, group
):
    given = ["length=12it", "optim.warmup=25%", "optim.lr_end=1e-3", f"optim.schedule={shape}"]
    given += ["optim.decay=0.3", *(["optim.milestones=[6it, 75%]"] if shape == "step" else [])]
    train("runs/a", *given)
    milestones = (6, 9) if shape == "step" else ()
    peak, end = 1e-2 * 16 / 256, 1e-3 * 16 / 256  # the config's are per 256 images
    schedule = Schedule(peak, 12, 3, shape, end, milestones, decay=0.3)
    assert Plan(config.load("small.yaml", given), 1).schedule == schedule
    assert [row["lr"] for row in rows("runs/a")] == [schedule.lr(step) for step in range(12)]


ODD = {  # values that no optimizer has by default
    "betas": (0.5, 0.7),
    "eps": 1e-3,
    "momentum": 0.3,
    "nesterov": True,
    "trust_coeff": 0.02,
    "always_adapt": True,
}
OPTIONS = [
    (name, option)
    for name in plugin.names("optimizers")
    for option in plugin.options(plugin.find("optimizers", name))
]


@pytest.mark.parametrize("name, option", OPTIONS)
def test_each_option_of_an_optimizer_reaches_all_of_its_groups_from_the_config(name, option, place):
    value = ODD[option]
    written = list(value) if isinstance(value, tuple) else value
    given = config.load("small.yaml", [f"optim.name={name}", f"optim.{option}={written}"])
    optimizer = build_optimizer(given, build_objective(given))
    assert all(group[option] == value for group in optimizer.param_groups)


def classifier() -> Classify:
    """With random weights, the same at each call; all of them have a gradient."""
    objective = Classify(Model(encoder="vit_test8", head={"classes": 3}))
    shard.initialise(objective, 0)
    torch.nn.init.normal_(objective.model.head.linear.weight, generator=torch.manual_seed(0))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    objective({"image": images, "label": torch.tensor([0, 1, 2, 0])})["loss"].backward()
    return objective


def test_a_step_of_adamw_is_torchs_with_odd_options_and_decay_on_matrices_alone():
    ours, theirs = classifier(), classifier()
    given = {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-3}
    optimizer = optim.build(ours, weight_decay=0.3, **given)
    spared = theirs.model.encoder.no_weight_decay()
    named = dict(theirs.model.encoder.named_parameters()) | {
        f"head.{n}": p for n, p in theirs.model.head.named_parameters()
    }
    decays = {n: 0.0 if p.ndim < 2 or n in spared else 0.3 for n, p in named.items()}
    groups = [{"params": [p], "weight_decay": decays[n]} for n, p in named.items()]
    peer = torch.optim.AdamW(groups, **given)
    for _ in range(2):
        optimizer.step()
        peer.step()
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(one, two)


def test_clipping_takes_the_gradients_share_of_their_norm_and_no_more(place, group):
    plain = ["optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.warmup=0it"]
    plain += ["length=1it", "checkpoint.every=1it"]
    for name, more in {
        "still": ["optim.lr=0"],
        "free": [],
        "loose": ["optim.clip=1e3"],
        "tight": ["optim.clip=1e-3"],
    }.items():
        train(f"runs/{name}", *plain, *more)
    norm = rows("runs/free")[0]["grad_norm"]
    assert norm > 0.01 and rows("runs/tight")[0]["grad_norm"] == norm  # logged as it was
    still, free, loose, tight = (
        torch.cat([v.double().flatten() for v in load(f"runs/{name}").state_dict().values()])
        for name in ("still", "free", "loose", "tight")
    )
    assert torch.equal(free, loose) and (free - still).norm() > 0
    assert_close(tight - still, (free - still) * 1e-3 / norm, rtol=1e-3, atol=1e-8)


def test_plain_numbers_that_an_optimizer_keeps_in_its_groups_are_restored_too(tmp_path, group):
    def made(steps: int) -> tuple[Classify, torch.optim.Optimizer]:
        objective = classifier()
        optimizer = optim.build(objective, "sgd", lr=0.1, weight_decay=0.0)
        for one in optimizer.param_groups:
            one["step"] = steps  # LAMB counts so in some releases of timm
        optimizer.step()
        return objective, optimizer

    saved = checkpoint.save(tmp_path, 7, *made(7), {"step": 7}, keep=1)
    objective, optimizer = made(1)
    checkpoint.restore(saved, objective, optimizer)
    assert all(one["step"] == 7 for one in optimizer.param_groups)


def test_bad_images_may_be_the_stated_share_and_not_one_more_but_ten_are_always_forgiven():
    for images, most in ((100, 10), (1000, 10), (1001, 10), (2000, 20)):
        ledger.check_bad(Counter(unreadable=most), images, 0.01)
        with pytest.raises(
            ValueError, match=f"data.max_bad: {most + 1} bad images .* to fill {images} places"
        ):
            ledger.check_bad(Counter(unreadable=most - 3, tiny=4), images, 0.01)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_makes_steps_of_matrices_orthogonal_and_adamw_takes_the_others(shape):
    torch.manual_seed(0)
    matrix, bias = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(5))
    table = torch.nn.Parameter(torch.zeros(1, 3, 4))
    alone = [torch.nn.Parameter(torch.zeros_like(p)) for p in (bias, table)]
    group = {"lr": 0.1, "weight_decay": 0.0}
    muon = plugin.build("optimizers", "muon", [{"params": [matrix, bias, table], **group}])
    adamw = plugin.build("optimizers", "adamw", [{"params": alone, **group}])
    for one in (matrix, bias, table):
        one.grad = torch.randn_like(one)
    for one, other in zip(alone, (bias, table)):
        one.grad = other.grad
    muon.step()
    adamw.step()
    assert torch.equal(bias, alone[0]) and torch.equal(table, alone[1])
    size = torch.linalg.svdvals(matrix.detach() / (0.1 * 0.2 * max(shape) ** 0.5))
    assert 0.6 < size.min() and size.max() < 1.3
    left, _, right = torch.linalg.svd(-matrix.grad, full_matrices=False)
    turned = left.T @ matrix.detach() @ right.T  # diagonal in the gradient's singular vectors
    assert (turned - turned.diag().diag()).norm() < 0.05 * turned.norm()
    assert set(muon.state[matrix]) == {"momentum", "step"}
