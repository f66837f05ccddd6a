"""Low-shot: how much a linear classifier learns from a handful of images a class."""

import statistics
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from prepretrain import distributed, logistic
from prepretrain.evaluators.base import Evaluator, accuracy, class_count, require
from prepretrain.features import extract
from prepretrain.sources.base import Subset


class Lowshot(Evaluator):
    """K images a class, chosen anew for each seed; mean and deviation over the seeds.

    The classifier is MSN's (Assran et al. 2022): multinomial logistic regression without intercept
    on features from which each one's own mean is taken and which are then scaled to length 1.

    data           the card; images are chosen from `train` and accuracy is measured on all of `val`
    pool           "class" (the class token) or "mean" (of the patch tokens)
    layer          read the tokens after that many blocks; None: after the last, and its norm
    shots          the numbers of images a class. The choice for fewer is part of that for more
    seeds          the number of choices; seed s of one run is seed s of any other
    at_most        take all images of a class that has fewer than K (iNaturalist 2018), not an error
    l2             of the summed loss: sum of cross-entropies + l2/2 |W|^2
    feature_batch  images at once a process, while features are computed
    workers        decoding processes

    Results are `top1_{K}shot` and `top1_{K}shot_std` (from two seeds on; over n - 1), `top5_…`
    where there are more than five classes; the headline is top-1 of the largest K.
    """

    headline, splits = "top1_10shot", ("train", "val")

    def __init__(
        self,
        *,
        data: str,
        pool: Literal["class", "mean"] = "class",
        layer: int | None = None,
        shots: tuple[int, ...] = (1, 5, 10),
        seeds: int = 5,
        at_most: bool = False,
        l2: float = 0.0025,
        feature_batch: int = 256,
        workers: int = 0,
    ):
        super().__init__(data=data)
        require(pool in ("class", "mean"), "lowshot.pool", pool, "is 'class' or 'mean'")
        require(
            bool(shots) and all(k >= 1 for k in shots) and len(set(shots)) == len(shots),
            "lowshot.shots",
            shots,
            "must be different numbers from 1 on",
        )
        require(seeds >= 1, "lowshot.seeds", seeds, "must be at least 1")
        require(l2 > 0, "lowshot.l2", l2, "must be above 0")
        require(feature_batch >= 1, "lowshot.feature_batch", feature_batch, "must be at least 1")
        require(workers >= 0, "lowshot.workers", workers, "must not be negative")
        self.layer = layer
        self.pool, self.shots, self.seeds = pool, sorted(shots), seeds
        self.at_most, self.l2 = at_most, l2
        self.feature_batch, self.workers = feature_batch, workers
        self.headline = f"top1_{max(shots)}shot"

    @classmethod
    def quoted(cls, results: dict[str, float]) -> str:
        """Top-1 of the largest K in the results."""
        found = [key for key in results if key.startswith("top1_") and key.endswith("shot")]
        return max(found, key=lambda key: int(key.removeprefix("top1_").removesuffix("shot")))

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """Accuracies on `val` for each K, and the number of its images."""
        source = self.card.open("train")
        if "label" not in source.fields:
            raise ValueError(f"{self.card.name}:train: has no labels, by which images are chosen.")
        labels = torch.tensor([source.label(i) for i in range(len(source))])
        reading = {
            "pool": self.pool,
            "layer": self.layer,
            "batch_size": self.feature_batch,
            "workers": self.workers,
        }
        val, val_labels = extract(
            model, self.card.open("val"), name=f"{self.card.name}:val", **reading
        )
        classes = class_count(self.card, labels, val_labels)
        chosen = {
            (k, seed): choose(labels, classes, k, seed, at_most=self.at_most, data=self.card.name)
            for k in self.shots
            for seed in range(self.seeds)
        }
        needed = sorted(
            set(torch.cat(list(chosen.values())).tolist())
        )  # features of no other image
        train, _ = extract(model, Subset(source, needed), name=f"{self.card.name}:train", **reading)
        places = torch.full((len(labels),), -1)
        places[needed] = torch.arange(len(needed))
        chosen = {job: (places[rows], labels[rows]) for job, rows in chosen.items()}
        found = self.measure(train, chosen, val, val_labels, classes)
        return distributed.from_main(found | {"images": len(val)})

    def measure(
        self,
        train: Tensor,
        chosen: dict[tuple[int, int], tuple[Tensor, Tensor]],
        val: Tensor,
        val_labels: Tensor,
        classes: int,
    ) -> dict[str, float]:
        """Mean and deviation for each K; `chosen` holds rows of `train` and labels for each (K,
        seed).

        The fits are shared out among the ranks.
        """
        device = distributed.device()
        train, val = _scaled(train).to(device), _scaled(val).to(device)
        mine = {}
        for job in list(chosen)[distributed.rank() :: distributed.world()]:
            rows, labels = (part.to(device) for part in chosen[job])
            weight = logistic.fit(
                train[rows].double(), labels, classes, l2=self.l2 / len(rows), intercept=False
            )
            mine[job] = accuracy(logistic.scores(val, weight).cpu(), val_labels)
        found = {
            job: top for part in distributed.all_gather_object(mine) for job, top in part.items()
        }
        results: dict[str, float] = {}
        for k in self.shots:
            results |= _summary([found[k, seed] for seed in range(self.seeds)], k)
        return results


def choose(
    labels: Tensor,
    classes: int,
    shots: int,
    seed: int,
    *,
    at_most: bool = False,
    data: str = "the data",
) -> Tensor:
    """Positions of `shots` images of each class, a pure function of the labels, `shots` and
    `seed`."""
    by_class = torch.argsort(labels, stable=True).split(
        torch.bincount(labels, minlength=classes).tolist()
    )
    if not at_most:
        few = [c for c, rows in enumerate(by_class) if len(rows) < shots]
        if few:
            raise ValueError(
                f"lowshot.shots: {data}:train has fewer than {shots} images in {len(few)} of "
                f"{classes} classes (class {few[0]} has {len(by_class[few[0]])}). Ask for "
                "fewer shots, or set lowshot.at_most=true to take what there is."
            )
    taken = [
        rows[torch.from_numpy(_generator(seed, c).permutation(len(rows))[:shots])]
        for c, rows in enumerate(by_class)
    ]
    return torch.cat(taken)


def _generator(seed: int, label: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=(seed << 32) + label))


def _scaled(features: Tensor) -> Tensor:
    """Each feature vector without its own mean, at length 1, as MSN's preprocessing makes them."""
    return nn.functional.normalize(features - features.mean(dim=1, keepdim=True), dim=1)


def _summary(per_seed: list[dict[str, float]], shots: int) -> dict[str, float]:
    results = {}
    for name in per_seed[0]:
        values = [found[name] for found in per_seed]
        results[f"{name}_{shots}shot"] = statistics.fmean(values)
        if len(values) > 1:
            results[f"{name}_{shots}shot_std"] = statistics.stdev(values)
    return results
