"""Writes a Model where `load`, timm and open_clip find it."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from prepretrain.distributed import checkpoint
from prepretrain.files import draft, write_json
from prepretrain.models.encoders.vit import ViT
from prepretrain.models.heads.linear import Linear
from prepretrain.models.joint import LARGEST
from prepretrain.models.model import Model

logger = logging.getLogger(__name__)


def save(model: Model, folder: Path, source: str, state: dict[str, Tensor] | None = None) -> Path:
    """Writes a Model's weights, with the options that make it again; returns their path.

    `model.safetensors` and `model.json` are for `load`. An image encoder, with its linear head if it
    has one, is under timm's key names, so that `timm.create_model("local-dir:<folder>")` loads it
    with strict keys. A model with another head or a text tower keeps its own names; its encoder for
    timm is in `timm/`; one with a text tower is in `open_clip/`, where open_clip has such towers, both for
    `open_clip.create_model("local-dir:<folder>/open_clip")`. Files appear complete or not at all.

    source: where the weights come from, kept beside them. state: the whole state dict of a model
    that is sharded.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in (state or model.state_dict()).items()}
    if model.text is None and isinstance(model.head, Linear | None):
        path = _write_encoder(model, state, folder, source)
        _try("timm", folder, partial(_write_timm, model, folder))
        return path
    path = _write_ours(model.options, state, folder, source)
    encoder = {k: v for k, v in state.items() if k.startswith("encoder.")}
    _write_encoder(model, encoder, folder / "timm", source)
    _try("timm", folder, partial(_write_timm, model, folder / "timm"))
    if model.text is not None:
        _try("open_clip", folder, partial(_write_open_clip, model, state, folder / "open_clip"))
    return path


def _try(library: str, folder: Path, write: Callable[[], None]) -> None:
    """Writes for another library what it can: whatever that meets, the weights themselves, which `load`
    finds, are written already."""
    try:
        write()
    except ValueError as error:  # it has nothing like this model
        logger.info("%s: not written for %s: %s", folder, library, error)
    except Exception as error:
        logger.warning("%s: not written for %s: %r", folder, library, error)


def _write_encoder(model: Model, state: dict[str, Tensor], folder: Path, source: str) -> Path:
    named = {
        _timms(k, model.encoder.timm_head).removeprefix("encoder."): v for k, v in state.items()
    }
    others = ("text", "joint") if isinstance(model.head, Linear) else ("text", "joint", "head")
    options = {k: v for k, v in model.options.items() if k not in others}
    return _write_ours(options, named, folder, source)


def _write_timm(model: Model, folder: Path) -> None:
    head = model.head if isinstance(model.head, Linear) else None
    write_json(folder / "config.json", _timm_config(model, head))


def _write_open_clip(model: Model, state: dict[str, Tensor], folder: Path) -> None:
    config, tensors = _for_open_clip(model, state)
    _write_tensors(folder, "open_clip_model.safetensors", tensors)
    write_json(folder / "open_clip_config.json", config)
    model.text.save_tokenizer(folder)


def _timms(key: str, head: str) -> str:
    """timm's name of a tensor of a Model: those of a classifier stand beside the encoder's."""
    for ours, theirs in (("head.linear.", f"{head}."), ("head.norm.", "fc_norm.")):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def _write_ours(
    options: dict[str, Any], state: dict[str, Tensor], folder: Path, source: str
) -> Path:
    path = _write_tensors(folder, "model.safetensors", state)
    sha256 = checkpoint.describe(path)["sha256"]
    write_json(folder / "model.json", {"options": options, "source": source, "sha256": sha256})
    return path


def _write_tensors(folder: Path, name: str, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    try:
        with draft(path) as place:
            save_file(state, place, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path}: could not be written ({error}). Make room, and start the same command again: a "
            f"run resumes from its last checkpoint."
        ) from error
    return path


def _for_open_clip(
    model: Model, state: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """open_clip's config and tensors. Raises ValueError where it has no such tower."""
    text_cfg = model.text.open_clip()
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    vision_cfg, visual = model.encoder.open_clip(encoder, model.joint.pool)
    tensors = {f"visual.{k}": v for k, v in visual.items()}
    tensors["visual.proj"] = state["joint.vision_projection"]
    for key, value in state.items():
        if key.startswith("text.tower."):
            tensors[f"text.{key.removeprefix('text.tower.')}"] = value
    tensors["text.text_projection"] = state["joint.text_projection"]
    tensors["logit_scale"] = state["joint.logit_scale"].clamp(max=LARGEST).reshape(())
    config = {
        "embed_dim": model.joint.width,
        "custom_text": True,
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
    }
    if model.joint.logit_bias is not None:
        tensors["logit_bias"] = state["joint.logit_bias"].reshape(())
        config["init_logit_bias"] = -10.0  # makes the parameter; the value is the checkpoint's
    preprocess = {"mean": list(model.mean), "std": list(model.std), "interpolation": "bicubic"}
    return {"model_cfg": config, "preprocess_cfg": preprocess}, tensors


def _timm_config(model: Model, head: Linear | None) -> dict[str, Any]:
    built = model.encoder.timm()
    data = {
        "input_size": [3, *model.encoder.image_size],
        "mean": list(model.mean),
        "std": list(model.std),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "num_classes": 0,
        "fixed_input_size": True,
    }
    arguments = {**built["model_args"], "num_classes": 0}
    if head is not None:
        data["num_classes"] = arguments["num_classes"] = head.classes
        arguments["global_pool"] = {"class": "token", "mean": "avg"}[head.pool]
        if isinstance(model.encoder, ViT):  # timm's norms the mean, unless it is told
            arguments["fc_norm"] = head.normed
            if head.normed:
                arguments.pop("final_norm")
    return {
        "architecture": built["architecture"],
        "num_classes": data["num_classes"],
        "num_features": model.encoder.width,
        "model_args": arguments,
        "pretrained_cfg": data,
    }
