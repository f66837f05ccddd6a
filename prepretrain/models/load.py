"""Finds and opens the weights of a run, an export, a file or a release, and loads the Model that they
are of."""

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prepretrain import plugin
from prepretrain.distributed import checkpoint, shard
from prepretrain.models import maws, weights
from prepretrain.models.encoders import base as encoders
from prepretrain.models.encoders.base import Encoder
from prepretrain.models.model import Model
from prepretrain.models.text.base import Tower
from prepretrain.models.weights import Weights, checked_options
from prepretrain.zoo import releases as zoo

logger = logging.getLogger(__name__)

PARTS = ("encoder", "text", "joint", "head")  # of a Model, which a source may name
# sources of weights beside runs and files: what comes before the slash, and the family that fetches
LIBRARIES = {"timm": "timm_vit", "open_clip": "openclip"}


def _ours(keys: Iterable[str]) -> dict[str, str]:
    """Our names of tensors that have timm's (see export.py); a head's may also lie under `encoder.`.

    The norm before a classifier is its own; without a classifier it is of an encoder of timm's.
    """
    bare = {k: k.removeprefix("encoder.") if k.startswith("encoder.head.") else k for k in keys}
    names = {
        k: re.sub(r"^head\.(fc\.)?(?=(weight|bias)$)", "head.linear.", n) for k, n in bare.items()
    }
    if "head.linear.weight" in names.values():
        names = {k: n.replace("encoder.fc_norm.", "head.norm.") for k, n in names.items()}
    return names


def _encoder_options(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in ("text", "joint", "head")}


def open_weights(source: str) -> Weights:
    """The weights of a run's folder, of an exported folder or of a file, as keys of a Model
    (`encoder.…`, `text.…`, `joint.…`); or of a released model (`maws/vit_l16`, see zoo/releases.py), or
    those that timm (`timm/NAME`) or open_clip (`open_clip/ARCHITECTURE/TAG`) fetches.

    `source:encoder` takes a part, and `source:teacher.backbone` what lies under such a prefix.
    Raises ValueError naming the source and what is wrong with it.
    """
    place, _, part = source.partition(":")
    found = _locate(place, part if part not in PARTS else "")
    if maws.is_released(found.shapes):
        shapes, read = maws.released(found.shapes, found.read)
        found = replace(found, shapes=shapes, read=read)
    flat = not any(k.startswith("encoder.") for k in found.shapes)
    if flat:  # timm's, MAE's and MAWS's files hold an encoder
        found = found.under("encoder")
    found = found.named(_ours(found.shapes))
    if part in PARTS:
        options = _encoder_options(found.options) if found.options and part == "encoder" else None
        found = replace(
            found.part(part).under(part), whole=not flat, options=options or found.options
        )
    return replace(found, source=source)


def open_text(source: str, tower: Tower) -> Weights:
    """The weights of a text tower alone: a model's with one (a run, an export, a released CLIP
    model), or a public checkpoint of the tower's family (open_clip's, Hugging Face's).

    Raises ValueError naming the source.
    """
    found = _locate(source)
    if maws.is_released(found.shapes) or any(k.startswith("text.tower.") for k in found.shapes):
        return replace(open_weights(source).part("text"), source=source)
    shapes, read = tower.adopt(found.shapes, found.read, found.options or {})
    return replace(found, shapes=shapes, read=read)


def fitting(model: Model, found: Weights) -> tuple[nn.Module, Weights]:
    """What of a model these weights are for: all of it, or its encoder where they hold nothing
    else, as those of stage one.

    Raises ValueError for a classifier of other classes, or one that the model has no place for.
    """
    _check_head(model, found)
    more = model.text is not None or model.head is not None
    if not more or not all(k.startswith("encoder.") for k in found.shapes):
        return model, found
    found = found.part("encoder")
    if model.head is not None and model.head.normed:
        # the norm before the classifier is another one, and starts anew (MAE's fine-tuning code)
        found = found.named({k: None if k.startswith("norm.") else k for k in found.shapes})
    return model.encoder, found


def _check_head(model: Model, found: Weights) -> None:
    theirs = {k: s for k, s in found.shapes.items() if k.startswith("head.")}
    state = {} if model.head is None else model.head.state_dict()
    ours = {f"head.{k}": tuple(v.shape) for k, v in state.items()}
    if theirs and (not ours or any(ours.get(k, s) != s for k, s in theirs.items())):
        raise ValueError(
            f"{found.source}: ends with {_described(theirs)}, and the model asked for has "
            f"{_described(ours)} (model.head). To take its encoder alone, write "
            f"{found.source.partition(':')[0]}:encoder."
        )


def _described(shapes: dict[str, tuple[int, ...]]) -> str:
    if not shapes:
        return "none"
    last = [shape for name, shape in shapes.items() if name.endswith("weight") and len(shape) == 2]
    return f"a head of {last[-1][0]} classes" if last else f"a head of {len(shapes)} tensors"


def _locate(place: str, inside: str = "") -> Weights:
    """The weights of a place, or what lies under the prefix `inside` in them."""
    found = _found(place, inside)
    found = found.part(inside).unwrapped() if inside else found
    plugin.check_trusted(found.options, place)
    return found


def _found(place: str, inside: str) -> Weights:
    path = Path(place)
    library, _, name = place.partition("/")
    if library in LIBRARIES and not path.exists():
        return _fetched(plugin.find("encoders", LIBRARIES[library]), name, place)
    if path.is_file():
        return weights.open_file(path, inside)
    if path.is_dir():
        for file in (path / "model.safetensors", path / "export" / "model.safetensors"):
            if file.exists():  # a run that is done: its averaged weights, if it kept an average
                return weights.open_file(file)
        saved = checkpoint.newest(path)
        if saved is not None:
            step = int(saved.name)
            logger.warning("%s: is not done: its weights are those of step %d", place, step)
            shapes, read, state = checkpoint.open_tensors(saved)
            return Weights(place, shapes, read, checked_options(state, saved)).part("model")
        if pieces := sorted(path.glob("*-of-*.safetensors")):
            raise ValueError(
                f"{place}: holds weights in {len(pieces)} pieces, as {pieces[0].name}. Join them into one "
                f"file (safetensors.torch.load_file and save_file), and give that."
            )
        raise ValueError(
            f"{place}: holds no complete checkpoint and no export. Was the run cut off before its first?"
        )
    if place in zoo.releases():
        row = zoo.find(place)
        found = weights.open_file(zoo.fetch(place)).renamed(row.rename, row.unused)
        return replace(found, source=place, options=row.model)
    raise ValueError(
        f"{place}: no such run or file. Give a run's folder (runs/…), a .safetensors or a .pt file, "
        f"or a released model. {zoo.nearest(place)}"
    )


def _fetched(family: type[Encoder], name: str, place: str) -> Weights:
    options = family.offered(name)
    try:
        state = family.fetch(name)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{place}: could not be fetched ({str(error)[:300]}). Without a network, give its file "
            f"instead, with {' '.join(f'{k}={v}' for k, v in options.items())}."
        ) from error
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    return Weights(place, shapes, state.__getitem__, options)


def options_of(source: str) -> dict[str, Any]:
    """The options of the Model that a source's weights are of, as far as it says them; nothing is
    fetched."""
    place = source.partition(":")[0]
    library, _, name = place.partition("/")
    if not Path(place).exists() and library in LIBRARIES:
        return plugin.find("encoders", LIBRARIES[library]).offered(name)
    if not Path(place).exists() and place in zoo.releases():
        return zoo.find(place).model
    return open_weights(source).options or {}


def load(source: str, **changes: Any) -> Model:
    """The model of a run, an export, a file or a release (`maws/vit_l16`), with its weights, on the
    CPU.

    changes: options to make it with instead, as in `load("runs/mae", image_size=448)`; those of
    `text` and `joint` one by one, as in `load("runs/clip", text={"tokenizer": "there.model"})`. A
    file that does not say what it is needs `encoder=`, and for its text tower `text=` and `joint=`.
    """
    return filled(*described(source, **changes))


def filled(model: Model, found: Weights) -> Model:
    """What `described` returned as a model with its weights, on the CPU."""
    model.to_empty(device="cpu")
    shard.fill_buffers(model)
    weights.fill(model, found)
    return model.eval()


def described(source: str, **changes: Any) -> tuple[Model, Weights]:
    """The model of `load` on the meta device, and its weights, of which nothing is read yet. Raises
    ValueError where they do not fit each other."""
    found = open_weights(source)
    changes = dict(changes)
    for key in ("text", "joint"):
        if isinstance(changes.get(key), dict):
            changes[key] = {**((found.options or {}).get(key) or {}), **changes[key]}
    if source in zoo.releases() and zoo.find(source).text is not None:
        text = changes.get("text", found.options["text"])
        if "tokenizer" not in text:  # released beside the model
            changes["text"] = {**text, "tokenizer": str(zoo.tokenizer(source))}
    if "encoder" not in {**(found.options or {}), **changes}:
        raise ValueError(
            f"{source}: does not say which encoder it is. Add encoder='vit_b16', or the like."
        )
    with torch.device("meta"):
        model = Model(**encoders.follow(found.options or {}, changes))
    _check_head(model, found)
    weights.check(model, found)
    return model.eval(), found
