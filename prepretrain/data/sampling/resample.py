"""How often images come by how frequent their tags are: three published laws, and their threshold."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prepretrain import plugin
from prepretrain.data.sampling.weights import CHUNK, Weights
from prepretrain.data.sources.base import Source, fingerprint_of
from prepretrain.data.tags import rarest
from prepretrain.data.tags.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_RANGE = (1e-30, 1e30)  # in which a threshold is looked for


def repeat_factor(shares: np.ndarray, threshold: float) -> np.ndarray:
    """How often an image of a class is to come in an epoch, by the share of all images that have the
    class: max(1, sqrt(threshold / share)) (LVIS, arXiv 1908.03195, appendix B.2)."""
    return np.maximum(1, np.sqrt(threshold / shares))


def inverse_sqrt(shares: np.ndarray, threshold: float) -> np.ndarray:
    """sqrt(threshold / share): images of rare tags come more often, those of frequent ones less often.
    SWAG (arXiv 2201.08371) is thought to draw so; its law is not published in full."""
    return np.sqrt(threshold / shares)


def cap(shares: np.ndarray, threshold: float) -> np.ndarray:
    """min(1, threshold / share): of a tag's images as many as the threshold says, at most (MetaCLIP,
    arXiv 2309.16671, which draws for each tag of an image anew: there an image of several frequent
    tags is kept more often)."""
    return threshold / np.maximum(shares, threshold)


Law = Callable[[np.ndarray, float], np.ndarray]
LAWS: dict[str, Law] = {
    "repeat_factor": repeat_factor,
    "inverse_sqrt": inverse_sqrt,
    "cap": cap,
}


def tail_of(counts: np.ndarray, threshold: float) -> float:
    """The share of all mentions that those tags have which are in fewer than so many images."""
    return float(counts[counts < threshold].sum() / counts.sum())


def threshold_of(counts: np.ndarray, tail: float) -> int:
    """The count up to which tags, the rarest first, have the share of all mentions that is nearest to
    `tail`: by which MetaCLIP 2 (arXiv 2507.22062) carries a threshold over to other data."""
    rising = np.sort(counts)
    shares = np.cumsum(rising) / rising.sum()
    return int(rising[np.abs(shares - tail).argmin()])


class Resample:
    """Says how often each image comes by its rarest tag, which asks for most; an image without a known
    tag has the factor 1.

    by          what the tags are: the hashtags of a vocabulary
    law         repeat_factor, inverse_sqrt or cap, of which `t` is the threshold
    t           a share of the images or, above 1, a number of them
    epoch       instead of t: how many images an epoch holds, for each image that it may hold; t is found
    tail        instead of t: the share of all mentions that tags of fewer than t images have; t is found
    vocabulary  a file of datasets/hashtags.py, under the data folder; null: the objective's or the card's
    """

    def __init__(
        self,
        *,
        law: Literal["repeat_factor", "inverse_sqrt", "cap"],
        by: Literal["hashtags"] = "hashtags",
        t: float | None = None,
        epoch: float | None = None,
        tail: float | None = None,
        vocabulary: str | None = None,
    ):
        self.law, self.t, self.epoch, self.tail = law, t, epoch, tail
        self.vocabulary = vocabulary

    def weights(self, path: Path, source: Source, others: Weights | None, where: str) -> Weights:
        """The factor of each image of a source. path: the vocabulary, counted from this source;
        others: what else says how often they come. All processes call it together."""
        vocabulary = Vocabulary.load(path)
        try:
            vocabulary.check(source)
        except ValueError as error:
            raise ValueError(f"{where}.vocabulary: {path}: {error}") from error
        tags = rarest.read(path, vocabulary, source)
        counts = np.array(vocabulary.counts, dtype=np.int64)
        threshold = self._threshold(counts, vocabulary.images, tags, others, where)
        factors = LAWS[self.law](counts / vocabulary.images, threshold)
        factors = np.append(factors, 1.0)  # the place of -1, an image without a known tag
        logger.info(
            "%s: %s with t = %g, %g images; factors from %.3g to %.3g",
            *(where, self.law, threshold, threshold * vocabulary.images),
            *(factors[:-1].min(), factors[:-1].max()),
        )
        key = fingerprint_of([self.law, threshold, *rarest.identity(vocabulary)])
        return Weights(len(source), key, lambda which: factors[tags[which]])

    def _threshold(
        self,
        counts: np.ndarray,
        images: int,
        tags: np.ndarray,
        others: Weights | None,
        where: str,
    ) -> float:
        """The threshold as a share of the images."""
        if self.t is not None:
            return self.t if self.t <= 1 else self.t / images
        if self.tail is not None:
            return threshold_of(counts, self.tail) / images
        unique, sums = _sums(tags, others, len(counts))
        found = _solved(LAWS[self.law], counts / images, sums, self.epoch * unique)
        if found is None:
            raise ValueError(
                f"{where}.epoch: no t of the law {self.law} gives an epoch of {self.epoch:g} times the "
                f"{unique:,} images. repeat_factor gives 1 or more, cap 1 or less."
            )
        return found


def _sums(tags: np.ndarray, others: Weights | None, count: int) -> tuple[int, np.ndarray]:
    """How many images may come at all, and what their other weights come to for each rarest tag; for
    images without one at the end."""
    unique, sums = 0, np.zeros(count + 1)
    for first in range(0, len(tags), CHUNK):
        some = np.asarray(tags[first : first + CHUNK])
        other = np.ones(len(some)) if others is None else others[first : first + CHUNK]
        unique += int((other > 0).sum())
        sums += np.bincount(np.where(some < 0, count, some), other, count + 1)
    return unique, sums


def _solved(law: Law, shares: np.ndarray, sums: np.ndarray, wanted: float) -> float | None:
    """The threshold at which the sum of all weights is the wanted one, found by halving; None if
    there is none."""
    total = lambda threshold: float(law(shares, threshold) @ sums[:-1] + sums[-1])
    low, high = _RANGE
    if not total(low) <= wanted * (1 + 1e-9) or not wanted <= total(high) * (1 + 1e-9):
        return None
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if total(middle) < wanted else (low, middle)
    return high


def resample(given: Any, where: str) -> Resample:
    """What a config asks for. Raises ValueError naming `where`."""
    asked = Resample(**plugin.check(Resample, dict(given), where))
    ways = [name for name in ("t", "epoch", "tail") if getattr(asked, name) is not None]
    if len(ways) != 1:
        raise ValueError(
            f"{where}: {' and '.join(ways) or 'none'} of t, epoch and tail is given. Give one, as in "
            f"{where}={{by: hashtags, law: repeat_factor, t: 1e-4}}."
        )
    return asked
