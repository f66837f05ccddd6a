"""Features of a split: frozen encoder, no augmentation, each image exactly once; kept on disk where
that is asked for."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from prepretrain.data.loader import evaluation_batches
from prepretrain.data.sources.base import fingerprint_of
from prepretrain.data.subset import Subset
from prepretrain.data.transforms import (
    BadImage,
    Size,
    decode,
    plain_size,
    resize_center_crop,
    sides,
    squash,
)
from prepretrain.data.video.views import Views
from prepretrain.distributed import group as distributed
from prepretrain.distributed.shared import SharedRows
from prepretrain.evaluation.feature_store import Store, file_name, size
from prepretrain.training.log import logger

# An image uint8 [3, S, S] as the encoder sees it, and its generators by purpose, to another like it.
Change = Callable[[Tensor, Callable], Tensor]

# Positions [m], features [m, …] and labels [m] of some images.
_Part = tuple[Tensor, Tensor, Tensor]
_GATHERED = 1 << 28  # bytes of features that a process receives at once

_VERSION = 2  # of how an image becomes a feature, weights and options apart: raise it with a change


def extract(
    model: nn.Module,
    source: Any,
    *,
    pool: str = "class",
    layer: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    image_size: Size | None = None,
    name: str = "the source",
    share: float = 0.875,
    resize: Literal["crop", "squash"] = "crop",
    change: Change | None = None,
    views: Views | None = None,
    labelled: bool = True,
    cache: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """Features float32 [n, D] and labels int64 [n] in the source's order, the same on every rank.

    `batch_size` is per rank; `image_size` defaults to the encoder's own; `pool`, `layer`: as
    Model.features', and pool "tokens": all tokens, float16 [n, T, D], only with a cache; `name` is
    what errors call the source; `share` is how much of the short side is seen, where `resize` is
    "crop": the centre ("squash" shows all, without keeping the aspect); `change` is done to each
    image then; not `labelled` needs no labels, and gives zeros. views: of a source of videos, what is
    seen of each, in place of share and resize: the mean over its views, and over the frames of a model
    of images; `batch_size` then counts videos.

    cache: a folder that all ranks see, in which features are kept under a hash of the weights, the
    model's options, the data's fingerprint and stamp, and how they are read; what is returned is then
    memory-mapped, and the next call finds it. A pass that was cut off goes on from its last whole
    chunk, and chunks that changed on disk are computed again. The folder may be removed at any time.
    Labels are not kept: they are read each time, since they may be mended.

    Raises ValueError for data without labels, a cache together with `change`, tokens without a
    cache, and a disk without room; RuntimeError for features that are not finite.
    """
    if labelled and "label" not in source.fields:
        raise ValueError(
            f"{name}: has no labels (its fields: {', '.join(source.fields)}). "
            "This evaluation needs a card whose source gives them."
        )
    if cache is not None and change is not None:
        raise ValueError(f"{name}: features of changed images are not cached. Leave one out.")
    if cache is None and pool == "tokens":
        raise ValueError(
            f"{name}: all tokens of all images are kept on disk only. Give extract a cache; an "
            "evaluator has none within a run, so use --stage eval/… there."
        )
    field = "image" if views is None else "video"
    source = source.only((field, "label") if labelled else (field,))
    image_size = image_size or model.encoder.image_size
    seen, compute = labelled and cache is None, _features
    if views is None:
        centre = Centre(image_size, share, resize, change, seen)
    else:
        centre, compute = views.of(model.encoder, seen), _clip_features

    def passed(some: Any) -> Iterator[_Part]:
        batches = evaluation_batches(some, centre, batch_size=batch_size, workers=workers)
        return _parts(batches, partial(compute, model, pool=pool, layer=layer), len(some), name)

    with frozen(model):
        if cache is None:
            return _held(len(source), passed(source))
        height, width = sides(image_size)
        data = [*state(source), len(source)]
        reading = [_VERSION, pool, layer, plain_size((height, width)), share, resize]
        shape = [1, 3, height, width]
        if views is not None:
            reading += views.asked()
            shape = [1, views.count, 3, views.length(model.encoder), height, width]
        key = fingerprint_of([fingerprint(model), *data, *reading])
        row = partial(compute, model, torch.zeros(shape, dtype=torch.uint8), pool, layer)
        labels = labels_of(source) if labelled else torch.zeros(len(source), dtype=torch.int64)
        path = cache / f"{file_name(name)}-{key}"
        return _cached(path, source, row, passed, batch_size, name), labels


def state(source: Any) -> list[str]:
    """What the data is and when its files last changed, as process 0 sees it: what was computed from
    it before holds as long as this is the same."""
    return distributed.from_main([source.fingerprint, source.stamp])


def labels_of(source: Any) -> Tensor:
    """int64 [n], read by process 0 alone. Raises BadImage, on every process, for an image without
    one."""
    found: Tensor | BadImage | None = None
    if distributed.is_main():
        try:
            labels = source.labels()
            if None in labels:
                raise BadImage("no label", "", source.key(labels.index(None)))
            found = torch.tensor(labels, dtype=torch.int64)
        except BadImage as error:
            found = error
    found = distributed.from_main(found)
    if isinstance(found, BadImage):
        raise found
    return found


def _features(model: nn.Module, image: Tensor, pool: str, layer: int | None) -> Tensor:
    image = image.to(next(model.parameters()).device)
    if pool == "tokens":
        return model(image, layer=layer).half()
    return model.features(image, pool, layer).float()


def _clip_features(model: nn.Module, clips: Tensor, pool: str, layer: int | None) -> Tensor:
    """uint8 [B, views, 3, T, H, W] to [B, D], or with pool "tokens" to those of all views [B, L, D]."""
    B, views = clips.shape[:2]
    seen = clips.flatten(0, 1)
    if model.encoder.frames is None:  # its frames one by one
        seen = seen.transpose(1, 2).flatten(0, 1)
    features = _features(model, seen, pool, layer).unflatten(0, (B, -1))
    return features.flatten(1, 2) if pool == "tokens" else features.mean(1)


def _parts(
    batches: Iterator[dict], compute: Callable[[Tensor], Tensor], count: int, name: str
) -> Iterator[_Part]:
    """What all processes have computed of their batches, the same on each of them.

    Raises RuntimeError unless each of `count` images comes once, with features that are finite.
    """
    seen = torch.zeros(count, dtype=torch.int64)
    for batch in batches:
        features = compute(batch["image"] if "image" in batch else batch["clip"])
        # a row that only fills the batch has the position -1
        about = torch.stack([torch.tensor(batch["position"]), batch["label"]], dim=1)
        row = features[0].numel() * features.element_size() * distributed.world()
        size = max(1, _GATHERED // row)
        for some, described in zip(features.split(size), about.split(size), strict=True):
            some, (position, label) = distributed.all_rows(some), distributed.all_rows(described).T
            real = position >= 0
            position, label, some = position[real], label[real], some[real.to(some.device)]
            if not some.isfinite().all():
                bad = position[~some.flatten(1).isfinite().all(dim=1).cpu()].tolist()
                raise RuntimeError(
                    f"{name}: the features of {len(bad)} of {len(position)} images, of number "
                    f"{bad[0]} first, are not finite. Were the model's weights loaded, and did its "
                    "training stay finite?"
                )
            seen.index_add_(0, position, torch.ones_like(position))
            yield position, some, label
    if wrong := (seen != 1).sum().item():
        raise RuntimeError(
            f"{name}: of {count} images {wrong} were not evaluated exactly once; a result would be "
            "wrong."
        )


def _held(count: int, parts: Iterator[_Part]) -> tuple[Tensor, Tensor]:
    """All features and labels, in memory: once on each machine."""
    labels, rows = torch.zeros(count, dtype=torch.int64), None
    for position, features, label in parts:
        if rows is None:
            rows = SharedRows((count, *features.shape[1:]), features.dtype)
        rows.put(position, features)
        labels[position] = label
    return rows.finish(), labels


def _cached(
    path: Path,
    source: Any,
    row: Callable[[], Tensor],
    passed: Callable[[Any], Iterator[_Part]],
    batch_size: int,
    name: str,
) -> Tensor:
    """The features of a source, read from the store at `path` after what it lacks was computed in one
    pass; `row()` is an image's, as an example."""
    store, missing = _find(path, len(source))
    if store is not None and not missing:
        return store.read()
    with contextlib.ExitStack() as held:
        if not distributed.from_main(_lock(path, held) if distributed.is_main() else None):
            if row().ndim > 2:
                raise ValueError(f"{path}: another process is writing it. Wait for its end.")
            logger.info("%s: another process is writing it; computed here without", path)
            return _held(len(source), passed(source))[0]
        # once more, as the process that held the lock before has left it
        store, missing = _find(path, len(source))
        if store is None:
            example = row()[0]
            shape, dtype = tuple(example.shape), str(example.dtype).removeprefix("torch.")
            _check_room(path, size(len(source), shape, dtype), name)
            made = Store.create(path, len(source), shape, dtype) if distributed.is_main() else None
            store = distributed.from_main(made)
            missing = store.spans
        if missing:
            rows = _in_turn(torch.cat([torch.arange(*span) for span in missing]), batch_size)
            chunks = _Chunks(store)
            for position, features, _ in passed(Subset(source, rows.numpy())):
                if distributed.is_main():
                    chunks.put(rows[position], features.cpu())
        distributed.barrier()  # the others read what rank 0 has written
    return store.read()


def _in_turn(rows: Tensor, batch_size: int) -> Tensor:
    """The rows in the order in which the processes' batches, each of an adjoining share of it, hold at
    any time what lies together in `rows`: so chunks are whole one after another."""
    share = -(-len(rows) // distributed.world())
    batch = torch.arange(len(rows)) % share // min(batch_size, share)
    ordered = torch.empty_like(rows)
    ordered[batch.argsort(stable=True)] = rows
    return ordered


class _Chunks:
    """Rows on their way into a store, each chunk of which is written as soon as it is whole."""

    def __init__(self, store: Store):
        self.store, self.ends = store, dict(store.spans)
        self.begun: dict[int, Tensor] = {}
        self.lacking: dict[int, int] = {}

    def put(self, rows: Tensor, features: Tensor) -> None:
        """Takes some rows, of which each comes once."""
        chunk = rows // self.store.chunk
        for number in chunk.unique().tolist():
            first, mine = number * self.store.chunk, chunk == number
            count = self.ends[first] - first
            begun = self.begun.setdefault(first, features.new_empty(count, *features.shape[1:]))
            begun[rows[mine] - first] = features[mine]
            self.lacking[first] = self.lacking.get(first, count) - int(mine.sum())
            if not self.lacking[first]:
                self.store.write(first, self.begun.pop(first))


def _find(path: Path, rows: int) -> tuple[Store | None, list[tuple[int, int]]]:
    """The store of so many rows at `path` and what it lacks, as rank 0 sees it."""
    store = Store.open(path) if distributed.is_main() else None
    store = store if store is not None and store.rows == rows else None
    return distributed.from_main((store, store.missing() if store else []))


def _lock(path: Path, held: contextlib.ExitStack) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(FileLock(f"{path}.lock", timeout=0))
    except Timeout:
        return False
    return True


def _check_room(path: Path, needed: int, name: str) -> None:
    free = distributed.from_main(
        shutil.disk_usage(path.parent).free if distributed.is_main() else 0
    )
    if needed > free:
        raise ValueError(
            f"{name}: its features take {needed / 1e9:.1f} GB at {path.parent}, where "
            f"{free / 1e9:.1f} GB are free. Make room, take fewer images, or pool them (class, mean)."
        )


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights and options, the same however many ranks they are sharded over.

    The precision that a sharded model computes in is not in it. Called on every rank.
    """
    digest = hashlib.sha256(json.dumps(model.options, sort_keys=True, default=str).encode())
    for key, tensor in sorted(model.state_dict().items()):
        whole = distributed.whole(tensor)
        if distributed.is_main():
            digest.update(f"{key} {whole.dtype} {tuple(whole.shape)}\n".encode())
            digest.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return distributed.from_main(digest.hexdigest())


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
    """Evaluation mode without gradients, and on a GPU float32 products by its matrix units, of 10
    bits (TF32); afterwards each module trains again that did before.

    What is fitted or compared outside of this, probes and neighbours, has products in all of
    float32.
    """
    training = [module for module in model.modules() if module.training]
    products = torch.get_float32_matmul_precision()
    model.eval()
    if distributed.on_gpu():
        torch.set_float32_matmul_precision("high")
    try:
        # Not inference_mode: what FSDP gathers in it are inference tensors, and the training step
        # after an evaluation then fails with "Inplace update to inference tensor".
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        for module in training:
            module.training = True


@contextlib.contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Leaves the device's memory to what is fitted on a model's features: one that each process has
    whole waits in the host's, one that is sharded gives up what it has gathered of the others.

    One that is training stays as it is, with its optimizer.
    """
    device = next(model.parameters()).device
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.reshard()
    moves = not (units or model.training or device.type == "cpu")
    if moves:
        model.cpu()
    try:
        yield
    finally:
        if moves:
            model.to(device)


class Centre:
    """The transform of an evaluation: decode and take the centre; a class, so that workers can
    pickle it."""

    def __init__(
        self,
        size: Size,
        share: float,
        resize: str = "crop",
        change: Change | None = None,
        labelled: bool = False,
    ):
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
