"""Random numbers that are a pure function of who asks for what."""

import functools
import hashlib

import numpy as np
from numpy.random.bit_generator import ISeedSequence

_WORD = (1 << 64) - 1


class Random:
    """Generators that are a pure function of (seed, epoch, index, copy, purpose), whoever asks.

    copy: which of an image's places in the epoch, where it has several.
    """

    def __init__(self, seed: int, epoch: int, index: int, copy: int = 0):
        self.seed, self.epoch, self.index, self.copy = int(seed), int(epoch), int(index), int(copy)

    def __call__(self, purpose: str) -> np.random.Generator:
        # Philox counts up from the low word; epoch, index and copy sit in the three above, so that
        # the streams of two images cannot overlap.
        counter = _words(0, self.copy, self.index, self.epoch)
        key = _Key(_words(self.seed, _digest(purpose)))
        return np.random.Generator(np.random.Philox(key, counter=counter))


class _Key(ISeedSequence):
    """A key for Philox as it is; given as `key`, entropy of the system would be fetched in vain,
    which takes five times as long as all else."""

    def __init__(self, words: np.ndarray):
        self.words = words

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        return self.words


def _words(*values: int) -> np.ndarray:
    return np.array([value & _WORD for value in values], dtype=np.uint64)


@functools.lru_cache(maxsize=1024)
def _digest(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
