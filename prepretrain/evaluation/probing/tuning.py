"""Trains a classifier, and an adapter if there is one, on a model's frozen encoder, many times over."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from prepretrain.data.loader import Stream
from prepretrain.data.sources.base import Source
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.evaluation.features import fingerprint
from prepretrain.evaluation.probing import adapters
from prepretrain.models.model import Model
from prepretrain.objectives.classify import Classify
from prepretrain.training import optim
from prepretrain.training.fit import fit
from prepretrain.training.schedule import Schedule
from prepretrain.training.signals import Signals


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how. method: an adapter's name, or "linear". adapter: its options. lr: per
    256 images. epochs, warmup: of the images trained on."""

    method: str
    pool: Literal["class", "mean"]
    optimizer: Literal["sgd", "adamw"]
    lr: float
    weight_decay: float
    epochs: int
    warmup: int
    batch_size: int
    crop_scale: tuple[float, float]
    precision: Literal["bf16", "fp32"]
    adapter: dict[str, Any] = field(default_factory=dict)

    def check(self, encoder: nn.Module) -> None:
        """Raises ValueError if the adapter does not fit the encoder, or an option the adapter."""
        if self.method != "linear":
            adapters.check(encoder, self.method, self.adapter)


class Tuning:
    """A fresh classifier on a model's frozen encoder: built and filled once, trained as often as
    asked, each time from its start. `model` is what was trained last."""

    def __init__(self, recipe: Recipe, model: Model, classes: int, *, workers: int = 0):
        self.recipe, self.workers = recipe, workers
        # drop path belongs to the training that the encoder had
        left_out = ("text", "joint", "head", "drop_path")
        options = {k: v for k, v in model.options.items() if k not in left_out}
        with torch.device("meta"):
            self.model = Model(**options, head={"classes": classes, "pool": recipe.pool})
            self.model.encoder.requires_grad_(False)
            if recipe.method != "linear":
                adapters.adapt(self.model.encoder, recipe.method, recipe.adapter)
            self.objective = Classify(self.model, crop_scale=recipe.crop_scale)
        shard.shard(self.objective, precision=recipe.precision)
        _fill_frozen(self.model.encoder, model.encoder)

    def train(self, images: Source, seed: int, folder: Path) -> None:
        """Trains on these images, by the one loop; nothing but its log is written to the folder.

        Raises ValueError for an image that cannot be read: another would stand in for it.
        """
        for part in self.objective.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # an evaluation leaves whole parameters behind, which would go stale
        shard.initialise(self.objective, seed, frozen=False)
        recipe, world = self.recipe, distributed.world()
        batch = -(-min(recipe.batch_size, len(images)) // world) * world
        epoch = -(-len(images) // batch)
        peak = recipe.lr * recipe.batch_size / 256
        schedule = Schedule(peak, recipe.epochs * epoch, recipe.warmup * epoch)
        stream = Stream(
            images.only(self.objective.fields),
            self.objective.transform(train=True),
            batch_size=batch,
            seed=seed,
            workers=self.workers,
            max_bad=0.0,
        )
        folder.mkdir(parents=True, exist_ok=True)
        fit(
            self.objective,
            stream,
            self._optimizer(peak),
            schedule,
            folder=folder,
            seed=seed,
            options=self.model.options,
            log_every=schedule.steps,
            save_every=None,
            signals=Signals(()),  # nothing is saved here, so they are whoever's who evaluates
        )
        bad = folder / "quarantine.jsonl"
        if distributed.from_main(bad.exists() and bad.stat().st_size > 0):
            raise ValueError(
                f"{bad}: names images that were to be trained on and cannot be read. Repair them, or "
                f"remove them from the data."
            )

    def _optimizer(self, lr: float) -> torch.optim.Optimizer:
        decay = self.recipe.weight_decay
        if self.recipe.optimizer == "adamw":
            return optim.build(self.objective, lr=lr, weight_decay=decay, betas=(0.9, 0.999))
        return optim.build(self.objective, "sgd", lr=lr, weight_decay=decay, momentum=0.9)


def identity(recipe: Recipe, model: Model) -> dict[str, Any]:
    """What tells a tuned model from another, but for its images: the recipe, and a hash of the
    model that it starts from; as JSON holds it. Called on every rank."""
    return json.loads(json.dumps({**asdict(recipe), "model": fingerprint(model)}))


def _fill_frozen(fresh: nn.Module, encoder: nn.Module) -> None:
    """Copies an encoder's weights into the frozen ones of another, which may hold an adapter more."""
    given = encoder.state_dict()
    frozen = {k: v for k, v in fresh.state_dict(keep_vars=True).items() if not v.requires_grad}
    if given.keys() != frozen.keys():
        odd = sorted(given.keys() ^ frozen.keys())
        raise RuntimeError(f"the frozen encoder is not the one that is measured: {odd[:8]}.")
    for name, target in frozen.items():
        distributed.put(target, distributed.whole(given[name]))
