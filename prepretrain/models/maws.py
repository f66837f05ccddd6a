"""MAWS's released CLIP models under the names of a Model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from prepretrain.models.text.base import Keys

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
