"""Text towers: their tokenizers, initial values, checkpoints of others, and exports."""

import json
import pickle

import open_clip
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

from prepretrain.distributed import shard
from prepretrain.models import weights
from prepretrain.models.encoders.base import Encoder
from prepretrain.models.encoders.vit import ViT
from prepretrain.models.export import save
from prepretrain.models.load import load, open_text, open_weights
from prepretrain.models.model import Model
from prepretrain.models.text.open_clip import OpenClip

WORDS = (
    "the quick brown fox jumps over a lazy dog and sees red blue green cats in small houses".split()
)
BPE = {"name": "open_clip", "architecture": "ViT-B-32", "width": 32, "layers": 2, "heads": 2}
TINY_XLMR = {"name": "xlmr", "width": 32, "depth": 2, "heads": 2, "hidden": 64, "vocabulary": 120}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> str:
    """The path of a small SentencePiece model, with ids laid out as in XLM-R's: <unk>, <s>, </s>."""
    folder = tmp_path_factory.mktemp("pieces")
    lines = (" ".join(WORDS[i % 17 :] + WORDS[: i % 17]) for i in range(200))
    (folder / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tiny"),
        vocab_size=80,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return str(folder / "tiny.model")


def small(text: dict, **joint) -> Model:
    """A small model with a text tower and initial values."""
    model = Model(encoder="vit_test8", text=text, joint={"width": 16, **joint})
    shard.initialise(model, 0)
    return model.eval()


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    """Random pictures."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def test_open_clips_tower_makes_open_clips_tokens_and_features():
    model = small(BPE)
    tokens = model.text.tokenizer()(["a red bee", "a wave in the sea"])
    assert torch.equal(
        tokens, open_clip.get_tokenizer("ViT-B-32")(["a red bee", "a wave in the sea"])
    )
    peer = open_clip.transformer.TextTransformer(width=32, layers=2, heads=2, output_dim=None)
    peer.load_state_dict(model.text.tower.state_dict())
    assert_close(model.text(tokens), peer.eval()(tokens))


def test_a_tower_made_on_the_meta_device_is_the_one_made_on_the_cpu(pieces):
    for text in (BPE, {**TINY_XLMR, "tokenizer": pieces}):
        want = small(text)
        with torch.device("meta"):
            model = Model(encoder="vit_test8", text=text, joint={"width": 16})
        model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.fill_(99)  # what to_empty may leave
        shard.fill_buffers(model)
        shard.initialise(model, 0)
        tokens = want.text.tokenizer()(["a lazy dog", "cats"])
        assert_close(model.eval().text_features(tokens), want.text_features(tokens))


@pytest.mark.parametrize("text", [BPE, TINY_XLMR], ids=["open_clip", "xlmr"])
def test_a_towers_initial_values_are_all_set_and_have_its_authors_deviations(text):
    model = small(text)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    peer = (
        open_clip.transformer.TextTransformer(width=32, layers=2, heads=2, output_dim=None)
        if text is BPE
        else XLMRobertaForMaskedLM(XLMRobertaConfig(**HF)).roberta
    )
    mine = dict(model.text.tower.named_parameters())
    for name, value in peer.named_parameters():
        if name in mine and value.ndim == 2:
            assert mine[name].detach().std() == pytest.approx(
                value.detach().std().item(), rel=0.15
            ), name
    assert_close(model.joint.logit_scale.exp(), torch.tensor([1 / 0.07]))


HF = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}


def test_a_hugging_face_checkpoint_of_xlmr_gives_the_same_first_token(tmp_path):
    peer = XLMRobertaForMaskedLM(XLMRobertaConfig(**HF)).eval()
    torch.nn.init.normal_(peer.roberta.embeddings.token_type_embeddings.weight)
    peer.save_pretrained(tmp_path)
    model = small(TINY_XLMR)
    found = open_text(str(tmp_path / "model.safetensors"), model.text)
    weights.fill(model.text, found)
    tokens = torch.tensor([[0, 5, 9, 2, 1, 1], [0, 7, 100, 60, 3, 2]])
    want = peer.roberta(tokens, attention_mask=(tokens != 1).long()).last_hidden_state[:, 0]
    assert_close(model.text(tokens), want, rtol=1e-5, atol=1e-5)


def test_an_open_clip_checkpoint_gives_its_text_tower_in_either_form(tmp_path):
    config = {"width": 32, "layers": 2, "heads": 2, "context_length": 77, "vocab_size": 49408}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    model = small(BPE)
    tokens = model.text.tokenizer()(["a red bee", "sea"])
    for kind in (open_clip.CLIP, open_clip.CustomTextCLIP):
        peer = kind(16, vision_cfg=vision, text_cfg=config).eval()
        torch.save({"state_dict": peer.state_dict()}, tmp_path / "peer.pt")
        weights.fill(model.text, open_text(str(tmp_path / "peer.pt"), model.text))
        projection = peer.text_projection if kind is open_clip.CLIP else peer.text.text_projection
        assert_close(model.text(tokens) @ projection, peer.encode_text(tokens))


def test_a_text_checkpoint_that_does_not_fit_names_its_keys(tmp_path):
    save_file(
        {"tower.odd": torch.zeros(1), "token_embedding.weight": torch.zeros(2, 2)},
        tmp_path / "odd.safetensors",
    )
    model = small(BPE)
    with pytest.raises(
        ValueError, match=r"(?s)odd.safetensors: does not fit.*left over tower.tower.odd"
    ):
        weights.check(model.text, open_text(str(tmp_path / "odd.safetensors"), model.text))


def test_xlmr_ids_are_fairseqs(pieces):
    tokenizer = small({**TINY_XLMR, "tokenizer": pieces, "context": 12}).text.tokenizer()
    peer = sentencepiece.SentencePieceProcessor(model_file=pieces)
    got = tokenizer(["the lazy dog 中"])[0].tolist()
    want = [i + 1 if i else 3 for i in peer.encode("the lazy dog 中")]
    assert 3 in want and got == [0, *want, 2, *[1] * (10 - len(want))]
    assert tokenizer.count("the lazy dog 中") == len(want) and tokenizer.count(" ") == 0


def test_the_text_towers_read_100_tokens_and_open_clips_75(pieces):
    long = "dog " * 2500  # 10,000 characters
    xlmr = small({**TINY_XLMR, "tokenizer": pieces}).text.tokenizer()
    assert xlmr.room == 100 and xlmr.count(long) > 100
    row = xlmr([long])[0]
    assert row.shape == (102,) and row[0] == 0 and row[-1] == 2 and (row != 1).all()
    bpe = small(BPE).text.tokenizer()
    assert bpe.room == 75 and bpe.count(long) == 2500
    assert bpe([long])[0, -1] == 49407 and bpe([long]).shape == (1, 77)


def test_a_tokenizer_travels_to_a_worker(pieces):
    for text in (BPE, {**TINY_XLMR, "tokenizer": pieces}):
        tokenizer = small(text).text.tokenizer()
        assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(["a dog"]), tokenizer(["a dog"]))


@pytest.mark.parametrize(
    "text, said",
    [
        ({"name": "clip"}, "model.text.name: no tower 'clip'.*There are: open_clip, xlmr"),
        ({"name": "xlm"}, "model.text.name: no tower 'xlm'. Did you mean 'xlmr'"),
        ("xlmr", "model.text: 'xlmr' is no section"),
        (
            {"name": "xlmr", "widht": 3},
            "model.text.widht: unknown option. Did you mean model.text.width",
        ),
        ({"name": "xlmr", "size": "huge"}, "model.text.size: 'huge' is none of"),
        ({**TINY_XLMR, "context": 600}, "model.text.context: 600 does not lie between 3 and .*512"),
        ({**TINY_XLMR, "heads": 5}, "model.text.width: 32 must be a multiple of model.text.heads"),
        ({**BPE, "heads": 5}, "model.text.width: 32 must be a multiple of model.text.heads"),
        (
            {"name": "open_clip", "architecture": "ViT-B-23"},
            "no model config 'ViT-B-23'. Did you mean 'ViT-B-",
        ),
        ({"name": "open_clip", "architecture": "roberta-ViT-B-32"}, "use model.text.name=xlmr"),
        ({"name": "open_clip"}, "model.text: missing model.text.architecture"),
    ],
)
def test_a_mistake_in_the_text_section_names_the_key_and_the_way_out(text, said):
    with pytest.raises(ValueError, match=said.replace("?", "[?]")):
        with torch.device("meta"):
            Model(encoder="vit_test8", text=text)


def test_a_tokenizer_that_is_missing_or_of_other_data_is_refused(pieces, tmp_path):
    (tmp_path / "odd.model").write_text("not a model")
    for changed, said in (
        ({}, "model.text.tokenizer: is missing"),
        ({"tokenizer": "none.model"}, "there is no file at none.model"),
        ({"tokenizer": str(tmp_path / "odd.model")}, "odd.model is no SentencePiece model"),
        ({"tokenizer": pieces, "vocabulary": 20}, "model.text.vocabulary: 20 ids do not hold the"),
    ):
        with pytest.raises(ValueError, match=said):
            small({**TINY_XLMR, **changed}).text.tokenizer()
    with pytest.raises(ValueError, match="model.joint: there is nothing to join"):
        Model(encoder="vit_test8", joint={"width": 4})


@pytest.mark.parametrize("pool, bias", [("class", False), ("mean", True)])
def test_an_export_loads_in_open_clip_with_strict_keys_and_gives_the_same_features(
    tmp_path, pool, bias
):
    model = small(BPE, pool=pool, bias=bias)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            )
    save(model, tmp_path, "test")
    place = f"local-dir:{tmp_path / 'open_clip'}"
    peer, preprocess = open_clip.create_model_from_pretrained(place)
    tokens = open_clip.get_tokenizer(place)(["a red bee", "a wave"])
    assert torch.equal(tokens, model.text.tokenizer()(["a red bee", "a wave"]))
    picture = images()
    with torch.no_grad():
        got = peer.eval().get_logits(model.normalise(picture), tokens)[0]
        image, text, scale, shift = model.pairs(picture, model.text.tokenizer()(["a", "b", "c"]))
        text = model.text_features(tokens)
    assert_close(got, scale * image @ text.T + shift, rtol=1e-4, atol=1e-4)
    assert tuple(preprocess.transforms[-1].mean) == model.mean


def test_an_export_with_a_text_tower_loads_again_and_its_encoder_loads_in_timm(tmp_path, pieces):
    import timm

    model = small({**TINY_XLMR, "tokenizer": pieces})
    save(model, tmp_path, "test")
    assert not (tmp_path / "open_clip").exists()  # XLM-R is not open_clip's own tower
    again = load(str(tmp_path))
    tokens = model.text.tokenizer()(["a dog", "cats"])
    assert_close(again.text_features(tokens), model.text_features(tokens))
    assert again.options == model.options
    peer = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        assert_close(
            peer(model.normalise(images())), model.features(images()), rtol=1e-5, atol=1e-5
        )
    assert "text" not in json.loads((tmp_path / "timm" / "model.json").read_text())["options"]
    assert "cls_token" in load_file(tmp_path / "timm" / "model.safetensors")


def test_what_another_library_cannot_load_leaves_the_runs_own_export_whole(
    tmp_path, caplog, monkeypatch
):
    caplog.set_level("INFO")
    model = Model(encoder="vit_test8", final_norm=False, text=BPE, joint={"width": 16})
    shard.initialise(model, 0)
    save(model, tmp_path / "bare", "test")
    assert "not written for open_clip: open_clip's image towers end with a norm" in caplog.text
    assert not (tmp_path / "bare" / "open_clip").exists()
    assert (tmp_path / "bare" / "timm" / "config.json").exists()
    tokens = model.text.tokenizer()(["a dog", "cats"])
    assert_close(load(str(tmp_path / "bare")).text_features(tokens), model.text_features(tokens))
    monkeypatch.setattr(ViT, "timm", Encoder.timm)  # as an encoder of one's own
    alone = Model(encoder="vit_test8")
    shard.initialise(alone, 0)
    save(alone, tmp_path / "own", "test")
    assert "not written for timm: timm has no encoder like ViT" in caplog.text
    assert_close(load(str(tmp_path / "own")).features(images()), alone.eval().features(images()))


def test_the_encoder_alone_of_a_model_with_text_is_taken_by_name(tmp_path):
    save(small(BPE), tmp_path, "test")
    alone = load(f"{tmp_path}:encoder")
    assert alone.text is None and "text" not in alone.options
    assert open_weights(str(tmp_path)).options["text"]["name"] == "open_clip"
    moved = load(str(tmp_path), text={"tokenizer": "there"})
    assert moved.options["text"] == {**BPE, "tokenizer": "there"}


def test_a_tower_with_quickgelu_is_not_exported_to_open_clip_beside_a_tower_without():
    with pytest.raises(ValueError, match="'ViT-B-32-quickgelu' uses QuickGELU"):
        OpenClip(architecture="ViT-B-32-quickgelu", width=32, layers=1, heads=2).open_clip()


@pytest.fixture(scope="module")
def hub_tokenizer(tmp_path_factory) -> str:
    """A folder of a Hugging Face tokenizer of words, with an end token and padding 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["</s>", "<pad>", "<unk>", *sorted(set(WORDS))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 0)]
    )
    folder = tmp_path_factory.mktemp("words")
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    whole.save_pretrained(folder)
    return str(folder)


def test_a_config_with_a_tokenizer_of_the_hub_takes_a_local_folder_and_exports_it(
    hub_tokenizer, tmp_path
):
    text = {"name": "open_clip", "architecture": "ViT-B-16-SigLIP", "width": 32, "layers": 1}
    text |= {"heads": 2, "tokenizer": hub_tokenizer}
    model = small(text, bias=True)
    tokenizer = model.text.tokenizer()
    tokens = tokenizer(["The lazy dog!", "cats " * 200])
    assert tokens.shape == (2, 64) and tokenizer.room == 63
    assert tokenizer.count("The lazy dog!") == 3 and tokenizer.count("cats " * 200) == 200
    save(model, tmp_path, "test")
    place = f"local-dir:{tmp_path / 'open_clip'}"
    peer = open_clip.create_model(place).eval()
    assert torch.equal(
        open_clip.get_tokenizer(place)(["the lazy dog"]), tokenizer(["the lazy dog"])
    )
    assert_close(peer.encode_text(tokens, normalize=True), model.text_features(tokens))
    for wrong, said in (
        ({"tokenizer": "none"}, "'none' does not fit 'ViT-B-16-SigLIP': there is no folder none"),
        ({"tokenizer": str(tmp_path)}, "the tokenizer of 'ViT-B-16-SigLIP', cannot be read"),
    ):
        with pytest.raises(ValueError, match=said):
            small({**text, **wrong}).text.tokenizer()
    with pytest.raises(ValueError, match="it has open_clip's own BPE"):
        small({**BPE, "tokenizer": hub_tokenizer}).text.tokenizer()
