"""Does pre-training help a detector, at an equal budget of detection? On 200 photographs of raccoons.

    python benchmarks/detection_raccoon.py --data FOLDER --work runs/raccoon --out
    benchmarks/results/detection_raccoon.json

FOLDER holds raccoon/ (images/, instances_train.json, instances_val.json, in COCO's format) and cifar10/
(train.parquet, val.parquet). For each seed: MAE on CIFAR-10's photos, hashtags from its weights, and a
detector with the encoder from scratch, from MAE, and from MAE then hashtags; each trained as a whole,
and with its encoder frozen. Everything runs through tools/launch.py, one thread a run; what is done is
not done again. Prints one JSON line a model and seed, and the table. No number of it is from a paper.
"""

import argparse
import concurrent.futures
import json
import time
from pathlib import Path

from cifar10_two_stage import over_seeds, prepare, record, tool

CARD = """description: raccoons
licence: as the photos
train: {source: coco, path: "%(folder)s/images", listing: "%(folder)s/instances_train.json"}
val: {source: coco, path: "%(folder)s/images", listing: "%(folder)s/instances_%(val)s.json"}
"""
READ = {"train": "raccoon_train", "val": "raccoon"}  # the cards whose val is each split
ARMS = ("scratch", "mae", "two_stage")
COMMON = ["data.workers=0", "shard.precision=fp32", "checkpoint.every=50%"]
SMALL = ["data.train=tagged", "data.window=0", "model.image_size=64", *COMMON]
MAE = [
    "base=[]",
    "model.encoder=vit_mini8",
    "objective.decoder_depth=1",
    "objective.decoder_width=96",
    "objective.decoder_heads=3",
    "objective.crop_scale=[0.5,1.0]",
    "optim.lr=3e-3",
    "batch_size=128",
    *SMALL,
]
WSP = [
    "objective={name: hashtag, vocabulary: hashtags.json, tags: null, head: mlp, pool: mean, "
    "crop_scale: [0.5, 1.0]}",
    "model={encoder: vit_mini8, positions: learned}",
    "optim.lr=2e-3",
    "optim.weight_decay=0.05",
    "optim.schedule=cosine",
    "optim.warmup=10%",
    "batch_size=64",
    *SMALL,
]
SLIM = (  # a detector's head that a CPU trains
    "channels: 32, hidden: 128, anchors: [8, 16, 32, 64, 128], candidates: [300, 100], "
    "proposals: [100, 100], sampled_anchors: 64"
)
PLAIN = [  # ViTDet's recipe without what a short run on a CPU has no use for
    "model.encoder=vit_mini8",
    "model.relative_positions=false",
    "model.drop_path=0",
    "optim.layer_decay=1",
    "optim.schedule=cosine",
    "optim.milestones=[]",
    "optim.warmup=10%",
    *COMMON,
]
DETECTION = [
    "model.image_size=96",
    "model.window=12",
    f"model.head={{name: mask_rcnn, classes: 1, masks: false, {SLIM}, sampled_regions: 32}}",
    "objective.scale=[0.7,1.4]",
    "data.train=raccoon",
    "optim.lr=16e-3",
    "batch_size=8",
    f"evaluators=[{', '.join(f'{{name: detection, data: {card}, every: 100%}}' for card in READ.values())}]",
    *PLAIN,
]


def train(work: Path, name: str, stage: str, overrides: list[str], init: str | None = None) -> None:
    """One model, unless it is there already."""
    if not (work / "runs" / name / "export").exists():
        start = ["--init", f"runs/{init}"] if init else []
        out = ["--out", f"runs/{name}"]
        tool(work, "tools/launch.py", "--stage", stage, *out, *start, *overrides)


def stage_one(work: Path, seed: int, steps: int) -> None:
    """MAE of a seed."""
    train(work, f"mae_{seed}", "mae", [*MAE, f"length={steps}it", f"seed={seed}"])


def detectors(work: Path, arm: str, seed: int, given: argparse.Namespace) -> None:
    """Both detectors of an arm, and the hashtags that come before, once stage one is there."""
    its = f"seed={seed}"
    if arm == "two_stage":
        hashtags = [*WSP, f"length={given.hashtags}it", its]
        train(work, f"two_stage_{seed}", "wsp", hashtags, f"mae_{seed}")
    for freeze in ("false", "true"):
        asked = [*DETECTION, f"length={given.steps}it", f"objective.freeze={freeze}", its]
        init = None if arm == "scratch" else f"{arm}_{seed}"
        train(work, detector(arm, freeze, seed), "finetune/coco_vitdet_b", asked, init)


def detector(arm: str, freeze: str, seed: int) -> str:
    """The name of a detector's run."""
    return f"{'frozen' if freeze == 'true' else 'full'}_{arm}_{seed}"


def main() -> None:
    """Trains, evaluates, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/raccoon"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--mae", type=int, default=500, help="steps of 128 images")
    parser.add_argument("--hashtags", type=int, default=250, help="steps of 64 images")
    parser.add_argument("--steps", type=int, default=250, help="steps of 8 images, of a detector")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    given = parser.parse_args()
    start, work, data = time.time(), given.work.resolve(), given.data.resolve()
    prepare(work, data / "cifar10")
    for split, card in READ.items():
        content = CARD % {"folder": data / "raccoon", "val": split}
        (work / "datasets" / f"{card}.yaml").write_text(content)
    seeds = range(given.seeds)
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda seed: stage_one(work, seed, given.mae), seeds))
        asked = [(arm, seed) for arm in ARMS for seed in seeds]
        list(pool.map(lambda one: detectors(work, *one, given), asked))
    table = {}
    for freeze, arm in [(freeze, arm) for freeze in ("false", "true") for arm in ARMS]:
        rows = []
        for seed in seeds:
            name = detector(arm, freeze, seed)
            results = json.loads((work / "runs" / name / "results.json").read_text())
            found = {split: results[f"detection/{card}"] for split, card in READ.items()}
            rows.append(
                {f"{s}_{k}": found[s][f"box_{k}"] for s in found for k in ("AP", "AP50", "AP75")}
            )
            print(json.dumps({"run": name, **rows[-1]}), flush=True)
        table[detector(arm, freeze, 0).removesuffix("_0")] = over_seeds(rows)
    command = (
        f"detection_raccoon.py --data FOLDER --seeds {given.seeds} --mae {given.mae} "
        f"--hashtags {given.hashtags} --steps {given.steps}"
    )
    record(given.out, command, start, table=table)


if __name__ == "__main__":
    main()
