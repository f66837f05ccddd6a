"""Time of evaluating frozen features: what of a pass over images is the model, and each probe.

    python benchmarks/features.py
    python benchmarks/features.py --images 64 --rows 5000

The pass is over JPEGs of 500 x 375, by a ViT-Ti/16 (192 channels), with and without a cache on disk;
the probes learn from 50,000 features of 192 channels in 10 classes with each protocol's own settings,
and k-NN classifies 10,000 by those. CPU time on one thread. Prints one JSON line a figure.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from loader import textures

from prepretrain.data.sources.base import Source
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.evaluators.knn import Knn
from prepretrain.evaluation.features import extract
from prepretrain.evaluation.probing import probes
from prepretrain.models.model import Model

WIDTH, CLASSES = 192, 10
CARD = "train: {source: synthetic, images: 2}\nval: {source: synthetic, images: 2}\n"


class Textures(Source):
    """JPEGs in memory, so that no disk is measured."""

    fields = ("image", "label")
    fingerprint = "textures"

    def __init__(self, count: int):
        self.files, self.groups = list(textures(count)), [count]

    def __getitem__(self, index: int) -> dict:
        return {"key": str(index), "image": self.files[index], "label": index % CLASSES}


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    before = time.process_time()
    work()
    return time.process_time() - before


def report(figure: str, spent: float, **setting: object) -> None:
    """One line."""
    line = {"figure": figure, "seconds": round(spent, 4), **setting}
    print(json.dumps(line | {"torch": torch.__version__}), flush=True)


def feature_pass(images: int, batch: int) -> None:
    """A pass without a cache, one that fills it and one that finds it, with the share of each that
    is spent in the model."""
    source, model = Textures(images), Model(encoder="vit_ti16")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    inside, whole = [], model.features

    def timed(*given: object) -> torch.Tensor:
        before = time.process_time()
        found = whole(*given)
        inside.append(time.process_time() - before)
        return found

    model.features = timed
    setting = {"images": images, "batch": batch, "encoder": "vit_ti16", "threads": 1}
    extract(model, Textures(batch), batch_size=batch)  # a first time is slower
    with tempfile.TemporaryDirectory() as folder:
        for figure, cache in (
            ("features_pass", None),
            ("features_pass_kept", Path(folder)),
            ("features_found", Path(folder)),
        ):
            inside.clear()
            spent = seconds(lambda: extract(model, source, batch_size=batch, cache=cache))
            report(figure, spent, model_share=round(sum(inside) / spent, 3), **setting)


def probing(rows: int) -> None:
    """Each protocol on made features, which are hard to tell apart, and k-NN."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % CLASSES
    middle = 0.15 * torch.randn(CLASSES, WIDTH, generator=generator)
    features = middle[labels] + torch.randn(rows, WIDTH, generator=generator)
    setting = {"rows": rows, "width": WIDTH, "classes": CLASSES, "threads": 1}
    for protocol in (name for name in probes.PROTOCOLS if name != "attentive"):
        given = (features, labels, CLASSES)
        spent = seconds(lambda: probes.fit(protocol, *given, seed=0, **probes.PROTOCOLS[protocol]))
        report(f"probe_{protocol}", spent, **setting, **probes.PROTOCOLS[protocol])
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as card:
        card.write(CARD)
        card.flush()
        evaluator = Knn(data=card.name)
    queries = features[: rows // 5]
    spent = seconds(lambda: evaluator.votes(features, labels, queries, CLASSES))
    report("knn", spent, **setting, queries=len(queries), k=evaluator.k)


def main() -> None:
    """One JSON line a figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=50000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init()
    feature_pass(asked.images, asked.batch)
    probing(asked.rows)
    distributed.shutdown()


if __name__ == "__main__":
    main()
