"""Leaks: near-copies of evaluation images in the training data, and what is right without them."""

import shutil

import pytest
import torch
from PIL import Image, ImageOps
from test_copies import encoded, picture
from test_curation import column, recipe, write_shard, write_yaml
from test_features import tiny_model

from prepretrain import plugin
from prepretrain.curation import commands, similarity
from prepretrain.curation.embedding import Embedder, require_images
from prepretrain.curation.engine import Machines
from prepretrain.data.card import load_card
from prepretrain.data.subset import Subset
from prepretrain.evaluation import leaks
from prepretrain.evaluation.evaluators.base import accuracy, build
from prepretrain.evaluation.features import extract
from prepretrain.models.export import save

HERE = Machines()


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """A folder with an evaluation card of six images, two classes, and a training card that holds a
    smaller copy of the second, a mirrored one of the fifth, and an image of its own."""
    folder = tmp_path_factory.mktemp("leaks")
    for number in range(6):
        place = folder / "val" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(encoded(picture(number), quality=90))
    (folder / "odd").mkdir()
    (folder / "odd/broken.jpg").write_bytes(b"no picture")
    smaller = encoded(picture(1).resize((96, 72), Image.Resampling.BICUBIC), quality=70)
    mirrored = encoded(ImageOps.mirror(picture(4)), quality=80)
    files = [encoded(picture(50)), smaller, b"no picture", mirrored]
    write_shard(folder / "shards/00000.tar", [{"jpg": data} for data in files])
    evaluated = {"source": "folder", "path": str(folder / "val")}
    odd = {"source": "folder", "path": str(folder / "odd")}
    write_yaml(folder / "pets.yaml", {"train": evaluated, "val": evaluated, "odd": odd})
    write_yaml(folder / "web.yaml", {"train": {"source": "shards", "path": str(folder / "shards")}})
    against = [f"{folder / 'pets.yaml'}:{split}" for split in ("val", "odd")]
    stages = {"meta": {}, "look": {}, "leaks": {"against": against}}
    out = folder / "out"
    commands.run(str(folder / "web.yaml"), recipe(folder, **stages), out, None, HERE)
    return folder


def test_near_copies_of_evaluation_images_are_found_by_number_and_key(curated):
    matches = column(curated / "out", "leaks", "matches")
    assert matches[0] is None and matches[2] is None
    (one,), (other,) = matches[1], matches[3]
    assert (one["set"], one["key"], one["mirrored"]) == ("pets:val", "b/1.jpg", False)
    assert (other["key"], other["mirrored"]) == ("a/4.jpg", True)
    assert column(curated / "out", "leaks", "reason")[1:4:2] == ["near-copy of pets:val"] * 2
    sets = leaks.content_of(curated / "out")["sets"]
    assert sets["pets:val"]["leaked"] == [2, 3] and sets["pets:val"]["unreadable"] == []
    assert sets["pets:odd"]["leaked"] == [] and sets["pets:odd"]["unreadable"] == ["broken.jpg"]


def evaluator(curated, **options):
    return build("knn", cache=False, data=str(curated / "pets.yaml"), k=1, pool="mean", **options)


def test_a_result_says_how_many_images_leaked_and_what_is_right_without_them(curated):
    protocol = evaluator(curated, leaks=str(curated / "out"))
    scores = torch.eye(2)[torch.tensor([0, 0, 1, 0, 1, 1])]  # wrong: 2 and 3, the leaked ones
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    leaked = protocol.leaked(protocol.open_data()["val"])
    found = protocol.certify(lambda kept: accuracy(scores[kept], labels[kept]), leaked)
    assert found == {
        "top1": pytest.approx(400 / 6),
        "leaked_images": 2,
        "top1_without_leaks": 100.0,
    }


def test_an_evaluation_writes_the_certificate_beside_its_result(curated, tmp_path, group):
    model = tiny_model()
    plain = evaluator(curated).run(model, tmp_path)
    protocol = evaluator(curated, leaks=str(curated / "out"))
    protocol.open_data()
    found = protocol.run(model, tmp_path)
    assert plain == {name: found[name] for name in plain}
    assert set(found) - set(plain) == {"leaked_images", "top1_without_leaks"}
    assert protocol.options["leaks"] == str(curated / "out")
    assert protocol.data_state()["leaks"][0] == "web:train"


def test_a_set_that_was_not_searched_or_has_changed_has_no_certificate(curated):
    with pytest.raises(ValueError, match="pets:val, pets:odd were looked for, not of cifar10:val"):
        leaks.read(curated / "out", "cifar10:val", None)
    changed = load_card(str(curated / "pets.yaml")).open("odd")
    with pytest.raises(ValueError, match="is of pets:val with 6 images"):
        leaks.read(curated / "out", "pets:val", changed)
    with pytest.raises(ValueError, match="there is no found.json"):
        evaluator(curated, leaks=str(curated / "nowhere")).open_data()


@pytest.fixture(scope="module")
def embedded(curated):
    """The folder with a model, and features of three shards, one of which has nothing to read."""
    save(tiny_model(), curated / "model", "a test")
    files = [picture(1), picture(4).crop((20, 15, 108, 81)), picture(51), picture(52)]
    data = [encoded(image) for image in files]
    for shard, some in enumerate((data[:2], [b"no picture"], data[2:])):
        write_shard(curated / f"more/{shard:05d}.tar", [{"jpg": one} for one in some])
    write_yaml(
        curated / "more.yaml", {"train": {"source": "shards", "path": str(curated / "more")}}
    )
    return curated


def leaks_by_features(embedded, out, above=0.9):
    """The matches of each image, among others by features."""
    against = [f"{embedded / 'pets.yaml'}:{split}" for split in ("val", "odd")]
    chosen = {"against": against, "features": "embed", "similarity": above}
    model = str(embedded / "model")
    stages = {"meta": {}, "look": {}, "embed": {"model": model}, "leaks": chosen}
    commands.run(str(embedded / "more.yaml"), recipe(embedded, **stages), out, None, HERE)
    return column(out, "leaks", "matches")


def test_features_above_the_similarity_are_matches_as_all_pairs_say(
    embedded, tmp_path, monkeypatch
):
    def unit(card, split):
        source = load_card(str(embedded / card)).open(split)
        source = Subset(source, [n for n in range(len(source)) if (card, n) != ("more.yaml", 2)])
        return torch.nn.functional.normalize(
            extract(tiny_model(), source, pool="mean", labelled=False)[0]
        )

    cosine = unit("more.yaml", "train") @ unit("pets.yaml", "val").T
    middle = float(cosine.flatten().sort().values[-8:-6].mean())
    found = leaks_by_features(embedded, tmp_path / "out", middle)
    assert found.pop(2) is None
    for row, matches in enumerate(found):
        expected = set((cosine[row] > middle).nonzero().flatten().tolist())
        assert {match["number"] for match in matches or []} == expected
        for match in matches or []:
            assert match["similarity"] == pytest.approx(
                float(cosine[row, match["number"]]), abs=2e-3
            )
    assert found[0][0]["distance"] is not None, "a near-copy by its hashes comes first"
    sets = leaks.content_of(tmp_path / "out")["sets"]
    assert sets["pets:val"]["leaked"] == (cosine > middle).any(0).nonzero().flatten().tolist()
    assert sets["pets:odd"]["unreadable"] == ["broken.jpg"]
    monkeypatch.setattr(similarity, "cores", lambda: 3)
    leaks_by_features(embedded, tmp_path / "again", middle)
    for file in sorted((tmp_path / "out/leaks").glob("*.parquet")):
        assert file.read_bytes() == (tmp_path / "again/leaks" / file.name).read_bytes()


def test_a_similarity_that_nearly_all_images_pass_is_refused(embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(similarity, "_MOST", 1)
    with pytest.raises(ValueError, match="is passed by .* images of the evaluation sets for each"):
        leaks_by_features(embedded, tmp_path / "out", 0.01)


def test_features_of_another_model_than_is_there_now_are_refused(embedded, tmp_path, monkeypatch):
    leaks_by_features(embedded, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/leaks")
    monkeypatch.setattr(Embedder, "mark", "another")
    with pytest.raises(ValueError, match="'embed' is of another model than"):
        leaks_by_features(embedded, tmp_path / "out")


def test_features_of_videos_are_refused_before_any_stage_runs(embedded):
    videos = load_card(str(embedded / "pets.yaml")).open("val").only(("key",))
    with pytest.raises(ValueError, match="leaks.features: pets:val: holds no images"):
        require_images(videos, "leaks.features: pets:val")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"features": "embed"}, "one needs the other"),
        ({"features": "embed", "similarity": 1.5}, "similarity: 1.5 must"),
    ],
)
def test_features_and_their_similarity_are_named_together(options, message):
    with pytest.raises(ValueError, match=message):
        plugin.build("curation_stages", "leaks", against=["pets:val"], **options)


def test_an_evaluation_set_without_data_is_an_error_before_any_stage_runs(curated):
    write_yaml(curated / "gone.yaml", {"val": {"source": "folder", "path": str(curated / "gone")}})
    stages = {"meta": {}, "look": {}, "leaks": {"against": [f"{curated / 'gone.yaml'}:val"]}}
    with pytest.raises(ValueError, match="there is nothing at"):
        web, out = str(curated / "web.yaml"), curated / "none"
        commands.run(web, recipe(curated, **stages), out, None, HERE)
    assert not out.exists()
