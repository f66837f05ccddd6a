"""Linear probe: how much of a dataset's classes a linear map reads from frozen features."""

from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from prepretrain.distributed import group as distributed
from prepretrain.evaluation.evaluators.base import (
    ProbeEvaluator,
    accuracy,
    class_count,
    require,
)
from prepretrain.evaluation.features import set_aside
from prepretrain.evaluation.probing import probes
from prepretrain.evaluation.probing.probes import PROTOCOLS


class Linear(ProbeEvaluator):
    """A probe on frozen features that are computed once, from the centre of each image.

    MAE and SWAG train theirs on random crops and flips: far dearer, and this is a lower bound on
    what that gives.

    data           the card; the probe learns from its `train` and is measured on its `val`
    protocol       "mae": BatchNorm without affine, then a linear layer, by LARS and a cosine (He et al.
                   2022, appendix A; arXiv 2305.15248, Table 14, where larger models take 50 epochs).
                   "swag": a linear layer by Nesterov's momentum and a cosine (SWAG's, in torchvision's
                   PR 5793, whose rate is not known).
                   "sweep": a linear layer at several rates at once; the best on a held-out tenth of
                   `train` is then trained on all of it.
                   "lbfgs": logistic regression, its L2 strength chosen on a held-out tenth of `train`;
                   the better choice for small sets, and needs no tuning. "ridge": least squares in
                   closed form, its L2 strength chosen so too.
                   "attentive": attention pooling of all tokens, then a linear layer, by AdamW
    pool           "class" (the class token), "mean" (of the patch tokens) or, for "attentive" alone,
                   "tokens", which are first written to <run folder>/features: n x T x D x 2 bytes
    layer          read the tokens after that many blocks; None: after the last, and its norm (SimMIM
                   probes layer 8 of a ViT-B, mean pool: its issue 14)
    epochs, batch_size, lr (per 256 images), warmup (epochs), weight_decay: of the protocols that have
                   them (probes.PROTOCOLS), and None: the protocol's own. A smaller training set is one
                   batch, at the lr of `batch_size`: LARS's steps are relative to the weights, so a lower
                   lr would leave them where they start
    share          of the image's short side that the centre crop shows
    resize         "crop": that centre; "squash": all, without keeping the aspect (so do the released
                   scripts of fine-tuned models)
    views          of a card of videos, what is seen of each, in place of share and resize: {sampling,
                   stride, span, clips, crops, short_side, frames}, data/video/views.py's. Features are the
                   mean over clips, and over the frames (by default 8 of them) of a model of images
    feature_batch  images at once a process, while features are computed;  workers: as data.workers
    seed           of the head's first weights, the order of images, and the held-out tenth
    """

    headline, splits, certified = "top1", ("train", "val"), "val"

    def __init__(
        self,
        *,
        data: str,
        protocol: Literal["mae", "swag", "sweep", "lbfgs", "ridge", "attentive"] = "mae",
        pool: Literal["class", "mean", "tokens"] = "class",
        layer: int | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        warmup: int | None = None,
        weight_decay: float | None = None,
        share: float = 0.875,
        resize: Literal["crop", "squash"] = "crop",
        views: dict[str, Any] | None = None,
        feature_batch: int = 256,
        workers: int | None = None,
        seed: int = 0,
    ):
        super().__init__(
            data=data,
            pool=pool,
            layer=layer,
            share=share,
            resize=resize,
            views=views,
            feature_batch=feature_batch,
            workers=workers,
        )
        require(
            protocol in PROTOCOLS, "linear.protocol", protocol, f"is one of {', '.join(PROTOCOLS)}"
        )
        pools = ("tokens",) if protocol == "attentive" else ("class", "mean")
        require(
            pool in pools, "linear.pool", pool, f"is {' or '.join(pools)} for protocol {protocol}"
        )
        given = {
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "warmup": warmup,
            "weight_decay": weight_decay,
        }
        self.protocol, self.seed = protocol, seed
        self.settings = _settings(protocol, {k: v for k, v in given.items() if v is not None})

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: a class token, where it is asked for; for tokens, a cache."""
        super().check(model)
        if self.pool == "tokens" and not self.cache:
            raise ValueError(
                "linear.protocol: 'attentive' keeps all tokens on disk, which makes no sense of a "
                "model that is training. Use --stage eval/linear after the run, or another protocol."
            )

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """Top-1 (and top-5) on `val`, with the numbers of images that it was measured and trained
        on."""
        sources = self.open_data()
        train, train_labels = self.features(model, "train", sources["train"], folder)
        val, val_labels = self.features(model, "val", sources["val"], folder)
        classes = class_count(self.card, train_labels, val_labels)
        with set_aside(model):
            scores = probes.scores(self.fit(train, train_labels, classes), val)
        measure = lambda kept: accuracy(scores[kept], val_labels[kept])
        found = self.certify(measure, self.leaked(sources["val"]))
        return distributed.from_main(found | {"images": len(val), "train_images": len(train)})

    def fit(self, features: Tensor, labels: Tensor, classes: int) -> nn.Module:
        """A probe on this process's device, trained on features [n, D] (attentive: [n, T, D]) and
        labels [n]: features to scores [n, classes], for probes.scores.

        Raises ValueError for features that are not finite or labels that do not fit.
        """
        where = f"{self.card.name}:train"
        if len(features) < 2 or len(features) != len(labels):
            raise ValueError(
                f"{where}: {len(features)} images with {len(labels)} labels are too few, or do not "
                f"fit each other: a probe needs two images or more, each with its label."
            )
        if not all(part.isfinite().all() for part in features.split(4096)):
            raise ValueError(f"{where}: features are not finite. Did the training stay finite?")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(f"{where}: labels run from {low} to {high}, of {classes} classes.")
        return probes.fit(self.protocol, features, labels, classes, seed=self.seed, **self.settings)


def _settings(protocol: str, given: dict[str, float]) -> dict[str, float]:
    """The protocol's settings under those that are given, checked."""
    known = PROTOCOLS[protocol]
    for name in given:
        if name not in known:
            raise ValueError(
                f"linear.{name}: protocol '{protocol}' has none. It has: "
                f"{', '.join(known) or 'no setting'}."
            )
    found = known | given
    for name in found.keys() & {"epochs", "lr", "batch_size"}:
        least = 2 if name == "batch_size" else 1
        rule = "must be above 0" if name == "lr" else f"must be at least {least}"
        fits = found[name] > 0 if name == "lr" else found[name] >= least
        require(fits, f"linear.{name}", found[name], rule)
    if "warmup" in found:
        rule = f"must be 0 to {found['epochs'] - 1} (below epochs)"
        require(0 <= found["warmup"] < found["epochs"], "linear.warmup", found["warmup"], rule)
    decay = found.get("weight_decay", 0.0)
    require(decay >= 0, "linear.weight_decay", decay, "must not be negative")
    return found
