"""Text towers behind one class: open_clip's transformers and XLM-R, each with its tokenizer.

B texts, L tokens, W channels of a tower.
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Keys = tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]  # shapes by name, a reader of one

BOS, PAD, EOS, UNKNOWN = 0, 1, 2, 3  # XLM-R's, which are fairseq's
XLMR_SIZES = {
    "base": {"width": 768, "depth": 12, "heads": 12, "hidden": 3072},
    "large": {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096},
}


class Tokenizer:
    """Texts to ids of one length. `room` is how many tokens of a text itself fit into it."""

    room: int

    def count(self, text: str) -> int:
        """The tokens of a text itself, before any are cut off; 0 for a text without content."""
        raise NotImplementedError

    def __call__(self, texts: list[str]) -> Tensor:
        """int64 [B, L]: what does not fit is cut off at the end; ask `count` first to know."""
        raise NotImplementedError


class Tower(nn.Module):
    """Encodes texts. A family is one subclass in TOWERS; its constructor's keywords are its options."""

    width: int  # W
    context: int  # L, tokens that mark the start and the end included

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, L] to one feature [B, W] a text, after the final norm and before any
        projection."""
        raise NotImplementedError

    def tokenizer(self) -> Tokenizer:
        """What makes this tower's tokens; raises ValueError where its file is missing."""
        raise NotImplementedError

    def save_tokenizer(self, folder: Path) -> None:
        """Writes what open_clip's loader of a folder needs beside the weights, if anything."""

    def init_non_persistent_buffers(self) -> None:
        """Recomputes what no checkpoint holds, after the tower was moved from the meta device."""

    def no_weight_decay(self) -> set[str]:
        """timm's name for the parameters without weight decay, beside all 1-d ones."""
        return set()

    def adopt(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> Keys:
        """The tensors of a public checkpoint of this family under this tower's names; a key that is
        not known keeps its name, so that it shows as left over."""
        raise NotImplementedError

    def open_clip(self) -> dict[str, Any]:
        """The `text_cfg` with which open_clip builds this tower, with a bias-free projection.

        Raises ValueError where open_clip has no such tower.
        """
        raise ValueError(
            "model.text: open_clip cannot load this tower under its own keys. Only "
            "model.text.name=open_clip is exported to it."
        )


class OpenClip(Tower):
    """The text part of one of open_clip's model configs, without its projection."""

    def __init__(
        self,
        *,
        architecture: str,
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        context: int | None = None,
        tokenizer: str | None = None,
    ):
        """architecture: a name of open_clip.list_models(). width, layers, heads, context: instead of
        the config's. tokenizer: a local folder of a Hugging Face tokenizer, for the configs that
        name one of the hub; None lets open_clip fetch that."""
        super().__init__()
        import open_clip  # here and not above, since it takes seconds, and most runs have no text
        from open_clip.model import CLIPTextCfg
        from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer

        if architecture not in open_clip.list_models():
            near = difflib.get_close_matches(architecture, open_clip.list_models(), n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(
                f"model.text.architecture: open_clip has no model config '{architecture}'.{hint} "
                f"open_clip.list_models() has all {len(open_clip.list_models())}."
            )
        whole = open_clip.get_model_config(architecture)
        asked = {"width": width, "layers": layers, "heads": heads, "context_length": context}
        self.given = whole["text_cfg"] | {k: v for k, v in asked.items() if v is not None}
        if "hf_model_name" in self.given:
            raise ValueError(
                f"model.text.architecture: the text part of '{architecture}' is a Hugging Face model "
                f"({self.given['hf_model_name']}), not open_clip's own transformer. For XLM-R use "
                f"model.text.name=xlmr."
            )
        made = CLIPTextCfg(**self.given)
        if made.width % made.heads:
            raise ValueError(
                f"model.text.width: {made.width} must be a multiple of model.text.heads "
                f"({made.heads})."
            )
        self.architecture, self.source = architecture, tokenizer
        self.quick = bool(whole.get("quick_gelu"))
        self.width, self.layers, self.context = made.width, made.layers, made.context_length
        act = QuickGELU if self.quick else nn.GELU
        norm, norm_options = LayerNorm, made.norm_kwargs or {}
        self.tower = TextTransformer(
            context_length=made.context_length,
            vocab_size=made.vocab_size,
            width=made.width,
            heads=made.heads,
            layers=made.layers,
            mlp_ratio=made.mlp_ratio,
            output_dim=None,
            embed_cls=made.embed_cls,
            no_causal_mask=made.no_causal_mask,
            pad_id=made.pad_id,
            eos_id=made.eos_id,
            pool_type=made.pool_type,
            act_layer=lambda: act(**(made.act_kwargs or {})),
            norm_layer=lambda size: norm(size, **norm_options),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """See Tower.forward."""
        return self.tower(tokens)

    def tokenizer(self) -> Tokenizer:
        """See Tower.tokenizer; open_clip's own BPE comes with it, others need `tokenizer`."""
        return OpenClipTokenizer(self.architecture, self.given, self.context, self.source)

    def save_tokenizer(self, folder: Path) -> None:
        """See Tower: the files of a Hugging Face tokenizer; open_clip's own BPE has none."""
        if "hf_tokenizer_name" in self.given:
            self.tokenizer().inner.save_pretrained(folder)

    def init_non_persistent_buffers(self) -> None:
        """See Tower: the causal mask."""
        if self.tower.attn_mask is not None:
            with torch.device(self.tower.attn_mask.device):
                self.tower.attn_mask.copy_(self.tower.build_causal_mask())

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """CLIP's initialisation (arXiv 2103.00020, its code), but for biases, which start at 0."""
        name = name.removeprefix("tower.")
        depth_scaled = self.width**-0.5 * (2 * self.layers) ** -0.5
        deviations = {
            "token_embedding.weight": 0.02,
            "positional_embedding": 0.01,
            "cls_emb": 0.01,
            "attn.in_proj_weight": self.width**-0.5,
            "attn.out_proj.weight": depth_scaled,
            "mlp.c_fc.weight": (2 * self.width) ** -0.5,
            "mlp.c_proj.weight": depth_scaled,
        }
        for ending, deviation in deviations.items():
            if name.endswith(ending):
                tensor.normal_(std=deviation, generator=generator)
                return True
        if name.endswith("attn.in_proj_bias"):
            tensor.zero_()
            return True
        return False

    def no_weight_decay(self) -> set[str]:
        """As open_clip's."""
        return {"tower.positional_embedding", "tower.cls_emb"}

    def adopt(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> Keys:
        """An open_clip checkpoint, with a text tower of its own (`text.…`) or in the old flat form.

        Its image tower, projection and temperature are not part of the tower, and left out.
        """
        other = ("visual.", "logit_scale", "logit_bias", "text_projection", "text.text_projection")
        names = {f"tower.{k.removeprefix('text.')}": k for k in shapes if not k.startswith(other)}
        return {n: shapes[k] for n, k in names.items()}, lambda name: read(names[name])

    def open_clip(self) -> dict[str, Any]:
        """See Tower.open_clip."""
        if self.quick:
            raise ValueError(
                f"model.text.architecture: '{self.architecture}' uses QuickGELU, which open_clip sets "
                f"for both towers at once, and the image tower has GELU."
            )
        return self.given | {"proj_type": "linear", "proj_bias": False, "output_tokens": False}


class OpenClipTokenizer(Tokenizer):
    """open_clip's own BPE, or the Hugging Face tokenizer that a config names."""

    def __init__(self, architecture: str, given: dict[str, Any], context: int, source: str | None):
        from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

        self.context, self.ours = context, "hf_tokenizer_name" not in given
        if source is not None and (self.ours or not Path(source).is_dir()):
            why = "it has open_clip's own BPE" if self.ours else f"there is no folder {source}"
            raise ValueError(
                f"model.text.tokenizer: {source!r} does not fit '{architecture}': {why}."
            )
        options = given.get("tokenizer_kwargs", {})
        try:
            if self.ours:
                self.inner = SimpleTokenizer(context_length=context, **options)
            else:
                place = given["hf_tokenizer_name"] if source is None else source
                mode = given.get("tokenizer_mode")
                self.inner = HFTokenizer(place, context, tokenizer_mode=mode, **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model.text.tokenizer: '{source or given.get('hf_tokenizer_name')}', the tokenizer "
                f"of '{architecture}', cannot be read ({str(error)[:200]}). Download its folder, and "
                f"give its path."
            ) from error
        special = 2 if self.ours else self.inner.tokenizer.num_special_tokens_to_add()
        self.room = context - special

    def count(self, text: str) -> int:
        """See Tokenizer.count."""
        if self.ours:
            return len(self.inner.encode(text))
        cleaned = self.inner.clean_fn(text)
        return len(self.inner.tokenizer(cleaned, add_special_tokens=False)["input_ids"])

    def __call__(self, texts: list[str]) -> Tensor:
        """See Tokenizer."""
        return self.inner(texts, self.context)


class XLMR(Tower):
    """XLM-RoBERTa as MAWS uses it: no pooler, the feature of the first token, post-norm."""

    def __init__(
        self,
        *,
        size: Literal["base", "large"] = "base",
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        hidden: int | None = None,
        vocabulary: int = 250_002,
        positions: int = 514,
        context: int = 102,
        dropout: float = 0.1,
        tokenizer: str | None = None,
    ):
        """width, depth, heads, hidden (of the MLP): instead of the size's. context: 100 tokens, BOS
        and EOS. positions: rows of the position table, which starts at the third. tokenizer: the path
        of XLM-R's SentencePiece model (`sentencepiece.bpe.model`)."""
        super().__init__()
        from transformers import XLMRobertaConfig, XLMRobertaModel  # seconds: see OpenClip

        asked = {"width": width, "depth": depth, "heads": heads, "hidden": hidden}
        made = XLMR_SIZES[size] | {k: v for k, v in asked.items() if v is not None}
        if made["width"] % made["heads"]:
            raise ValueError(
                f"model.text.width: {made['width']} must be a multiple of model.text.heads "
                f"({made['heads']})."
            )
        if not 3 <= context <= positions - PAD - 1:
            raise ValueError(
                f"model.text.context: {context} does not lie between 3 and what model.text.positions "
                f"{positions} leaves, {positions - PAD - 1}."
            )
        self.width, self.context, self.vocabulary = made["width"], context, vocabulary
        self.path = tokenizer
        config = XLMRobertaConfig(
            vocab_size=vocabulary,
            hidden_size=made["width"],
            num_hidden_layers=made["depth"],
            num_attention_heads=made["heads"],
            intermediate_size=made["hidden"],
            max_position_embeddings=positions,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            bos_token_id=BOS,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        self.tower = XLMRobertaModel(config, add_pooling_layer=False)
        # There is one type of token; its row adds to every position, and MAWS's files have none.
        self.tower.embeddings.token_type_embeddings = _NoTypes()

    def forward(self, tokens: Tensor) -> Tensor:
        """See Tower.forward: padding is seen by no token."""
        # Not through the model's own forward, whose masks depend on values and so need them: a plan
        # is made on the meta device.
        hidden = self.tower.embeddings(input_ids=tokens)
        mask = (tokens != PAD)[:, None, None, :]
        # a copy, not a view: FSDP hooks what a module returns, and changes in place would lose them
        return self.tower.encoder(hidden, attention_mask=mask).last_hidden_state[:, 0].clone()

    def tokenizer(self) -> Tokenizer:
        """See Tower.tokenizer."""
        if self.path is None:
            raise ValueError(
                "model.text.tokenizer: is missing: the path of XLM-R's SentencePiece model, "
                "sentencepiece.bpe.model."
            )
        return SentencePiece(Path(self.path), self.context, self.vocabulary)

    def init_non_persistent_buffers(self) -> None:
        """See Tower: transformers keeps a row of positions and one of zeros."""
        embeddings = self.tower.embeddings
        places = embeddings.position_ids
        places.copy_(torch.arange(places.shape[-1], device=places.device).expand_as(places))
        embeddings.token_type_ids.zero_()

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """RoBERTa's initialisation: N(0, 0.02), biases and the rows of padding 0."""
        if "LayerNorm" in name or not name.endswith("weight"):
            return False
        tensor.normal_(std=0.02, generator=generator)
        if "embeddings." in name:
            tensor[PAD] = 0
        return True

    def adopt(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> Keys:
        """A Hugging Face checkpoint of XLM-R, as a masked language model (`roberta.…`) or bare.

        The head and the pooler are left out. The one row of token types is added to every position,
        which is what it does in the model.
        """
        types, places = (
            "embeddings.token_type_embeddings.weight",
            "embeddings.position_embeddings.weight",
        )
        other = ("lm_head.", "pooler.", "embeddings.position_ids", types)
        bare = {k.removeprefix("roberta."): k for k in shapes}
        names = {f"tower.{b}": k for b, k in bare.items() if not b.startswith(other)}

        def fetch(name: str) -> Tensor:
            tensor = read(names[name])
            if name == f"tower.{places}" and types in bare:
                return tensor + read(bare[types])[0].to(tensor.dtype)
            return tensor

        return {n: shapes[k] for n, k in names.items()}, fetch


class _NoTypes(nn.Module):
    """In the place of the embedding of token types, where there is one type and it is zero."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros((), device=ids.device)


class SentencePiece(Tokenizer):
    """XLM-R's ids from its SentencePiece model, rebuilt as fairseq's: a piece's number + 1, with 0
    <s>, 1 <pad>, 2 </s>, 3 <unk> and the last id <mask>."""

    def __init__(self, path: Path, context: int, vocabulary: int):
        """Raises ValueError if the file is missing, not a model, or of another vocabulary."""
        import sentencepiece

        if not path.is_file():
            raise ValueError(
                f"model.text.tokenizer: there is no file at {path}. It is XLM-R's SentencePiece "
                f"model, sentencepiece.bpe.model."
            )
        try:
            self.inner = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # whatever the library throws at garbage
            raise ValueError(
                f"model.text.tokenizer: {path} is no SentencePiece model ({error})."
            ) from error
        if self.inner.get_piece_size() + 2 > vocabulary:
            raise ValueError(
                f"model.text.vocabulary: {vocabulary} ids do not hold the "
                f"{self.inner.get_piece_size()} pieces of {path}, <pad> and <mask>."
            )
        self.context, self.room = context, context - 2

    def count(self, text: str) -> int:
        """See Tokenizer.count."""
        return len(self.inner.encode(text))

    def __call__(self, texts: list[str]) -> Tensor:
        """See Tokenizer; padded with 1."""
        rows = torch.full((len(texts), self.context), PAD)
        for row, text in zip(rows, texts):
            pieces = self.inner.encode(text)[: self.room]
            ids = [BOS, *(p + 1 if p else UNKNOWN for p in pieces), EOS]
            row[: len(ids)] = torch.tensor(ids)
        return rows


TOWERS = {"open_clip": OpenClip, "xlmr": XLMR}

# MAWS's released text towers are torchtext's RoBERTa, under the names that it had from 0.12 on, or
# those of before.
_BLOCKS = ("layers.layers.", "layers.")
_FUSED = {
    "self_attn.in_proj_weight": "weight",
    "self_attn.in_proj_bias": "bias",
    "attention.input_projection.weight": "weight",
    "attention.input_projection.bias": "bias",
}
_PARTS = {
    "self_attn.out_proj": "attention.output.dense",
    "attention.output_projection": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "attention_layer_norm": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "residual_mlp.mlp.0": "intermediate.dense",
    "linear2": "output.dense",
    "residual_mlp.mlp.3": "output.dense",
    "norm2": "output.LayerNorm",
    "final_layer_norm": "output.LayerNorm",
}
_AROUND = {
    "token_embedding.": "word_embeddings.",
    "positional_embedding.embedding.": "position_embeddings.",
    "embedding_layer_norm.": "LayerNorm.",
}
_TORCHTEXT = "text_encoder.encoder.transformer."


def is_released(names: Any) -> bool:
    """Whether these are the keys of one of MAWS's released CLIP models."""
    return any(name.startswith("vision_encoder.") for name in names)


def released(shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> Keys:
    """A released MAWS-CLIP checkpoint under a Model's names: `encoder.…`, `text.…` and `joint.…`.

    Each fused projection of queries, keys and values becomes three. A key without a rule keeps its
    name, so that it shows as left over.
    """
    found: dict[str, tuple[str, int | None]] = {}  # ours: (theirs, which third of it)
    for key in shapes:
        for ours, third in _renamed(key):
            found[ours] = (key, third)

    def shape(key: str, third: int | None) -> tuple[int, ...]:
        if key == "logit_scale":
            return (1,)  # released without a dimension, which cannot be sharded
        whole = shapes[key]
        return whole if third is None else (whole[0] // 3, *whole[1:])

    def fetch(name: str) -> Tensor:
        key, third = found[name]
        tensor = read(key)
        return tensor.reshape(shape(key, None)) if third is None else tensor.chunk(3)[third]

    return {ours: shape(*place) for ours, place in found.items()}, fetch


def _renamed(key: str) -> list[tuple[str, int | None]]:
    """Our names for a released key, each with the third of the tensor that it is, if it is one."""
    if key.startswith("vision_encoder."):
        return [(f"encoder.{key.removeprefix('vision_encoder.')}", None)]
    if key in ("vision_projection", "text_projection", "logit_scale"):
        return [(f"joint.{key}", None)]
    inner = key.removeprefix(_TORCHTEXT)
    for theirs, ours in _AROUND.items():
        if key != inner and inner.startswith(theirs):
            return [(f"text.tower.embeddings.{ours}{inner.removeprefix(theirs)}", None)]
    for start in _BLOCKS:
        number, _, rest = inner.removeprefix(start).partition(".")
        if key == inner or not inner.startswith(start) or not number.isdigit():
            continue
        layer = f"text.tower.encoder.layer.{number}."
        if rest in _FUSED:
            three = enumerate(("query", "key", "value"))
            return [(f"{layer}attention.self.{name}.{_FUSED[rest]}", i) for i, name in three]
        part, _, leaf = rest.rpartition(".")
        if part in _PARTS:
            return [(f"{layer}{_PARTS[part]}.{leaf}", None)]
    return [(key, None)]
