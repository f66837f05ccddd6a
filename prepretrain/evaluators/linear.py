"""Linear probe: how much of a dataset's classes a linear map reads from frozen features."""

import math
from pathlib import Path
from typing import Literal

import torch
from timm.optim import Lars
from torch import Tensor, nn

from prepretrain import distributed, logistic
from prepretrain.evaluators.base import Evaluator, accuracy, class_count, labelled_features, require
from prepretrain.log import logger

L2 = (1e-2, 1e-3, 1e-4, 1e-5)  # strong to weak, each fit starting from the one before
ITERATIONS, TOLERANCE = 150, 1e-4  # of L-BFGS: scikit-learn's are 100 and 1e-4


class Linear(Evaluator):
    """The linear probe of MAE (He et al. 2022, appendix A), on features computed once.

    MAE trains its probe with random crops and flips. Here features are computed once, from the
    centre of each image, and the probe is trained on those: far cheaper, and a lower bound on what
    the augmented probe gives.

    data           the card; its splits `train` and `val` are used
    pool           "class" (the class token) or "mean" (of the patch tokens)
    layer          read the tokens after that many blocks; None: after the last, and its norm (SimMIM
                   probes layer 8 of a ViT-B, mean pool: its issue 14)
    solver         "sgd": BatchNorm without affine, then a linear layer, trained with LARS and a cosine,
                   as MAE does. "lbfgs": logistic regression on standardised features, its L2 strength
                   chosen on a tenth of `train`; the better choice for small sets, and needs no tuning
    epochs, batch_size, lr (per 256 images), warmup (epochs), weight_decay: of "sgd". A smaller training
                   set is one batch, at the lr of `batch_size`: LARS's steps are relative to the weights,
                   so a lower lr would leave them where they start
    feature_batch  images at once a process, while features are computed;  workers: decoding processes
    seed           of the head's first weights, the order of images, and the held-out tenth
    """

    headline, splits = "top1", ("train", "val")

    def __init__(
        self,
        *,
        data: str,
        pool: Literal["class", "mean"] = "class",
        layer: int | None = None,
        solver: Literal["sgd", "lbfgs"] = "sgd",
        epochs: int = 90,
        batch_size: int = 16384,
        lr: float = 0.1,
        warmup: int = 10,
        weight_decay: float = 0.0,
        feature_batch: int = 256,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(data=data)
        require(pool in ("class", "mean"), "linear.pool", pool, "is 'class' or 'mean'")
        require(solver in ("sgd", "lbfgs"), "linear.solver", solver, "is 'sgd' or 'lbfgs'")
        require(epochs >= 1, "linear.epochs", epochs, "must be at least 1")
        require(batch_size >= 2, "linear.batch_size", batch_size, "must be at least 2")
        require(lr > 0, "linear.lr", lr, "must be above 0")
        require(
            0 <= warmup < epochs,
            "linear.warmup",
            warmup,
            f"must be 0 to {epochs - 1} (below epochs)",
        )
        require(weight_decay >= 0, "linear.weight_decay", weight_decay, "must not be negative")
        require(feature_batch >= 1, "linear.feature_batch", feature_batch, "must be at least 1")
        require(workers >= 0, "linear.workers", workers, "must not be negative")
        self.layer = layer
        self.pool, self.solver, self.seed = pool, solver, seed
        self.epochs, self.batch_size, self.lr = epochs, batch_size, lr
        self.warmup, self.weight_decay = warmup, weight_decay
        self.feature_batch, self.workers = feature_batch, workers

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """Top-1 (and top-5) on `val`, with the numbers of images that it was measured and trained
        on."""
        reading = {
            "pool": self.pool,
            "layer": self.layer,
            "batch_size": self.feature_batch,
            "workers": self.workers,
        }
        train, train_labels = labelled_features(self.card, "train", model, **reading)
        val, val_labels = labelled_features(self.card, "val", model, **reading)
        classes = class_count(self.card, train_labels, val_labels)
        scores = self.fit(train, train_labels, val, classes)
        found = accuracy(scores.cpu(), val_labels) | {
            "images": len(val),
            "train_images": len(train),
        }
        return distributed.from_main(found)

    def fit(self, train: Tensor, labels: Tensor, val: Tensor, classes: int) -> Tensor:
        """Scores [len(val), classes] of a probe trained on `train`."""
        if len(train) < 2:
            raise ValueError(
                f"{self.card.name}:train: {len(train)} image is too few to train a probe on."
            )
        device = distributed.device()
        solve = _sgd if self.solver == "sgd" else _lbfgs
        return solve(self, train.to(device), labels.to(device), val.to(device), classes)


def _sgd(options: Linear, train: Tensor, labels: Tensor, val: Tensor, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(options.seed)
    head = _head(train.shape[1], classes, generator).to(train.device)
    # LARS adapts the weight but not the bias, as MAE's and MoCo v3's do; timm's adapts only where
    # there is weight decay, so without always_adapt the weight would not be adapted at all.
    optimizer = Lars(
        [
            {
                "params": [head[1].weight],
                "weight_decay": options.weight_decay,
                "always_adapt": True,
            },
            {"params": [head[1].bias]},
        ],
        momentum=0.9,
    )
    batches = math.ceil(len(train) / options.batch_size)  # near-equal ones: no image is dropped
    peak = options.lr * options.batch_size / 256
    for epoch in range(options.epochs):
        order = torch.randperm(len(train), generator=generator).to(train.device)
        for i, rows in enumerate(order.tensor_split(batches)):
            lr = peak * _schedule(epoch + i / batches, options.warmup, options.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = nn.functional.cross_entropy(head(train[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    head.eval()
    with torch.no_grad():
        return head(val)


def _head(width: int, classes: int, generator: torch.Generator) -> nn.Sequential:
    linear = nn.Linear(width, classes)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


def _schedule(epoch: float, warmup: int, epochs: int) -> float:
    """The share of the peak lr at a fractional epoch: linear warm-up, then half a cosine."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (epoch - warmup) / (epochs - warmup))


def _lbfgs(options: Linear, train: Tensor, labels: Tensor, val: Tensor, classes: int) -> Tensor:
    """Logistic regression, its L2 strength the one that is best on a held-out tenth of `train`."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed))
    held, kept = order.to(train.device).tensor_split([math.ceil(len(train) / 10)])
    inner, outer = _standardised(train[kept], train[held])
    best, chosen, weight = -1.0, L2[0], None
    for l2 in L2:
        weight = logistic.fit(
            inner,
            labels[kept],
            classes,
            l2=l2,
            start=weight,
            iterations=ITERATIONS,
            tolerance=TOLERANCE,
        )
        top1 = accuracy(logistic.scores(outer, weight), labels[held])["top1"]
        if top1 > best:  # on a tie the stronger one stays
            best, chosen = top1, l2
    logger.info("linear/%s: l2 %g, %.2f %% on a held-out tenth", options.card.name, chosen, best)
    inner, outer = _standardised(train, val)
    weight = logistic.fit(
        inner, labels, classes, l2=chosen, start=weight, iterations=ITERATIONS, tolerance=TOLERANCE
    )
    return logistic.scores(outer, weight)


def _standardised(train: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the mean and deviation of `train` removed; a constant feature becomes 0."""
    mean, deviation = train.mean(0), train.std(0, correction=0).clamp_min(1e-6)
    return (train - mean) / deviation, (other - mean) / deviation
