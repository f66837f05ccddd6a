"""Measures a model from Python, without a config and without a run."""

import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prepretrain.distributed import group
from prepretrain.evaluation.evaluators.base import build
from prepretrain.models.model import Model


def evaluate(
    model: Model, evaluator: str, *, data: str, folder: str | Path | None = None, **options: Any
) -> dict[str, float]:
    """Measures a model by an evaluator, and returns its named metrics.

    evaluator: a file's name in evaluation/evaluators ("knn", "linear", …), or a dotted module of
    your own. data: a card. options: the evaluator's. folder: where it keeps features and what it
    trains, which makes the next call faster; without one, nothing is kept. The model is moved to
    this process's device. Under torchrun, call it on every process.

        evaluate(load("maws/vit_b16"), "knn", data="cifar10", pool="mean")    # {"top1": …}
    """
    protocol = build(evaluator, cache=folder is not None, data=data, **options)
    protocol.check(model)
    protocol.open_data()
    joined_before = dist.is_initialized()
    model = model.to(group.init())
    try:
        with tempfile.TemporaryDirectory() as temporary:
            return protocol.run(model, Path(folder or temporary))
    finally:
        if not joined_before:
            group.shutdown()
