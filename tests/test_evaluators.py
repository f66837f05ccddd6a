"""Every evaluator keeps the contract; the probes give the numbers they should."""

import dataclasses
import gc
import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import processes
from sklearn.linear_model import LogisticRegression, Ridge
from test_features import tiny_model
from test_text import BPE
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from prepretrain import plugin
from prepretrain.data.card import load_card
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.evaluators.base import accuracy, class_count
from prepretrain.evaluation.evaluators.linear import Linear
from prepretrain.evaluation.features import set_aside
from prepretrain.evaluation.probing import logistic, probes
from prepretrain.evaluation.probing.probes import PROTOCOLS
from prepretrain.models.export import save
from prepretrain.models.load import described
from prepretrain.runs import run

CARD = """
description: procedural scenes
licence: none
train: {source: synthetic, images: 240, size: 32, seed: 0}
val: {source: synthetic, images: 37, size: 32, seed: 1}
"""


@pytest.fixture
def card(tmp_path) -> str:
    path = tmp_path / "scenes.yaml"
    path.write_text(CARD)
    return str(path)


def clouds(
    count: int, classes: int, apart: float, seed: int, width: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian features around one centre a class, which is the same for every seed."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return apart * centres[labels] + torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize("name", plugin.names("evaluators"))
def test_every_evaluator_documents_its_options_and_quotes_a_metric_that_it_returns(
    name, card, tmp_path
):
    kind = plugin.find("evaluators", name)
    for option in plugin.options(kind):
        assert option in inspect.getdoc(kind), f"{name}: option {option} is not in the docstring"
    for option, parameter in plugin.options(kind).items():
        assert (parameter.default is parameter.empty) == (option == "data")
    others = ("detection", "segmentation", "segmentation_knn", "depth", "video", "zeroshot_tags")
    if name in others:
        return  # of other models and data: tests of their own
    evaluator = plugin.build("evaluators", name, data=card)
    model = tiny_model(text=BPE, head={"classes": 10})
    evaluator.check(model)
    results = evaluator.run(model, tmp_path)
    assert results["images"] == 37
    assert evaluator.headline in results and kind.quoted(results) == evaluator.headline
    assert all(
        isinstance(value, (int, float)) and math.isfinite(value) for value in results.values()
    )
    assert results == evaluator.run(tiny_model(text=BPE, head={"classes": 10}), tmp_path), (
        "a second run gives other numbers"
    )


def measured(card: str) -> list[dict[str, float]]:
    small = {"feature_batch": 8, "workers": 0}
    parts = (
        ("linear", {**small, "epochs": 12}),
        ("linear", {**small, "protocol": "ridge", "pool": "mean"}),
        ("knn", {**small, "k": 5}),
        ("lowshot", {"shots": [1, 2]}),
    )
    return [
        plugin.build("evaluators", name, data=card, **options).run(tiny_model(), None)
        for name, options in parts
    ]


def _measure(rank: int, card: str, folder: str) -> None:
    distributed.init()
    torch.save(measured(card), f"{folder}/{rank}.pt")
    distributed.shutdown()


def test_more_ranks_give_the_numbers_of_one(card, tmp_path):
    expected = measured(card)
    for world in (2, 3):  # of 37 images in batches of 8, the last is never full
        processes(world, _measure, card, str(tmp_path))
        for rank in range(world):
            for found, want in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
                assert found == pytest.approx(want, abs=1e-9)


def _sharded(rank: int, card: str, folder: str) -> None:
    distributed.init()
    numbers, parts = [], []
    knn, linear = (
        plugin.build("evaluators", name, data=card, **options)
        for name, options in (("knn", {"k": 5}), ("linear", {"protocol": "ridge"}))
    )
    for group, memory in ((1, None), (2, None), (None, 100), (None, 1 << 40)):
        distributed.memory = lambda memory=memory: memory  # of a GPU
        model = run._on_devices(*described(f"{folder}/model"), group)
        parts.append(sum(whole(p).numel() for p in model.parameters()))
        if group is not None:
            numbers.append((knn.run(model, None), linear.run(model, Path(folder, str(group)))))
    torch.save((numbers, parts), f"{folder}/{rank}.pt")
    distributed.shutdown()


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """What of a parameter lies on this process."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def test_a_model_that_is_sharded_measures_the_same_and_is_where_a_gpu_has_no_room(card, tmp_path):
    model = tiny_model()
    save(model, tmp_path / "model", "a test")
    processes(2, _sharded, card, str(tmp_path))
    count = sum(p.numel() for p in model.parameters())
    for rank in range(2):
        numbers, parts = torch.load(tmp_path / f"{rank}.pt")
        assert parts == [count, pytest.approx(count / 2, rel=0.01)] + parts[1::-1]
        for now, alone in zip(numbers[1], numbers[0], strict=True):
            assert now == pytest.approx(alone, abs=1e-9)


class OnGpu(nn.Module):
    """A model that says it is on a GPU, and notes where it is moved."""

    def __init__(self):
        super().__init__()
        self.moves: list[str] = []

    def parameters(self, recurse: bool = True):
        yield SimpleNamespace(device=torch.device("cuda", 0))

    def cpu(self):
        self.moves.append("cpu")

    def to(self, device: torch.device):
        self.moves.append(str(device))


@pytest.mark.parametrize(
    "name, options, method", [("linear", {"protocol": "ridge"}, "fit"), ("knn", {"k": 3}, "votes")]
)
def test_the_model_waits_in_the_hosts_memory_while_its_features_are_probed(
    name, options, method, card, monkeypatch
):
    evaluator = plugin.build("evaluators", name, data=card, **options)
    number = len(evaluator.card.open("val"))
    monkeypatch.setattr(evaluator, "features", lambda *_: clouds(number, 3, 1.0, 0))
    compute, model = getattr(evaluator, method), OnGpu().eval()
    monkeypatch.setattr(
        evaluator, method, lambda *given: model.moves.append("probe") or compute(*given)
    )
    evaluator.run(model, None)
    assert model.moves == ["cpu", "probe", "cuda:0"]
    training = OnGpu().train()
    with set_aside(training):
        assert not training.moves


def storages(larger_than: int = 0) -> set[int]:
    """Where the numbers of all float32 tensors lie, but for those of other tests that have none."""
    plain = (t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.float32)
    return {t.untyped_storage().data_ptr() for t in plain if t.numel() > larger_than}


@pytest.mark.parametrize("protocol", ["lbfgs", "ridge", "sweep"])
def test_a_probe_holds_one_copy_of_its_features_at_a_time(protocol, monkeypatch):
    features, labels = clouds(300, 3, 1.0, 0)
    held = []

    def noted(compute):
        def noting(*given: object, **options: object) -> object:
            held.append(len(storages(larger_than=3000) - before))
            return compute(*given, **options)

        return noting

    for module, name in ((logistic, "fit"), (probes, "ridge"), (probes, "_stacked")):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    before = storages()
    probes.fit(
        protocol,
        features,
        labels,
        3,
        seed=0,
        **({"epochs": 2, "batch_size": 64} if protocol == "sweep" else {}),
    )
    assert len(held) > 1 and set(held) == {1}


FLAT = [name for name in PROTOCOLS if name != "attentive"]


def probed(card: str, train, labels, val, answers, classes: int, **options) -> dict[str, float]:
    """Accuracies on `val` of a probe trained on `train`."""
    head = Linear(data=card, **options).fit(train, labels, classes)
    return accuracy(probes.scores(head, val), answers)


@pytest.mark.parametrize("protocol", FLAT)
def test_separable_features_are_probed_to_about_100_percent(protocol, card):
    both = *clouds(600, 8, 6.0, 0), *clouds(300, 8, 6.0, 1)
    found = probed(card, *both, 8, protocol=protocol)
    assert found["top1"] > 99 and found["top5"] == 100


@pytest.mark.parametrize("protocol", FLAT)
def test_noise_is_probed_to_chance(protocol, card):
    both = *clouds(500, 4, 0.0, 0), *clouds(2000, 4, 0.0, 1)
    found = probed(card, *both, 4, protocol=protocol)
    assert abs(found["top1"] - 25) < 4 and "top5" not in found


def test_a_training_set_smaller_than_the_batch_is_trained_on_whole(card):
    both = *clouds(10, 2, 8.0, 0), *clouds(50, 2, 8.0, 1)
    assert probed(card, *both, 2, epochs=200)["top1"] > 95


def test_an_attentive_probe_finds_the_token_that_tells_the_classes(card):
    """One token of nine, elsewhere in each image, says the class, beside which their mean is noisy."""

    def hidden(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        vectors, labels = clouds(count, 4, 3.0, seed)
        tokens = 6 * torch.randn(count, 9, 16, generator=generator)
        tokens[:, :, 0], vectors[:, 0] = 0, 20  # a mark that attention can learn to look for
        tokens[torch.arange(count), torch.randint(9, (count,), generator=generator)] = vectors
        return tokens, labels

    both = *hidden(600, 0), *hidden(200, 1)
    options = {"protocol": "attentive", "pool": "tokens", "batch_size": 64, "epochs": 15}
    found = probed(card, *both, 4, **options, lr=4e-3)["top1"]
    mean = probed(card, both[0].mean(1), both[1], both[2].mean(1), both[3], 4, protocol="ridge")
    assert found > mean["top1"] + 10, (found, mean)
    half = [part.half() if part.ndim == 3 else part for part in both]
    assert probed(card, *half, 4, **options) == probed(card, *half, 4, **options)


def test_the_sweeps_heads_are_those_of_momentum_sgd_at_each_rate():
    features, labels = clouds(70, 3, 1.0, 0)
    stack = probes._stacked(features, labels, 3, (0.01, 0.3), 5, epochs=4, batch_size=32)
    for k, rate in enumerate((0.01, 0.3)):
        generator = torch.Generator().manual_seed(5)
        alone = probes._linear(16, 3, generator)
        optimizer = torch.optim.SGD(
            alone.parameters(), lr=rate * 32 / 256, momentum=0.9, nesterov=True
        )
        probes._train(
            alone, optimizer, features, labels, generator, epochs=4, batch_size=32, warmup=0
        )
        torch.testing.assert_close(stack.weight[k].T, alone.weight)
        torch.testing.assert_close(stack.bias[k, 0], alone.bias)


@pytest.mark.parametrize("protocol", FLAT)
def test_the_labels_of_val_do_not_influence_the_probe(protocol, card, tmp_path, monkeypatch):
    fitted = []
    whole = Linear.fit
    monkeypatch.setattr(Linear, "fit", lambda *a: fitted.append(whole(*a)) or fitted[-1])
    features, labels = clouds(100, 3, 1.0, 0)
    for val_labels in (labels, (labels + 1) % 3):
        splits = {"train": (features, labels), "val": (features, val_labels)}
        evaluator = Linear(data=card, protocol=protocol)
        evaluator.open = lambda split, splits=splits: splits[split][0]
        evaluator.features = lambda model, split, source, folder, splits=splits: splits[split]
        evaluator.run(tiny_model(), tmp_path)
    for one, other in zip(*(head.state_dict().values() for head in fitted)):
        assert torch.equal(one, other)


def test_the_sweep_takes_another_rate_where_the_held_out_tenth_says_so(caplog):
    """With the first rate chosen, or the last, the choice was no choice."""
    chosen = set()
    for apart, flipped in ((3.0, 0.0), (0.2, 0.4)):
        features, labels = clouds(300, 3, apart, 0)
        noisy = torch.rand(300, generator=torch.Generator().manual_seed(0)) < flipped
        with caplog.at_level("INFO", logger="prepretrain"):
            probes.fit(
                "sweep", features, labels.where(~noisy, 0), 3, seed=0, epochs=8, batch_size=64
            )
        chosen.add(caplog.messages[-1].split(",")[0])
    assert len(chosen) == 2, chosen


def test_standardised_features_have_mean_0_and_variance_1_and_a_constant_one_is_0():
    features = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    features = features * torch.tensor([0.1, 1.0, 3.0, 20.0, 400.0, 0.0]) + 5
    found = probes._standardiser(features)(features)
    assert_close(found.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    assert_close(found.var(0, correction=0), torch.tensor([1.0] * 5 + [0.0]), rtol=1e-4, atol=0)


def test_ridge_agrees_with_scikit_learn_at_every_strength():
    features, labels = clouds(300, 5, 0.7, 0)
    solve = probes.ridge(features, labels, 5)
    for l2 in (1.0, 1e-4, 0.1):
        other, weight = Ridge(alpha=l2 * 300, tol=1e-12), solve(l2)
        other.fit(features.double().numpy(), torch.eye(5)[labels].double().numpy())
        np.testing.assert_allclose(weight[:, :-1].numpy(), other.coef_, atol=1e-8)
        np.testing.assert_allclose(weight[:, -1].numpy(), other.intercept_, atol=1e-8)


def test_a_probe_that_diverges_and_features_that_are_not_finite_are_errors(card):
    features, labels = clouds(100, 3, 1.0, 0)
    with pytest.raises(RuntimeError, match="'swag' probe diverged"):
        Linear(data=card, protocol="swag", lr=1e30).fit(features, labels, 3)
    features[7, 3] = float("nan")
    with pytest.raises(ValueError, match="scenes:train: features are not finite"):
        Linear(data=card).fit(features, labels, 3)


def test_labels_that_do_not_fit_the_features_or_the_classes_are_errors(card):
    features, labels = clouds(30, 3, 1.0, 0)
    with pytest.raises(ValueError, match="labels run from 0 to 2, of 2 classes"):
        Linear(data=card).fit(features, labels, 2)
    with pytest.raises(ValueError, match="30 images with 29 labels"):
        Linear(data=card).fit(features, labels[1:], 3)


def test_of_equal_scores_the_lower_class_comes_first_and_nan_has_no_rank():
    scores = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]] * 3)
    assert accuracy(scores, torch.tensor([0, 1, 6])) == {
        "top1": pytest.approx(100 / 3),
        "top5": pytest.approx(200 / 3),
    }
    scores[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="scores are NaN"):
        accuracy(scores, torch.tensor([0, 1, 6]))


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("intercept", [True, False])
def test_logistic_regression_agrees_with_scikit_learn(l2, intercept):
    features, labels = clouds(300, 5, 0.7, 0)
    weight = logistic.fit(features.double(), labels, 5, l2=l2, intercept=intercept, tolerance=1e-8)
    other = LogisticRegression(
        C=1 / (len(features) * l2), fit_intercept=intercept, tol=1e-8, max_iter=5000
    )
    other.fit(features.double().numpy(), labels.numpy())
    fresh, _ = clouds(200, 5, 0.7, 1)
    ours = logistic.scores(fresh, weight).softmax(1).numpy()
    np.testing.assert_allclose(ours, other.predict_proba(fresh.double().numpy()), atol=1e-4)


def test_logistic_regression_in_parts_is_that_in_one(monkeypatch):
    features, labels = clouds(300, 5, 0.7, 0)
    whole = logistic.fit(features.double(), labels, 5, l2=1e-2)
    monkeypatch.setattr(logistic, "ROWS", 70)
    torch.testing.assert_close(
        logistic.fit(features.double(), labels, 5, l2=1e-2), whole, atol=1e-6, rtol=1e-6
    )


def test_a_label_beyond_the_cards_classes_is_an_error(card):
    scenes = dataclasses.replace(load_card(card), classes=["circle", "square"])
    with pytest.raises(ValueError, match="labels run from 0 to 2, and there are 2 classes"):
        class_count(scenes, torch.tensor([0, 2]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"pool": "max"}, "pool"),
        ("linear", {"protocol": "adam"}, "protocol"),
        ("linear", {"protocol": "lbfgs", "lr": 0.1}, "linear.lr: protocol 'lbfgs' has none"),
        ("linear", {"protocol": "sweep", "lr": 0.1}, "It has: epochs, batch_size"),
        ("linear", {"protocol": "attentive"}, "linear.pool: 'class' .* tokens for protocol"),
        ("linear", {"pool": "tokens"}, "linear.pool: 'tokens' .* class or mean for protocol"),
        ("linear", {"resize": "stretch"}, "resize"),
        ("linear", {"share": 0.0}, "evaluator.share"),
        ("knn", {"pool": "tokens"}, "pool"),
        ("knn", {"k": 0}, "evaluator.k"),
        ("knn", {"temperature": 0.0}, "evaluator.temperature"),
        ("knn", {"feature_batch": 0}, "evaluator.feature_batch"),
        ("linear", {"epochs": 0}, "epochs"),
        ("linear", {"epochs": 5}, "warmup: 10 does not fit; it must be 0 to 4"),
        ("linear", {"lr": -1.0}, "lr"),
        ("linear", {"batch_size": 1}, "batch_size"),
        ("linear", {"weight_decay": -0.1}, "weight_decay"),
        ("linear", {"bach_size": 8}, "Did you mean evaluator.batch_size"),
    ],
)
def test_an_option_that_does_not_fit_is_named(name, options, message, card):
    with pytest.raises(ValueError, match=message):
        plugin.build("evaluators", name, data=card, **options)
