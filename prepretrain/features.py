"""Pooled features of a split: frozen encoder, no augmentation, each image exactly once."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prepretrain import distributed
from prepretrain.loader import evaluation_batches
from prepretrain.transforms import BadImage, decode, resize_center_crop, squash

# An image uint8 [3, S, S] as the encoder sees it, and its generators by purpose, to another like it.
Change = Callable[[Tensor, Callable], Tensor]


def extract(
    model: nn.Module,
    source: Any,
    *,
    pool: str = "class",
    layer: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    image_size: int | None = None,
    name: str = "the source",
    share: float = 0.875,
    resize: Literal["crop", "squash"] = "crop",
    change: Change | None = None,
    labelled: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features float32 [n, D] and labels int64 [n] in the source's order, the same on every rank.

    `batch_size` is per rank; `image_size` defaults to the encoder's own; `pool`, `layer`: as
    Model.features'; `name` is what errors call the source; `share` is how much of the short side is
    seen, where `resize` is "crop": the centre ("squash" shows all, without keeping the aspect);
    `change` is done to each image then; not `labelled` needs no labels, and gives zeros.
    """
    if labelled and "label" not in source.fields:
        raise ValueError(
            f"{name}: has no labels (its fields: {', '.join(source.fields)}). "
            "This evaluation needs a card whose source gives them."
        )
    centre = _Centre(image_size or model.encoder.image_size, share, resize, change, labelled)
    device = next(model.parameters()).device
    rows = _Rows(len(source), name)
    with frozen(model):
        for batch in evaluation_batches(source, centre, batch_size=batch_size, workers=workers):
            features = model.features(batch["image"].to(device), pool, layer).float().cpu()
            real = batch["mask"]
            mine = torch.tensor(batch["position"])[real], features[real], batch["label"][real]
            for part in distributed.all_gather_object(mine):
                rows.put(*part)
    return rows.finish()


def extract_texts(
    model: nn.Module, texts: list[str], *, batch_size: int = 256
) -> tuple[Tensor, int]:
    """Features float32 [n, J] of length 1 of texts, the same on every rank, and how many texts were
    longer than the tower reads, and so cut.

    `batch_size` is per rank; each rank computes its share. Raises ValueError for a text without
    content, or features that are not finite.
    """
    tokenizer = model.text.tokenizer()
    counts = [tokenizer.count(text) for text in texts]
    if 0 in counts:
        raise ValueError(f"text {counts.index(0)}: {texts[counts.index(0)]!r} is empty.")
    device = next(model.parameters()).device
    share = -(-len(texts) // distributed.world())
    mine = texts[distributed.rank() * share : (distributed.rank() + 1) * share]
    rows = []
    with frozen(model):
        # as many and as large batches on every rank, since a sharded tower runs on all at once
        for first in range(0, share, batch_size):
            part = mine[first : first + batch_size]
            filled = part + texts[:1] * (min(batch_size, share - first) - len(part))
            rows.append(model.text_features(tokenizer(filled).to(device)).cpu()[: len(part)])
    features = torch.cat([row for part in distributed.all_gather_object(rows) for row in part])
    if not features.isfinite().all():
        raise RuntimeError("the features of texts are not finite. Did the training stay finite?")
    return features, sum(count > tokenizer.room for count in counts)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module trains again that did before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not inference_mode: what FSDP gathers in it are inference tensors, and the training step
        # after an evaluation then fails with "Inplace update to inference tensor".
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _Centre:
    """The transform of an evaluation: decode and take the centre; a class, so that workers can
    pickle it."""

    def __init__(self, size: int, share: float, resize: str, change: Change | None, labelled: bool):
        self.size, self.share, self.resize = size, share, resize
        self.change, self.labelled = change, labelled

    def __call__(self, sample: dict) -> dict:
        if self.labelled and sample.get("label") is None:
            raise BadImage("no label")
        image = decode(sample["image"])
        if self.resize == "squash":
            image = squash(image, self.size)
        else:
            image = resize_center_crop(image, self.size, share=self.share)
        if self.change is not None:
            image = self.change(image, sample["random"])
        return {"image": image, "label": int(sample["label"]) if self.labelled else 0}


class _Rows:
    """Features put at their images' positions, with a count of how often each came."""

    def __init__(self, count: int, name: str):
        self.name, self.seen = name, torch.zeros(count, dtype=torch.int64)
        self.features: Tensor | None = None
        self.labels = torch.zeros(count, dtype=torch.int64)

    def put(self, position: Tensor, features: Tensor, labels: Tensor) -> None:
        """Stores the rows of one rank's batch."""
        if self.features is None:
            self.features = features.new_zeros(len(self.seen), features.shape[1])
        self.features[position] = features
        self.labels[position] = labels
        self.seen.index_add_(0, position, torch.ones_like(position))

    def finish(self) -> tuple[Tensor, Tensor]:
        """All rows, after checking that each image was seen once and that every feature is
        finite."""
        wrong = (self.seen != 1).sum().item()
        if wrong or self.features is None:
            raise RuntimeError(
                f"{self.name}: of {len(self.seen)} images {wrong} were not evaluated "
                "exactly once; a result would be wrong."
            )
        bad = (~self.features.isfinite().all(dim=1)).sum().item()
        if bad:
            raise RuntimeError(
                f"{self.name}: the features of {bad} of {len(self.seen)} images are not "
                "finite. Were the model's weights loaded, and did its training stay finite?"
            )
        return self.features, self.labels
