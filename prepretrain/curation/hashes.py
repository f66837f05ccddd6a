"""Perceptual hashes: bits of a picture that stay nearly the same when it is scaled, encoded anew or
made brighter, so that near-copies are found without comparing pixels."""

import hashlib

import numpy as np
import pyarrow as pa
from torch import Tensor

from prepretrain.data.transforms import resized

SIDE = 64  # pixels of the thumbnail that all hashes are of, as PDQ has it (facebook/ThreatExchange)
COARSE, FINE = 8, 16  # frequencies a side: 64 and 256 bits
WORDS = tuple(f"fine{i}" for i in range(FINE * FINE // 64))
CELLS = 4  # of colour, a side
COLOURS = ("colour0", "colour1")

SCHEMA = pa.schema(
    [("thumb", pa.uint64())]
    + [(f"{name}{way}", pa.uint64()) for way in ("", "_flipped") for name in ("coarse", *WORDS)]
    + [(name, pa.uint64()) for name in COLOURS]
)

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_CHROMA = 0.5 / (1 - _LUMA[[0, 2]])  # to -127.5 … 127.5, as in JPEG


def hashes(image: Tensor) -> dict[str, int]:
    """The hashes of a picture, uint8 [3, H, W], as SCHEMA names them, each of 64 bits.

    thumb: equal for equal pixels, whatever the file (a checksum of the size and a thumbnail).
    coarse: signs of 8 x 8 low frequencies, each above the median or not (pHash); near-copies differ
    in few bits, and so do pictures of one kind. fine0 … fine3: the same of 16 x 16 frequencies (as
    in PDQ), by which near-copies are told from what only looks alike. …_flipped: those of its mirror
    image. colour0, colour1: mean red and blue less grey of 4 x 4 parts, 16 bytes, equal for the mirror
    image; the others see no colour, by which alone the goods of a shop may differ.
    """
    small = resized(image, SIDE, SIDE).permute(1, 2, 0).contiguous().numpy()
    spectrum = _BASIS @ (small @ _LUMA) @ _BASIS.T
    digest = hashlib.sha256(f"{tuple(image.shape)}".encode() + small.tobytes()).digest()
    found = {"thumb": int.from_bytes(digest[:8], "little")}
    for way, signs in (("", 1.0), ("_flipped", _MIRROR)):
        seen = spectrum * signs
        words = [*_words(seen[:COARSE, :COARSE]), *_words(seen[1:, 1:])]
        found |= {f"{name}{way}": word for name, word in zip(("coarse", *WORDS), words)}
    return found | dict(zip(COLOURS, _colours(small)))


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How many bits differ between hashes uint64 [..., words]."""
    return np.bitwise_count(one ^ other).sum(-1, dtype=np.int64)


def _colours(picture: np.ndarray) -> list[int]:
    """The mean chroma of each part of a picture [SIDE, SIDE, 3] and of the part that it has in the
    mirror image together, a byte each."""
    chroma = (picture[..., [0, 2]] - (picture @ _LUMA)[..., None]) * _CHROMA
    parts = chroma.reshape(CELLS, SIDE // CELLS, CELLS, SIDE // CELLS, 2).mean((1, 3))
    parts = (parts + parts[:, ::-1])[:, : CELLS // 2] / 2
    values = np.clip(np.rint(parts + 128), 0, 255).astype(np.uint8)
    return [int(word) for word in values.ravel().view("<u8")]


def _words(spectrum: np.ndarray) -> list[int]:
    """A bit for each frequency that is above the median, in words of 64."""
    bits = np.packbits((spectrum > np.median(spectrum)).ravel())
    return [int(word) for word in bits.view("<u8")]


def _cosines() -> np.ndarray:
    """[FINE + 1, SIDE]: the first rows of the discrete cosine transform (DCT-II)."""
    row, column = np.arange(FINE + 1)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * row * (2 * column + 1) / (2 * SIDE))


_BASIS = _cosines()
_MIRROR = np.where(
    np.arange(FINE + 1) % 2, -1.0, 1.0
)  # a mirror image's odd frequencies change sign
