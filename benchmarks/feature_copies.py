"""Which near-copies do features find that hashes do not, and at which threshold? On planted copies.

    python benchmarks/feature_copies.py shop.yaml flickr.yaml --models mae=runs/mae wsp=runs/wsp
    --work runs/copies --out benchmarks/results/feature_copies.json

Of each card's train, which is shards, some pictures are changed (cropped, coloured, stretched, …) and make an
evaluation set. For each model, and for the hashes: recall is the share of changed pictures that are found
with their own original; false pairs are those of a changed picture and an image that is not its original,
nor the same file; the set's own near-copies are among them, so precision is a lower bound. Then
stages leaks and semantic run with the similarity at which precision is 95 %, as a user would run them, and
a sheet of pairs is drawn: found rightly and wrongly, nearest to the threshold. Prints a JSON line for each.
"""

import argparse
import io
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import yaml
from cifar10_two_stage import record
from duplicates import CHANGES, cropped, encoded, hashed, pairs_of, scaled
from PIL import Image, ImageDraw

from prepretrain.curation import commands, similarity
from prepretrain.curation.copies import Alike
from prepretrain.curation.embedding import Embedder
from prepretrain.curation.engine import Machines
from prepretrain.curation.stages.semantic import Semantic, nearest_earlier
from prepretrain.data.card import load_card
from prepretrain.data.sources.base import Source
from prepretrain.evaluation import leaks

PRECISIONS = (0.99, 0.95, 0.8)


def corner(image: Image.Image, area: float) -> Image.Image:
    """The lower right part, of a share of the area."""
    left, top = (round(side * (1 - area**0.5)) for side in image.size)
    return image.crop((left, top, *image.size))


def shifted(image: Image.Image) -> Image.Image:
    """Redder, and less blue, by a fifth."""
    red, green, blue = image.split()
    more, less = red.point(lambda v: min(255, v * 1.2)), blue.point(lambda v: v * 0.8)
    return Image.merge("RGB", (more, green, less))


def stretched(image: Image.Image) -> Image.Image:
    """Three quarters as wide."""
    return image.resize((max(1, round(image.width * 0.75)), image.height), Image.Resampling.BICUBIC)


PLANTED = {
    "JPEG of quality 50": CHANGES["JPEG of quality 50"],
    "half the size": lambda image: encoded(scaled(image, 0.5)),
    "crop of 90 %": lambda image: encoded(cropped(image, 0.9)),
    "crop of 80 %": lambda image: encoded(cropped(image, 0.8)),
    "crop of 60 %": lambda image: encoded(cropped(image, 0.6)),
    "corner of 80 %": lambda image: encoded(corner(image, 0.8)),
    "colour shifted": lambda image: encoded(shifted(image)),
    "three quarters as wide": lambda image: encoded(stretched(image)),
    "mirrored": CHANGES["mirrored"],
}


class Planted:
    """A card's pictures, and changed ones of them as the evaluation set `planted:val`."""

    def __init__(self, card: str, work: Path, changed: int, seed: int):
        self.card, self.work = card, work
        self.source = load_card(card).open("train").only(("image",))
        self.files = [self.source[number]["image"] for number in range(len(self.source))]
        chosen = np.random.default_rng(seed).choice(len(self.files), changed, replace=False)
        for number in np.sort(chosen).tolist():
            image = Image.open(io.BytesIO(self.files[number])).convert("RGB")
            for change, function in PLANTED.items():
                place = work / "planted" / change
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{number:06d}.jpg").write_bytes(function(image))
        self.address = f"{work / 'planted.yaml'}:val"
        split = {"val": {"source": "folder", "path": str(work / "planted")}}
        about = {"description": "changed pictures", "licence": "as the pictures"}
        (work / "planted.yaml").write_text(yaml.safe_dump(about | split))
        self.val: Source = load_card(str(work / "planted.yaml")).open("val").only(("image",))
        keys = [self.val.key(number) for number in range(len(self.val))]
        self.change = np.array([key.split("/")[-2] for key in keys])
        self.original = np.array([int(Path(key).stem) for key in keys])

    def scores(self, one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
        """Recall by change, and precision, of pairs of an image and a changed one."""
        right = one == self.original[other]
        same = [self.files[a] == self.files[self.original[b]] for a, b in zip(one, other)]
        false = int((~np.array(same, bool)).sum())
        found = Counter(self.change[other[right]])
        recall = {c: round(found[c] / int((self.change == c).sum()), 4) for c in PLANTED}
        return {
            "recall": recall,
            "false_pairs": false,
            "precision": round(int(right.sum()) / max(1, int(right.sum()) + false), 4),
        }


def by_hashes(planted: Planted) -> dict[str, Any]:
    """What stage leaks finds without features, at its defaults and with more fine bits."""
    originals, _ = hashed(dict(enumerate(planted.files)))
    others, _ = hashed({n: planted.val[n]["image"] for n in range(len(planted.val))})
    found = {}
    for name, alike in {"hashes": Alike(), "hashes, fine: 60": Alike(fine=60)}.items():
        pairs = pairs_of(originals, others, alike)
        found[name] = planted.scores(pairs["one"], pairs["other"])
    return found


def by_clusters(
    rows: np.ndarray, others: np.ndarray, original: np.ndarray, eps: float
) -> dict[str, Any]:
    """What stage semantic makes of all pictures and the changed ones together: of how many changed pictures
    that are so near to their original it drops one of the two, the clusters of k-means notwithstanding."""
    stage, both = Semantic(eps=eps, after=()), np.concatenate([rows, others])
    dropped = np.zeros(len(both), bool)
    clusters = stage._clusters(both.astype(np.float16))
    for members in clusters:
        _, cosine = nearest_earlier(both[members])
        dropped[members[cosine > 1 - eps]] = True
    near = (rows[original] * others).sum(1) > 1 - eps
    resolved = dropped[original] | dropped[len(rows) :]
    return {
        "clusters": len(clusters),
        "near": int(near.sum()),
        "resolved": int((near & resolved).sum()),
        "dropped": int(dropped.sum()),
    }


def by_features(planted: Planted, model: str, pool: str) -> tuple[dict[str, Any], np.ndarray]:
    """Recall at the similarities with which precision is still so much, and all cosines."""
    embedder = Embedder(model, {}, pool, None, 0.875, False, 128, 0)
    start = time.process_time()
    rows, others = (
        similarity.of_length_one(np.stack(embedder.features(source)))
        for source in (planted.source, planted.val)
    )
    rate = (len(rows) + len(others)) / (time.process_time() - start)
    cosine, found = rows @ others.T, {"images_a_second_of_cpu": round(rate)}
    for precision in PRECISIONS:
        for threshold in (1 - np.geomspace(0.5, 2e-4, 80)).round(4).tolist():
            if (cosine > threshold).sum() > 50 * len(others):
                continue
            scores = planted.scores(*np.nonzero(cosine > threshold))
            if scores["precision"] >= precision:
                found[f"precision {precision:.0%}"] = {"similarity": threshold, **scores}
                break
    if chosen := found.get("precision 95%"):
        eps = 1 - chosen["similarity"]
        found["semantic"] = by_clusters(rows, others, planted.original, eps)
    apart = [float(cosine[n, k]) for k, n in enumerate(planted.original)]
    found["similarity_to_own"] = {
        change: [
            round(float(np.quantile(np.array(apart)[planted.change == change], q)), 4)
            for q in (0.1, 0.5)
        ]
        for change in PLANTED
    }
    return found, cosine


def as_a_user(planted: Planted, model: str, pool: str, threshold: float) -> dict[str, Any]:
    """Runs the stages on the card with a threshold, and says what they found."""
    out = planted.work / f"curated-{Path(model).name}-{pool}"
    recipe = {
        "meta": {},
        "look": {},
        "duplicates": {},
        "embed": {"model": str(Path(model).resolve()), "pool": pool},
        "semantic": {"after": ["duplicates"], "eps": round(1 - threshold, 4)},
        "leaks": {"against": [planted.address], "features": "embed", "similarity": threshold},
        "keep": {"name": "decide", "reasons": ["duplicates", "leaks", "semantic"]},
    }
    file = planted.work / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    commands.run(planted.card, str(file), out, None, Machines())
    dropped = {
        table: sum(
            len(t) - t["reason"].null_count
            for t in map(parquet.read_table, sorted((out / table).glob("*.parquet")))
        )
        for table in ("duplicates", "semantic", "leaks")
    }
    leaked = leaks.content_of(out)["sets"]["planted:val"]["leaked"]
    return {"dropped": dropped, "evaluation_images_leaked": len(leaked), "of": len(planted.val)}


def draw(planted: Planted, cosine: np.ndarray, threshold: float, sheet: Path) -> None:
    """Pairs above the threshold and nearest to it, each original beside the changed picture: of each
    change those that are right in a row, then those that are wrong."""
    side, columns = 80, 6
    one, other = np.nonzero(cosine > threshold)
    order = np.argsort(cosine[one, other], kind="stable")
    one, other = one[order], other[order]
    right = one == planted.original[other]
    rows = [
        np.flatnonzero(right & (planted.change[other] == change))[:columns] for change in PLANTED
    ]
    wrong = np.flatnonzero(~right)
    rows += [wrong[start : start + columns] for start in range(0, 3 * columns, columns)]
    canvas = Image.new("RGB", (columns * (2 * side + 16), len(rows) * (side + 20)), "white")
    pen = ImageDraw.Draw(canvas)
    for line, row in enumerate(rows):
        for place, pair in enumerate(row.tolist()):
            x, y = place * (2 * side + 16), line * (side + 20)
            a, b = int(one[pair]), int(other[pair])
            for step, data in enumerate((planted.files[a], planted.val[b]["image"])):
                image = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side))
                canvas.paste(image, (x + step * side, y))
            kind = planted.change[b] if right[pair] else "not its own"
            pen.text((x, y + side + 2), f"{cosine[a, b]:.3f} {kind}"[:28], fill="black")
    canvas.save(sheet, quality=85)


def main() -> None:
    """Measures, prints and writes what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cards", nargs="+")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=RUN[:POOL]")
    parser.add_argument("--work", type=Path, default=Path("runs/copies"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--changed", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start, table = time.time(), {}
    for card in given.cards:
        name = load_card(card).name
        work = given.work.resolve() / name
        planted = Planted(card, work, given.changed, given.seed)
        table[name] = {"images": len(planted.files), "changed": given.changed} | by_hashes(planted)
        for model in given.models:
            label, _, place = model.partition("=")
            run, _, pool = place.partition(":")
            found, cosine = by_features(planted, run, pool or "mean")
            if chosen := found.get("precision 95%"):
                found["stages"] = as_a_user(planted, run, pool or "mean", chosen["similarity"])
                draw(planted, cosine, chosen["similarity"], work / f"{label}.jpg")
            table[name][label] = found
            print(json.dumps({"set": name, "model": label, **found}), flush=True)
    cards = " ".join(Path(card).name for card in given.cards)
    models = " ".join(model.split("=")[0] + "=RUN" for model in given.models)
    command = (
        f"feature_copies.py {cards} --models {models} --changed {given.changed} --seed {given.seed}"
    )
    record(given.out, command, start, table=table)


if __name__ == "__main__":
    main()
