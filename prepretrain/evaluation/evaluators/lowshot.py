"""Low-shot: how much is learnt from a handful of images a class, by a linear classifier on the frozen
encoder or with an adapter in it."""

import re
import statistics
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prepretrain.data.sources.base import Source, fingerprint_of
from prepretrain.data.subset import Subset, evenly
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.evaluators.base import (
    Evaluator,
    class_count,
    decoding,
    ranks,
    require,
    tops,
)
from prepretrain.evaluation.features import extract, labels_of, set_aside, state
from prepretrain.evaluation.probing import logistic, subsets, tuning
from prepretrain.evaluation.probing.adapters import ADAPTERS
from prepretrain.evaluation.probing.tuning import Recipe, Tuning
from prepretrain.files import read_json, write_json

SHOTS = (1, 2, 5, 10)  # MSN's (1, 2, 5) and MAWS's (1, 5, 10)
Job = tuple[str, int]  # ("5shot", the seed or the list's number)


class Lowshot(Evaluator):
    """K images a class, chosen anew for each seed; mean and deviation over the seeds.

    data           the card; images are chosen from `train` and accuracy is measured on `val`
    method         "logistic": MSN's (Assran et al. 2022) multinomial logistic regression without
                   intercept, on features from which each one's own mean is taken and which are then
                   scaled to length 1. The others train on crops and flips with the encoder frozen:
                   "linear" a classifier alone, "vpt", "vpt_deep", "lora" and "adaptformer" also an
                   adapter in a ViT (MAWS, arXiv 2303.13496, section 4)
    pool           "class" (the class token) or "mean" (of the patch tokens)
    shots          the numbers of images a class, by default 1, 2, 5 and 10 unless `percent` or `lists`
                   say what to take. The choice for fewer is part of that for more
    percent        that share of each class, at least one image (the 1 % lists of SimCLR and MSN hold 12
                   or 13 of each of ImageNet's classes: take those by `lists`)
    seeds          the number of choices; seed s of one run is seed s of any other
    lists          in place of a choice: a folder of published lists, or a pattern
                   (`subsets*/5imgs_class.txt`), one file name a line; K is what each holds of a class,
                   and the mean is over the lists of the same K
    at_most        take all images of a class that has fewer than K (iNaturalist 2018), not an error;
                   of a list whose classes differ, K is the largest number
    val_images     measure on that many of `val`, spread evenly; all if None
    layer, l2      of "logistic". layer: read the tokens after that many blocks; None: after the last,
                   and its norm. l2: of the summed loss: sum of cross-entropies + l2/2 |W|^2
    adapter        options of the adapter: {tokens} of vpt and vpt_deep, {rank, alpha} of lora, {width,
                   scale} of adaptformer
    optimizer      "sgd" with momentum 0.9, or "adamw"
    epochs, warmup (epochs), batch_size, lr (per 256 images), weight_decay: cosine, the defaults VPT's
                   but for lr. A smaller training set is one batch, at the lr of `batch_size`
    crop_scale     share of an image's area that a training crop shows
    precision      of training: "bf16", or "fp32", which CPUs want
    feature_batch  images at once a process, while features or scores are computed
    workers        as data.workers

    Results are `top1_{K}shot` and `top1_{K}shot_std` (from two seeds on; over n - 1), `top5_…`
    where there are more than five classes, and `…_{P}percent`; the headline is top-1 of the largest
    K. What was trained is under `lowshot/<data>/<method>_{K}shot_{seed}/` of the run's folder, and an
    evaluation that was cut off does not train it again.
    """

    headline, splits, certified = "top1_10shot", ("train", "val"), "val"

    def __init__(
        self,
        *,
        data: str,
        method: Literal[
            "logistic", "linear", "vpt", "vpt_deep", "lora", "adaptformer"
        ] = "logistic",
        pool: Literal["class", "mean"] = "class",
        shots: tuple[int, ...] | None = None,
        percent: float | None = None,
        seeds: int = 5,
        lists: str | None = None,
        at_most: bool = False,
        val_images: int | None = None,
        layer: int | None = None,
        l2: float = 0.0025,
        adapter: dict[str, Any] | None = None,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 1.0,  # not from the paper, which tries 0.05 to 50
        weight_decay: float = 1e-4,
        epochs: int = 100,
        warmup: int = 10,
        batch_size: int = 128,
        crop_scale: tuple[float, float] = (0.08, 1.0),  # not from the paper
        precision: Literal["bf16", "fp32"] = "bf16",
        feature_batch: int = 256,
        workers: int | None = None,
    ):
        super().__init__(data=data)
        methods = ("logistic", "linear", *ADAPTERS)
        require(method in methods, "lowshot.method", method, f"is one of {', '.join(methods)}")
        require(pool in ("class", "mean"), "lowshot.pool", pool, "is 'class' or 'mean'")
        require(
            lists is None or (shots is None and percent is None),
            "lowshot.lists",
            lists,
            "says which images are taken, so it goes without lowshot.shots and lowshot.percent",
        )
        if shots is None:
            shots = SHOTS if lists is None and percent is None else ()
        elif not shots or min(shots) < 1 or len(set(shots)) < len(shots):
            require(False, "lowshot.shots", shots, "must be different numbers from 1 on")
        fits = percent is None or 0 < percent <= 100
        require(fits, "lowshot.percent", percent, "must lie above 0 and up to 100")
        require(seeds >= 1, "lowshot.seeds", seeds, "must be at least 1")
        fits = val_images is None or val_images >= 1
        require(fits, "lowshot.val_images", val_images, "must be at least 1")
        fits = layer is None or method == "logistic"
        require(fits, "lowshot.layer", layer, "is for method=logistic; others use the last")
        require(l2 > 0, "lowshot.l2", l2, "must be above 0")
        fits = adapter is None or method in ADAPTERS
        require(fits, "lowshot.adapter", adapter, f"is for a method with one, not {method}")
        require(
            optimizer in ("sgd", "adamw"), "lowshot.optimizer", optimizer, "is 'sgd' or 'adamw'"
        )
        require(lr > 0, "lowshot.lr", lr, "must be above 0")
        require(weight_decay >= 0, "lowshot.weight_decay", weight_decay, "must not be negative")
        require(epochs >= 1, "lowshot.epochs", epochs, "must be at least 1")
        rule = f"must be 0 to {epochs - 1} (below epochs)"
        require(0 <= warmup < epochs, "lowshot.warmup", warmup, rule)
        require(batch_size >= 1, "lowshot.batch_size", batch_size, "must be at least 1")
        fits = 0 < crop_scale[0] <= crop_scale[1] <= 1
        require(fits, "lowshot.crop_scale", crop_scale, "rises, above 0 and up to 1")
        require(feature_batch >= 1, "lowshot.feature_batch", feature_batch, "must be at least 1")
        self.method, self.pool, self.layer, self.l2 = method, pool, layer, l2
        self.shots, self.percent, self.seeds, self.lists = sorted(shots), percent, seeds, lists
        self.at_most, self.val_images = at_most, val_images
        self.feature_batch, self.workers = feature_batch, decoding(workers)
        self.recipe = Recipe(
            method=method,
            pool=pool,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            epochs=epochs,
            warmup=warmup,
            batch_size=batch_size,
            crop_scale=tuple(crop_scale),
            precision=precision,
            adapter=adapter or {},
        )
        self.variant = None if method == "logistic" else method
        if shots:
            self.headline = f"top1_{max(shots)}shot"
        elif percent is not None:
            self.headline = f"top1_{percent:g}percent"

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: an adapter needs a ViT, and its own options."""
        if self.method != "logistic":
            self.recipe.check(model.encoder)

    def data_state(self) -> dict[str, Any]:
        """See Evaluator.data_state: also of the lists."""
        found = super().data_state()
        if self.lists is None:
            return found
        return found | {"lists": fingerprint_of(subsets.read_lists(self.lists).items())}

    @classmethod
    def quoted(cls, results: dict[str, float]) -> str:
        """Top-1 of the largest K in the results, or of the share if there is no K."""
        found = [re.fullmatch(r"top1_([\d.]+)(shot|percent)", key) for key in results]
        best = max(filter(None, found), key=lambda m: (m.group(2) == "shot", float(m.group(1))))
        return best.group(0)

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """Accuracies on `val` for each K, and the number of its images."""
        self.check(model)
        sources = self.open_data()
        source, whole = sources["train"], sources["val"]
        measured = evenly(len(whole), self.val_images)
        val = Subset(whole, measured) if len(measured) < len(whole) else whole
        labels, val_labels = (_labels(s, self.card.name) for s in (source, val))
        classes = class_count(self.card, labels, val_labels)
        chosen = self.choose(source, labels, classes, folder)
        if self.method == "logistic":
            found = self._on_features(model, source, labels, chosen, val, classes)
        else:
            found = self._trained(model, source, chosen, val, classes, folder)

        def measure(kept: Tensor) -> dict[str, float]:
            return summary({job: tops(rank[kept], classes) for job, rank in found.items()})

        results = self.certify(measure, self.leaked(whole)[measured])
        results = distributed.from_main(results | {"images": len(val)})
        self.headline = self.quoted(results)
        return results

    def choose(
        self, source: Source, labels: Tensor, classes: int, folder: Path
    ) -> dict[Job, Tensor]:
        """Positions of the images of each job, by K and then by seed or list."""
        name, chosen = self.card.name, {}
        if self.lists is None:
            for seed in range(self.seeds):
                for k in self.shots:
                    chosen[f"{k}shot", seed] = subsets.choose(
                        labels, classes, k, seed, at_most=self.at_most, data=name
                    )
                if self.percent is not None:
                    rows = subsets.choose_percent(labels, classes, self.percent, seed)
                    chosen[f"{self.percent:g}percent", seed] = rows
            return chosen
        lists = subsets.read_lists(self.lists)
        place = folder / "lowshot" / name
        for path, rows in subsets.find(source, lists, data=f"{name}:train", folder=place).items():
            fewest, most = subsets.per_class(labels[rows], classes)
            if fewest < most and not self.at_most:
                raise ValueError(
                    f"lowshot.lists: {path} holds {fewest} to {most} images of a class. Leave it out, "
                    f"or set lowshot.at_most=true to have it reported as {most}shot."
                )
            size = f"{most}shot"
            chosen[size, sum(other == size for other, _ in chosen)] = rows
        return chosen

    def _reading(self) -> dict[str, int]:
        return {"batch_size": self.feature_batch, "workers": self.workers}

    def _on_features(
        self,
        model: nn.Module,
        source: Source,
        labels: Tensor,
        chosen: dict[Job, Tensor],
        val: Source,
        classes: int,
    ) -> dict[Job, Tensor]:
        """The ranks of each job by logistic regression, on features of the images it needs."""
        reading = {"pool": self.pool, "layer": self.layer, **self._reading()}
        there, answers = extract(model, val, name=f"{self.card.name}:val", **reading)
        needed = torch.cat(list(chosen.values())).unique()
        few = Subset(source, needed.tolist())
        features, _ = extract(model, few, name=f"{self.card.name}:train", **reading)
        places = {job: torch.searchsorted(needed, rows) for job, rows in chosen.items()}
        with set_aside(model):
            return self.measure(features, labels[needed], places, there, answers, classes)

    def measure(
        self,
        train: Tensor,
        labels: Tensor,
        chosen: dict[Job, Tensor],
        val: Tensor,
        val_labels: Tensor,
        classes: int,
    ) -> dict[Job, Tensor]:
        """The ranks (base.ranks) of the labels of features `val` by each job; `chosen` holds its rows of
        `train`.

        The fits are shared out among the ranks.
        """
        device = distributed.device()
        train, labels, val = _scaled(train).to(device), labels.to(device), _scaled(val).to(device)
        mine = {}
        for job in list(chosen)[distributed.rank() :: distributed.world()]:
            rows = chosen[job].to(device)
            weight = logistic.fit(
                train[rows].double(), labels[rows], classes, l2=self.l2 / len(rows), intercept=False
            )
            mine[job] = ranks(logistic.scores(val, weight).cpu(), val_labels)
        found = {
            job: rank for part in distributed.all_gather_object(mine) for job, rank in part.items()
        }
        return {job: found[job] for job in chosen}

    def _trained(
        self,
        model: nn.Module,
        source: Source,
        chosen: dict[Job, Tensor],
        val: Source,
        classes: int,
        folder: Path,
    ) -> dict[Job, Tensor]:
        """The ranks of each job by training; all processes train each job together."""
        asked = tuning.identity(self.recipe, model) | {"classes": classes, "val": state(val)}
        tuned, found = None, {}
        for (size, number), rows in chosen.items():
            images = Subset(source, rows.tolist())
            place = folder / "lowshot" / self.card.name / f"{self.method}_{size}_{number}"
            record = {**asked, "images": state(images)}
            measured = _recorded(place / "result.json", record)
            if measured is None:
                if tuned is None:
                    tuned = Tuning(self.recipe, model, classes, workers=self.workers)
                tuned.train(images, number, place)
                where = f"{self.card.name}:val"
                scores = extract(tuned.model, val, pool="scores", name=where, **self._reading())
                measured = distributed.from_main(ranks(*scores).tolist())
                shown = tops(torch.tensor(measured), classes)
                _record(place / "result.json", {**record, "found": shown, "ranks": measured})
            found[size, number] = torch.tensor(measured)
        return found


def _labels(source: Source, name: str) -> Tensor:
    if "label" not in source.fields:
        raise ValueError(f"{name}: has no labels, by which images are chosen and counted.")
    return labels_of(source)


def _scaled(features: Tensor) -> Tensor:
    """Each feature vector without its own mean, at length 1, as MSN's preprocessing makes them."""
    return nn.functional.normalize(features - features.mean(dim=1, keepdim=True), dim=1)


def _recorded(path: Path, asked: dict[str, Any]) -> list[int] | None:
    """The ranks that a finished job left behind; None if it is another, or not finished."""
    try:
        known = read_json(path)
    except (OSError, ValueError):  # not there, or damaged: fitted again
        known = {}
    known.pop("found", None)  # for people
    measured = known.pop("ranks", None)
    return distributed.from_main(measured if known == asked else None)


def _record(path: Path, values: dict[str, Any]) -> None:
    if distributed.is_main():
        write_json(path, values)


def summary(found: dict[Job, dict[str, float]]) -> dict[str, float]:
    """Mean and deviation over the seeds, or lists, of each K."""
    results = {}
    for size in dict.fromkeys(size for size, _ in found):
        jobs = [top for (other, _), top in found.items() if other == size]
        for name in jobs[0]:
            values = [top[name] for top in jobs]
            results[f"{name}_{size}"] = statistics.fmean(values)
            if len(values) > 1:
                results[f"{name}_{size}_std"] = statistics.stdev(values)
    return results
