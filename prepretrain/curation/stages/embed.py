"""Computes each image's features by a model, and the loss of the model's own pre-pretraining."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from prepretrain.curation.shard import Shard
from prepretrain.curation.stages.base import Stage
from prepretrain.data.loader import evaluation_batches
from prepretrain.data.sources.base import Source
from prepretrain.data.subset import Subset
from prepretrain.evaluation import validation
from prepretrain.evaluation.features import Centre, fingerprint, frozen
from prepretrain.models.load import described, load
from prepretrain.models.model import Model
from prepretrain.objectives.base import Objective
from prepretrain.runs.export import load_objective


class Embed(Stage):
    """`feature` of each image, in float16, and `model`, a hash of the weights and options that it is
    of; with `loss` also that of the run's own objective. Null for an image that cannot be read.

    model       a run's folder, a file of weights, or a release: maws/vit_b16
    pool        "class" (the class token) or "mean" (of the patch tokens)
    layer       read the tokens after that many blocks; None: after the last, and its norm
    share       of the image's short side that the centre crop shows
    loss        also the loss of the centre crop, with a mask that the row draws: of a run of mae, simmim
                or feature_mae. Pixio keeps an image with this as its probability (`decide`'s draw)
    batch_size  images at once;  workers: processes that decode for each task

    Works on the GPU where there is one. Features depend on the machine and the batch size by rounding.
    """

    gpu = True
    reads = {"look": ("error",)}

    def __init__(
        self,
        *,
        model: str,
        pool: Literal["class", "mean"] = "mean",
        layer: int | None = None,
        share: float = 0.875,
        loss: bool = False,
        batch_size: int = 128,
        workers: int = 0,
    ):
        if not 0 < share <= 1:
            raise ValueError(f"share: {share!r} does not fit; it must lie above 0 and up to 1.")
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"{name}: {value!r} does not fit; it must be at least {least}.")
        self.model, self.pool, self.layer, self.share = model, pool, layer, share
        self.loss, self.batch_size, self.workers = loss, batch_size, workers
        self.columns = {"feature": pa.list_(pa.float16()), "model": pa.string()}
        if loss:
            self.columns |= {"loss": pa.float32()}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_loaded", "_mark")}

    def check(self) -> None:
        """See Stage.check: the model is there, and gives what is asked of it."""
        model, _ = described(self.model)
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
            return load(self.model).to(device), None
        objective = load_objective(Path(self.model)).to(device)
        return objective.model, objective

    @cached_property
    def _mark(self) -> str:
        return fingerprint(self._loaded[0])[:16]

    def shard(self, shard: Shard) -> dict[str, list[Any]]:
        readable = np.flatnonzero(shard.table("look")["error"].is_null())
        (model, objective), source = self._loaded, Subset(shard.source, readable)
        found = {"feature": self._each(source, model, self._centre(model), self._feature)}
        if objective is not None:
            validation.check(objective, source, self.model)
            transform = objective.transform(False)
            found["loss"] = self._each(source, objective, transform, objective.losses)
        columns = {name: [None] * len(shard) for name in self.columns}
        for name, values in found.items():
            for row, value in zip(readable.tolist(), values, strict=True):
                columns[name][row] = value
        columns["model"] = [None if one is None else self._mark for one in columns["feature"]]
        return columns

    def _centre(self, model: Model) -> Centre:
        return Centre(model.encoder.image_size, self.share)

    def _feature(self, batch: dict[str, Any]) -> Tensor:
        return self._loaded[0].features(batch["image"], self.pool, self.layer)

    def _each(
        self,
        source: Source,
        module: nn.Module,
        transform: Callable[[dict[str, Any]], dict[str, Any]],
        compute: Callable[[dict[str, Any]], Tensor],
    ) -> list[Any]:
        """What `compute` gives of each image of a source, or None where it cannot be read."""
        values: list[Any] = [None] * len(source)
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
                        values[place] = value.astype(np.float16) if value.ndim else float(value)
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
