"""The text transformers of open_clip's model configs, with their tokenizers."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prepretrain import plugin
from prepretrain.models.text.base import Keys, Tokenizer, Tower

CLIP_TOKENS = 49_408  # of CLIP's BPE, which is open_clip's own


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
        # Each token sees those before it alone, and the feature is the last one's that is no padding.
        last = made.pool_type == "argmax" and not made.embed_cls and not made.no_causal_mask
        if last and "hf_tokenizer_name" not in self.given:
            self.padding = 0
        # open_clip gives its blocks the mask of the longest texts, whatever the length of these
        self.tower.transformer.register_forward_pre_hook(_cut_mask, with_kwargs=True)

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

    def adopt(
        self,
        shapes: dict[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        options: dict[str, Any],
    ) -> Keys:
        """An open_clip checkpoint, with a text tower of its own (`text.…`) or in the old flat form.

        Its image tower, projection and temperature are not part of the tower, and left out.
        """
        self._check_activation(options)
        other = ("visual.", "logit_scale", "logit_bias", "text_projection", "text.text_projection")
        names = {f"tower.{k.removeprefix('text.')}": k for k in shapes if not k.startswith(other)}
        return {n: shapes[k] for n, k in names.items()}, lambda name: read(names[name])

    def _check_activation(self, options: dict[str, Any]) -> None:
        """Raises ValueError for weights of a tag of open_clip's with another activation."""
        import open_clip

        architecture, tag = options.get("architecture"), options.get("tag")
        if tag is None:
            return
        stated = open_clip.get_pretrained_cfg(architecture, tag)
        if stated.get("quick_gelu") and not self.quick:
            raise ValueError(
                f"model.text.architecture: open_clip's {architecture}/{tag} was trained with QuickGELU, "
                f"and the text tower of '{self.architecture}' has GELU. Take the architecture whose name "
                f"ends with -quickgelu."
            )

    def open_clip(self) -> dict[str, Any]:
        """See Tower.open_clip."""
        if self.quick:
            raise ValueError(
                f"model.text.architecture: '{self.architecture}' uses QuickGELU, which open_clip sets "
                f"for both towers at once, and the image tower has GELU."
            )
        return self.given | {"proj_type": "linear", "proj_bias": False, "output_tokens": False}


def _cut_mask(_: nn.Module, given: tuple[Tensor], options: dict[str, Any]) -> tuple[tuple, dict]:
    length, mask = given[0].shape[1], options["attn_mask"]
    return given, {"attn_mask": mask if mask is None else mask[..., :length, :length]}


class OpenClipTokenizer(Tokenizer):
    """open_clip's own BPE, or the Hugging Face tokenizer that a config names."""

    def __init__(self, architecture: str, given: dict[str, Any], context: int, source: str | None):
        from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

        self.context, self.ours = context, "hf_tokenizer_name" not in given
        if not self.ours:
            plugin.require("transformers", "text", f"model.text.architecture: {architecture}")
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
                options = {**options, "tokenizer_mode": mode, "trust_remote_code": False}
                self.inner = HFTokenizer(place, context, **options)
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
