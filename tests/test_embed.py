"""Features of shards and stage one's own loss, and images that say the same by them."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_copies import encoded, picture
from test_curation import column, recipe, write_shard, write_yaml
from test_features import tiny_model
from test_train import train

from prepretrain.curation import commands
from prepretrain.curation.copies import roots
from prepretrain.curation.engine import Machines
from prepretrain.curation.stages import semantic
from prepretrain.curation.stages.embed import Embed
from prepretrain.data.card import load_card
from prepretrain.data.transforms import decode, resize_center_crop
from prepretrain.evaluation import validation
from prepretrain.evaluation.features import extract
from prepretrain.models.load import load
from prepretrain.runs.export import load_objective

pytest.importorskip("datatrove", reason="the extra `data` is not installed")
HERE = Machines()


@pytest.fixture
def web(place) -> str:
    """A card of a shard of four images, one of which cannot be read, and of a shard of such alone."""
    files = [encoded(picture(1)), b"no picture", encoded(picture(2)), encoded(picture(3))]
    write_shard(place / "shards/00000.tar", [{"jpg": data} for data in files])
    write_shard(place / "shards/00001.tar", [{"jpg": b"none"}])
    split = {"source": "shards", "path": str(place / "shards")}
    return write_yaml(place / "web.yaml", {"train": split})


def test_features_and_the_loss_of_a_run_are_those_of_its_evaluation(web, place, group):
    train("run", "length=2it", "optim.warmup=1it")
    stages = {"meta": {}, "look": {}, "embed": {"model": "run", "loss": True, "batch_size": 2}}
    commands.run(web, recipe(place, **stages), place / "out", None, HERE)
    feature, loss = (column(place / "out", "embed", name) for name in ("feature", "loss"))
    assert [one is None for one in feature] == [False, True, False, False, True]
    assert [one is None for one in loss] == [one is None for one in feature]
    files = [encoded(picture(number)) for number in (1, 2, 3)]
    write_shard(place / "good/00000.tar", [{"jpg": data} for data in files])
    write_yaml(place / "good.yaml", {"train": {"source": "shards", "path": str(place / "good")}})
    source = load_card(str(place / "good.yaml")).open("train")
    expected, _ = extract(load("run"), source, pool="mean", labelled=False)
    found = np.array([one for one in feature if one is not None])
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-3, rtol=2e-3)
    mean, images = validation.measure(load_objective(place / "run"), source, batch_size=2)
    assert images == 3
    assert np.mean([one for one in loss if one is not None]) == pytest.approx(mean, rel=1e-5)
    models = column(place / "out", "embed", "model")
    assert len({one for one in models if one}) == 1 and models[1] is None


def test_a_released_file_is_embedded_that_is_told_what_it_is(web, place):
    torch.save({"model": tiny_model().encoder.state_dict()}, place / "released.pth")
    stages = {"meta": {}, "look": {}, "embed": {"model": "released.pth"}}
    with pytest.raises(ValueError, match="released.pth: does not say which encoder it is"):
        commands.run(web, recipe(place, **stages), place / "out", None, HERE)
    stages["embed"]["options"] = {"encoder": "vit_test8"}
    commands.run(web, recipe(place, **stages), place / "out", None, HERE)
    feature = column(place / "out", "embed", "feature")
    image = resize_center_crop(decode(encoded(picture(2))), 32, share=0.875)
    expected = tiny_model().eval().features(image[None], "mean")[0]
    np.testing.assert_allclose(feature[2], expected.detach().numpy(), atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match="the loss is that of a run as it was trained"):
        Embed(model="run", options={"encoder": "vit_test8"}, loss=True)


def test_the_nearest_earlier_row_is_that_of_all_similarities(monkeypatch):
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    monkeypatch.setattr(semantic, "_AT_ONCE", 7)
    places, best = semantic.nearest_earlier(rows)
    cosine = np.where(np.tril(np.ones((50, 50)), -1), rows @ rows.T, -1)
    np.testing.assert_allclose(best, cosine.max(1), atol=1e-6)
    assert np.array_equal(places[1:], cosine.argmax(1)[1:])


def test_a_chain_of_copies_ends_at_what_is_kept():
    assert roots(np.array([-1, 0, 1, -1, 2, 3])).tolist() == [0, 0, 0, 3, 0, 3]


LAB = """
import numpy as np
import pyarrow as pa
from prepretrain.curation.stages.base import Stage

class Points(Stage):
    columns = {"feature": pa.list_(pa.float16()), "model": pa.string()}
    table = "embed"

    def __init__(self, *, models: int = 1):
        self.models = models

    def shard(self, shard):
        random = np.random.default_rng(0)
        centres = random.normal(size=(6, 16))
        rows = [centres[row % 6] + 0.01 * (row // 6) * random.normal(size=16) for row in range(18)]
        features = [None if row == 17 else rows[row].astype(np.float16) for row in range(18)]
        return {"feature": features, "model": [f"m{row % self.models}" for row in range(18)]}
"""


def cluster(place, monkeypatch, **options):
    """The answers of stage semantic on 17 points near six centres."""
    (place / "lab").mkdir(exist_ok=True)
    (place / "lab/points.py").write_text(LAB)
    monkeypatch.syspath_prepend(place)
    write_shard(
        place / "shards/00000.tar", [{"jpg": b"none"}] * 18, [f"{i:02d}" for i in range(18)]
    )
    split = {"source": "shards", "path": str(place / "shards")}
    card = write_yaml(place / "web.yaml", {"train": split})
    models = options.pop("models", 1)
    chosen = recipe(
        place,
        points={"name": "lab.points", "models": models},
        semantic={"after": [], "clusters": 3, **options},
    )
    commands.run(card, chosen, place / "out", None, HERE, again=True)
    return {
        name: column(place / "out", "semantic", name) for name in ("reason", "group", "distance")
    }


def test_of_each_centre_one_image_is_kept_the_same_every_time(tmp_path, monkeypatch):
    found = cluster(tmp_path, monkeypatch, eps=0.05)
    assert sum(reason is not None for reason in found["reason"]) == 11
    for row in range(17):
        assert found["group"][row] % 6 == row % 6
    file = tmp_path / "out/semantic/00000.parquet"
    before = file.read_bytes()
    cluster(tmp_path, monkeypatch, eps=0.06)
    assert cluster(tmp_path, monkeypatch, eps=0.05) == found and file.read_bytes() == before
    assert pq.read_table(file)["kept_row"].null_count == 7


def test_no_two_kept_images_are_as_near_as_what_is_dropped(tmp_path, monkeypatch):
    found = cluster(tmp_path, monkeypatch, eps=1e-4)
    assert all(value is None or value < 1e-4 for value in found["distance"])


def test_features_of_two_models_are_not_compared(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="are of 2 models"):
        cluster(tmp_path, monkeypatch, models=2)
