"""Training on captions: the losses against open_clip's, the loop's promises, and bad captions."""

import json
import os
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import open_clip
import pyarrow
import pytest
import torch
import torch.nn.functional as F
from conftest import processes
from open_clip.loss import SigLipLoss
from PIL import Image
from pyarrow import parquet
from test_text import BPE, TINY_XLMR, images, pieces, small  # noqa: F401
from test_train import rows, train
from torch.testing import assert_close

from prepretrain.config import load as load_config
from prepretrain.data.batch import collate
from prepretrain.data.loader import Stream
from prepretrain.data.random import Random
from prepretrain.data.sources.parquet import Parquet
from prepretrain.data.sources.shards import Shards
from prepretrain.data.sources.synthetic import Synthetic
from prepretrain.data.transforms import BadImage
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.distributed.group import rank, world
from prepretrain.losses import contrastive
from prepretrain.losses.contrastive import sigmoid_loss, softmax_loss
from prepretrain.models.joint import LARGEST
from prepretrain.models.load import load
from prepretrain.models.model import Model
from prepretrain.objectives.captions import Captioned, captions
from prepretrain.objectives.clip import CLIP
from prepretrain.objectives.lit import LiT
from prepretrain.objectives.mae import MAE
from prepretrain.runs.export import load_objective
from prepretrain.runs.launch import launch

TEXT = "text: {name: open_clip, architecture: ViT-B-32, width: 32, layers: 2, heads: 2}"
MODEL = f"model={{encoder: vit_test8, {TEXT}, joint: {{width: 16}}}}"
STAGE = ["objective={name: clip, chunk: 3}", "data.train=scenes", MODEL, "length=6it"]
STAGE += ["checkpoint.every=2it", "optim.lr=2e-2"]

LIT = ["objective={name: lit}", *STAGE[1:]]


def features(count: int, seed: int, width: int = 8) -> torch.Tensor:
    """Rows of length 1."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


def both(name: str, chunk: int | None, rows_: slice, peer) -> tuple[list, list]:
    """[loss, gradients of both features, of scale and of bias] by us and by open_clip."""
    found = []
    for ours in (True, False):
        image, text = (features(8, s)[rows_].requires_grad_() for s in (1, 2))
        scale, bias = (torch.tensor([v], requires_grad=True) for v in (9.0, -3.0))
        if ours:
            loss, _ = contrastive.LOSSES[name](image, text, scale, bias, chunk)
        elif name == "softmax":
            loss = peer(image, text, scale)
        else:
            loss = peer(image, text, scale, bias)
        loss.backward()
        found.append([loss.detach(), image.grad, text.grad, scale.grad])
        found[-1] += [bias.grad] if name == "sigmoid" else []
    return found[0], found[1]


@pytest.mark.parametrize("chunk", [None, 3, 1])
def test_the_losses_and_their_gradients_are_open_clips(chunk):
    for name, peer in (("softmax", open_clip.ClipLoss()), ("sigmoid", SigLipLoss())):
        for got, want in zip(*both(name, chunk, slice(None), peer)):
            assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_chunks_change_the_loss_by_rounding_only_and_keep_no_row_of_products():
    found, kept = {}, {}
    for chunk in (None, 2):
        image, text = (features(16, s).requires_grad_() for s in (1, 2))
        sizes = []
        pack = lambda tensor: sizes.append(tensor.numel()) or tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = softmax_loss(image, text, torch.tensor([20.0]), torch.zeros(1), chunk)
        loss.backward()
        found[chunk], kept[chunk] = (loss.detach(), image.grad, text.grad), max(sizes)
    for one, other in zip(found[None], found[2]):
        assert_close(one, other, rtol=0, atol=1e-6)
    assert kept[None] == 16 * 16 and kept[2] == 16 * 8  # all products; the features alone


def _losses_in_two(rank_: int) -> None:
    distributed.init()
    mine = slice(4 * rank(), 4 * rank() + 4)
    clip = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=2)
    siglip = SigLipLoss(rank=rank(), world_size=2)
    for chunk in (None, 3):
        for name, peer in (("softmax", clip), ("sigmoid", siglip)):
            got, want = both(name, chunk, mine, peer)
            for one, other in zip(got, want):
                assert_close(one, other, rtol=1e-5, atol=1e-6)
            # the mean over processes is the loss of the whole batch, and so are the gradients
            alone = open_clip.ClipLoss() if name == "softmax" else SigLipLoss()
            image, text = (features(8, s).requires_grad_() for s in (1, 2))
            learned = [torch.tensor([9.0]), torch.tensor([-3.0])][: len(got) - 3]
            whole = alone(image, text, *learned)
            whole.backward()
            assert_close(
                distributed.all_sum(got[0]) / world(), whole.detach(), rtol=1e-5, atol=1e-6
            )
            assert_close(got[1] / world(), image.grad[mine], rtol=1e-5, atol=1e-6)
            assert_close(got[2] / world(), text.grad[mine], rtol=1e-5, atol=1e-6)
    distributed.shutdown()


def test_the_losses_and_their_gradients_are_open_clips_on_two_processes():
    processes(2, _losses_in_two)


def test_the_accuracy_is_the_share_of_images_that_find_their_caption():
    image = features(6, 0)
    assert softmax_loss(image, image, torch.ones(1), torch.zeros(1))[1] == 1
    moved = sigmoid_loss(image, image.roll(1, 0), torch.ones(1), torch.zeros(1), 2)[1]
    assert moved == 0


def test_the_scale_never_passes_100_and_can_come_back():
    joint = small(BPE).joint
    with torch.no_grad():
        joint.logit_scale.fill_(LARGEST + 1)
    for sign, moves in ((1.0, True), (-1.0, False)):  # of the loss's gradient by the scale
        joint.logit_scale.grad = None
        scale = joint(None, None)[2]
        assert_close(scale, torch.tensor([100.0]))
        (sign * scale).sum().backward()
        assert bool(joint.logit_scale.grad > 0) == moves


def _in_two(rank_: int, where: str) -> None:
    os.chdir(where)
    distributed.init()
    train("runs/two_sharded", *STAGE, "shard.group=null")
    train("runs/two_replicated", *STAGE, "shard.group=1")
    train("runs/two_lit", *LIT, init="runs/mae")
    distributed.shutdown()


def test_clip_and_lit_are_the_same_runs_on_one_process_and_on_two_and_resume(
    place,
    group,
):
    train("runs/one", *STAGE)
    train("runs/mae", "length=1it", "optim.warmup=0it")
    train("runs/lit", *LIT, init="runs/mae")
    processes(2, _in_two, str(place))
    locked = [row["loss"] for row in rows("runs/lit")]
    assert [row["loss"] for row in rows("runs/two_lit")] == pytest.approx(locked, rel=1e-4)
    want = rows("runs/one")
    assert len(want) == 6 and want[-1]["loss"] < want[0]["loss"]
    for name in ("two_sharded", "two_replicated"):
        for got, row in zip(rows(f"runs/{name}"), want):
            for key in ("loss", "accuracy", "scale", "grad_norm"):
                assert got[key] == pytest.approx(row[key], rel=1e-4, abs=1e-5), (name, key)
    for name, equal in (("one", True), ("two_sharded", False)):
        shutil.copytree(f"runs/{name}", f"runs/{name}_continued")
        for step in (4, 6):
            shutil.rmtree(f"runs/{name}_continued/checkpoints/{step:09d}")
        train(f"runs/{name}_continued", *STAGE)
        got = [row["loss"] for row in rows(f"runs/{name}_continued")]
        losses = [row["loss"] for row in want]
        assert got == losses if equal else got == pytest.approx(losses, rel=1e-4)
    model = load("runs/one")
    exported = load("runs/one/export")
    tokens = model.text.tokenizer()(["a striped red bee"])
    assert_close(model.text_features(tokens), exported.text_features(tokens))
    assert load_objective(Path("runs/one")).model.text_features(tokens).isfinite().all()


def test_stage_two_on_captions_starts_from_stage_ones_encoder_alone(place, group):
    train("runs/mae", "length=2it", "optim.warmup=0it")
    train("runs/clip", *STAGE[:2], f"model={{positions: learned, {TEXT}}}", "length=1it",
          "optim.lr=0", "optim.warmup=0it", init="runs/mae")  # fmt: skip
    one, two = load("runs/mae"), load("runs/clip")
    assert_close(two.encoder.state_dict(), one.encoder.state_dict())
    train("runs/tags", "objective={name: hashtag, vocabulary: tags.json}", "data.train=scenes",
          "length=1it", "optim.warmup=0it", init="runs/clip:encoder")  # fmt: skip
    assert load("runs/tags").text is None


def test_lit_trains_all_but_the_image_tower(place, group, pieces):  # noqa: F811
    train("runs/mae", "length=2it", "optim.warmup=0it", "model.drop_path=0.5")
    tower = f"text: {{name: xlmr, width: 32, depth: 2, heads: 2, hidden: 64, vocabulary: 120, tokenizer: {pieces}}}"
    stage = ["objective={name: lit}", f"model={{{tower}, joint: {{width: 8, pool: mean}}}}"]
    stage += ["data.train=scenes", "length=4it", "checkpoint.every=2it"]
    train("runs/lit", *stage, init="runs/mae")
    before, after = load("runs/mae"), load("runs/lit")
    assert all(
        torch.equal(v, after.encoder.state_dict()[k])
        for k, v in before.encoder.state_dict().items()
    )
    shutil.copytree("runs/lit", "runs/again")
    shutil.rmtree("runs/again/checkpoints/000000004")
    train("runs/again", *stage, init="runs/mae")
    assert rows("runs/again") == rows("runs/lit")
    with pytest.raises(ValueError, match="--init: is missing; objective 'lit'"):
        launch("small.yaml", [*stage, MODEL], dry_run=True)
    train("runs/bf16", *stage, "shard.precision=bf16", init="runs/mae")
    figures = [[row[0]["loss"], row[0]["scale"]] for row in (rows("runs/bf16"), rows("runs/lit"))]
    assert figures[0][0] == pytest.approx(figures[1][0], rel=0.02)
    assert figures[0][1] == figures[1][1]  # the scale is not rounded to bf16
    objective = LiT(small(TINY_XLMR | {"dropout": 0.0}))
    objective.train()
    assert not objective.model.encoder.training and objective.model.text.training
    batch = {"image": images(4), "tokens": torch.randint(4, 100, (4, 9)), "cut": torch.zeros(4)}
    objective(batch)["loss"].backward()
    assert all(p.grad is None for p in objective.model.encoder.parameters())
    learned = [*objective.model.text.parameters(), *objective.model.joint.parameters()]
    assert all(p.grad is not None for p in learned)


def test_a_text_tower_starts_from_a_checkpoint_that_the_objective_names(place, group):
    peer = small(BPE)
    torch.save({f"text.{k}": v + 1 for k, v in peer.text.tower.state_dict().items()}, "peer.pt")
    still = ["optim.lr=0", "optim.warmup=0it", "length=1it"]
    train("runs/from", "objective={name: clip, text_weights: peer.pt}", *STAGE[1:3], *still)
    got, want = load("runs/from").text.state_dict(), peer.text.state_dict()
    assert_close(got["tower.ln_final.weight"], want["tower.ln_final.weight"] + 1)
    with pytest.raises(ValueError, match="peer.safetensors: no such run or file"):
        wrong = "objective={name: clip, text_weights: peer.safetensors}"
        launch("small.yaml", [wrong, *STAGE[1:]], dry_run=True)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["batch_per_process=8"], "batch_per_process: 8 takes .* 16 images in 2 parts, and objective 'clip'"),
        (["objective.loss=sigmoid"], "sigmoid needs model.joint.bias=true"),
        (["objective.chunk=0"], "objective.chunk: 0 must be at least 1"),
        (["data.train=colours"], "has no text or captions.*objective.hashtags=true"),
        (["model.text=null", "model.joint=null"], "model.text: is missing"),
        (["objective.lss=softmax"], "objective.lss: unknown option. Did you mean objective.loss"),
        (["model={text: {name: xlmr, width: 32, depth: 1, heads: 2, hidden: 8}}"],
         "model.text.tokenizer: is missing"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_caption_stage_names_the_key_and_the_way_out(place, overrides, said):
    with pytest.raises(ValueError, match=said):
        launch("small.yaml", [*STAGE[1:], "objective={name: clip}", *overrides], dry_run=True)


def test_a_dry_run_counts_both_towers(place, capsys):
    launch("small.yaml", STAGE, dry_run=True)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    text, length, width = 2 * 2, 77, 32
    tower = 2 * (12 * width**2 * length + 2 * length**2 * width)  # two blocks
    image = 2 * (12 * width**2 * 17 + 2 * 17**2 * width) + 16 * 192 * width
    joint = 2 * width * 16 + 2 * 16  # projections, and one product each way
    assert said["flops_per_image"] == pytest.approx(2 * (tower + image + joint), rel=0.001)
    assert said["parameters"] > said["encoder_parameters"] + 49408 * width and text


@pytest.mark.parametrize("text", [BPE, TINY_XLMR | {"dropout": 0.0}], ids=["open_clip", "xlmr"])
def test_both_towers_are_sharded_by_block_and_recomputed_in_either_precision(group, text):
    batch = {"image": images(4), "tokens": torch.randint(4, 100, (4, 77)), "cut": torch.zeros(4)}
    found = {}
    for precision in ("fp32", "bf16"):
        for recompute in ("none", "block"):
            with torch.device("meta"):
                model = Model(encoder="vit_test8", text=text, joint={"width": 16})
                objective = CLIP(model, chunk=2)
            shard.shard(objective, precision=precision, recompute=recompute)
            shard.initialise(objective, 0)
            assert len(shard.find_roots(objective)) == 3  # encoder, text, joint
            assert len(shard.blocks(objective)) == 2 + 2  # two of each tower
            loss = objective(batch)["loss"]
            loss.backward()
            first = next(model.text.tower.parameters())
            found[precision, recompute] = loss.item(), first.grad.norm().item()
        assert found[precision, "block"] == pytest.approx(found[precision, "none"], rel=1e-6)
    assert found["bf16", "none"] == pytest.approx(found["fp32", "none"], rel=0.05)


class Words:
    """A tokenizer of words, which knows 4 places."""

    room = 2

    def count(self, text: str) -> int:
        return len(text.split())

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(word) for word in (t.split() + [""] * 4)[:4]] for t in texts])


def sample(**fields) -> dict:
    """A sample with a picture."""
    file = BytesIO()
    Image.new("RGB", (40, 30), (9, 90, 200)).save(file, "PNG")
    return {"key": "k", "image": file.getvalue(), "random": Random(0, 0, 0), **fields}


def test_one_of_several_captions_is_chosen_by_the_samples_own_randomness():
    made = Captioned(16, Words(), (0.5, 1.0), hashtags=False)
    several = ["a", "bb", "ccc", "dddd", " "]
    first = [
        int(made(sample(captions=several) | {"random": Random(s, 0, 0)})["tokens"][0])
        for s in range(60)
    ]
    again = int(made(sample(captions=several) | {"random": Random(7, 0, 0)})["tokens"][0])
    assert set(first) == {1, 2, 3, 4} and first[7] == again
    fixed = Captioned(16, Words(), None, hashtags=False)
    assert fixed(sample(captions=several))["tokens"][0] == 1


def test_hashtags_are_a_caption_only_where_asked_for_and_where_there_is_no_text():
    tags = sample(text=" ", hashtags=["#Red", "BEE", "..."])
    assert captions(tags) == [] and captions(tags, hashtags=True) == ["red bee"]
    assert captions(tags | {"text": "a bee"}, hashtags=True) == ["a bee"]
    assert captions(tags | {"captions": ["one", "two"]}, hashtags=True) == ["one", "two"]


def test_a_caption_that_is_too_long_is_cut_and_counted_and_an_empty_one_is_a_bad_sample():
    made = Captioned(16, Words(), (0.5, 1.0), hashtags=False)
    assert made(sample(text="one two"))["cut"] == 0
    assert made(sample(text="word " * 2000))["cut"] == 1
    for nothing in ("", "  \n"):
        with pytest.raises(BadImage, match="no caption"):
            made(sample(text=nothing))
    objective = CLIP(small(BPE))
    long = objective.transform(train=True)(sample(text="dog " * 2500))
    assert objective(collate([long, long]))["cut_captions"] == 1


TEXTS = ("a dog", "red cats and blue foxes " * 4, "the quick brown fox", "small houses " * 200)


def texts_of(objective: CLIP, count: int) -> torch.Tensor:
    """The tokens [B, L] of the first of TEXTS, as they reach an objective."""
    made = objective.transform(train=True)
    return collate([made(sample(text=text)) for text in TEXTS[:count]])["tokens"]


@pytest.mark.parametrize("name", ["open_clip", "xlmr"])
def test_texts_end_with_the_longest_of_a_batch_where_loss_and_gradients_stay_the_same(name, pieces):  # noqa: F811
    xlmr = TINY_XLMR | {"dropout": 0.0, "tokenizer": pieces, "context": 77}
    objective = CLIP(small(xlmr if name == "xlmr" else BPE)).train()
    tokenizer = objective.model.text.tokenizer()
    assert texts_of(objective, 1).shape == (1, 16)
    assert texts_of(objective, 4).shape == (4, 77)
    short, whole = texts_of(objective, 3), tokenizer(list(TEXTS[:3]))
    assert 16 < short.shape[1] < 77 and short.shape[1] % 16 == 0
    found = []
    for tokens in (short, whole):
        objective.zero_grad()
        loss = objective({"image": images(3), "tokens": tokens, "cut": torch.zeros(3)})["loss"]
        loss.backward()
        gradients = {k: p.grad for k, p in objective.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **gradients})
    assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "architecture",
    [
        "coca_ViT-B-32",
        "MobileCLIP-S1",
        "ViT-B-16-SigLIP",
    ],  # a class token, no causal mask, the last
)
def test_a_tower_whose_features_depend_on_the_padding_gets_all_of_it(architecture):
    text = {"name": "open_clip", "architecture": architecture, "width": 32, "layers": 1, "heads": 2}
    tower = small(text).text
    assert tower.padding is None
    tokens = torch.full((2, tower.context), 0)
    tokens[:, :5] = torch.tensor([9, 5, 6, 7, 40])
    assert tower(tokens).shape == (2, 32)


def shard_of(path: Path, captions_: list[bytes | list]) -> Shards:
    """A shard with a sample for each caption: bytes are its .txt, a list its json's captions."""
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions_):
            details = {"captions": caption} if isinstance(caption, list) else {"a": 1}
            files = {"png": sample()["image"], "json": json.dumps(details).encode()}
            files |= {"txt": caption} if isinstance(caption, bytes) else {}
            for ending, data in files.items():
                info = tarfile.TarInfo(f"{number:04d}.{ending}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return Shards(path=str(path))


def test_captions_in_json_are_read_as_they_are(tmp_path):
    source = shard_of(tmp_path / "0.tar", [["one bee", "two bees"], b"a text"])
    assert source.fields == ("image", "text", "captions")
    assert source.texts(0) == {"text": "", "captions": ["one bee", "two bees"]}
    assert source.texts(1) == {"text": "a text", "captions": []}
    with pytest.raises(BadImage, match="captions: .* is no text"):
        shard_of(tmp_path / "1.tar", [["a"], [1, 2]])[1]
    with pytest.raises(BadImage, match="text: .* is no text"):
        Shards(path=str(tmp_path / "0.tar"), text="json.captions")[0]


def test_data_with_hashtags_alone_serves_only_where_they_may_be_captions():
    class Tagged:
        fields = ("image", "hashtags")

    class Card:
        name = "tagged"

    with pytest.raises(ValueError, match="data.train=tagged: has no text or captions"):
        CLIP(small(BPE)).check(Card, Tagged)
    CLIP(small(BPE), hashtags=True).check(Card, Tagged)


def test_captions_of_a_parquet_column_are_a_list(tmp_path):
    given = (["one", None, "two"], None)
    rows_ = [{"image": sample()["image"], "captions": c} for c in given]
    parquet.write_table(pyarrow.Table.from_pylist(rows_), tmp_path / "a.parquet")
    source = Parquet(path=str(tmp_path / "a.parquet"))
    assert source.fields == ("image", "captions")
    assert [source.texts(i) for i in range(2)] == [{"captions": ["one", "two"]}, {"captions": []}]


def test_text_that_is_not_unicode_is_a_bad_sample_wherever_it_comes_from(tmp_path):
    raw = pyarrow.array([b"\xff\xfe", b"a bee"]).view(pyarrow.string())
    table = pyarrow.table({"image": [sample()["image"]] * 2, "text": raw, "path": ["a", "b"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    source = Parquet(path=str(tmp_path / "a.parquet"))
    with pytest.raises(BadImage, match="a: bad metadata: text: .*utf-8"):
        source[0]
    assert source[1]["text"] == "a bee" and source[1]["key"] == "b"
    made = Captioned(16, Words(), (0.5, 1.0), hashtags=False)
    with pytest.raises(BadImage, match="bad metadata: caption"):
        made(sample(captions=["half \ud83d"]))


def test_an_objective_without_captions_refuses_a_text_tower(tmp_path):
    with pytest.raises(ValueError, match="objective 'mae' does not train a text tower.*:encoder"):
        MAE(small(BPE))


def test_bad_captions_are_replaced_and_counted_by_cause(tmp_path):
    source = shard_of(
        tmp_path / "0.tar", [b"a bee", b"", b"\xff\xfe\x00not utf-8", b"a wave", b"  "]
    )
    made = Captioned(16, Words(), (0.5, 1.0), hashtags=False)
    batch = next(Stream(source, made, batch_size=5, seed=0, max_bad=1.0).batches())
    causes = {(one["cause"], one["key"]) for one in batch["bad"]}
    assert {("no caption", "0001"), ("bad metadata", "0002"), ("no caption", "0004")} <= causes
    assert batch["image"].shape == (5, 3, 16, 16)


def test_captions_train_from_made_scenes_in_workers():
    objective = CLIP(small(BPE))
    stream = Stream(
        Synthetic(images=8, size=32),
        objective.transform(train=True),
        batch_size=4,
        seed=0,
        workers=1,
    )
    batch = next(stream.batches())
    assert batch["tokens"].shape == (4, 16) and batch["cut"].tolist() == [0] * 4


def test_a_config_with_text_survives_being_written_and_read(place):
    config = load_config("small.yaml", STAGE)
    assert config.model["text"]["architecture"] == "ViT-B-32"
