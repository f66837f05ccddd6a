"""Draws scenes of one textured thing each, with captions, noisy hashtags and clean labels."""

import io
import math

import numpy as np
from PIL import Image, ImageDraw

from prepretrain.data.random import Random
from prepretrain.data.sources.base import Source, fingerprint_of

COLOURS = {
    "red": (205, 45, 45),
    "orange": (235, 140, 40),
    "yellow": (235, 215, 70),
    "pink": (235, 130, 175),
    "brown": (135, 85, 50),
    "green": (60, 160, 70),
    "teal": (45, 165, 165),
    "blue": (55, 85, 200),
    "purple": (135, 65, 170),
    "grey": (130, 135, 145),
}
# A class is an outline and a texture, and a colour that it has more often than others. The first
# word is its usual hashtag; the others are synonyms, each rarer than the one before.
THINGS = {
    "ball": ("ball", "balls", "sphere"),
    "box": ("box", "boxes", "crate"),
    "tent": ("tent", "tents", "camping"),
    "star": ("star", "stars", "starfish"),
    "plus": ("plus", "cross", "pharmacy"),
    "heart": ("heart", "hearts", "valentine"),
    "ring": ("ring", "rings", "hoop"),
    "moon": ("moon", "crescent", "moons"),
    "arrow": ("arrow", "arrows", "signpost"),
    "leaf": ("leaf", "leaves", "foliage"),
}
LOOKS = {  # usual colour, texture
    "ball": ("orange", "rayed"),
    "box": ("brown", "checked"),
    "tent": ("blue", "striped"),
    "star": ("yellow", "shaded"),
    "plus": ("red", "plain"),
    "heart": ("pink", "dotted"),
    "ring": ("grey", "ringed"),
    "moon": ("yellow", "banded"),
    "arrow": ("purple", "zigzag"),
    "leaf": ("green", "veined"),
}
SCENES = {  # sky, ground
    "beach": ((150, 205, 235), (225, 205, 150)),
    "forest": ((95, 140, 110), (50, 85, 45)),
    "desert": ((235, 200, 150), (205, 150, 90)),
    "snow": ((185, 200, 215), (240, 243, 248)),
    "city": ((160, 165, 175), (95, 95, 100)),
    "night": ((20, 25, 55), (40, 40, 60)),
    "sea": ((170, 200, 230), (40, 95, 145)),
    "meadow": ((160, 205, 240), (110, 170, 80)),
}
CHATTER = ("photooftheday", "love", "art", "nofilter", "happy", "follow", "instagood", "weekend")
TEMPLATES = (
    "a {texture} {colour} {thing} {where}",
    "{colour} {thing}, {texture}, {where}",
    "a {colour} {thing} {where}",
    "{where}: one {colour} {thing}, {texture}",
)

_USUAL = 0.4  # how often a thing has its usual colour; otherwise any
_CHATTER, _TAIL = 0.7, 0.5  # how many such tags an image has on average
_RARE = 2000  # kinds of rare tags, their frequency falling as a power of their rank


class Synthetic(Source):
    """Image i is a pure function of (seed, i, size); its label says what thing it shows.

    Hashtags name the thing or a synonym, and its colour, texture and scene; each is missing now and
    then, and wrong with probability `noise`. The rest are chatter and a long tail of rare words.
    aside: how much of all that is said that does not name the thing, 1 being as on a talkative
    site; with less, fewer images have a tag beside the thing's.
    """

    fields = ("image", "label", "hashtags", "text")
    classes = list(THINGS)

    def __init__(
        self,
        *,
        images: int,
        size: int = 64,
        seed: int = 0,
        noise: float = 0.1,
        aside: float = 1.0,
    ):
        if images < 1 or size < 8:
            raise ValueError(f"source: images {images} must be 1 or more, size {size} 8 or more.")
        if not 0 <= noise <= 0.5:
            raise ValueError(f"source.noise: {noise} is not between 0 and 0.5.")
        if not 0 <= aside <= 1:
            raise ValueError(f"source.aside: {aside} is not between 0 and 1.")
        self.size, self.seed, self.noise, self.aside = size, seed, noise, aside
        self.groups = [images]
        self.fingerprint = fingerprint_of(["synthetic 2", images, size, seed, noise, aside])

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.groups[0]:
            raise IndexError(f"image {index} of {self.groups[0]}")
        rng = Random(self.seed, 0, index)
        facts = _facts(rng("facts"))
        file = io.BytesIO()
        Image.fromarray(draw(facts, self.size, rng("picture"))).save(file, "JPEG", quality=90)
        return {
            "key": self.key(index),
            "image": file.getvalue(),
            "label": self.classes.index(facts["thing"]),
            "hashtags": self._hashtags(facts, rng("hashtags")),
            "text": _caption(facts, rng("caption")),
        }

    def key(self, index: int) -> str:
        return f"{index:09d}"

    def label(self, index: int) -> int:
        return self.classes.index(_facts(Random(self.seed, 0, index)("facts"))["thing"])

    def hashtags(self, index: int) -> list[str]:
        rng = Random(self.seed, 0, index)
        return self._hashtags(_facts(rng("facts")), rng("hashtags"))

    def _hashtags(self, facts: dict[str, str], rng: np.random.Generator) -> list[str]:
        tags = [_word(facts["thing"], self.noise, rng)] if rng.random() >= self.noise else []
        for fact, choices in (("colour", COLOURS), ("texture", TEXTURES), ("scene", SCENES)):
            if rng.random() < self.aside * (1 - 2 * self.noise):
                wrong = rng.random() < self.noise
                tags.append(list(choices)[rng.integers(len(choices))] if wrong else facts[fact])
        for _ in range(rng.poisson(self.aside * _CHATTER)):
            tags.append(CHATTER[min(rng.geometric(0.35), len(CHATTER)) - 1])
        for _ in range(rng.poisson(self.aside * _TAIL)):
            tags.append(f"{facts['scene']}{min(rng.zipf(1.5), _RARE)}")
        return [_as_written(tag, rng) for tag in tags]


def _facts(rng: np.random.Generator) -> dict[str, str]:
    """What is in the scene: a thing, its colour and texture, and where it is."""
    pick = lambda options: list(options)[rng.integers(len(options))]
    thing = pick(THINGS)
    usual, texture = LOOKS[thing]
    colour = usual if rng.random() < _USUAL else pick(COLOURS)
    return {"thing": thing, "colour": colour, "texture": texture, "scene": pick(SCENES)}


def _caption(facts: dict, rng: np.random.Generator) -> str:
    place = {"night": "at night", "snow": "in the snow", "sea": "by the sea"}
    where = place.get(facts["scene"], f"in the {facts['scene']}")
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(where=where, **facts)


def _word(thing: str, noise: float, rng: np.random.Generator) -> str:
    """One of its names; with `noise` that of another thing."""
    if rng.random() < noise:
        thing = list(THINGS)[rng.integers(len(THINGS))]
    names = THINGS[thing]
    return names[min(rng.geometric(0.7), len(names)) - 1]


def _as_written(tag: str, rng: np.random.Generator) -> str:
    """People write #Red, RED and red for one thing."""
    style = rng.random()
    return f"#{tag}" if style < 0.3 else tag.capitalize() if style < 0.4 else tag


def draw(facts: dict[str, str], size: int, rng: np.random.Generator) -> np.ndarray:
    """The picture of a scene: uint8 [size, size, 3]."""
    canvas = _background(SCENES[facts["scene"]], size, rng)
    canvas = _with_thing(canvas, facts, rng)
    canvas = (canvas - 128) * rng.uniform(0.85, 1.1) + 128 + rng.uniform(-15, 15)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(1, 3)
    return canvas.clip(0, 255).astype(np.uint8)


def _background(colours: tuple, size: int, rng: np.random.Generator) -> np.ndarray:
    """Sky over ground with a tilted horizon, mottled, as float32 [size, size, 3]."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    horizon = rng.uniform(0.3, 0.75) + rng.uniform(-0.25, 0.25) * (x - 0.5)
    ground = (1 / (1 + np.exp((horizon - y) * rng.uniform(15, 60))))[..., None]
    sky, floor = (np.float32(colour) + rng.normal(0, 14, 3) for colour in colours)
    mottle = rng.normal(0, 6, (5, 5, 3)).astype(np.float32)
    smooth = [
        np.asarray(Image.fromarray(mottle[..., c]).resize((size, size), Image.BICUBIC))
        for c in range(3)
    ]
    return (sky * (1 - ground) + floor * ground).astype(np.float32) + np.stack(smooth, -1)


def _with_thing(canvas: np.ndarray, facts: dict[str, str], rng: np.random.Generator) -> np.ndarray:
    """The canvas with the thing near its centre, a little turned and stretched."""
    size, radius = len(canvas), rng.uniform(0.34, 0.44)
    angle, stretch = rng.uniform(-0.25, 0.25), rng.uniform(0.88, 1.14)
    centre = 0.5 + rng.uniform(-0.08, 0.08, 2)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    place = lambda points: (points * (stretch, 1 / stretch) @ turn) * radius + centre
    cover = _cover(facts["thing"], place, size)[..., None]
    u, v = _within(size, centre, radius, angle)
    return (
        canvas * (1 - cover) + _fill(COLOURS[facts["colour"]], facts["texture"], u, v, rng) * cover
    )


def _within(
    size: int, centre: np.ndarray, radius: float, angle: float
) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel's coordinates in units of a thing's radius, along the thing's own axes."""
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size
    x, y = (x - centre[0]) / radius, (y - centre[1]) / radius
    u, v = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    return u.astype(np.float32), v.astype(np.float32)


def _cover(shape: str, place, size: int) -> np.ndarray:
    """How much of each pixel the shape covers, from a drawing of twice the size."""
    image = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(image)
    for points, value in OUTLINES[shape]:
        pen.polygon([tuple(point) for point in place(points) * 2 * size], fill=value)
    return np.asarray(image.reduce(2), dtype=np.float32) / 255


def _fill(
    colour: tuple, texture: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The colour with its texture, at the thing's own coordinates u and v: float32 [S, S, 3]."""
    base = np.float32(colour) + rng.normal(0, 12, 3).astype(np.float32)
    second = base * 0.45 + rng.choice((0.0, 110.0))
    pitch, phase = rng.uniform(1.6, 2.2), rng.uniform(0, 1)
    mix = TEXTURES[texture](u, v, pitch, phase).astype(np.float32)[..., None]
    return base * (1 - mix) + second * mix


def _wave(x: np.ndarray) -> np.ndarray:
    """0 to 1 and back, once a unit."""
    return np.abs(2 * (x % 1) - 1)


# How much of the second colour there is at (u, v), which run from -1 to 1 over the thing.
TEXTURES = {
    "plain": lambda u, v, pitch, phase: 0 * u,
    "striped": lambda u, v, pitch, phase: _wave(u * pitch + phase) < 0.5,
    "banded": lambda u, v, pitch, phase: _wave(v * pitch + phase) < 0.5,
    "dotted": lambda u, v, pitch, phase: (
        (_wave(u * pitch + phase) - 0.5) ** 2 + (_wave(v * pitch) - 0.5) ** 2 < 0.1
    ),
    "checked": lambda u, v, pitch, phase: (
        (_wave(u * pitch / 2 + phase) < 0.5) ^ (_wave(v * pitch / 2) < 0.5)
    ),
    "shaded": lambda u, v, pitch, phase: (0.5 + 0.5 * u + 0.5 * v).clip(0, 1),
    "ringed": lambda u, v, pitch, phase: _wave(np.hypot(u, v) * pitch + phase) < 0.5,
    "rayed": lambda u, v, pitch, phase: _wave(np.arctan2(v, u) / math.pi * 3 + phase) < 0.5,
    "zigzag": lambda u, v, pitch, phase: _wave(v * pitch + 0.6 * _wave(u * 2) + phase) < 0.5,
    "veined": lambda u, v, pitch, phase: _wave((v + np.abs(u)) * pitch + phase) < 0.5,
}


def _circle(radius: float = 1.0, centre: tuple = (0.0, 0.0)) -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    return np.stack([np.cos(t), np.sin(t)], 1) * radius + centre


def _polar(radii: list[float]) -> np.ndarray:
    """Points around the centre at these distances, the first one on top."""
    t = np.arange(len(radii)) * 2 * math.pi / len(radii)
    return np.stack([np.sin(t), -np.cos(t)], 1) * np.array(radii)[:, None]


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 32, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -y / 16], 1)


def _leaf() -> np.ndarray:
    t = np.linspace(-1, 1, 14)
    side = 0.48 * (1 - t**2)
    return np.concatenate([np.stack([side, t], 1), np.stack([-side, t], 1)[::-1]])


# Polygons of about unit radius and their grey, drawn one over the other.
OUTLINES = {
    "ball": [(_circle(0.9), 255)],
    "box": [(np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.78, 255)],
    "tent": [(np.array([[0, -0.9], [1, 0.8], [-1, 0.8]]), 255)],
    "star": [(_polar([1.1, 0.45] * 5), 255)],
    "plus": [
        (
            np.array(
                [
                    [-3, -9],
                    [3, -9],
                    [3, -3],
                    [9, -3],
                    [9, 3],
                    [3, 3],
                    [3, 9],
                    [-3, 9],
                    [-3, 3],
                    [-9, 3],
                    [-9, -3],
                    [-3, -3],
                ]
            )
            / 9.5,
            255,
        )
    ],
    "heart": [(_heart(), 255)],
    "ring": [(_circle(0.95), 255), (_circle(0.5), 0)],
    "moon": [(_circle(0.95), 255), (_circle(0.8, (0.45, -0.1)), 0)],
    "arrow": [
        (
            np.array(
                [[0, -1], [0.8, -0.1], [0.3, -0.1], [0.3, 1], [-0.3, 1], [-0.3, -0.1], [-0.8, -0.1]]
            ),
            255,
        )
    ],
    "leaf": [(_leaf(), 255)],
}
