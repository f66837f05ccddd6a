"""Computes each image's features by a model, and the loss of the model's own pre-pretraining."""

from typing import Any, Literal

import numpy as np
import pyarrow as pa

from prepretrain.curation.embedding import Embedder
from prepretrain.curation.shard import Shard
from prepretrain.curation.stages.base import Stage
from prepretrain.data.subset import Subset


class Embed(Stage):
    """`feature` of each image, in float16, and `model`, a hash of the weights and options that it is
    of; with `loss` also that of the run's own objective. Null for an image that cannot be read.

    model       a run's folder, a file of weights, or a release: maws/vit_b16
    options     to make the model with instead, as load() takes them: {encoder: vit_b16} for a file that does
                not say what it is, {image_size: 448}
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
        options: dict[str, Any] | None = None,
        pool: Literal["class", "mean"] = "mean",
        layer: int | None = None,
        share: float = 0.875,
        loss: bool = False,
        batch_size: int = 128,
        workers: int = 0,
    ):
        if options and loss:
            raise ValueError("options: the loss is that of a run as it was trained. Leave one out.")
        self.embedder = Embedder(
            model, options or {}, pool, layer, share, loss, batch_size, workers
        )
        self.columns = {"feature": pa.list_(pa.float16()), "model": pa.string()}
        if loss:
            self.columns |= {"loss": pa.float32()}

    def check(self) -> None:
        """See Stage.check: the model is there, and gives what is asked of it."""
        self.embedder.check()

    def shard(self, shard: Shard) -> dict[str, list[Any]]:
        readable = np.flatnonzero(shard.table("look")["error"].is_null())
        source = Subset(shard.source, readable)
        found: dict[str, list[Any]] = {"feature": self.embedder.features(source)}
        if self.embedder.loss:
            found["loss"] = self.embedder.losses(source)
        columns = {name: [None] * len(shard) for name in self.columns}
        for name, values in found.items():
            for row, value in zip(readable.tolist(), values, strict=True):
                columns[name][row] = value
        mark = self.embedder.mark
        columns["model"] = [None if one is None else mark for one in columns["feature"]]
        return columns
