"""Bytes to pixels, and the crops of training and evaluation; random only by keyed generators."""

import functools
import io
import math
import warnings
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 64_000_000  # not from the paper: above the 50 million of many telephones
MAX_SIDE = 65_535  # pixels: what a JPEG can have
# Others are refused before they are looked at: Pillow runs Ghostscript on what begins like EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

_STRIP = 1 << 22  # not from the paper: pixels that are converted at a time
_LONGEST = 64  # not from the paper: how much longer than what is seen a picture is resized

Size = int | tuple[int, int]  # pixels of a picture: of both sides, or (height, width)

# A PNG's texts and profiles, which are not looked at, may be as large as Pillow lets all of them be.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_ORIENTATION = 0x0112
_END = b"\xff\xd9"


def sides(size: Size) -> tuple[int, int]:
    """(height, width) of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def plain_size(pair: tuple[int, int]) -> int | list[int]:
    """(height, width) as a config, timm and open_clip write it: one number where both are alike."""
    height, width = pair
    return height if height == width else [height, width]


class BadImage(ValueError):
    """A sample that cannot be used: `cause` is a word to count by, `detail` is for people."""

    def __init__(self, cause: str, detail: str = "", key: str = ""):
        super().__init__(cause, detail, key)
        self.cause, self.detail, self.key = cause, detail, key

    def __str__(self) -> str:
        return ": ".join(part for part in (self.key, self.cause, self.detail) if part)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image file to RGB uint8 [3, H, W], the same pixels with every decoder.

    The EXIF orientation is not applied: the stored pixels are returned as they are, as PIL and
    the papers' loaders do. Transparency is dropped, not composited. The size is read from the
    header and checked before any pixel is decoded. Raises BadImage.
    """
    opened = header(data, max_pixels)
    fast = _fast_decoder()
    if fast and _is_plain_jpeg(opened):
        try:
            return fast(data)
        except (RuntimeError, ValueError):
            pass  # PIL reads more, and its message says more
    try:
        return _pixels(opened)
    except BadImage:
        if opened.format != "JPEG" or _END in data[-2:] or "progressive" in opened.info:
            raise
        return _decode_unterminated(data)


def orientation(data: bytes) -> int:
    """How EXIF says that an image file is to be turned to be upright, 1 to 8; 1 is as it is stored.
    1 for what says nothing, or nonsense, and for a TIFF, which `decode` turns."""
    try:
        image = open_image(io.BytesIO(data))
        turn = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block must not lose the image
        return 1
    return turn if turn in range(1, 9) else 1


def pixels(image: Image.Image | str | Path) -> Tensor:
    """RGB uint8 [3, H, W] of a PIL image, or of an image file; raises BadImage, which names it."""
    if isinstance(image, Image.Image):
        return _pixels(image)
    try:
        return decode(Path(image).read_bytes())
    except BadImage as error:
        raise BadImage(error.cause, error.detail, str(image)) from error


def header(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open lazily, which reads the header only, and refuse what would not fit."""
    try:
        with warnings.catch_warnings():
            # PIL warns from 89 megapixels on; the limit that counts is ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = open_image(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadImage("too large", str(error)) from error
    except UnidentifiedImageError as error:  # which names the place in memory, another each time
        raise BadImage("unreadable", f"{len(data)} bytes of no known format") from error
    except Exception as error:  # PIL's parsers raise anything on garbage, struct.error included
        raise BadImage("unreadable", f"{len(data)} bytes: {error}") from error
    width, height = image.size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        limit = f"the limit is {max_pixels}, and {MAX_SIDE} a side"
        raise BadImage("too large", f"{width} x {height} pixels, {limit}")
    return image


def open_image(file: IO[bytes] | Path) -> Image.Image:
    """Opens an image file lazily, as Pillow does, if it is of one of FORMATS; whatever it is called."""
    return Image.open(file, formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow reads; AVIF came with 11.3."""
    Image.init()
    return tuple(one for one in FORMATS if one in Image.OPEN)


def _is_plain_jpeg(header: Image.Image) -> bool:
    """Whether the fast decoders agree with PIL: torchcodec rotates by EXIF, CMYK differs."""
    if header.format != "JPEG" or header.mode not in ("RGB", "L"):
        return False
    blocks = (body for name, body in header.applist if name == "APP1")
    if not any(body[:4].lower() == b"exif" for body in blocks):
        return True
    try:
        # Only a block that says so: of a malformed one each decoder makes something else.
        return header.getexif().get(_ORIENTATION) == 1
    except Exception:  # a broken EXIF block must not lose the image
        return False


@functools.cache
def _fast_decoder():
    """The first decoder that is installed and works; None leaves PIL."""
    probe = io.BytesIO()
    Image.new("RGB", (8, 8)).save(probe, "JPEG")
    for make in (_simplejpeg, _torchcodec, _torchvision):
        try:
            fast = make()
            fast(probe.getvalue())
            return fast
        except (ImportError, OSError, RuntimeError, AttributeError):
            continue
    return None


def _simplejpeg():
    from simplejpeg import decode_jpeg

    return lambda data: torch.from_numpy(decode_jpeg(data)).permute(2, 0, 1)


def _torchcodec():
    from torchcodec.decoders import decode_jpeg

    return decode_jpeg


def _torchvision():
    from torchvision.io import ImageReadMode, decode_jpeg

    def fast(data: bytes) -> Tensor:
        with warnings.catch_warnings():
            # Deprecated from 0.29 on in favour of torchcodec, which is tried first.
            warnings.simplefilter("ignore")
            return decode_jpeg(
                torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB
            )

    return fast


def _pixels(image: Image.Image) -> Tensor:
    try:
        return torch.from_numpy(_array(image)).permute(2, 0, 1)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage("unreadable", str(error)) from error


def _decode_unterminated(data: bytes) -> Tensor:
    """Decode a JPEG that lacks nothing but its end marker.

    A decoder fills what is missing with whatever follows; only where no pixel is missing do two
    different continuations give one picture.
    """
    zeros, ones = (
        _pixels(open_image(io.BytesIO(data + filler * 64 + _END)))
        for filler in (b"\x00", b"\xff\x00")
    )
    if not torch.equal(zeros, ones):
        raise BadImage("unreadable", f"a JPEG of {len(data)} bytes, truncated")
    return zeros


def _array(image: Image.Image) -> np.ndarray:
    """The pixels, uint8 [H, W, 3]; a large image in strips, so that it is not held four times."""
    width, height = image.size
    if image.mode == "I" and image.format == "PPM":  # whose range Pillow maps to 16 bits
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    if width * height <= _STRIP:
        return np.array(_rgb(image))
    pixels, rows = np.empty((height, width, 3), dtype=np.uint8), max(1, _STRIP // width)
    image.load()
    for top in range(0, height, rows):
        end = min(top + rows, height)
        pixels[top:end] = np.asarray(_rgb(image.crop((0, top, width, end))))
    return pixels


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # PIL would clip 16 bits at 255; the high byte is the picture.
        high = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage("unreadable", f"pixels of mode {image.mode} have no range to map to 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def random_resized_crop(
    image: Tensor,
    size: Size,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A random box, `scale` of the area and `ratio` of the sides, as uint8 [3, H, W] of that size.

    `ratio` is how much narrower or wider than the size a box may be, so that things in a rectangle
    are distorted as little as in a square.
    """
    H, W = sides(size)
    low, high = (limit * (W / H) for limit in ratio)
    top, left, height, width = crop_box(image.shape[-2], image.shape[-1], rng, scale, (low, high))
    return resized(image[..., top : top + height, left : left + width], H, W)


def crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(top, left, height, width): ten tries, then the largest centred box within `ratio`."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def flip(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirror left and right in half of the cases."""
    return image.flip(-1) if rng.random() < 0.5 else image


def resize_center_crop(image: Tensor, size: Size, *, share: float = 0.875) -> Tensor:
    """Resized so that it just covers the size / share, then the centre: uint8 [3, H, W] of that
    size.

    Of a picture that is much longer than wide only the middle is resized: scaled up as a whole, a
    line of one pixel's height would not fit into memory.
    """
    H, W = sides(size)
    least_height, least_width = max(H, round(H / share)), max(W, round(W / share))
    image = _middle(image, least_height, least_width)
    height, width = image.shape[-2:]
    if height * least_width <= width * least_height:  # the height is what is scarce
        height, width = least_height, max(W, int(least_height * width / height))
    else:
        height, width = max(H, int(least_width * height / width)), least_width
    top, left = round((height - H) / 2), round((width - W) / 2)
    return resized(image, height, width)[..., top : top + H, left : left + W]


def _middle(image: Tensor, least_height: int, least_width: int) -> Tensor:
    """The middle of an image, as long as _LONGEST of what its resized form must cover."""
    height, width = image.shape[-2:]
    rows = math.ceil(_LONGEST * width * least_height / least_width)
    columns = math.ceil(_LONGEST * height * least_width / least_height)
    # half of what goes is whole, so that the middle stays where it is
    top, left = max(0, (height - rows) // 2), max(0, (width - columns) // 2)
    return image[..., top : height - top, left : width - left]


def squash(image: Tensor, size: Size) -> Tensor:
    """The whole image, its aspect not kept: uint8 [3, H, W] of that size (MAWS's test transform)."""
    return resized(image, *sides(size))


def resized(image: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """uint8 [3, H, W], or a clip [T, 3, H, W], resized, with antialiasing; mode: F.interpolate's."""
    if image.shape[-2:] == (height, width):
        return image
    # Only channels-last uint8 takes torch's vectorised kernel; planar input is half as fast.
    batch = image.reshape(-1, *image.shape[-3:]).contiguous(memory_format=torch.channels_last)
    batch = F.interpolate(batch, (height, width), mode=mode, antialias=True)
    return batch if image.ndim == 4 else batch[0]
