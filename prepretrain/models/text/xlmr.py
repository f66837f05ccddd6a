"""XLM-R, with its SentencePiece tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prepretrain import plugin
from prepretrain.models.text.base import Keys, Tokenizer, Tower

BOS, PAD, EOS, UNKNOWN = 0, 1, 2, 3  # XLM-R's, which are fairseq's
SIZES = {
    "base": {"width": 768, "depth": 12, "heads": 12, "hidden": 3072},
    "large": {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096},
}


class XLMR(Tower):
    """XLM-RoBERTa as MAWS uses it: no pooler, the feature of the first token, post-norm."""

    padding = PAD

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
        plugin.require("transformers", "text", "model.text.name: xlmr")
        from transformers import XLMRobertaConfig, XLMRobertaModel  # seconds: see OpenClip

        asked = {"width": width, "depth": depth, "heads": heads, "hidden": hidden}
        made = SIZES[size] | {k: v for k, v in asked.items() if v is not None}
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

    def adopt(
        self,
        shapes: dict[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        options: dict[str, Any],
    ) -> Keys:
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
        plugin.require("sentencepiece", "text", f"model.text.tokenizer: {path}")
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
