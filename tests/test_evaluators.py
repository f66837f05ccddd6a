"""Every evaluator keeps the contract; the probes give the numbers they should."""

import dataclasses
import inspect
import math

import numpy as np
import pytest
import torch
from conftest import processes
from sklearn.linear_model import LogisticRegression
from test_features import tiny_model
from test_text import BPE

from prepretrain import distributed, logistic, plugin
from prepretrain.card import load_card
from prepretrain.evaluators.base import accuracy, class_count
from prepretrain.evaluators.linear import Linear

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
    evaluator = plugin.build("evaluators", name, data=card)
    model = tiny_model(text=BPE)
    evaluator.check(model)
    results = evaluator.run(model, tmp_path)
    assert results["images"] == 37
    assert evaluator.headline in results and kind.quoted(results) == evaluator.headline
    assert all(
        isinstance(value, (int, float)) and math.isfinite(value) for value in results.values()
    )
    assert results == evaluator.run(tiny_model(text=BPE), tmp_path), (
        "a second run gives other numbers"
    )


def measured(card: str) -> list[dict[str, float]]:
    parts = (("linear", {"feature_batch": 8, "epochs": 12}), ("lowshot", {"shots": [1, 2]}))
    return [
        plugin.build("evaluators", name, data=card, **options).run(tiny_model(), None)
        for name, options in parts
    ]


def _measure(rank: int, card: str, folder: str) -> None:
    distributed.init()
    torch.save(measured(card), f"{folder}/{rank}.pt")
    distributed.shutdown()


def test_two_ranks_give_the_numbers_of_one(card, tmp_path):
    processes(2, _measure, card, str(tmp_path))
    for rank in range(2):
        for found, expected in zip(
            torch.load(tmp_path / f"{rank}.pt"), measured(card), strict=True
        ):
            assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_separable_features_are_probed_to_about_100_percent(solver, card):
    (train, labels), (val, answers) = clouds(600, 8, 6.0, 0), clouds(300, 8, 6.0, 1)
    found = accuracy(Linear(data=card, solver=solver).fit(train, labels, val, 8), answers)
    assert found["top1"] > 99 and found["top5"] == 100


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_noise_is_probed_to_chance(solver, card):
    (train, labels), (val, answers) = clouds(500, 4, 0.0, 0), clouds(2000, 4, 0.0, 1)
    found = accuracy(Linear(data=card, solver=solver).fit(train, labels, val, 4), answers)
    assert abs(found["top1"] - 25) < 4 and "top5" not in found


def test_a_training_set_smaller_than_the_batch_is_trained_on_whole(card):
    (train, labels), (val, answers) = clouds(10, 2, 8.0, 0), clouds(50, 2, 8.0, 1)
    found = accuracy(Linear(data=card, epochs=200).fit(train, labels, val, 2), answers)
    assert found["top1"] > 95


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
        ("linear", {"solver": "adam"}, "solver"),
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
