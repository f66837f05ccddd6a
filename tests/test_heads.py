"""Heads as parts: named in a config, saved with the model, and asked for by objectives."""

import pytest
import torch

from prepretrain.distributed import shard
from prepretrain.models import export
from prepretrain.models.encoders.base import Encoder
from prepretrain.models.load import load
from prepretrain.models.model import Model
from prepretrain.objectives.classify import Classify
from prepretrain.objectives.hashtag import Hashtag
from prepretrain.objectives.mae import MAE

IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
COUNT = """
import torch
import prepretrain as pp

class Count(pp.Head):
    '''How many things there are.'''

    def __init__(self, encoder: pp.Encoder, *, most: int = 9):
        super().__init__()
        self.most, self.layer = most, torch.nn.Linear(encoder.width, 1)

    def forward(self, tokens):
        return self.layer(tokens.mean(1)).clamp(max=self.most)
"""


def made(**head) -> Model:
    model = Model(encoder="vit_test8", head=head)
    shard.initialise(model, 0)
    return model.eval()


def test_a_head_without_a_name_is_linear_and_another_one_is_named():
    assert made(classes=3).scores(IMAGES).shape == (2, 3)
    two = made(name="mlp", classes=3)
    torch.nn.init.normal_(two.head.head.weight)
    feature = two.features(IMAGES, "class")
    want = two.head.head(two.head.pre_logits(feature).tanh())
    torch.testing.assert_close(two.scores(IMAGES), want)
    with pytest.raises(
        ValueError, match="model.head.name: no head 'linaer'. Did you mean 'linear'"
    ):
        made(name="linaer", classes=3)


def test_a_head_that_timm_has_not_is_saved_whole_and_its_encoder_for_timm(tmp_path):
    model = made(name="mlp", classes=3)
    torch.nn.init.normal_(model.head.head.weight)
    export.save(model, tmp_path, "here")
    assert torch.equal(load(str(tmp_path)).scores(IMAGES), model.scores(IMAGES))
    assert torch.equal(load(str(tmp_path / "timm"))(IMAGES), model(IMAGES))
    assert torch.equal(load(f"{tmp_path}:encoder")(IMAGES), model(IMAGES))


def test_a_head_of_ones_own_is_trained_by_no_objective_that_needs_scores(tmp_path, monkeypatch):
    tmp_path.joinpath("mine_heads").mkdir()
    tmp_path.joinpath("mine_heads/counting.py").write_text(COUNT)
    monkeypatch.syspath_prepend(tmp_path)
    model = made(name="mine_heads.counting", most=2)
    assert model.head(model(IMAGES)).shape == (2, 1)
    with pytest.raises(ValueError, match="cannot train a Count. Name one of linear, mlp"):
        Classify(model)
    with pytest.raises(ValueError, match="scores: this model has no classifier"):
        model.scores(IMAGES)


class Whole(Encoder):
    """An encoder that can encode whole images only."""

    prefix, width, stride, patch, patch_width = 1, 8, 8, 8, 8
    image_size = (32, 32)


def test_an_objective_says_what_it_needs_of_a_model():
    with pytest.raises(ValueError, match="model.head: is missing; objective 'classify' trains"):
        Classify(Model(encoder="vit_test8"))
    with pytest.raises(ValueError, match="model.head: objective 'mae' does not train a head"):
        MAE(made(classes=3))
    with pytest.raises(ValueError, match="Whole cannot leave patches out .objective mae."):
        Whole().check(torch.zeros(1, 3, 32, 32), keep=torch.zeros(1, 1))
    assert MAE.needs == {"encoder": ("keep",)} and Hashtag.needs == {}
