"""The corruptions of ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich 2019, arXiv 1903.12261),
seeded, for images of any size: what they make of photos that have no published corrupted version.

Constants are those of the published makers (hendrycks/robustness, ImageNet-C/create_c,
make_imagenet_c.py and make_cifar_c.py). They count pixels: of images of about 224 in table
"imagenet", of 32 in "cifar"; an image of another size is corrupted by as many pixels. A shape is
[H, W, 3] in this file, its values 0 to 1.
"""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage, signal
from torch import Tensor

from prepretrain import plugin
from prepretrain.data.transforms import open_image

Corruption = Callable[[np.ndarray, tuple, np.random.Generator], np.ndarray]

SEVERITIES = (1, 2, 3, 4, 5)
FROST = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg", "frost6.jpg")


def _zooms(*ends: tuple[float, float]) -> list[tuple]:
    """The factors from 1 up to, but for rounding errors that count, each end, by its step."""
    return [tuple(np.arange(1, end, step)) for end, step in ends]


TABLES: dict[str, dict[str, list]] = {
    "imagenet": {
        "gaussian_noise": [0.08, 0.12, 0.18, 0.26, 0.38],  # deviation
        "shot_noise": [60, 25, 12, 5, 3],  # photons at full brightness
        "impulse_noise": [0.03, 0.06, 0.09, 0.17, 0.27],  # share of the values
        "defocus_blur": [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],  # radius, softness
        # deviation of the blur, largest distance, rounds
        "glass_blur": [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
        "motion_blur": [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],  # radius, deviation
        "zoom_blur": _zooms((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        # mean and deviation of the noise, zoom, threshold, radius, deviation, share of the picture
        "snow": [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
        "frost": [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],  # picture, frost
        "fog": [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],  # amount, decay
        "brightness": [0.1, 0.2, 0.3, 0.4, 0.5],  # added to the value of HSV
        "contrast": [0.4, 0.3, 0.2, 0.1, 0.05],  # share that stays
        # largest shift, deviation that smooths it, largest shift of a corner: 244 is as published
        "elastic_transform": [
            (244 * 2, 244 * 0.7, 244 * 0.1),
            (244 * 2, 244 * 0.08, 244 * 0.2),
            (244 * 0.05, 244 * 0.01, 244 * 0.02),
            (244 * 0.07, 244 * 0.01, 244 * 0.02),
            (244 * 0.12, 244 * 0.01, 244 * 0.02),
        ],
        "pixelate": [0.6, 0.5, 0.4, 0.3, 0.25],  # share of the side
        "jpeg_compression": [25, 18, 15, 10, 7],  # quality
        "speckle_noise": [0.15, 0.2, 0.35, 0.45, 0.6],  # deviation, of the value itself
        "gaussian_blur": [1, 2, 3, 4, 6],  # deviation
        # mean and deviation of the noise, that of its blur, threshold, strength or edge, mud
        "spatter": [
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ],
        "saturate": [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)],  # times, plus: of HSV's S
    },
    "cifar": {
        "gaussian_noise": [0.04, 0.06, 0.08, 0.09, 0.10],
        "shot_noise": [500, 250, 100, 75, 50],
        "impulse_noise": [0.01, 0.02, 0.03, 0.05, 0.07],
        "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        "glass_blur": [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
        "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        "zoom_blur": _zooms((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "snow": [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
        "frost": [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
        "fog": [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],
        "contrast": [0.75, 0.5, 0.4, 0.3, 0.15],
        "elastic_transform": [
            (0, 0, 32 * 0.08),
            (32 * 0.05, 32 * 0.2, 32 * 0.07),
            (32 * 0.08, 32 * 0.06, 32 * 0.06),
            (32 * 0.1, 32 * 0.04, 32 * 0.05),
            (32 * 0.1, 32 * 0.03, 32 * 0.03),
        ],
        "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],
        "jpeg_compression": [80, 65, 58, 50, 40],
        "speckle_noise": [0.06, 0.1, 0.12, 0.16, 0.2],
        "gaussian_blur": [0.4, 0.6, 0.7, 0.8, 1],
        "spatter": [
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ],
        "saturate": [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
    },
}
NAMES = tuple(TABLES["imagenet"])
OFFICIAL = NAMES[:15]  # those that mCE is over; the other four were for validation


def corrupt(
    image: Tensor,
    name: str,
    severity: int,
    random: np.random.Generator,
    *,
    table: str,
    textures: Sequence[np.ndarray] | None = None,
) -> Tensor:
    """uint8 [3, H, W] to uint8 [3, H, W]: the corruption `name` at `severity` 1 to 5.

    table: "imagenet" (for about 224 pixels) or "cifar" (for 32). textures: frost_textures', which
    "frost" needs. Values are cut to whole levels, not rounded, as published. A pure function of its
    arguments and the state of `random`. Raises ValueError for a name, severity or table that is not
    one, and for frost without textures.
    """
    check(name, severity, table)
    constants = TABLES[table][name][severity - 1]
    pixels = image.permute(1, 2, 0).numpy().astype(np.float64) / 255
    if name == "frost":
        if textures is None:
            raise ValueError("corruption 'frost' needs textures: see frost_textures.")
        shrunk = [texture[2::5, 2::5] for texture in textures] if table == "cifar" else textures
        found = frost(pixels, constants, random, shrunk)
    else:
        found = _CORRUPTIONS[name](pixels, constants, random)
    # the small number keeps rounding errors from taking a whole level
    levels = np.floor(found.clip(0, 1) * 255 + 1e-6).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(levels)).permute(2, 0, 1)


def check(name: str, severity: int, table: str) -> None:
    """Raises ValueError, naming what there is, unless all three are known."""
    if table not in TABLES:
        raise ValueError(plugin.unknown("no table", str(table), sorted(TABLES), quote=True))
    if name not in NAMES:
        raise ValueError(plugin.unknown("no corruption", str(name), list(NAMES), quote=True))
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity!r} is not one of 1, 2, 3, 4, 5.")


def chosen(
    section: str, names: Sequence[str], severities: Sequence[int], table: str
) -> tuple[str, ...]:
    """The corruptions that an evaluator's options name; ("all",) is all of them. Raises ValueError for
    one that there is not, or that comes twice. section: of the options."""
    names = NAMES if tuple(names) == ("all",) else tuple(names)
    for option, values in (("corruptions", names), ("severities", tuple(severities))):
        if len(set(values)) != len(values):
            raise ValueError(f"{section}.{option}: {values!r} does not fit; it repeats one.")
    if not severities:
        raise ValueError(f"{section}.severities: {severities!r} does not fit; it must name one.")
    for name in names:
        for severity in severities:
            check(name, severity, table)
    return names


def textures_of(names: Sequence[str], folder: str | None, section: str) -> list[np.ndarray] | None:
    """The textures that these corruptions need. Raises ValueError where frost lacks its folder."""
    if "frost" not in names:
        return None
    if folder is None:
        raise ValueError(
            f"{section}.frost: corruption 'frost' needs a folder of {FROST}, which "
            f"lie in ImageNet-C/create_c of github.com/hendrycks/robustness (Apache-2.0). "
            "Give it, or name the corruptions without frost."
        )
    return frost_textures(folder)


class Corrupt:
    """A corruption as a change of an image by its generators; a class, so that workers can pickle
    it."""

    def __init__(self, name: str, severity: int, table: str, textures: list[np.ndarray] | None):
        self.name, self.severity = name, severity
        self.options = {"table": table, "textures": textures if name == "frost" else None}

    def __call__(self, image: Tensor, random: Callable[[str], np.random.Generator]) -> Tensor:
        generator = random(f"{self.name} {self.severity}")
        return corrupt(image, self.name, self.severity, generator, **self.options)


def frost_textures(folder: str | Path) -> list[np.ndarray]:
    """The published pictures of frost, uint8 [H, W, 3] each. Raises ValueError naming all that
    `folder` lacks."""
    missing = [name for name in FROST if not Path(folder, name).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: has no {', '.join(missing)}. They lie in ImageNet-C/create_c of "
            "github.com/hendrycks/robustness (Apache-2.0); put all six into this folder."
        )
    return [np.asarray(open_image(Path(folder, name)).convert("RGB")) for name in FROST]


def gaussian_noise(x: np.ndarray, deviation: float, random: np.random.Generator) -> np.ndarray:
    """Normal noise on each value."""
    return x + random.normal(size=x.shape, scale=deviation)


def shot_noise(x: np.ndarray, photons: float, random: np.random.Generator) -> np.ndarray:
    """The Poisson noise of counting that many photons at full brightness."""
    return random.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """That share of the values, each colour's its own, becomes 0 or 1."""
    hit, salt = random.random(x.shape) <= share, random.random(x.shape) <= 0.5
    return np.where(hit, salt, x)


def speckle_noise(x: np.ndarray, deviation: float, random: np.random.Generator) -> np.ndarray:
    """Normal noise in proportion to each value."""
    return x + x * random.normal(size=x.shape, scale=deviation)


def gaussian_blur(x: np.ndarray, sigma: float, random: np.random.Generator) -> np.ndarray:
    """A Gaussian, cut at four deviations."""
    return _smooth(x, sigma)


def defocus_blur(x: np.ndarray, c: tuple, random: np.random.Generator) -> np.ndarray:
    """A disk, its edge softened."""
    kernel = disk(*c)
    reach = len(kernel) // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return signal.oaconvolve(padded, kernel[::-1, ::-1, None], mode="valid", axes=(0, 1))


def disk(radius: float, softness: float) -> np.ndarray:
    """The kernel of defocus_blur, [17, 17] or, for a radius above 8, [2 radius + 1] twice.

    Its sum is 1, but for radii 8 and 10, which touch the border, where softening mirrors it, as
    published.
    """
    reach, width = (8, 3) if radius <= 8 else (int(radius), 5)
    place = np.arange(-reach, reach + 1)
    inside = (place[:, None] ** 2 + place**2 <= radius**2).astype(np.float64)
    inside /= inside.sum()
    line = np.exp(-((np.arange(width) - width // 2) ** 2) / (2 * softness**2))
    for axis in (0, 1):
        inside = ndimage.correlate1d(inside, line / line.sum(), axis=axis, mode="mirror")
    return inside


def glass_blur(x: np.ndarray, c: tuple, random: np.random.Generator) -> np.ndarray:
    """Blurs, lets each pixel show one of its neighbours, from the last pixel to the first, and blurs
    again.

    The published loop means to swap two pixels. It swaps views of one array, so the neighbour keeps
    what it had; the published images show this, and so do these.
    """
    sigma, reach, rounds = c
    blurred = _levels(_smooth(x, sigma), cut=True)
    for _ in range(rounds):
        shown = _shown(x.shape[0], x.shape[1], reach, random)
        blurred = blurred.reshape(-1, 3)[shown].reshape(x.shape)
    return _smooth(blurred / 255, sigma)


def _shown(height: int, width: int, reach: int, random: np.random.Generator) -> np.ndarray:
    """[height * width]: which pixel each one shows after a round of glass_blur."""
    here = np.arange(height * width).reshape(height, width)
    inside = here[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1][::-1, ::-1]
    shift = random.integers(-reach, reach, size=(*inside.shape, 2))
    neighbour = inside + shift[..., 1] * width + shift[..., 0]
    # Two nodes a pixel: what it shows at first, and after its turn. A pixel takes what the neighbour
    # shows after its turn where that comes earlier, which is where its number is larger.
    turn = np.zeros(height * width, dtype=bool)
    turn[inside] = True
    points = np.concatenate([here.ravel(), here.ravel()])
    after = (neighbour > inside) & turn[neighbour]
    points[height * width + inside] = neighbour + after * height * width
    while (points >= height * width).any():  # each time twice as far along the chain
        points = points[points]
    return points[height * width :]


def motion_blur(x: np.ndarray, c: tuple, random: np.random.Generator) -> np.ndarray:
    """Half a Gaussian along a line at a random angle of -45 to 45 degrees."""
    return _streaked(_levels(x), *c, angle=random.uniform(-45, 45)) / 255


def _streaked(levels: np.ndarray, radius: float, sigma: float, *, angle: float) -> np.ndarray:
    """uint8 [H, W, …] blurred in one direction as ImageMagick's MotionBlurImage does it: to whole
    pixels along the line, cut to whole levels, the edge repeated."""
    steps = np.arange(2 * math.ceil(radius) + 1)
    kernel = np.exp(-(steps**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    down = np.ceil(steps * math.sin(math.radians(angle)) - 0.5).astype(int)
    right = np.ceil(steps * math.cos(math.radians(angle)) - 0.5).astype(int)
    height, width, pad = *levels.shape[:2], len(steps)
    edges = [(pad, pad), (pad, pad)] + [(0, 0)] * (levels.ndim - 2)
    padded = np.pad(levels.astype(np.float64), edges, mode="edge")
    total = sum(
        weight * padded[pad + dy : pad + dy + height, pad + dx : pad + dx + width]
        for weight, dy, dx in zip(kernel, down, right)
    )
    return np.floor(total + 1e-6)


def zoom_blur(x: np.ndarray, factors: tuple, random: np.random.Generator) -> np.ndarray:
    """The mean of the picture and of it zoomed by each factor."""
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of [H, W, C], enlarged to the same size."""
    height, width = x.shape[:2]
    kept = [math.ceil(side / factor) for side in (height, width)]
    large = [round(side * factor) for side in kept]
    top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
    middle = torch.from_numpy(x[top : top + kept[0], left : left + kept[1]]).permute(2, 0, 1)
    # corners on corners, as scipy.ndimage.zoom has them, and ten times as fast
    found = F.interpolate(middle[None], large, mode="bilinear", align_corners=True)[0]
    top, left = (large[0] - height) // 2, (large[1] - width) // 2
    return found[:, top : top + height, left : left + width].permute(1, 2, 0).numpy()


def snow(x: np.ndarray, c: tuple, random: np.random.Generator) -> np.ndarray:
    """A whiter picture behind two layers of flakes, one the other turned by 180 degrees."""
    mean, deviation, zoom, threshold, radius, sigma, share = c
    flakes = _zoomed(random.normal(size=(*x.shape[:2], 1), loc=mean, scale=deviation), zoom)
    flakes = _levels(np.where(flakes < threshold, 0, flakes), cut=True)
    layer = _streaked(flakes, radius, sigma, angle=random.uniform(-135, -45)) / 255
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    pale = share * x + (1 - share) * np.maximum(x, grey * 1.5 + 0.5)
    return pale + layer + layer[::-1, ::-1]


def frost(
    x: np.ndarray, c: tuple, random: np.random.Generator, textures: Sequence[np.ndarray]
) -> np.ndarray:
    """A weighted sum of the picture and a random part of one of the first five textures: the
    published code never draws the sixth."""
    picture, ice = c
    texture = _covering(textures[random.integers(5)], *x.shape[:2])
    top = random.integers(texture.shape[0] - x.shape[0])
    left = random.integers(texture.shape[1] - x.shape[1])
    part = texture[top : top + x.shape[0], left : left + x.shape[1]]
    return picture * x + ice * part / 255


def _covering(texture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The texture, enlarged where it is not larger than the picture."""
    scale = max((height + 1) / texture.shape[0], (width + 1) / texture.shape[1])
    if scale <= 1:
        return texture
    size = math.ceil(texture.shape[1] * scale), math.ceil(texture.shape[0] * scale)
    return np.asarray(Image.fromarray(texture).resize(size, Image.Resampling.BICUBIC))


def fog(x: np.ndarray, c: tuple, random: np.random.Generator) -> np.ndarray:
    """A cloud of that amount is added, and the brightest value kept."""
    amount, decay = c
    cloud = plasma(max(x.shape[:2]), decay, random)[: x.shape[0], : x.shape[1], None]
    return (x + amount * cloud) * x.max() / (x.max() + amount)


def plasma(size: int, decay: float, random: np.random.Generator) -> np.ndarray:
    """A plasma fractal [S, S] from 0 to 1, S the power of two from `size` up: diamonds and squares,
    their noise divided by decay^2 each time the step halves."""
    side = 1 << max(1, (size - 1).bit_length())
    height, step, noise = np.zeros((side, side)), side, 100.0

    def middle(total: np.ndarray) -> np.ndarray:
        return total / 4 + noise * random.uniform(-noise, noise, total.shape)

    while step >= 2:
        half = step // 2
        corners = height[::step, ::step]
        sides = corners + np.roll(corners, -1, axis=0)
        height[half::step, half::step] = middle(sides + np.roll(sides, -1, axis=1))
        centres = height[half::step, half::step]
        beside = corners + np.roll(corners, -1, axis=1)
        height[::step, half::step] = middle(centres + np.roll(centres, 1, axis=0) + beside)
        above = corners + np.roll(corners, -1, axis=0)
        height[half::step, ::step] = middle(centres + np.roll(centres, 1, axis=1) + above)
        step, noise = half, noise / decay
    height -= height.min()
    return height / height.max()


def brightness(x: np.ndarray, more: float, random: np.random.Generator) -> np.ndarray:
    """More is added to the value of HSV; hue and saturation stay."""
    value = x.max(-1, keepdims=True)
    new = (value + more).clip(0, 1)
    return np.where(value > 0, x * new / np.where(value > 0, value, 1), new)


def saturate(x: np.ndarray, c: tuple, random: np.random.Generator) -> np.ndarray:
    """The saturation of HSV times the first constant, plus the second; grey has the hue of red."""
    value, span = x.max(-1, keepdims=True), np.ptp(x, axis=-1, keepdims=True)
    saturation = span / np.where(value > 0, value, 1)
    new = (saturation * c[0] + c[1]).clip(0, 1)
    away = np.where(span > 0, (value - x) / np.where(span > 0, span, 1), [0.0, 1.0, 1.0])
    return value - value * new * away


def contrast(x: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """That share of the distance to each colour's mean stays."""
    mean = x.mean((0, 1))
    return (x - mean) * share + mean


def elastic_transform(x: np.ndarray, c: tuple, random: np.random.Generator) -> np.ndarray:
    """A random affine map of three points, then smooth random shifts."""
    amount, sigma, corner = c
    height, width = x.shape[:2]
    middle, reach = np.array([width // 2, height // 2]), min(height, width) // 3
    points = middle + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = points + random.uniform(-corner, corner, size=points.shape)
    # where each (x, y) of the result comes from: the map that takes the moved points back
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)
    rows, columns = np.indices((height, width))
    place = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back
    mapped = _sampled(x, place[..., 1], place[..., 0], mode="mirror")
    right, down = (
        amount * ndimage.gaussian_filter(random.uniform(-1, 1, (height, width)), sigma, truncate=3)
        for _ in range(2)
    )
    return _sampled(mapped, rows + down, columns + right, mode="reflect")


def _sampled(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, *, mode: str) -> np.ndarray:
    """[H, W, 3] at those places, between pixels linearly."""
    planes = [ndimage.map_coordinates(p, (rows, columns), order=1, mode=mode) for p in _planes(x)]
    return np.stack(planes, axis=-1)


def _planes(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -1, 0)


def pixelate(x: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """To that share of the side and back, by PIL's box filter."""
    picture = Image.fromarray(_levels(x))
    small = [max(1, int(side * share)) for side in picture.size]
    box = Image.Resampling.BOX
    return np.asarray(picture.resize(small, box).resize(picture.size, box)) / 255


def jpeg_compression(x: np.ndarray, quality: int, random: np.random.Generator) -> np.ndarray:
    """A JPEG of that quality, by PIL."""
    file = io.BytesIO()
    Image.fromarray(_levels(x)).save(file, "JPEG", quality=quality)
    return np.asarray(open_image(file)) / 255


def spatter(x: np.ndarray, c: tuple, random: np.random.Generator) -> np.ndarray:
    """Drops of water, or from severity 4 on of mud, where a smooth noise is above a threshold."""
    mean, deviation, sigma, threshold, strength, mud = c
    liquid = _smooth(random.normal(size=x.shape[:2], loc=mean, scale=deviation), sigma)
    liquid = np.where(liquid < threshold, 0, liquid)
    if mud:
        cover = _smooth((liquid > threshold).astype(np.float64), strength)[..., None]
        cover = np.where(cover < 0.8, 0, cover)
        return x * (1 - cover) + cover * np.array([63, 42, 20]) / 255
    drops = _levels(liquid, cut=True)
    shine = drops * _relief(drops)
    if shine.max() > 0:
        shine = strength * shine / shine.max()
    return x + shine[..., None] * np.array([175, 238, 238]) / 255


_SHADE = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])


def _relief(drops: np.ndarray) -> np.ndarray:
    """How brightly each pixel of the drops, uint8 [H, W], shines: by its distance from their edges,
    equalised, lit from one side. Distances are exact; the published ones are OpenCV's, near it."""
    edges = _edges(drops)
    distance = np.full(drops.shape, 20.0)
    if edges.any():
        distance = ndimage.distance_transform_edt(~edges).clip(max=20)
    distance = ndimage.uniform_filter(distance, 3, mode="mirror")
    relief = _equalised(_levels(distance / 255, cut=True)).astype(np.float64)
    relief = ndimage.correlate(relief, _SHADE, mode="mirror").clip(0, 255)
    return np.rint(ndimage.uniform_filter(relief, 3, mode="mirror"))


def _edges(levels: np.ndarray, low: int = 50, high: int = 150) -> np.ndarray:
    """Canny's edges of uint8 [H, W], bool: as OpenCV finds them, with its sum of absolute slopes."""
    x = levels.astype(np.int64)
    right, down = (ndimage.sobel(x, axis=axis, mode="nearest") for axis in (1, 0))
    size = np.abs(right) + np.abs(down)
    around = np.pad(size, 1)

    def beside(dy: int, dx: int) -> np.ndarray:
        return around[1 + dy : 1 + dy + x.shape[0], 1 + dx : 1 + dx + x.shape[1]]

    slope = math.tan(math.pi / 8)
    flat = np.abs(down) < slope * np.abs(right)
    steep = np.abs(down) > (slope + 2) * np.abs(right)
    rising = (right < 0) != (down < 0)
    thin = np.where(
        flat,
        (size > beside(0, -1)) & (size >= beside(0, 1)),
        np.where(
            steep,
            (size > beside(-1, 0)) & (size >= beside(1, 0)),
            np.where(
                rising,
                (size > beside(-1, 1)) & (size > beside(1, -1)),
                (size > beside(-1, -1)) & (size > beside(1, 1)),
            ),
        ),
    )
    parts, count = ndimage.label(thin & (size > low), structure=np.ones((3, 3)))
    strong = np.zeros(count + 1, dtype=bool)
    strong[parts[thin & (size > high)]] = True
    strong[0] = False
    return strong[parts]


def _equalised(levels: np.ndarray) -> np.ndarray:
    """uint8 with its levels spread evenly, the lowest at 0; a single level stays."""
    count = np.bincount(levels.ravel(), minlength=256)
    lowest = np.flatnonzero(count)[0]
    rest = levels.size - count[lowest]
    if rest == 0:
        return levels
    below = np.cumsum(count) - count[lowest]
    return np.rint(below.clip(0) * 255 / rest).astype(np.uint8)[levels]


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    """[H, W, …] under a Gaussian cut at four deviations, the edge repeated."""
    return ndimage.gaussian_filter(x, sigma, mode="nearest", axes=(0, 1))


def _levels(x: np.ndarray, *, cut: bool = False) -> np.ndarray:
    """0 to 1 as uint8, the nearest level, or the one below."""
    return np.floor(x.clip(0, 1) * 255 + (1e-6 if cut else 0.5)).astype(np.uint8)


_CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        *(gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur),
        *(zoom_blur, snow, fog, brightness, contrast, elastic_transform, pixelate),
        *(jpeg_compression, speckle_noise, gaussian_blur, spatter, saturate),
    )
}
