"""k-nearest neighbours: scikit-learn's numbers, in parts or whole, in a run or after it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from test_evaluators import CARD, clouds
from test_features import tiny_model
from test_train import rows, train

from prepretrain.evaluation.evaluators import knn
from prepretrain.evaluation.evaluators.knn import Knn


@pytest.fixture
def card(tmp_path) -> str:
    path = tmp_path / "scenes.yaml"
    path.write_text(CARD)
    return str(path)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_the_votes_are_scikit_learns(k, temperature, card):
    (train, labels), (val, _) = clouds(300, 7, 0.3, 0), clouds(90, 7, 0.3, 1)
    other = KNeighborsClassifier(
        n_neighbors=k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature)
    )
    other.fit(train.double().numpy(), labels.numpy())
    votes = Knn(data=card, k=k, temperature=temperature).votes(train, labels, val, 7)
    np.testing.assert_allclose(votes.numpy(), other.predict_proba(val.double().numpy()), atol=1e-4)


def test_in_parts_the_votes_are_those_in_one(card, monkeypatch):
    (train, labels), (val, _) = clouds(200, 4, 0.5, 0), clouds(50, 4, 0.5, 1)
    whole = Knn(data=card).votes(train, labels, val, 4)
    monkeypatch.setattr(knn, "VALUES", 7 * 200)
    torch.testing.assert_close(Knn(data=card).votes(train, labels, val, 4), whole)


def test_the_length_of_a_feature_is_of_no_account(card):
    (train, labels), (val, _) = clouds(200, 4, 0.5, 0), clouds(50, 4, 0.5, 1)
    scaled = val * torch.linspace(0.1, 9, 50)[:, None]
    found = Knn(data=card).votes(train * 3, labels, scaled, 4)
    torch.testing.assert_close(found, Knn(data=card).votes(train, labels, val, 4))


def test_a_small_temperature_does_not_overflow(card):
    (train, labels), (val, _) = clouds(50, 4, 0.5, 0), clouds(9, 4, 0.5, 1)
    votes = Knn(data=card, temperature=1e-4).votes(train, labels, val, 4)
    assert votes.isfinite().all() and torch.allclose(votes.sum(1), torch.ones(9))


def test_a_class_without_a_vote_is_not_among_the_first_five_whatever_its_number(card, tmp_path):
    generator = torch.Generator().manual_seed(0)
    train, labels = torch.randn(200, 16, generator=generator), torch.arange(200) % 10
    val, truth = torch.randn(300, 16, generator=generator), torch.arange(300) % 10
    splits = {"train": (train, labels), "val": (val, truth)}
    for k in (1, 2, 3, 20):
        evaluator = Knn(data=card, k=k)
        evaluator.open = lambda split: splits[split][0]
        evaluator.features = lambda model, split, source, folder: splits[split]
        found = evaluator.run(tiny_model(), tmp_path)
        votes = evaluator.votes(train, labels, val, 10)
        order = votes.argsort(dim=1, descending=True, stable=True)[:, :5]
        guessed = (order == truth[:, None]) & (votes.gather(1, order) > 0)
        assert found["top5"] == pytest.approx(100 * guessed.any(1).float().mean().item())
        if k == 1:
            assert found["top5"] == found["top1"]


def test_more_neighbours_than_images_is_an_error_before_anything_is_computed(card):
    with pytest.raises(ValueError, match="knn.k: scenes:train has 240 images, fewer than the 300"):
        Knn(data=card, k=300).open_data()


def test_evaluators_that_are_due_every_few_steps_leave_the_run_as_it_was(place, group):
    train("runs/plain")
    watching = (
        "evaluators=[{name: knn, data: colours, every: 4it}, "
        "{name: linear, data: colours, every: 6it, epochs: 12}]"
    )
    train("runs/watched", watching)
    watched = rows("runs/watched")
    assert [r for r in watched if "loss" in r] == rows("runs/plain")
    assert [r["step"] for r in watched if "knn/colours/top1" in r] == [4, 8, 12]
    assert [r["step"] for r in watched if "linear/colours/top1" in r] == [6, 12]
    assert not Path("runs/watched/features").exists()


def test_an_attentive_probe_within_a_run_is_refused_before_it_starts(place, group):
    probe = "{name: linear, data: colours, every: 4it, protocol: attentive, pool: tokens}"
    with pytest.raises(ValueError, match="'attentive' keeps all tokens on disk"):
        train("runs/watched", f"evaluators=[{probe}]")
    assert not Path("runs/watched/metrics.jsonl").exists()
