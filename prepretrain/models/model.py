"""`Model`, the noun that travels: an image encoder, and a text tower if it has one, that knows the
options that made it; and how one is loaded."""

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prepretrain import plugin
from prepretrain.distributed import checkpoint, shard
from prepretrain.models import text as texts
from prepretrain.models import weights
from prepretrain.models.encoders import base as encoders
from prepretrain.models.encoders.base import Encoder
from prepretrain.models.encoders.vit import ViT
from prepretrain.models.heads import LARGEST, Classifier, Joint
from prepretrain.models.weights import Weights
from prepretrain.zoo import releases as zoo

logger = logging.getLogger(__name__)

# sources of weights beside runs and files: what comes before the slash, and the family that fetches
LIBRARIES = {"timm": "timm_vit", "open_clip": "openclip"}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Model(nn.Module):
    """An image encoder, its preprocessing and its options; fine-tuned, also a classifier; with
    captions, also a text tower and the space that both share. B images or texts, N patches, D
    channels, C classes, L tokens, J shared channels."""

    container = True  # its children are sharded, not it (see shard.find_roots)

    def __init__(
        self,
        *,
        encoder: str,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        text: dict[str, Any] | None = None,
        joint: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        **options: Any,
    ):
        """encoder: a size's name, as in `vit_l16`; options: those of its family (image_size,
        drop_path, …). mean, std: of each colour, 0 to 1; by default those that the encoder states
        (of another library's weights), else ImageNet's. text: {name: open_clip | xlmr, options of
        that class in text.py}, and joint: the options of heads.Joint; a model without `text` has
        neither. head: the options of heads.Classifier; a model without has none."""
        super().__init__()
        self.encoder = encoders.build(encoder, **options)
        self.mean = _colour(mean or getattr(self.encoder, "mean", IMAGENET_MEAN), "mean")
        self.std = _colour(std or getattr(self.encoder, "std", IMAGENET_STD), "std")
        colours = {"mean": list(self.mean), "std": list(self.std)}
        self.options = {"encoder": encoder, **colours, **options}
        self.text = self.joint = self.head = None
        if head is not None:
            self.options |= {"head": dict(head)}
            asked = plugin.check(Classifier, dict(head), "model.head")
            self.head = Classifier(self.encoder.width, **asked)
            if self.head.normed and getattr(self.encoder, "final_norm", True):
                raise ValueError(
                    "model.head.norm: the encoder ends with a norm already; with model.final_norm=false "
                    "the one of the head takes its place."
                )
        if text is not None:
            self.text = _tower(text)
            self.options |= {"text": dict(text), "joint": dict(joint or {})}
            asked = plugin.check(Joint, dict(joint or {}), "model.joint")
            self.joint = Joint(self.encoder.width, self.text.width, **asked)
        elif joint is not None:
            raise ValueError(
                "model.joint: there is nothing to join without a text tower. Give model.text, as in "
                "model.text={name: open_clip, architecture: ViT-B-32}."
            )

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32, by mean and std, on the image's device."""
        mean = torch.tensor(self.mean, device=image.device).view(3, 1, 1) * 255
        std = torch.tensor(self.std, device=image.device).view(3, 1, 1) * 255
        return (image.float() - mean) / std

    def denormalise(self, image: Tensor) -> Tensor:
        """float [B, 3, H, W] back to uint8, clipped to what a picture can show."""
        mean = torch.tensor(self.mean, device=image.device).view(3, 1, 1) * 255
        std = torch.tensor(self.std, device=image.device).view(3, 1, 1) * 255
        return (image.float() * std + mean).round().clamp(0, 255).to(torch.uint8)

    def forward(self, image: Tensor, layer: int | None = None) -> Tensor:
        """uint8 [B, 3, H, W] to tokens [B, prefix + N, D]; layer: as Encoder.forward's."""
        return self.encoder(self.normalise(image), layer=layer)

    def features(self, image: Tensor, pool: str = "class", layer: int | None = None) -> Tensor:
        """uint8 [B, 3, H, W] to one float32 feature [B, D] an image; pool "joint": [B, J] of length
        1, in the space of the texts; "scores": [B, C] of its classifier."""
        if pool == "scores":
            return self.scores(image)
        if pool == "joint":
            self.require_text("features")
            return self.joint(self._pooled(image, self.joint.pool), None)[0]
        return encoders.pool(self(image, layer), self.encoder.prefix, pool).float()

    def scores(self, image: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, C], by the classifier of a fine-tuned model."""
        self.require_head("scores")
        return self.classify(self(image))

    def classify(self, tokens: Tensor) -> Tensor:
        """[B, prefix + N, D] tokens of the last layer to float32 [B, C]."""
        return self.head(encoders.pool(tokens, self.encoder.prefix, self.head.pool)).float()

    def text_features(self, tokens: Tensor) -> Tensor:
        """int64 [B, L] to float32 [B, J] of length 1, in the space of the images."""
        self.require_text("text_features")
        return self.joint(None, self.text(tokens))[1]

    def pairs(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """uint8 [B, 3, H, W] and int64 [B, L] to the features of both, [B, J] each of length 1, the
        scale [1] and the bias [1] of their products."""
        return self.joint(self._pooled(image, self.joint.pool), self.text(tokens))

    def _pooled(self, image: Tensor, pool: str) -> Tensor:
        return encoders.pool(self(image), self.encoder.prefix, pool)

    def require_head(self, who: str) -> None:
        """Raises ValueError, saying which stage makes one, if there is no classifier."""
        if self.head is None:
            raise ValueError(
                f"{who}: this model has no classifier. Fine-tuning makes one: --stage finetune, from "
                f"this model with --init."
            )

    def require_text(self, who: str) -> None:
        """Raises ValueError, saying which stage makes one, if there is no text tower."""
        if self.text is None:
            raise ValueError(
                f"{who}: this model has no text tower. Stage two with captions makes one: "
                f"--stage wsp_clip or --stage wsp_lit, from this model with --init."
            )

    def save(self, folder: Path, source: str) -> Path:
        """See `write`; returns the weights' path."""
        return write(
            self, {k: v.detach().cpu() for k, v in self.state_dict().items()}, folder, source
        )


def _tower(given: Any) -> texts.Tower:
    if not isinstance(given, dict):
        raise ValueError(
            f"model.text: {given!r} is no section. It has a name, as in {{name: xlmr}}."
        )
    given = dict(given)
    name = str(given.pop("name", None))
    if name not in texts.TOWERS:
        known = sorted(texts.TOWERS)
        raise ValueError(
            "model.text.name: " + plugin.unknown("no text tower", name, known, quote=True)
        )
    return texts.TOWERS[name](**plugin.check(texts.TOWERS[name], given, "model.text"))


def _colour(values: Any, name: str) -> tuple[float, float, float]:
    return plugin.coerce(values, tuple[float, float, float], f"model.{name}")


def write(model: Model, state: dict[str, Tensor], folder: Path, source: str) -> Path:
    """Writes a whole state dict of a Model, with the options that make it again; returns its path.

    `model.safetensors` and `model.json` are for `load`. An image encoder, with its classifier if it
    has one, is under timm's key names, so that `timm.create_model("local-dir:<folder>")` loads it
    with strict keys. A model with a text
    tower keeps its own names; its encoder for timm is in `timm/`, and in `open_clip/`, where
    open_clip has such towers, both for `open_clip.create_model("local-dir:<folder>/open_clip")`.
    Files appear complete or not at all.
    """
    state = {k: v.contiguous() for k, v in state.items()}
    if model.text is None:
        return _write_encoder(model, state, folder, source)
    encoder = {k: v for k, v in state.items() if k.startswith("encoder.")}
    _write_encoder(model, encoder, folder / "timm", source)
    try:
        config, tensors = _for_open_clip(model, state)
    except ValueError as error:
        logger.info("%s: not written for open_clip: %s", folder, error)
    else:
        _save(folder / "open_clip", "open_clip_model.safetensors", tensors)
        _write_json(folder / "open_clip" / "open_clip_config.json", config)
        model.text.save_tokenizer(folder / "open_clip")
    return _write_ours(model.options, state, folder, source)


def _write_encoder(model: Model, state: dict[str, Tensor], folder: Path, source: str) -> Path:
    named = {
        _timms(k, model.encoder.timm_head).removeprefix("encoder."): v for k, v in state.items()
    }
    options = {k: v for k, v in model.options.items() if k not in ("text", "joint")}
    path = _write_ours(options, named, folder, source)
    _write_json(folder / "config.json", _timm_config(model))
    return path


def _timms(key: str, head: str) -> str:
    """timm's name of a tensor of a Model: those of a classifier stand beside the encoder's."""
    for ours, theirs in (("head.linear.", f"{head}."), ("head.norm.", "fc_norm.")):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def _ours(key: str) -> str:
    """The other way round; a head's tensors may also lie under `encoder.`."""
    key = key.removeprefix("encoder.") if key.startswith("encoder.head.") else key
    if key.startswith("encoder.fc_norm."):
        return key.replace("encoder.fc_norm.", "head.norm.")
    return re.sub(r"^head\.(fc\.)?(?=(weight|bias)$)", "head.linear.", key)


def _write_ours(
    options: dict[str, Any], state: dict[str, Tensor], folder: Path, source: str
) -> Path:
    path = _save(folder, "model.safetensors", state)
    sha256 = checkpoint.describe(path)["sha256"]
    _write_json(folder / "model.json", {"options": options, "source": source, "sha256": sha256})
    return path


def _save(folder: Path, name: str, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    save_file(state, f"{path}.tmp", metadata={"format": "pt"})
    os.replace(f"{path}.tmp", path)
    return path


def _encoder_options(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in ("text", "joint", "head")}


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


def _timm_config(model: Model) -> dict[str, Any]:
    size = model.encoder.image_size
    built = model.encoder.timm()
    data = {
        "input_size": [3, size, size],
        "mean": list(model.mean),
        "std": list(model.std),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "num_classes": 0,
        "fixed_input_size": True,
    }
    arguments = {**built["model_args"], "num_classes": 0}
    if model.head is not None:
        data["num_classes"] = arguments["num_classes"] = model.head.classes
        arguments["global_pool"] = {"class": "token", "mean": "avg"}[model.head.pool]
        if isinstance(model.encoder, ViT):  # timm's norms the mean, unless it is told
            arguments["fc_norm"] = model.head.normed
            if model.head.normed:
                arguments.pop("final_norm")
    return {
        "architecture": built["architecture"],
        "num_classes": data["num_classes"],
        "num_features": model.encoder.width,
        "model_args": arguments,
        "pretrained_cfg": data,
    }


def _write_json(path: Path, value: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def open_weights(source: str) -> Weights:
    """The weights of a run's folder, of an exported folder or of a file, as keys of a Model
    (`encoder.…`, `text.…`, `joint.…`); or of a released model (`maws/vit_l16`, see zoo.py), or
    those that timm (`timm/NAME`) or open_clip (`open_clip/ARCHITECTURE/TAG`) fetches.

    `source:encoder` takes a part. Raises ValueError naming the source and what is wrong with it.
    """
    place, _, part = source.partition(":")
    found = _locate(place)
    if texts.is_released(found.shapes):
        shapes, read = texts.released(found.shapes, found.read)
        found = replace(found, shapes=shapes, read=read)
    if not any(
        k.startswith("encoder.") for k in found.shapes
    ):  # timm's, MAE's and MAWS's files hold an encoder
        found = found.under("encoder")
    found = found.named({key: _ours(key) for key in found.shapes})
    if part:
        options = _encoder_options(found.options) if found.options and part == "encoder" else None
        found = replace(found.part(part).under(part), whole=False, options=options or found.options)
    return replace(found, source=source)


def open_text(source: str, tower: texts.Tower) -> Weights:
    """The weights of a text tower alone: a model's with one (a run, an export, a released CLIP
    model), or a public checkpoint of the tower's family (open_clip's, Hugging Face's).

    Raises ValueError naming the source.
    """
    found = _locate(source)
    if texts.is_released(found.shapes) or any(k.startswith("text.tower.") for k in found.shapes):
        return replace(open_weights(source).part("text"), source=source)
    shapes, read = tower.adopt(found.shapes, found.read)
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
    if "head.linear.weight" not in found.shapes:
        return
    count = found.shapes["head.linear.weight"][0]
    if model.head is None or model.head.classes != count:
        asked = "has none" if model.head is None else f"has {model.head.classes} classes"
        raise ValueError(
            f"{found.source}: ends with a classifier of {count} classes, and the model asked for "
            f"{asked} (model.head). To take its encoder alone, write "
            f"{found.source.partition(':')[0]}:encoder."
        )


def _locate(place: str) -> Weights:
    path = Path(place)
    library, _, name = place.partition("/")
    if library in LIBRARIES and not path.exists():
        return _fetched(plugin.find("encoders", LIBRARIES[library]), name, place)
    if path.is_file():
        return weights.open_file(path)
    if path.is_dir():
        for file in (path / "model.safetensors", path / "export" / "model.safetensors"):
            if file.exists():  # a run that is done: its averaged weights, if it kept an average
                return weights.open_file(file)
        saved = checkpoint.newest(path)
        if saved is not None:
            shapes, read, state = checkpoint.open_tensors(saved)
            return Weights(place, shapes, read, state["options"]).part("model")
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
            f"instead, with encoder={options['encoder']} architecture={options['architecture']}."
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
    model.to_empty(device="cpu")
    shard.fill_buffers(model)
    _check_head(model, found)
    weights.fill(model, found)
    return model.eval()
