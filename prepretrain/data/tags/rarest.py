"""The rarest hashtag of each image, by which an order is weighted; kept beside the vocabulary."""

import logging
from pathlib import Path

import numpy as np

from prepretrain.data.sources.base import Source, fingerprint_of
from prepretrain.data.tags import counting
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.distributed import group as distributed
from prepretrain.files import draft

logger = logging.getLogger(__name__)


def read(path: Path, vocabulary: Vocabulary, source: Source) -> np.ndarray:
    """int32 [len(source)]: the id of each image's rarest tag, -1 for an image without a known one.

    `path` is the vocabulary's file, which was counted from this source. The ids are in a file
    beside it; where that is missing, all processes read the hashtags of a share of the shards each
    (not the images), and process 0 writes it.
    """
    file = _file(path, vocabulary)
    kept = _kept(file, len(source), len(vocabulary))
    if all(distributed.all_gather_object(kept is not None)):  # or some would wait for the others
        return kept
    logger.info("reads the hashtags of %d images, once: there is no %s", len(source), file)
    share = np.array_split(np.arange(len(source.groups)), distributed.world())[distributed.rank()]
    counts, ids = counting.rank(source, vocabulary, share.tolist())
    counts.log()
    found = np.concatenate(distributed.all_gather_object(ids))
    if distributed.is_main():
        write(path, vocabulary, found)
    return found


def write(path: Path, vocabulary: Vocabulary, rarest: np.ndarray) -> None:
    """Keeps what `read` returns, whole or not at all; where nothing can be written, it is read again
    at each start."""
    file = _file(path, vocabulary)
    try:
        for old in path.parent.glob(f"{path.name}.rarest-*.npy"):
            old.unlink(missing_ok=True)  # of another count, whose vocabulary was at this path
        with draft(file) as place, place.open("wb") as stream:
            np.save(stream, rarest.astype(np.int32), allow_pickle=False)
    except OSError as error:
        logger.warning("%s: is not kept (%s), so each start reads all hashtags again", file, error)


def _file(path: Path, vocabulary: Vocabulary) -> Path:
    key = fingerprint_of(identity(vocabulary))
    return path.with_name(f"{path.name}.rarest-{key}.npy")


def identity(vocabulary: Vocabulary) -> list[object]:
    """What says which ids `read` returns."""
    return [vocabulary.source, *vocabulary.tags, *vocabulary.counts]


def _kept(file: Path, images: int, tags: int) -> np.ndarray | None:
    """What `write` kept, memory-mapped: the processes of a machine share it. None for anything else."""
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    if found.shape != (images,) or found.dtype != np.int32:
        return None
    return found if not images or -1 <= found.min() <= found.max() < tags else None
