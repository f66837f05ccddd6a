"""`Model`, the noun that travels: an image encoder that knows the options that made it; and how one
is loaded."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prepretrain import checkpoint, plugin, shard, weights, zoo
from prepretrain.encoders import base as encoders
from prepretrain.encoders.base import Encoder
from prepretrain.weights import Weights

# sources of weights beside runs and files: what comes before the slash, and the family that fetches
LIBRARIES = {"timm": "timm_vit", "open_clip": "openclip"}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Model(nn.Module):
    """An image encoder, its preprocessing and its options. B images, N patches, D channels."""

    container = True  # its children are sharded, not it (see shard.find_roots)

    def __init__(
        self,
        *,
        encoder: str,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Any,
    ):
        """encoder: a size's name, as in `vit_l16`; options: those of its family (image_size,
        drop_path, …).

        mean, std: of each colour, 0 to 1; by default those that the encoder states (of another
        library's weights), else ImageNet's.
        """
        super().__init__()
        self.encoder = encoders.build(encoder, **options)
        self.mean = _colour(mean or getattr(self.encoder, "mean", IMAGENET_MEAN), "mean")
        self.std = _colour(std or getattr(self.encoder, "std", IMAGENET_STD), "std")
        colours = {"mean": list(self.mean), "std": list(self.std)}
        self.options = {"encoder": encoder, **colours, **options}

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
        """uint8 [B, 3, H, W] to one float32 feature [B, D] an image."""
        return encoders.pool(self(image, layer), self.encoder.prefix, pool).float()

    def save(self, folder: Path, source: str) -> Path:
        """Writes `model.safetensors`, `model.json` and, for timm, `config.json`; returns the
        weights' path."""
        return write(
            self, {k: v.detach().cpu() for k, v in self.state_dict().items()}, folder, source
        )


def _colour(values: Any, name: str) -> tuple[float, float, float]:
    return plugin.coerce(values, tuple[float, float, float], f"model.{name}")


def write(model: Model, state: dict[str, Tensor], folder: Path, source: str) -> Path:
    """Writes a whole state dict of a Model under timm's key names, with the options that make it
    again.

    `timm.create_model("local-dir:<folder>")` loads the result with strict keys. Files appear
    complete or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k.removeprefix("encoder."): v.contiguous() for k, v in state.items()}
    path = folder / "model.safetensors"
    save_file(state, f"{path}.tmp", metadata={"format": "pt"})
    sha256 = checkpoint.describe(Path(f"{path}.tmp"))["sha256"]
    os.replace(f"{path}.tmp", path)
    _write_json(
        folder / "model.json", {"options": model.options, "source": source, "sha256": sha256}
    )
    _write_json(folder / "config.json", _timm_config(model))
    return path


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
    return {
        "architecture": built["architecture"],
        "num_classes": 0,
        "num_features": model.encoder.width,
        "model_args": {**built["model_args"], "num_classes": 0},
        "pretrained_cfg": data,
    }


def _write_json(path: Path, value: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def open_weights(source: str) -> Weights:
    """The weights of a run's folder, of an exported folder or of a file, as keys of a Model
    (`encoder.…`); or of a released model (`maws/vit_l16`, see zoo.py), or those that timm
    (`timm/NAME`) or open_clip (`open_clip/ARCHITECTURE/TAG`) fetches.

    `source:encoder` takes a part. Raises ValueError naming the source and what is wrong with it.
    """
    place, _, part = source.partition(":")
    found = _locate(place)
    if not any(
        k.startswith("encoder.") for k in found.shapes
    ):  # timm's, MAE's and MAWS's files hold an encoder
        found = found.under("encoder")
    if part:
        found = replace(found.part(part).under(part), whole=False)
    return replace(found, source=source)


def _locate(place: str) -> Weights:
    path = Path(place)
    library, _, name = place.partition("/")
    if library in LIBRARIES and not path.exists():
        return _fetched(plugin.find("encoders", LIBRARIES[library]), name, place)
    if path.is_file():
        return weights.open_file(path)
    if path.is_dir():
        saved = checkpoint.newest(path)
        if saved is not None:
            shapes, read, state = checkpoint.open_tensors(saved)
            return Weights(place, shapes, read, state["options"]).part("model")
        for file in (path / "model.safetensors", path / "export" / "model.safetensors"):
            if file.exists():
                return weights.open_file(file)
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

    changes: options to make it with instead, as in `load("runs/mae", image_size=448)`. A file that
    does not say what it is needs `encoder=`.
    """
    found = open_weights(source)
    if "encoder" not in {**(found.options or {}), **changes}:
        raise ValueError(
            f"{source}: does not say which encoder it is. Add encoder='vit_b16', or the like."
        )
    with torch.device("meta"):
        model = Model(**encoders.follow(found.options or {}, changes))
    model.to_empty(device="cpu")
    shard.fill_buffers(model)
    weights.fill(model, found)
    return model.eval()
