"""Zero-shot by tags: which tags a class has, how they are calibrated, and what a run writes for it."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_features import tiny_model
from test_synsets import folder  # noqa: F401
from test_train import train
from torch.testing import assert_close

import prepretrain
from prepretrain.data.tags.nearest import Labels, Nearest
from prepretrain.data.tags.vocabulary import Merged, Vocabulary
from prepretrain.data.tags.wordnet import Nouns
from prepretrain.evaluation.evaluators.zeroshot_tags import scores
from prepretrain.models import tagger
from prepretrain.models.heads.linear import Linear
from prepretrain.models.load import load
from prepretrain.models.tagger import Tagger
from prepretrain.runs.export import export_labels, load_objective


def vocabulary(tags: dict[str, int], **how) -> Vocabulary:
    counting = {"source": "abc", "images": 100, "min_count": 1}
    return Vocabulary(list(tags), list(tags.values()), **counting, **how)


def test_a_class_is_its_own_tag_else_the_nearest_below_else_above(folder):  # noqa: F811
    nouns = Nouns.open(str(folder))
    merged = Merged("hashtags", {}, {"brownbear": "n00000300", "selfie": "selfie"}, {})
    labels = Labels(vocabulary({"n00000300": 2, "selfie": 1}, merged=merged), nouns)
    nearest = lambda *names, reach=3: labels.nearest(names, reach)
    assert nearest("Brown Bear") == nearest("n00000300") == Nearest([0], 0)
    assert nearest("selfie") == Nearest([1], 0)
    assert nearest("bear") == Nearest([0], 1) and nearest("animal") == Nearest([0], 2)
    assert nearest("animal", reach=1) == nearest("goose") == nearest("?") == Nearest([], None)
    labels = Labels(vocabulary({"animals": 2, "dogs": 1, "❤": 1}), nouns)
    assert nearest("goose") == nearest("bear") == Nearest([0], 1)
    assert nearest("brown bear") == Nearest([0], 2)
    assert nearest("domestic dog", "goose") == Nearest([1], 0) and nearest("☺").ids == []
    (folder / "mine.txt").write_text("n1\torganism\nn2\tdog\n")
    listed = Labels(vocabulary({"organism": 2}), Nouns.open(str(folder / "mine.txt")))
    assert Labels(labels.vocabulary, listed.nouns).nearest(["dogs"], 0) == Nearest([1], 0)
    assert listed.nearest(["dog"], 9) == Nearest([], None)  # no hypernyms there


def found(loss: str = "softmax") -> Tagger:
    """A head of four tags whose logits are the features."""
    head = Linear(tiny_model().encoder, classes=4)
    head.linear = torch.nn.Linear(4, 4, bias=False)
    head.linear.weight.data = torch.eye(4)
    return Tagger(head.eval(), vocabulary({"a": 40, "b": 10, "c": 25, "d": 25}), loss)


CLASSES = [Nearest([0], 0), Nearest([1, 2], 1), Nearest([], None)]


def test_scores_of_a_class_are_the_sum_of_its_tags_divided_by_the_sum_of_what_is_usual():
    features = torch.randn(2500, 4, generator=torch.Generator().manual_seed(0))
    p = features.softmax(1)
    without = torch.full((2500, 1), -math.inf)
    plain = scores(found(), features, CLASSES, "none")
    assert_close(plain, torch.cat([torch.stack([p[:, 0], p[:, 1] + p[:, 2]], 1).log(), without], 1))
    by_count = scores(found(), features, CLASSES, "counts")
    assert_close(by_count[:, :2], plain[:, :2] - torch.tensor([0.4, 0.35]).log())
    by_mean = scores(found(), features, CLASSES, "images")
    assert_close(by_mean[:, :2].exp().mean(0), torch.ones(2), rtol=1e-5, atol=1e-5)
    assert (by_count[:, 2] == -math.inf).all() and (by_mean[:, 2] == -math.inf).all()
    each = scores(found("binary"), features, CLASSES, "counts")
    assert_close(each[:, 0], (features[:, 0].sigmoid() / 0.4).log())


def test_a_run_on_hashtags_writes_its_head_by_which_classes_are_told_apart(place, group):
    hashtags = ["objective={name: hashtag, vocabulary: tags.json}", "model={encoder: vit_test8}"]
    train("runs/tags", *hashtags, "data.train=scenes", "length=2it", "optim.warmup=0it")
    model = load("runs/tags")
    head = Tagger.open("runs/tags", model.encoder)
    trained = load_objective(Path("runs/tags")).head.state_dict()
    assert_close(head.head.state_dict(), trained, rtol=0, atol=0)
    assert head.vocabulary.tags == Vocabulary.load("data/tags.json").tags
    measure = lambda **how: prepretrain.evaluate(
        model, "zeroshot_tags", data="colours", synsets="timm", **how
    )
    results = measure(tags="runs/tags")
    assert (results["own"], results["near"], results["without"]) == (3, 0, 0)
    assert results["top1"] == pytest.approx(results["mean_per_class"]) and results["images"] == 60
    assert measure(tags="runs/tags/export") == measure(folder="runs/tags") == results

    text = Path("datasets/colours.yaml").read_text().replace("red]", "zebra]")
    Path("datasets/colours.yaml").write_text(text + "names: [blue, green, zebra]\n")
    with pytest.raises(ValueError, match="1 of 3 classes of 'colours' have no tag.*: zebra. Name"):
        measure(tags="runs/tags")
    with pytest.raises(ValueError, match="runs/none: holds no labels.*evaluator.tags"):
        measure(tags="runs/none")
    assert export_labels("runs/tags", Path("copy")) == Path("copy/labels")
    assert tagger.fingerprint("copy") == tagger.fingerprint("runs/tags")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss": "hinge"}, "describes no head"),
        ({"head": {"name": "my_lab.head"}}, "describes no head"),
        (
            {"head": {"name": "linear", "classes": 3, "pool": "mean"}},
            "a head of 3 labels, and 4 tags",
        ),
        ({"head": {"name": "linear", "classes": 4, "rank": 3}}, "rank"),
    ],
)
def test_a_bad_description_of_a_head_is_refused_by_name(tmp_path, change, message):
    encoder, tags = tiny_model().encoder, vocabulary({"a": 4, "b": 3, "c": 2, "d": 1})
    options = {"name": "linear", "classes": 4, "pool": "mean"}
    tagger.write(tmp_path, options, "softmax", Linear(encoder, classes=4).state_dict(), tags)
    file = tmp_path / "labels" / "head.json"
    assert Tagger.open(str(tmp_path), encoder).loss == "softmax"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"labels.*{message}"):
        Tagger.open(str(tmp_path), encoder)
