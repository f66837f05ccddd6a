"""Features of a split: each image once, in order, whatever the number of ranks."""

import io

import numpy as np
import pytest
import torch
from conftest import processes
from PIL import Image

from prepretrain import distributed, shard
from prepretrain.features import extract, frozen
from prepretrain.model import Model
from prepretrain.objectives.mae import MAE
from prepretrain.sources.base import Source


class Pictures(Source):
    """`count` small JPEGs whose label is their number."""

    fields = ("image", "label")
    fingerprint = "pictures"

    def __init__(self, count: int, **changed: object):
        self.groups, self.changed = [count], changed

    def __getitem__(self, index: int) -> dict:
        pixels = np.random.default_rng(index).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((40, 36)).save(file, "JPEG")
        return {"key": f"k{index}", "image": file.getvalue(), "label": index, **self.changed}


def tiny_model(**options: object) -> Model:
    model = Model(encoder="vit_test8", **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def _save(rank: int, folder: str) -> None:
    distributed.init()
    torch.save(extract(tiny_model(), Pictures(13), batch_size=4), f"{folder}/{rank}.pt")
    distributed.shutdown()


def test_features_come_in_the_sources_order_with_their_labels():
    features, labels = extract(tiny_model(), Pictures(13), batch_size=4)
    assert features.shape == (13, 32) and features.dtype == torch.float32
    assert labels.tolist() == list(range(13))
    one, _ = extract(tiny_model(), Pictures(1), batch_size=4)
    torch.testing.assert_close(features[:1], one)


def test_two_ranks_give_the_same_features_as_one_where_nothing_divides(tmp_path):
    alone, labels = extract(tiny_model(), Pictures(13), batch_size=4)
    processes(2, _save, str(tmp_path))
    for rank in range(2):
        features, found = torch.load(tmp_path / f"{rank}.pt")
        assert found.tolist() == labels.tolist()
        torch.testing.assert_close(features, alone)


def test_a_source_without_labels_is_named():
    source = Pictures(3)
    source.fields = ("image",)
    with pytest.raises(ValueError, match="demo:val: has no labels"):
        extract(tiny_model(), source, name="demo:val")


def test_an_image_without_a_label_is_named():
    with pytest.raises(ValueError, match="k0.*no label"):
        extract(tiny_model(), Pictures(3, label=None), name="demo:val")


def test_an_unreadable_image_stops_the_evaluation():
    with pytest.raises(ValueError, match="unreadable"):
        extract(tiny_model(), Pictures(3, image=b"not an image"))


def test_an_image_that_is_evaluated_twice_is_an_error(monkeypatch):
    from prepretrain import features

    whole = features.evaluation_batches
    monkeypatch.setattr(
        features, "evaluation_batches", lambda *a, **k: [*whole(*a, **k), *whole(*a, **k)]
    )
    with pytest.raises(RuntimeError, match="5 were not evaluated exactly once"):
        extract(tiny_model(), Pictures(5))


def test_features_that_are_not_finite_are_an_error():
    model = tiny_model()
    model.encoder.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        extract(model, Pictures(3))


def test_the_model_trains_again_after_an_evaluation_where_it_trained_before():
    model = tiny_model().train()
    model.encoder.norm.eval()
    with frozen(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and not model.encoder.norm.training and torch.is_grad_enabled()


def _evaluate_then_train(rank: int) -> None:
    distributed.init()
    with torch.device("meta"):
        objective = MAE(
            Model(encoder="vit_test8"), decoder_depth=1, decoder_width=32, decoder_heads=2
        )
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    extract(objective.model, Pictures(3))
    image = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    objective({"image": image, "noise": torch.rand(2, 16)})["loss"].backward()
    distributed.shutdown()


def test_a_sharded_model_trains_after_an_evaluation():
    processes(1, _evaluate_then_train)
