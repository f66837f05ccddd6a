"""Fine-tuning: the classifier that a Model ends with, its recipe, and what it exports."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import processes
from PIL import Image
from safetensors.torch import load_file
from test_train import rows, train
from timm.data.auto_augment import rand_augment_transform
from torch.testing import assert_close

import prepretrain
from prepretrain.data.randaugment import RandAugment
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.evaluation.evaluators.accuracy import Accuracy
from prepretrain.models.export import save
from prepretrain.models.model import Model
from prepretrain.objectives.classify import Classify
from prepretrain.runs.launch import launch
from prepretrain.training import optim

FINETUNE = [
    "objective={name: classify, augment: rand-m9-mstd0.5-inc1, mixup: 0.8, cutmix: 1.0, smoothing: 0.1}",
    "model={positions: learned, final_norm: false, head: {classes: 3, norm: true}}",
    "checkpoint.best=true",
    "evaluators=[{name: accuracy, every: 25%}]",
]

# mixing and erasing draw from each process's own numbers, so only without them are 1 and 2 processes equal
PLAIN = [*FINETUNE, "objective.mixup=0", "objective.cutmix=0"]


def images(count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


def test_a_fine_tuned_run_starts_from_stage_one_and_timm_loads_it_with_the_same_logits(
    place, group
):
    train("runs/mae")
    train("runs/tuned", *FINETUNE, "optim.ema=0.9", init="runs/mae")
    ours = prepretrain.load("runs/tuned")
    theirs = timm.create_model("local-dir:runs/tuned/export", pretrained=True).eval()
    with torch.no_grad():
        assert_close(ours.scores(images()), theirs(ours.normalise(images())), rtol=1e-4, atol=1e-5)
    measured = [
        r["accuracy/colours/top1"] for r in rows("runs/tuned") if "step" in r and "loss" not in r
    ]
    results = json.loads(Path("runs/tuned/results.json").read_text())
    assert results["best accuracy/colours/top1"] == max(measured)
    assert results["accuracy/colours"]["top1"] == measured[-1]
    best = prepretrain.load("runs/tuned/best")
    assert Accuracy(data="colours").run(best, Path("."))["top1"] == max(measured)


def test_the_average_of_the_weights_is_what_is_evaluated_and_exported(place, group):
    length = ["length=5it", "optim.warmup=0it", "checkpoint.every=1it", "checkpoint.keep=9"]
    train("runs/plain", *FINETUNE, *length)
    train("runs/average", *FINETUNE, *length, "optim.ema=0.5")
    last = [r["loss"] for r in rows("runs/plain") if "loss" in r]
    assert [r["loss"] for r in rows("runs/average") if "loss" in r] == last  # training is the same
    shutil.rmtree("runs/plain/export")
    kept, average = {}, None
    for step in range(1, 6):
        for newer in range(step + 1, 6):
            path = Path(f"runs/plain/checkpoints/{newer:09d}")
            if path.exists():
                path.rename(path.with_name(f"aside{newer}"))
        kept[step] = prepretrain.load("runs/plain").state_dict()
        for newer in range(step + 1, 6):
            path = Path(f"runs/plain/checkpoints/aside{newer}")
            path.rename(path.with_name(f"{newer:09d}"))
    for step, state in kept.items():
        decay = min(0.5, (1 + step) / (10 + step))
        average = (
            state
            if average is None
            else {k: decay * average[k] + (1 - decay) * v for k, v in state.items()}
        )
    exported = prepretrain.load("runs/average").state_dict()
    for name, value in average.items():
        assert_close(exported[name], value, rtol=1e-5, atol=1e-7)
    assert not torch.equal(exported["head.linear.weight"], kept[5]["head.linear.weight"])


def _tune_in_two(rank: int, where: str) -> None:
    os.chdir(where)
    distributed.init()
    train("runs/two", *PLAIN, "optim.ema=0.9")
    distributed.shutdown()


def test_two_processes_fine_tune_to_the_same_average_as_one(place, group):
    train("runs/one", *PLAIN, "optim.ema=0.9")
    processes(2, _tune_in_two, str(place))
    one, two = (rows(f"runs/{n}") for n in ("one", "two"))
    for before, after in zip(one, two, strict=True):
        assert before.keys() == after.keys()
        assert_close(list(after.values()), list(before.values()), rtol=1e-4, atol=1e-5)


def test_a_resumed_fine_tuning_is_bitwise_the_uninterrupted_one(place, group):
    train("runs/whole", *FINETUNE, "optim.ema=0.9", "checkpoint.every=3it", "checkpoint.keep=9")
    shutil.copytree("runs/whole", "runs/cut")
    for step in (9, 12):
        shutil.rmtree(f"runs/cut/checkpoints/{step:09d}")
    shutil.rmtree("runs/cut/export")
    train("runs/cut", *FINETUNE, "optim.ema=0.9", "checkpoint.every=3it", "checkpoint.keep=9")
    assert rows("runs/cut") == rows("runs/whole")
    one, other = (load_file(f"runs/{n}/export/model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(one[k], other[k]) for k in one)


def _count_in(rank: int, where: str) -> None:
    os.chdir(where)
    distributed.init()
    found = Accuracy(data="colours", feature_batch=4).run(prepretrain.load("tuned"), Path("."))
    Path(f"found_{distributed.world()}_{rank}.json").write_text(json.dumps(found))
    distributed.shutdown()


def test_accuracy_counts_each_image_once_on_one_two_and_three_processes(place):
    torch.manual_seed(0)
    model = Model(encoder="vit_test8", head={"classes": 3})
    shard.initialise(model, 0)
    torch.nn.init.normal_(model.head.linear.weight)
    save(model, Path("tuned"), "made by the test")
    for count in (1, 2, 3):
        processes(count, _count_in, str(place))
    found = [json.loads(p.read_text()) for p in sorted(place.glob("found_*.json"))]
    assert len(found) == 6 and all(f == found[0] for f in found)
    source = Accuracy(data="colours").card.open("val")
    assert found[0]["images"] == len(source)


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_weight_decay_spares_one_dimensional_parameters_and_positions(layer_decay):
    model = Model(encoder="vit_test8", head={"classes": 3})
    built = optim.build(Classify(model), lr=1.0, weight_decay=0.05, layer_decay=layer_decay)
    decays = {id(p): g["weight_decay"] for g in built.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim < 2 or name in ("encoder.pos_embed", "encoder.cls_token")
        assert decays[id(parameter)] == (0.0 if spared else 0.05), name


def test_randaugment_is_timms_drawn_by_the_samples_own_randomness():
    model = Model(encoder="vit_test8", head={"classes": 3})
    augment = RandAugment("rand-m9-mstd0.5-inc1", model.mean, model.encoder.image_size)
    image = images(1)[0]
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    same = [augment(image, np.random.default_rng(7)) for _ in range(2)]
    assert torch.equal(*same)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())
    others = [augment(image, np.random.default_rng(seed)) for seed in range(8)]
    assert len({other.numpy().tobytes() for other in others}) > 3
    draw = np.random.default_rng(7)
    random.seed(int(draw.integers(2**32)))
    np.random.seed(int(draw.integers(2**32)))
    grey = (124, 116, 104)
    given = {"translate_const": 14, "img_mean": grey, "interpolation": Image.BICUBIC}
    peer = rand_augment_transform("rand-m9-mstd0.5-inc1", given)
    theirs = np.array(peer(Image.fromarray(image.permute(1, 2, 0).numpy())))
    assert np.array_equal(same[0].permute(1, 2, 0).numpy(), theirs)


@pytest.mark.parametrize("description", ["rand-m{}", "rand-m{}-inc1", "rand-m{}-mmax20-inc1"])
def test_every_operation_of_randaugment_takes_every_magnitude(description):
    model = Model(encoder="vit_test8", head={"classes": 3})
    picture = Image.fromarray(images(1)[0].permute(1, 2, 0).numpy())
    seen = set()
    for magnitude in range(21 if "mmax20" in description else 11):
        for operation in RandAugment(
            description.format(magnitude), model.mean, model.encoder.image_size
        ).apply.ops:
            operation.prob = 1.0
            changed = operation(picture)
            assert (changed.size, changed.mode) == (picture.size, picture.mode)
            seen.add(operation.name)
    assert len(seen) == 15


def test_randaugment_at_magnitude_10_posterizes_to_black():
    model = Model(encoder="vit_test8", head={"classes": 3})
    operations = RandAugment("rand-m10-inc1", model.mean, model.encoder.image_size).apply.ops
    (last,) = [operation for operation in operations if operation.name == "PosterizeIncreasing"]
    last.prob = 1.0
    picture = Image.fromarray(images(1)[0].permute(1, 2, 0).numpy())
    assert last(picture).getextrema() == ((0, 0),) * 3
    last.magnitude = 5  # keeps 2 bits of 8
    assert np.array_equal(np.array(last(picture)), np.array(picture) & 0b11000000)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.head.classes=4"], "model.head.classes: 4, and the card 'colours' has 3"),
        (["model.head.classes=1"], "model.head.classes: 1 leaves nothing to tell apart; take 2"),
        (["objective.augment=autoaugment"], "must be a RandAugment, as rand-m9-mstd0.5-inc1"),
        (
            ["objective={name: mae, decoder_depth: 1}"],
            "objective 'mae' does not train a head",
        ),
        (["model.head=null"], "objective 'classify' trains a head"),
        (["evaluators=[]"], "checkpoint.best: nothing is measured"),
        (["model.head.colour=1"], "model.head.colour: unknown option"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused_before_it_starts(place, overrides, message):
    with pytest.raises(ValueError, match=message):
        launch("small.yaml", [*FINETUNE, *overrides], dry_run=True)


def test_a_classifier_of_other_classes_is_not_started_from_unless_its_encoder_is_asked_for(
    place, group
):
    five = Model(encoder="vit_test8", final_norm=False, head={"classes": 5, "norm": True})
    save(five, Path("five"), "made by the test")
    with pytest.raises(
        ValueError, match="a head of 5 classes, and the model asked for has a head of 3"
    ):
        launch("small.yaml", FINETUNE, init="five", dry_run=True)
    launch("small.yaml", FINETUNE, init="five:encoder", dry_run=True)


def test_accuracy_refuses_a_model_without_a_classifier_or_with_one_of_other_classes(place):
    with pytest.raises(ValueError, match="no classifier. Fine-tuning makes one: --stage finetune"):
        Accuracy(data="colours").check(Model(encoder="vit_test8"))
    with pytest.raises(ValueError, match="the card has 3 classes, and the model's classifier 5"):
        Accuracy(data="colours").check(Model(encoder="vit_test8", head={"classes": 5}))
