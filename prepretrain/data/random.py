"""Random numbers that are a pure function of who asks for what."""

import functools
import hashlib

import numpy as np

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
        counter = (self.epoch & _WORD) << 192 | (self.index & _WORD) << 128
        counter |= (self.copy & _WORD) << 64
        key = _digest(purpose) << 64 | self.seed & _WORD
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


@functools.lru_cache(maxsize=1024)
def _digest(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
