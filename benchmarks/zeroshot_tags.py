"""Zero-shot classification without a text tower: hashtags and nouns of captions against CLIP, at equal
images.

    python benchmarks/zeroshot_tags.py --data FOLDER --work runs/zeroshot_tags --out
    benchmarks/results/zeroshot_tags.json

FOLDER holds fashion_titles (shop photos in img2dataset's layout with a title, tags and an article type)
and cifar10 (train.parquet, val.parquet). A fixed fifth of the shop photos is held out; its article types
are the classes. Of CIFAR-10 as many training photos are taken as a long tail has (5,000 of the first
class, each next one has 0.7 of it), with a hashtag, `#cats`, and a caption, "a photo of cats": the plurals
of the names, so that no class name is ever trained on; cars are CIFAR-10's automobiles. For each set and
seed three models are trained from scratch on as many images: on hashtags merged by WordNet (stage wsp), on
nouns of captions with the binary loss (wsp_catlip), on captions (wsp_clip). The first two are measured with
each calibration, the third with the card's templates; of CIFAR-10 on 3,000 of its 10,000 test photos. A
model that is done is not trained again.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import time
from pathlib import Path

import torch
from cifar10_two_stage import over_seeds, record, tool
from flickr_clip import CARD, STAGE_TWO, TEMPLATES, TOWER
from pyarrow import Table, parquet

import prepretrain

WORDS = "airplanes cars birds cats deer dogs frogs horses ships trucks".split()
CIFAR = """description: CIFAR-10's photos, the training ones with a long tail; made by benchmarks/zeroshot_tags.py
licence: as the photos
classes: [airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck]
templates: {en: ['a photo of {}', 'a photo of a {}'], trained: ['a photo of {}', 'a photo of a {}']}
names: {en: [airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck], trained: [%s]}
train: {source: parquet, path: long_tail.parquet, text: text, hashtags: hashtags}
val: {source: parquet, path: "%s/val.parquet", subset: 30%%}
""".replace("[%s]}", f"[{', '.join(WORDS)}]}}")
ENCODERS = {"fashion_titles": ("vit_mini8", 64), "cifar10_tail": ("vit_mini4", 32)}
MODELS = {  # stage, objective, more of the model
    "hashtags": ("wsp", "name: hashtag, vocabulary: SET_tags.json, tags: null, head: mlp", ""),
    "nouns": (
        "wsp_catlip",
        "name: hashtag, labels: captions, vocabulary: SET_nouns.json, tags: null, loss: binary, "
        "head: linear",
        "",
    ),
    "clip": ("wsp_clip", "name: clip", f", text: {TOWER}, joint: {{width: 96, pool: class}}"),
}


def prepare(work: Path, data: Path) -> None:
    """The cards of both sets, CIFAR-10's long tail, and the vocabularies."""
    (work / "datasets").mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    shop = CARD.format(
        name="fashion_titles", path=data / "fashion_titles", also="", extra=TEMPLATES
    )
    (work / "datasets" / "fashion_titles.yaml").write_text(shop)
    (work / "datasets" / "cifar10_tail.yaml").write_text(CIFAR % (data / "cifar10"))
    if not (work / "data" / "long_tail.parquet").exists():
        parquet.write_table(
            long_tail(data / "cifar10" / "train.parquet"), work / "data" / "long_tail.parquet"
        )
    for name in ENCODERS:
        for kind, how in (("tags", ["--synsets", "wordnet"]), ("nouns", ["--captions"])):
            out = f"data/{name}_{kind}.json"
            if not (work / out).exists():
                tool(work, "datasets/hashtags.py", name, *how, "--min-count", "20", "--out", out)


def long_tail(path: Path) -> Table:
    """The first photos of each class, with the words that they are trained on."""
    table = parquet.read_table(path)
    rows, left = [], [round(5000 * 0.7**label) for label in range(10)]
    for row, label in enumerate(table["label"].to_pylist()):
        if left[label]:
            left[label] -= 1
            rows.append(row)
    table = table.take(rows)
    words = [WORDS[label] for label in table["label"].to_pylist()]
    texts = [[f"a photo of {word}" for word in words], [[f"#{word}"] for word in words]]
    return table.append_column("text", [texts[0]]).append_column("hashtags", [texts[1]])


def train(work: Path, name: str, kind: str, seed: int, images: int) -> None:
    """One model, unless it is there already."""
    stage, objective, more = MODELS[kind]
    encoder, size = ENCODERS[name]
    run = work / "runs" / f"{name}_{kind}_{seed}"
    if not (run / "export").exists():
        tool(
            work,
            "tools/launch.py",
            *("--stage", stage, "--out", f"runs/{run.name}"),
            f"objective={{{objective.replace('SET', name)}, crop_scale: [0.5, 1.0]}}",
            f"model={{encoder: {encoder}, image_size: {size}, positions: learned{more}}}",
            *(f"data.train={name}", f"length={images}img", f"seed={seed}"),
            *("optim.lr_end=0", "optim.ema=null", "optim.clip=null"),
            *STAGE_TWO,
        )


def measured(name: str, kind: str, run: Path) -> dict[str, float]:
    """Top-1 and its mean over classes, in each way that a model can be asked."""
    model = prepretrain.load(str(run))
    how = {"data": name, "workers": 0, "share": 1.0, "folder": run}  # which keeps features
    if kind == "clip":
        languages = ["en", "trained"] if name == "cifar10_tail" else ["en"]
        asked = {"the names": how | {"templates": "card"}}
        if len(languages) == 2:
            asked["the words trained on"] = how | {"templates": "card", "language": "trained"}
        evaluator = "zeroshot"
    else:
        evaluator, how = "zeroshot_tags", how | {"missing": "last"}
        ways = ("none", "counts", "images")
        asked = {f"calibrated by {way}": how | {"calibration": way} for way in ways}
    found = {}
    for way, options in asked.items():
        results = prepretrain.evaluate(model, evaluator, **options)
        found |= {f"{way} {key}": results[key] for key in ("top1", "mean_per_class")}
        found |= {key: results[key] for key in ("own", "near", "without") if key in results}
    return found


def told(table: dict[str, dict]) -> str:
    """The table in Markdown: top-1 and its mean over classes, in percent."""
    lines = ["| set | trained on | asked by | top-1 | mean per class |", "|---|---|---|--:|--:|"]
    for model, found in table.items():
        for key in found:
            if key.endswith(" top1"):
                way = key.removesuffix(" top1")
                figures = (found[f"{way} {name}"]["mean"] for name in ("top1", "mean_per_class"))
                name, kind = model.split()
                lines.append(
                    " | ".join([f"| {name}", kind, way, *(f"{n:.1f}" for n in figures)]) + " |"
                )
    return "\n".join(lines)


def main() -> None:
    """Trains, evaluates, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/zeroshot_tags"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=10000, help="of each model's training")
    parser.add_argument("--parallel", type=int, default=2, help="models that train side by side")
    given = parser.parse_args()
    start, work, data = time.time(), given.work.resolve(), given.data.resolve()
    out = given.out and given.out.resolve()
    torch.set_num_threads(1)
    os.environ["PREPRETRAIN_PLUGINS"] = "captions"  # the source of the shop photos
    prepare(work, data)
    os.chdir(work)  # where the cards are
    each = list(itertools.product(ENCODERS, MODELS, range(given.seeds)))
    with concurrent.futures.ThreadPoolExecutor(given.parallel) as pool:
        list(pool.map(lambda one: train(work, *one, given.images), each))
    table = {}
    for name in ENCODERS:
        for kind in MODELS:
            rows = []
            for seed in range(given.seeds):
                run = work / "runs" / f"{name}_{kind}_{seed}"
                rows.append(measured(name, kind, run))
                print(
                    json.dumps({"set": name, "model": kind, "seed": seed, **rows[-1]}), flush=True
                )
            table[f"{name} {kind}"] = over_seeds(rows)
    print(told(table))
    command = f"zeroshot_tags.py --data FOLDER --images {given.images} --seeds {given.seeds}"
    record(out, command, start, table=table)


if __name__ == "__main__":
    main()
