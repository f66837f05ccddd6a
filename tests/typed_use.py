"""Uses of the public API for a type checker: `mypy` reads this file, and nothing runs it."""

from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import assert_type

import prepretrain as pp


def measure(name: str) -> float:
    model = pp.load(name, image_size=448)
    assert_type(model, pp.Model)
    metrics = pp.evaluate(model, "knn", data="cifar10", pool="mean")
    assert_type(metrics, dict[str, float])
    return metrics["top1"]


def read(address: str) -> list[str]:
    source: pp.Source = pp.open_data(address)
    return [source.key(i) for i in range(len(source))]


def start() -> Path:
    if "maws/vit_l16" not in pp.releases():
        raise ValueError("not released")
    return pp.launch("mae", ["data.train=mine"], procs=8)


class Darkest(pp.Objective):
    """An objective of somebody else's."""

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["image"].flatten(1).amin(1)


class Brightness(pp.Evaluator):
    """An evaluator of somebody else's."""

    headline = "mean"

    def run(self, model: torch.nn.Module, folder: Path) -> dict[str, float]:
        return {"mean": 0.0}


def misspelt() -> None:
    pp.laod("maws/vit_l16")  # type: ignore[attr-defined]
    pp.launch("mae", "data.train=mine")  # type: ignore[arg-type]
