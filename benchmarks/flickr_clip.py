"""Does MAE before captions (or hashtags) help, at the same budget of captions? On real captions.

    python benchmarks/flickr_clip.py --data FOLDER --work runs/captions --out
    benchmarks/results/flickr_clip.json

FOLDER holds two folders of shards in img2dataset's layout: flickr8k_1k (photos with five captions each)
and fashion_titles (shop photos with a title, tags and an article type). A fixed fifth of each is held
out. For each seed: stage one on the photos of both, then CLIP on each, and hashtags on the tags, from
its weights and from scratch, with the same number of images. Measured on what is held out: retrieval
both ways, zero-shot over the article types, and a linear probe of them. Everything runs through
tools/launch.py, one thread each. Prints one JSON line per model and seed, and the table. A model that
is done is not trained again.
"""

import argparse
import concurrent.futures
import json
import time
from pathlib import Path

from cifar10_two_stage import over_seeds, record, tool

CARD = """description: {name}, of which a fifth is held out
licence: as the photos; not part of this repository
{extra}train: {{source: captions.held_out, path: "{path}", part: train{also}}}
val: {{source: captions.held_out, path: "{path}", part: val{also}}}
"""
TEMPLATES = "templates: ['{}', 'a photo of {}.', 'a product photo of {}.']\n"
ENCODER = "vit_mini8"
TOWER = "{name: open_clip, architecture: ViT-B-32, width: 96, layers: 2, heads: 3, context: 32}"
COMMON = ["data.workers=0", "shard.precision=fp32", "checkpoint.every=50%"]
MAE = [
    f"model.encoder={ENCODER}",
    "model.image_size=64",
    "objective.decoder_depth=2",
    "objective.decoder_width=96",
    "objective.decoder_heads=3",
    "objective.crop_scale=[0.4,1.0]",
    "data.train=both",
    "optim.lr=1.5e-3",
    "optim.warmup=10%",
    "batch_size=128",
    "base=[]",
    *COMMON,
]
STAGE_TWO = [
    "optim.lr=1e-3",
    "optim.weight_decay=0.1",
    "optim.schedule=cosine",
    "optim.warmup=10%",
    "batch_size=128",
    *COMMON,
]
CLIP = [
    f"model={{encoder: {ENCODER}, image_size: 64, positions: learned, text: {TOWER}, "
    "joint: {width: 96, pool: class}}",
    "objective={name: clip, crop_scale: [0.5, 1.0]}",
    *STAGE_TWO,
]
TAGS = [
    f"model={{encoder: {ENCODER}, image_size: 64, positions: learned}}",
    "objective={name: hashtag, vocabulary: tags.json, tags: null, head: mlp, crop_scale: [0.5, 1.0]}",
    "data.train=fashion_titles",
    *STAGE_TWO,
]
RETRIEVAL = "{name: retrieval, data: %s, every: 100%%}"
ZEROSHOT = "{name: zeroshot, data: fashion_titles, every: 100%}"
PROBE = "{name: linear, data: fashion_titles, every: 100%, protocol: lbfgs}"
WANTED = {  # figures of the table: evaluation, its key
    "retrieval/flickr8k_1k": ("mean_recall", "image_to_text_r10", "text_to_image_r10"),
    "retrieval/fashion_titles": ("mean_recall", "image_to_text_r10", "text_to_image_r10"),
    "zeroshot/fashion_titles": ("top1", "top5", "mean_per_class"),
    "linear/fashion_titles": ("top1",),
}


def prepare(work: Path, data: Path) -> None:
    """The cards of both sets, one of their photos together, and the vocabulary of the tags."""
    (work / "datasets").mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    fashion, flickr = data / "fashion_titles", data / "flickr8k_1k"
    for name, path, also, extra in (
        ("fashion_titles", fashion, "", TEMPLATES),
        ("flickr8k_1k", flickr, "", ""),
        ("both", fashion, f', also: ["{flickr}"]', ""),
    ):
        text = CARD.format(name=name, path=path, also=also, extra=extra)
        (work / "datasets" / f"{name}.yaml").write_text(text)
    if not (work / "data" / "tags.json").exists():
        count = ["fashion_titles", "--min-count", "20", "--out", "data/tags.json"]
        tool(work, "datasets/hashtags.py", *count)


def train(work: Path, run: str, stage: str, evaluators: list[str], *options: str) -> None:
    """One model, unless it is there already."""
    if not (work / "runs" / run / "export").exists():
        due = f"evaluators=[{', '.join(evaluators)}]"
        tool(work, "tools/launch.py", "--stage", stage, "--out", f"runs/{run}", *options, due)


def seed_runs(work: Path, seed: int, mae: str, lengths: dict[str, str]) -> None:
    """All models of one seed."""
    train(work, f"mae_{seed}", "mae", [], *MAE, f"length={mae}", f"seed={seed}")
    for start, init in (("scratch", []), ("two_stage", ["--init", f"runs/mae_{seed}"])):
        rest = [*init, f"seed={seed}"]
        for name, evaluators in (
            ("flickr8k_1k", [RETRIEVAL % "flickr8k_1k"]),
            ("fashion_titles", [RETRIEVAL % "fashion_titles", ZEROSHOT, PROBE]),
        ):
            options = [*CLIP, f"data.train={name}", f"length={lengths[name]}", *rest]
            train(work, f"clip_{name}_{start}_{seed}", "wsp_clip", evaluators, *options)
        options = [*TAGS, f"length={lengths['fashion_titles']}", *rest]
        train(work, f"tags_{start}_{seed}", "wsp", [PROBE], *options)


def figures(work: Path, run: str) -> dict[str, float]:
    """The wanted numbers of one run's results."""
    results = json.loads((work / "runs" / run / "results.json").read_text())
    found = {
        f"{evaluation} {key}": results[evaluation][key]
        for evaluation, keys in WANTED.items()
        for key in keys
        if evaluation in results
    }
    return found | {"images_seen": results["images"]}


def main() -> None:
    """Trains, evaluates, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/captions"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--mae", default="20ep", help="length of stage one")
    parser.add_argument("--flickr", default="30ep", help="length of stage two on flickr8k_1k")
    parser.add_argument("--fashion", default="6ep", help="lengths of stage two on fashion_titles")
    given = parser.parse_args()
    start, work, data = time.time(), given.work.resolve(), given.data.resolve()
    lengths = {"flickr8k_1k": given.flickr, "fashion_titles": given.fashion}
    prepare(work, data)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda s: seed_runs(work, s, given.mae, lengths), range(given.seeds)))
    table = {}
    for name in ("clip_flickr8k_1k", "clip_fashion_titles", "tags"):
        for kind in ("scratch", "two_stage"):
            rows = [figures(work, f"{name}_{kind}_{seed}") for seed in range(given.seeds)]
            for seed, row in enumerate(rows):
                print(json.dumps({"model": f"{name}_{kind}", "seed": seed, **row}), flush=True)
            table[f"{name}_{kind}"] = over_seeds(rows)
    command = (
        f"flickr_clip.py --data FOLDER --mae {given.mae} --flickr {given.flickr} "
        f"--fashion {given.fashion} --seeds {given.seeds}"
    )
    record(given.out, command, start, table=table)


if __name__ == "__main__":
    main()
