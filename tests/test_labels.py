"""Captions as labels: CatLIP's and SuperClass's numbers, on any number of processes, resumed."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import processes
from safetensors import safe_open
from test_train import rows, train
from torch.testing import assert_close

from prepretrain.data.random import Random
from prepretrain.data.sources.synthetic import Synthetic
from prepretrain.data.tags.vocabulary import Merged, Vocabulary
from prepretrain.data.transforms import BadImage
from prepretrain.distributed import checkpoint
from prepretrain.distributed import group as distributed
from prepretrain.losses.rarity import InverseFrequency
from prepretrain.losses.sparse import sparse_binary_cross_entropy, sparse_cross_entropy
from prepretrain.models.load import load
from prepretrain.models.model import Model
from prepretrain.models.tagger import Tagger
from prepretrain.objectives.hashtag import Hashtag
from prepretrain.runs.export import load_objective
from prepretrain.runs.launch import launch
from prepretrain.runs.replay import replay
from prepretrain.training import fit

GOLDEN = Path(os.environ.get("PREPRETRAIN_GOLDEN", Path(__file__).parent / "golden"))
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no {GOLDEN}")


def reference(name: str) -> dict[str, torch.Tensor]:
    with safe_open(GOLDEN / f"{name}_reference.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def ids(rows: list[list[int]]) -> torch.Tensor:
    """Rows of different ids, padded with -1."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows])


@golden
def test_the_binary_loss_and_its_gradient_are_catlips():
    want = reference("catlip")
    tags = ids([row.nonzero().flatten().tolist() for row in want["targets"]])
    logits = want["logits"].clone().requires_grad_()
    losses = sparse_binary_cross_entropy(logits, tags)
    assert_close(losses.mean(), want["loss_batch_mean"])
    assert_close(losses.sum(), want["loss_sum"])
    losses.mean().backward()
    assert_close(logits.grad, want["grad.logits"])


@golden
def test_weights_losses_and_counts_of_three_steps_are_superclasss():
    want = reference("superclass")
    weigh = InverseFrequency(60)
    for step in range(3):
        tags = ids([sorted(set(row.tolist())) for row in want[f"step{step}.labels"]])
        logits = want[f"step{step}.logits"].clone().requires_grad_()
        weights = weigh(tags)
        every = ((weigh.seen + 1).double() / (weigh.having + 1)).log().float()
        assert_close(every[None], want[f"step{step}.idf"], rtol=1e-6, atol=1e-7)
        shares = weigh.having.double()[None] / 6
        # theirs are means in float32, ours are counts
        assert_close(shares, want[f"step{step}.cap_fq_after"], rtol=1e-7, atol=1e-7)
        assert weigh.seen / 6 == want[f"step{step}.num_samples_after"].item()
        loss = sparse_cross_entropy(logits, tags, weights).mean()
        assert_close(loss, want[f"step{step}.loss"])
        loss.backward()
        assert_close(logits.grad, want[f"step{step}.grad.logits"])


@golden
def test_tokens_of_a_caption_are_superclasss_tokenizers():
    want = reference("superclass")["captions.ids"]
    with safe_open(GOLDEN / "superclass_reference.safetensors", "pt") as file:
        captions = json.loads(file.metadata()["captions"])
    made = tokens().transform(train=False)
    for caption, row in zip(captions, want, strict=True):
        sample = Synthetic(images=1, size=32, seed=0)[0] | {"text": caption}
        sample["random"] = Random(0, 0, 0)
        if caption:
            assert made(sample)["tags"].tensor.tolist() == row.unique().tolist()
        else:  # of which SuperClass makes a label too, its padding
            with pytest.raises(BadImage, match="no caption"):
                made(sample)


def tokens(**options) -> Hashtag:
    return Hashtag(Model(encoder="vit_test8"), labels="tokens", head="linear", **options)


def test_without_weight_neither_loss_nor_gradient_is_anything():
    logits = torch.randn(2, 5, requires_grad=True)
    tags, weight = torch.tensor([[0, 1], [2, -1]]), torch.tensor([[0.0, 0.0], [3.0, 9.0]])
    losses = sparse_cross_entropy(logits, tags, weight)
    losses.sum().backward()
    assert losses[0] == 0 and (logits.grad[0] == 0).all()
    assert_close(losses[1], -logits.log_softmax(1)[1, 2])


def test_evaluation_weighs_and_counts_nothing():
    weigh = InverseFrequency(4)
    first = weigh(torch.tensor([[0, 1], [0, -1]]))
    assert_close(first, torch.tensor([[0.0, 1.5], [0.0, 1.0]]).log().clamp(min=0))
    weigh.eval()
    weigh(torch.tensor([[3], [3]]))
    assert weigh.seen == 2 and weigh.having.tolist() == [2, 1, 0, 0]


RARE = [
    "objective={name: hashtag, vocabulary: tags.json, idf: true}",
    "model={encoder: vit_test8}",
    "data.train=scenes",
    "batch_size=12",
    "length=4it",
    "checkpoint.every=2it",
]


def _in_three(rank: int, where: str) -> None:
    os.chdir(where)
    distributed.init()
    train("runs/of3", *RARE)
    distributed.shutdown()


def counts(folder: str) -> dict[str, torch.Tensor]:
    return load_objective(Path(folder)).weights.state_dict()


def test_a_run_that_weighs_labels_is_the_same_on_one_process_and_on_three_and_resumes_bitwise(
    place, group
):
    train("runs/of1", *RARE)
    want, seen = rows("runs/of1"), counts("runs/of1")
    assert seen["seen"] == 48 and 0 < seen["having"].max() <= 48
    shutil.copytree("runs/of1", "runs/again")
    shutil.rmtree("runs/again/checkpoints/000000004")
    train("runs/again", *RARE)
    assert rows("runs/again") == want
    one, two = (
        checkpoint.open_tensors(checkpoint.newest(Path(f"runs/{n}"))) for n in ("of1", "again")
    )
    assert all(torch.equal(one[1](key), two[1](key)) for key in one[0])
    processes(3, _in_three, str(place))
    for got, row in zip(rows("runs/of3"), want, strict=True):
        assert got["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert_close(counts("runs/of3"), seen, rtol=0, atol=0)
    head, trained = (
        Tagger.open("runs/of3", load("runs/of3").encoder).head,
        load_objective(Path("runs/of3")),
    )
    assert_close(head.state_dict(), trained.head.state_dict(), rtol=0, atol=0)  # of three shards
    with pytest.raises(ValueError, match="batch_per_process: 6 .*looks at all of a batch at once"):
        launch("small.yaml", [*RARE, "batch_per_process=6"], dry_run=True)


@pytest.mark.parametrize("late", [False, True])
def test_a_replay_counts_the_labels_of_its_step_once(place, group, monkeypatch, late):
    monkeypatch.setattr(fit, "_reads_late", lambda: late)
    forward, losses = Hashtag.forward, []

    def spoilt(self, batch):
        figures = forward(self, batch)
        if "position" in batch:
            losses.append(figures["loss"].item())
            figures["loss"] = figures["loss"] * (math.nan if len(losses) == 3 else 1)
        return figures

    monkeypatch.setattr(Hashtag, "forward", spoilt)
    with pytest.raises(FloatingPointError, match="step 3 is not finite"):
        train("runs/a", *RARE)
    monkeypatch.setattr(Hashtag, "forward", forward)
    (row,) = replay(Path("runs/a/dumps/000000003"))
    assert row["loss"] == losses[2] and row["found"] is None


def nouns(tmp_path: Path, monkeypatch) -> Vocabulary:
    monkeypatch.setenv("PREPRETRAIN_DATA", str(tmp_path))
    merged = Merged("captions", {}, {"dog": "n1", "dogs": "n1", "moon": "n2"}, {"n1": "dog"})
    how = {"source": "abc", "images": 9, "min_count": 1, "merged": merged}
    made = Vocabulary(["n1", "n2"], [5, 4], **how)
    made.save(tmp_path / "nouns.json")
    return made


def test_nouns_of_all_captions_of_an_image_are_its_labels(tmp_path, monkeypatch):
    nouns(tmp_path, monkeypatch)
    build = lambda **how: Hashtag(Model(encoder="vit_test8"), vocabulary="nouns.json", **how)
    objective = build(labels="captions", loss="binary")
    made = objective.transform(train=True)
    sample = Synthetic(images=1, size=32, seed=0)[0] | {"random": Random(0, 0, 0)}
    texts = {"captions": ["Two dogs, one dog", "the MOON"], "text": "not this"}
    assert made(sample | texts)["tags"].tensor.tolist() == [0, 1]
    assert made(sample | {"captions": [], "text": "a dog"})["tags"].tensor.tolist() == [0]
    with pytest.raises(BadImage, match="no known tag"):
        made(sample | {"captions": [], "text": "a cat"})
    batch = {"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "tags": ids([[0, 1], [1]])}
    for parameter in objective.parameters():
        parameter.data.zero_()
    assert_close(objective(batch)["loss"], 2 * torch.tensor(2.0).log())
    with pytest.raises(ValueError, match="objective.labels: hashtags, and .*counted from captions"):
        build()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": "captions"}, "objective.vocabulary: is missing"),
        ({"labels": "tokens", "vocabulary": "x.json"}, "objective.vocabulary: 'x.json' is not for"),
        ({"labels": "tokens", "idf": True, "loss": "binary"}, "objective.idf: weighs"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Hashtag(Model(encoder="vit_test8"), **options)


def test_data_without_captions_is_refused():
    class Source:
        fields, fingerprint = ("image", "hashtags"), "abc"

    class Card:
        name = "tagged"

    with pytest.raises(ValueError, match="data.train=tagged: has no text or captions"):
        tokens().check(Card, Source())
