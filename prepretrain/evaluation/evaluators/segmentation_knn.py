"""Segmentation by nearest patches: what a model's patches say of classes without any training."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prepretrain.data.dense.maps import VOID, Fitted
from prepretrain.data.loader import evaluation_batches, to_device
from prepretrain.data.sources.base import Source
from prepretrain.data.subset import evenly_spaced
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.dense import LabelMapEvaluator, Network
from prepretrain.evaluation.evaluators.base import require
from prepretrain.evaluation.features import frozen

VALUES = 1 << 26  # similarities at once


class SegmentationKnn(LabelMapEvaluator):
    """Each patch of `val` gets the classes of the most similar patches of `train`, by cosine, weighted by
    exp(similarity / temperature); scores of patches are resized to the image. Cheap enough to watch a
    pretraining with. In the manner of "Towards In-context Scene Understanding" (arXiv 2306.01667), of
    which the defaults of k and temperature are # not from the paper

    data           the card
    layer          read the map after that many blocks; null: after the last, and its norm
    k              neighbours
    temperature    of the weights
    train_images   so many of `train`, spread evenly; null takes all
    patches        of all of them that are kept at most, spread evenly
    images         so many of `val`, spread evenly; null takes all
    pictures       of so many of them a sheet is drawn: image, truth, prediction
    feature_batch  images at once a process;  workers: as data.workers

    An image is resized to fit into model.image_size. Results as of `segmentation`.
    """

    def __init__(
        self,
        *,
        data: str,
        layer: int | None = None,
        k: int = 30,
        temperature: float = 0.02,
        train_images: int | None = 500,
        patches: int = 100_000,
        images: int | None = None,
        pictures: int = 0,
        feature_batch: int = 16,
        workers: int | None = None,
    ):
        require(k >= 1, "segmentation_knn.k", k, "must be at least 1")
        super().__init__(
            data=data,
            split="val",
            whole=True,
            images=images,
            pictures=pictures,
            feature_batch=feature_batch,
            workers=workers,
        )
        self.splits = ("train", "val")
        self.layer, self.k, self.temperature = layer, k, temperature
        self.train_images, self.patches = train_images, patches

    def check(self, model: nn.Module) -> None:
        """See Evaluator.check: an encoder that gives maps is needed, no head."""
        super().check(model)
        model.encoder.require(("maps",), f"segmentation_knn/{self.data}")

    def asked(self) -> list:
        """See DenseEvaluator."""
        kept = [self.layer, self.k, self.temperature, self.train_images, self.patches]
        return [*super().asked(), *kept]

    def run(self, model: nn.Module, folder: Path) -> dict[str, float]:
        """See the class."""
        return super().run(model, folder) | {"patches": len(self.bank[0])}

    def prepare(self, model: nn.Module, sources: dict[str, Source]) -> None:
        """See PictureEvaluator.prepare: the patches of `train`."""
        with frozen(model):
            self.bank = self._bank(model, evenly_spaced(sources["train"], self.train_images))

    def network(self, model: nn.Module) -> Network:
        """See DenseEvaluator: the classes of the nearest patches."""
        bank, classes = self.bank
        k = min(self.k, len(bank))

        def scores(images: Tensor) -> Tensor:
            maps = self._maps(model, images)
            patches, found = maps.flatten(2).transpose(1, 2).flatten(0, 1), []
            for part in patches.split(max(1, VALUES // len(bank))):
                nearest, places = (part @ bank.T).topk(k, dim=1)
                weights = (nearest / self.temperature).softmax(1)
                found.append((weights[..., None] * classes[places]).sum(1))
            return torch.cat(found).unflatten(0, (-1, *maps.shape[-2:])).permute(0, 3, 1, 2)

        return scores

    def _maps(self, model: nn.Module, images: Tensor) -> Tensor:
        """Normalised images to maps [B, D, rows, columns] of length 1 at each place."""
        layer = self.layer or len(model.encoder.scales or model.encoder.blocks)
        (maps,) = model.encode(images, maps=(layer,))
        return F.normalize(maps.float(), dim=1)

    def _bank(self, model: nn.Module, source: Source) -> tuple[Tensor, Tensor]:
        """Patches of a source [N, D], and the share that each class has of each [N, C]; of all
        processes, in the order of the images."""
        mine = sorted(self._patches(model, source), key=lambda row: row[0])
        rows = [row for part in distributed.all_gather_object(mine) for row in part]
        bank, classes = (torch.cat([row[i] for row in rows]) for i in (1, 2))
        device = distributed.device()
        return bank.to(device), classes.to(device)

    def _patches(self, model: nn.Module, source: Source) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number of the image, its patches, their classes) of this process's images, on the CPU."""
        most = max(1, self.patches // len(source))  # of an image
        canvas = model.encoder.image_size
        reader = evaluation_batches(
            source,
            Fitted(self.field, canvas),
            batch_size=self.feature_batch,
            workers=self.workers,
        )
        for batch in reader:
            on_device = to_device({key: batch[key] for key in ("image", "size")})
            images = model.normalise_padded(on_device["image"], on_device["size"])
            maps = self._maps(model, images).cpu()
            for place, one, labels in zip(batch["position"], maps, batch[self.field]):
                if place < 0:
                    continue
                shares = self._shares(labels, one.shape[-2:])
                known = shares.sum(1).nonzero()[:, 0]
                kept = known[torch.arange(0, len(known), -(-len(known) // most) or 1)]
                yield place, one.flatten(1).T[kept], shares[kept]

    def _shares(self, labels: Tensor, grid: tuple[int, int]) -> Tensor:
        """[rows x columns, C]: the share of each class among a cell's pixels that have one."""
        classes = len(self.card.classes)
        one_hot = F.one_hot(labels.long(), VOID + 1)[..., :classes].permute(2, 0, 1).float()
        shares = F.adaptive_avg_pool2d(one_hot, grid).flatten(1).T
        return shares / shares.sum(1, keepdim=True).clamp(min=1e-9)
