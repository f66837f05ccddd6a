"""Finds planted copies among real pictures, and counts a set's own near-copies between two splits.

    python benchmarks/duplicates.py planted web.yaml shop.yaml --out benchmarks/results/duplicates.json
    python benchmarks/duplicates.py scale 1000000 --out benchmarks/results/duplicates_scale.json
    python benchmarks/duplicates.py leaks cifar10 --out benchmarks/results/duplicates_cifar10.json

planted: of each card's train some pictures are changed (encoded anew, scaled, cropped, mirrored,
brighter) and put beside all. Recall is the share of changed pictures that are near-copies of their own
original; false pairs are those of a changed picture and an image that is not its original, nor a copy
of it by file. The set's own near-copies are among them, so precision is a lower bound.
brightness: precision and recall if near-copies also had to be about as bright.
scale: stage duplicates among so many random hashes (cards: 1000000), a twentieth of them in families of
copies; in the current folder, with DuckDB's memory limited.
leaks: pairs of an image of `train` and one of `val`, by how far their hashes are apart, and a sheet
of some of them.
"""

import argparse
import datetime
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageOps

from prepretrain.curation.copies import Alike, masks, near_pairs, with_hashes
from prepretrain.curation.engine import Tables
from prepretrain.curation.folder import Folder, Manifest, ShardFile
from prepretrain.curation.hashes import COLOURS, SCHEMA, SIDE, WORDS, hashes
from prepretrain.curation.stages.duplicates import Duplicates
from prepretrain.curation.thumbnail import thumbnail
from prepretrain.data.card import load_card
from prepretrain.data.sources.base import Source
from prepretrain.data.transforms import BadImage, resized

SETTINGS = {  # (coarse, fine, colour)
    "defaults": Alike(),
    "4 of 64 bits": Alike(coarse=4),
    "fine 60": Alike(fine=60),
    "any colour": Alike(colour=255),
    "coarse alone": Alike(fine=128, colour=255),
}
OFF = 1 << 32  # the number of a changed picture is that of its kind times this, and its original's


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    """A JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def scaled(image: Image.Image, factor: float) -> Image.Image:
    size = tuple(max(1, round(side * factor)) for side in image.size)
    return image.resize(size, Image.Resampling.BICUBIC)


def cropped(image: Image.Image, area: float) -> Image.Image:
    """The middle, of a share of the area."""
    left, top = (round(side * (1 - area**0.5) / 2) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


CHANGES = {
    "JPEG of quality 50": lambda image: encoded(image, 50),
    "JPEG of quality 20": lambda image: encoded(image, 20),
    "half the size": lambda image: encoded(scaled(image, 0.5)),
    "twice the size": lambda image: encoded(scaled(image, 2)),
    "crop of 95 %": lambda image: encoded(cropped(image, 0.95)),
    "crop of 90 %": lambda image: encoded(cropped(image, 0.9)),
    "crop of 80 %": lambda image: encoded(cropped(image, 0.8)),
    "mirrored": lambda image: encoded(ImageOps.mirror(image)),
    "mirrored, half, quality 50": lambda image: encoded(scaled(ImageOps.mirror(image), 0.5), 50),
    "a fifth brighter": lambda image: encoded(image.point(lambda value: min(255, value * 1.2))),
}


def hashed(files: dict[int, bytes]) -> tuple[pa.Table, int]:
    """The hashes of image files by their numbers, and how many cannot be decoded."""
    rows, bad = [], 0
    for number, data in files.items():
        try:
            rows.append(
                {"shard": number >> 32, "row": number & (OFF - 1)} | hashes(thumbnail(data)[0])
            )
        except BadImage:
            bad += 1
    kinds = [("shard", pa.int64()), ("row", pa.int64()), *SCHEMA]
    return pa.Table.from_pylist(rows, pa.schema(kinds)), bad


def pairs_of(one: pa.Table, other: pa.Table, alike: Alike) -> dict[str, np.ndarray]:
    """Near-copies, mirrored ones too, of images of two tables of hashes."""
    database = duckdb.connect()
    database.register("one", one)
    database.register("other", other)
    database.sql(f"CREATE TABLE plain AS {with_hashes('FROM one')}")
    database.sql(
        f"CREATE TABLE both_ways AS SELECT *, false AS flipped FROM ({with_hashes('FROM other')})"
    )
    database.sql(f"INSERT INTO both_ways BY NAME {with_hashes('FROM other', flipped=True)}")
    return near_pairs(database, "plain", "both_ways", alike)


def changed_pictures(files: dict[int, bytes], changed: int, seed: int) -> dict[int, bytes]:
    """Some files, changed in each way, by the number of the way and their own."""
    chosen = np.random.default_rng(seed).choice(len(files), changed, replace=False)
    copies: dict[int, bytes] = {}
    for number in np.sort(chosen).tolist():
        image = Image.open(io.BytesIO(files[number])).convert("RGB")
        for kind, change in enumerate(CHANGES.values(), start=1):
            copies[kind * OFF + number] = change(image)
    return copies


def planted(source: Source, changed: int, seed: int) -> dict[str, Any]:
    """Recall by change and false pairs, by setting."""
    files = {number: source[number]["image"] for number in range(len(source))}
    changed = min(changed, len(source))
    copies = changed_pictures(files, changed, seed)
    start = time.process_time()
    (originals, _), (others, _) = hashed(files), hashed(copies)
    rate = (len(files) + len(copies)) / (time.process_time() - start)
    found: dict[str, Any] = {
        "images": len(files),
        "changed": changed,
        "hashed_a_second_of_cpu": round(rate),
    }
    for name, alike in SETTINGS.items():
        pairs = pairs_of(originals, others, alike)
        kind, number = pairs["other"] >> 32, pairs["other"] & (OFF - 1)
        right = pairs["one"] == number
        same = np.array([files[a] == files[b] for a, b in zip(pairs["one"], number)], bool)
        own = pairs_of(originals, originals, alike)
        recall = {
            change: round(float((right & (kind == place)).sum() / changed), 4)
            for place, change in enumerate(CHANGES, start=1)
        }
        found[name] = {
            "recall": recall,
            "right_pairs": int(right.sum()),
            "false_pairs": int((~same).sum()),
            "precision": round(float(right.sum() / max(1, (right | ~same).sum())), 4),
            "own_pairs": int((own["one"] < own["other"]).sum()),
        }
    return found


def brightness(source: Source, changed: int, seed: int) -> list[dict[str, Any]]:
    """What it would change if near-copies also had to be about as bright: on average, or in each of the
    parts that colours are of, as the most levels of 255 between them; with `fine: 60`."""
    files = {number: source[number]["image"] for number in range(len(source))}
    copies = changed_pictures(files, changed, seed)
    (originals, _), (others, _) = hashed(files), hashed(copies)
    pairs = pairs_of(originals, others, Alike(fine=60))
    kind, number = pairs["other"] >> 32, pairs["other"] & (OFF - 1)
    right = pairs["one"] == number
    same = np.array([files[a] == files[b] for a, b in zip(pairs["one"], number)], bool)
    greys = [np.array([grey(files[n]) for n in pairs["one"].tolist()])]
    greys += [np.array([grey(copies[n]) for n in pairs["other"].tolist()])]
    parts = np.abs(greys[0] - greys[1])
    measures = {"mean": parts[:, 0], "parts": parts[:, 1:].max(1)}
    names = dict(enumerate(CHANGES, start=1))
    found = []
    for by, apart in measures.items():
        for most in (4, 8, 12, 16, 24, 32, 255):
            alike = apart <= most
            shares = {
                c: round(float((right & alike & (kind == k)).sum() / changed), 4)
                for k, c in names.items()
            }
            true, false = int((right & alike).sum()), int((~same & alike).sum())
            precision = round(true / max(1, true + false), 4)
            found.append({"by": by, "most": most, "precision": precision, "recall": shares})
    return found


def grey(data: bytes) -> np.ndarray:
    """The mean grey level of a picture, and those of its 4 x 4 parts, each with its mirror image's."""
    small = resized(thumbnail(data)[0], SIDE, SIDE).permute(1, 2, 0).numpy().mean(2)
    parts = small.reshape(4, SIDE // 4, 4, SIDE // 4).mean((1, 3))
    return np.concatenate([[small.mean()], (parts + parts[:, ::-1])[:, :2].ravel() / 2])


def scale(count: int, seed: int, memory: str, coarse: list[int]) -> dict[str, Any]:
    """CPU seconds and memory of stage duplicates among so many random hashes, with families of copies."""
    found: dict[str, Any] = {"memory_limit": memory}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        folder, copies = families(Path(place), count, seed)
        found |= {"families": copies["families"], "largest": copies["largest"]}
        for bits in coarse:
            stage, spill = Duplicates(coarse=bits), Path(place) / "spill"
            start, wall = time.process_time(), time.time()
            tables = Tables(folder, stage.reads, spill)
            tables.query(f"SET memory_limit = '{memory}'; SET threads = 1")
            answer = stage.reduce(tables)
            dropped = sum(
                len(rows) - rows["reason"].null_count
                for rows in tables.divided(answer, stage.columns)
            )
            found[f"{bits} of 64 bits"] = {
                "cpu_seconds": round(time.process_time() - start, 1),
                "seconds": round(time.time() - wall, 1),
                "masks": len(masks(bits, 2 * count)),
                "dropped": dropped,
                "copies_planted": copies["copies"],
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
            print(json.dumps({"images": count, **found}), flush=True)
    return found


def families(place: Path, count: int, seed: int) -> tuple[Folder, dict[str, int]]:
    """A curation's folder with tables `meta` and `look` of random hashes, a twentieth of them in
    families of 2 to 1,000 near-copies and one of a hundredth of all, a third of which have the hashes of the first."""
    random = np.random.default_rng(seed)
    words = random.integers(0, 2**64, (count, 2 * len(WORDS) + 2), dtype=np.uint64)
    sizes = np.minimum(random.zipf(1.8, count) + 1, 1000)
    sizes[0] = count // 100
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), count // 20)]
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    members = random.permutation(count)[: len(first)]  # a family is spread over all shards
    words[members] = words[members[first]]
    changed = members[(random.random(len(first)) > 1 / 3) & (first != np.arange(len(first)))]
    half = len(WORDS) + 1
    for column in range(2 * half):
        for _ in range(
            2 if column % half == 0 else 3
        ):  # bits that differ, of the coarse and the fine
            flips = random.integers(0, 64, len(changed), dtype=np.uint64)
            words[changed, column] ^= np.uint64(1) << flips
    names = [f"{name}{way}" for way in ("", "_flipped") for name in ("coarse", *WORDS)]
    shards = [
        ShardFile("none", 0, "", len(part)) for part in np.array_split(words, -(-count // 100_000))
    ]
    folder = Folder(place)
    folder.begin(Manifest("random:train", {}, ["image"], 1, shards))
    ends = np.cumsum([0, *(shard.samples for shard in shards)])
    for number, (start, end) in enumerate(pairwise(ends.tolist())):
        rows, own = np.arange(end - start, dtype=np.int32), words[start:end]
        look = {name: own[:, at] for at, name in enumerate(names)}
        look |= {name: np.zeros(len(rows), np.uint64) for name in COLOURS}
        digests = [
            value.tobytes().hex() * 4 for value in random.integers(0, 2**64, len(rows), np.uint64)
        ]
        meta = {"key": digests, "sha256": digests, "bytes": rows.astype(np.int64)}
        meta |= {name: np.full(len(rows), 256, np.int32) for name in ("width", "height")}
        folder.write(
            "look",
            number,
            pa.table(
                {
                    "row": rows,
                    "thumb": own[:, 0] ^ own[:, 1] ^ np.arange(start, end, dtype=np.uint64),
                    **look,
                }
            ),
        )
        folder.write("meta", number, pa.table({"row": rows, **meta}))
    copies = {"families": len(sizes), "largest": int(sizes.max()), "copies": int((sizes - 1).sum())}
    return folder, copies


def leaks(card: str, sheet: Path, shown: int) -> dict[str, Any]:
    """How many images of val have near-copies in train, by distance; some are drawn."""
    opened = load_card(card)
    train, val = (opened.open(split).only(("image",)) for split in ("train", "val"))
    tables = [hashed({n: s[n]["image"] for n in range(len(s))})[0] for s in (train, val)]
    found: dict[str, Any] = {"train": len(train), "val": len(val)}
    for name, alike in SETTINGS.items():
        if name == "coarse alone":
            continue
        pairs = pairs_of(*tables, alike)
        nearest: dict[int, int] = {}
        for other, distance in zip(pairs["other"].tolist(), pairs["distance"].tolist()):
            nearest[other] = min(distance, nearest.get(other, 999))
        found[name] = {
            "val_images_with_near_copies": len(nearest),
            "pairs": len(pairs["one"]),
            "mirrored": int(pairs["flipped"].sum()),
            "by_distance": {
                f"up to {most}": sum(d <= most for d in nearest.values())
                for most in (0, 8, 16, 24, 31)
            },
        }
        if name == "defaults":
            draw(train, val, pairs, sheet, shown)
        if name == "fine 60":
            further = pairs["distance"] > Alike.fine
            others = {column: values[further] for column, values in pairs.items()}
            draw(train, val, others, sheet.with_stem(f"{sheet.stem}_60"), shown)
    return found


def draw(train: Source, val: Source, pairs: dict[str, np.ndarray], sheet: Path, shown: int) -> None:
    """A sheet of pairs, train beside val, evenly over their distances."""
    order = np.argsort(pairs["distance"], kind="stable")
    order = order[np.linspace(0, len(order), min(shown, len(order)), endpoint=False).astype(int)]
    side, columns = 96, 6
    canvas = Image.new(
        "RGB", (columns * (2 * side + 24), -(-len(order) // columns) * (side + 22)), "white"
    )
    pen = ImageDraw.Draw(canvas)
    for place, pair in enumerate(order.tolist()):
        x, y = place % columns * (2 * side + 24), place // columns * (side + 22)
        for step, data in enumerate(
            (train[int(pairs["one"][pair])], val[int(pairs["other"][pair])])
        ):
            image = Image.open(io.BytesIO(data["image"])).convert("RGB")
            canvas.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x + step * side, y))
        mirrored = ", mirrored" if pairs["flipped"][pair] else ""
        pen.text((x, y + side + 3), f"{pairs['distance'][pair]}{mirrored}", fill="black")
    canvas.save(sheet, quality=85)


def main() -> None:
    """Measures, and writes what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("planted", "brightness", "scale", "leaks"))
    parser.add_argument("cards", nargs="+")
    parser.add_argument("--changed", type=int, default=200)
    parser.add_argument("--shown", type=int, default=48)
    parser.add_argument("--memory", default="4GB", help="of DuckDB, for scale")
    parser.add_argument("--coarse", type=int, nargs="+", default=[4], help="bits, for scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    for card in asked.cards:
        if asked.what == "scale":
            found[card] = scale(int(card), asked.seed, asked.memory, asked.coarse)
            continue
        name = load_card(card).name
        if asked.what in ("planted", "brightness"):
            source = load_card(card).open("train").only(("image",))
            measure = planted if asked.what == "planted" else brightness
            found[name] = measure(source, asked.changed, asked.seed)
        else:
            found[name] = leaks(card, asked.out.with_suffix(".jpg"), asked.shown)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    made = {
        "command": " ".join(["benchmarks/duplicates.py", *map(_plain, sys.argv[1:])]),
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "seed": asked.seed,
    }
    asked.out.write_text(json.dumps(made | found, indent=1) + "\n")


def _plain(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


if __name__ == "__main__":
    main()
