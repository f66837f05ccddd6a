"""Computes features of a source's images by a model, and the loss of the model's own pre-pretraining."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from prepretrain.data.loader import evaluation_batches
from prepretrain.data.sources.base import Source
from prepretrain.evaluation import validation
from prepretrain.evaluation.features import Centre, fingerprint, frozen
from prepretrain.models.load import described, load
from prepretrain.models.model import Model
from prepretrain.objectives.base import Objective
from prepretrain.runs.export import load_objective


@dataclass(frozen=True)
class Embedder:
    """A model, and how images become features by it; the options are those of stage embed. It loads the
    model where it is used first, onto the GPU where there is one."""

    model: str
    options: dict[str, Any]
    pool: Literal["class", "mean"]
    layer: int | None
    share: float
    loss: bool
    batch_size: int
    workers: int

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_loaded", "mark")}

    def check(self) -> None:
        """Raises ValueError where the model is not there, or does not give what is asked of it."""
        model, _ = described(self.model, **self.options)
        if self.pool == "class" and model.encoder.prefix < 1:
            raise ValueError(f"embed.pool: {self.model} has no class token. Use pool: mean.")
        if self.loss and not Path(self.model).is_dir():
            raise ValueError(
                f"embed.loss: {self.model} is no run's folder, which has an objective."
            )

    @cached_property
    def _loaded(self) -> tuple[Model, Objective | None]:
        """The model, and its objective where its loss is asked for, on the device."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if not self.loss:
            return load(self.model, **self.options).to(device), None
        objective = load_objective(Path(self.model)).to(device)
        return objective.model, objective

    @cached_property
    def mark(self) -> str:
        """A hash of the model's weights and options."""
        return fingerprint(self._loaded[0])[:16]

    def features(self, source: Source) -> list[np.ndarray | None]:
        """The feature of each image in float16, or None where it cannot be read."""
        require_images(source, "embed")
        model, _ = self._loaded
        centre = Centre(model.encoder.image_size, self.share)
        compute = lambda batch: model.features(batch["image"], self.pool, self.layer)
        return [
            None if value is None else value.astype(np.float16)
            for value in self._each(source, model, centre, compute)
        ]

    def losses(self, source: Source) -> list[float | None]:
        """The loss of each image by the run's objective, or None where it cannot be read."""
        _, objective = self._loaded
        if objective is None:
            raise ValueError("embed.loss: is false, so no objective was loaded.")
        validation.check(objective, source, self.model)
        values = self._each(source, objective, objective.transform(False), objective.losses)
        return [None if value is None else float(value) for value in values]

    def _each(
        self,
        source: Source,
        module: nn.Module,
        transform: Callable[[dict[str, Any]], dict[str, Any]],
        compute: Callable[[dict[str, Any]], Tensor],
    ) -> list[np.ndarray | None]:
        """What `compute` gives of each image of a source, or None where it cannot be read."""
        values: list[np.ndarray | None] = [None] * len(source)
        if not len(source):
            return values
        batches = evaluation_batches(
            source.only(("image",)),
            transform,
            batch_size=self.batch_size,
            workers=self.workers,
            seed=validation.SEED,
            leave_out=True,
        )
        device = next(module.parameters()).device
        with frozen(module):
            for batch in batches:
                tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
                computed = compute(tensors).float().cpu().numpy()
                _require_finite(computed, batch)
                for place, real, value in zip(batch["position"], batch["mask"], computed):
                    if real:
                        values[place] = value
        return values


def _require_finite(computed: np.ndarray, batch: dict[str, Any]) -> None:
    """Raises ValueError for what float16 cannot hold."""
    most = np.abs(computed.reshape(len(computed), -1)).max(1)
    bad = [k for k, m in zip(batch["key"], most) if not m < np.finfo(np.float16).max]
    if bad:
        raise ValueError(
            f"embed: {len(bad)} images have features or a loss that float16 cannot hold, {bad[0]!r} first. "
            "Were the model's weights loaded, and did its training stay finite?"
        )


def require_images(source: Source, who: str) -> None:
    """Raises ValueError for a source of videos, of which there are no features."""
    if "image" not in source.fields:
        raise ValueError(f"{who}: holds no images, of which features are computed. Leave it out.")
