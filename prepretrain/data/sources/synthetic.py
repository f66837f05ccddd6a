"""Made scenes of textured shapes in clutter, with captions, noisy hashtags and clean labels."""

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
TEXTURES = ("plain", "striped", "dotted", "checked", "shaded")
# A class is an outline, in any colour and texture: what a patch shows does not tell it, where the
# edges of an object lie does. The first word is its usual hashtag; the others are synonyms, each
# rarer than the one before.
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

_RARE = 2000  # kinds of rare tags, their frequency falling as a power of their rank


class Synthetic(Source):
    """Image i is a pure function of (seed, i, size); labels are what the main object is.

    Hashtags name it, its colour, texture and scene, with synonyms, chatter and a long tail
    of rare words; each is left out with twice the probability `noise`, and is wrong with `noise`.
    """

    fields = ("image", "label", "hashtags", "text")
    classes = list(THINGS)

    def __init__(self, *, images: int, size: int = 64, seed: int = 0, noise: float = 0.1):
        if images < 1 or size < 8:
            raise ValueError(f"source: images {images} must be 1 or more, size {size} 8 or more.")
        if not 0 <= noise <= 0.5:
            raise ValueError(f"source.noise: {noise} is not between 0 and 0.5.")
        self.size, self.seed, self.noise = size, seed, noise
        self.groups = [images]
        self.fingerprint = fingerprint_of(["synthetic", images, size, seed, noise])

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
            "hashtags": _hashtags(facts, self.noise, rng("hashtags")),
            "text": _caption(facts, rng("caption")),
        }

    def key(self, index: int) -> str:
        return f"{index:09d}"

    def label(self, index: int) -> int:
        return self.classes.index(_facts(Random(self.seed, 0, index)("facts"))["thing"])

    def hashtags(self, index: int) -> list[str]:
        rng = Random(self.seed, 0, index)
        return _hashtags(_facts(rng("facts")), self.noise, rng("hashtags"))


def _facts(rng: np.random.Generator) -> dict:
    """What is in the scene: the main object, where it stands, and what else there is."""
    pick = lambda options: list(options)[rng.integers(len(options))]
    return {
        "thing": pick(THINGS),
        "colour": pick(COLOURS),
        "texture": pick(TEXTURES),
        "scene": pick(SCENES),
        "others": [pick(THINGS) for _ in range(rng.integers(0, 3))],
    }


def _caption(facts: dict, rng: np.random.Generator) -> str:
    place = {"night": "at night", "snow": "in the snow", "sea": "by the sea"}
    where = place.get(facts["scene"], f"in the {facts['scene']}")
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(where=where, **facts)


def _hashtags(facts: dict, noise: float, rng: np.random.Generator) -> list[str]:
    words = [_word(facts["thing"], noise, rng)]
    for fact, choices in (
        ("colour", COLOURS),
        ("texture", TEXTURES),
        ("scene", SCENES),
    ):
        wrong = rng.random() < noise
        words.append(list(choices)[rng.integers(len(choices))] if wrong else facts[fact])
    tags = [word for word in words if rng.random() >= 2 * noise]
    tags += [shape for shape in facts["others"] if rng.random() < noise]
    tags += [CHATTER[min(rng.geometric(0.35), len(CHATTER)) - 1] for _ in range(rng.poisson(0.7))]
    tags += [f"{facts['scene']}{min(rng.zipf(1.5), _RARE)}" for _ in range(rng.poisson(0.5))]
    return [_as_written(tag, rng) for tag in tags]


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


def draw(facts: dict, size: int, rng: np.random.Generator) -> np.ndarray:
    """The picture of a scene: uint8 [size, size, 3]."""
    canvas = _background(SCENES[facts["scene"]], size, rng)
    canvas = _clutter(canvas, size, rng)
    for shape in facts["others"]:
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        texture = TEXTURES[rng.integers(len(TEXTURES))]
        canvas = _with_object(canvas, shape, colour, texture, rng.uniform(0.07, 0.11), rng)
    canvas = _with_object(
        canvas, facts["thing"], facts["colour"], facts["texture"], rng.uniform(0.3, 0.42), rng
    )
    canvas = (canvas - 128) * rng.uniform(0.85, 1.1) + 128 + rng.uniform(-15, 15)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(2, 6)
    return canvas.clip(0, 255).astype(np.uint8)


def _background(colours: tuple, size: int, rng: np.random.Generator) -> np.ndarray:
    """Sky over ground with a tilted horizon, mottled, as float32 [size, size, 3]."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    horizon = rng.uniform(0.3, 0.75) + rng.uniform(-0.25, 0.25) * (x - 0.5)
    ground = (1 / (1 + np.exp((horizon - y) * rng.uniform(15, 60))))[..., None]
    sky, floor = (np.float32(colour) + rng.normal(0, 14, 3) for colour in colours)
    mottle = rng.normal(0, 14, (7, 7, 3)).astype(np.float32)
    smooth = [
        np.asarray(Image.fromarray(mottle[..., c]).resize((size, size), Image.BICUBIC))
        for c in range(3)
    ]
    return (sky * (1 - ground) + floor * ground).astype(np.float32) + np.stack(smooth, -1)


def _clutter(canvas: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Strokes and blots that belong to no class."""
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 8)):
        x, y, dx, dy = rng.uniform(0, 1, 4) * (size, size, 0.3 * size, 0.3 * size)
        colour = tuple(int(c) for c in rng.integers(20, 235, 3))
        kind = rng.integers(3)
        if kind == 0:
            pen.line(
                (x, y, x + dx - 0.15 * size, y + dy - 0.15 * size),
                colour,
                width=int(1 + rng.integers(0, 3) * size / 64),
            )
        elif kind == 1:
            pen.ellipse((x, y, x + dx / 3, y + dy / 3), colour)
        else:
            pen.arc(
                (x, y, x + dx, y + dy),
                *rng.uniform(0, 360, 2),
                fill=colour,
                width=max(1, size // 32),
            )
    return np.asarray(image).astype(np.float32)


def _with_object(
    canvas: np.ndarray,
    shape: str,
    colour: str,
    texture: str,
    radius: float,
    rng: np.random.Generator,
) -> np.ndarray:
    size = len(canvas)
    angle, stretch = rng.uniform(-0.45, 0.45), rng.uniform(0.85, 1.18)
    x, y = rng.uniform(radius * 0.9, 1 - radius * 0.9, 2)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    place = lambda points: (points * (stretch, 1 / stretch) @ turn) * radius + (x, y)
    cover = _cover(shape, place, size)[..., None]
    shadow = np.roll(cover, (max(1, size // 32), max(1, size // 32)), (0, 1)) * 0.35
    fill = _fill(COLOURS[colour], texture, size, angle, rng)
    return canvas * (1 - shadow) * (1 - cover) + fill * cover


def _cover(shape: str, place, size: int) -> np.ndarray:
    """How much of each pixel the shape covers, from a drawing of twice the size."""
    image = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(image)
    for points, value in OUTLINES[shape]:
        pen.polygon([tuple(point) for point in place(points) * 2 * size], fill=value)
    return np.asarray(image.reduce(2), dtype=np.float32) / 255


def _fill(
    colour: tuple, texture: str, size: int, angle: float, rng: np.random.Generator
) -> np.ndarray:
    """The colour with its texture: float32 [size, size, 3]."""
    base = np.float32(colour) + rng.normal(0, 12, 3).astype(np.float32)
    if texture == "plain":
        return base
    second = base * 0.45 + rng.choice((0.0, 110.0))
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    pitch = rng.uniform(5, 7)
    mix = {
        "striped": lambda: (u * pitch) % 1 < 0.5,
        "checked": lambda: ((u * pitch) % 1 < 0.5) ^ ((v * pitch) % 1 < 0.5),
        "dotted": lambda: ((u * pitch) % 1 - 0.5) ** 2 + ((v * pitch) % 1 - 0.5) ** 2 < 0.09,
        "shaded": lambda: (u + v - rng.uniform(0, 1)).clip(0, 1),
    }[texture]()
    mix = mix.astype(np.float32)[..., None]
    return base * (1 - mix) + second * mix


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
