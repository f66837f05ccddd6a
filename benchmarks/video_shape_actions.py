"""Does image pre-training help to tell motions apart, at an equal budget? On 135 clips of a coloured
shape that moves in one of three ways, which no single frame shows.

    python benchmarks/video_shape_actions.py --data FOLDER --work runs/shapes --out
    benchmarks/results/video_shape_actions.json

FOLDER holds shape_actions/ (a folder of clips a class, clips.json with each one's split) and cifar10/
(train.parquet, val.parquet). For each seed: MAE on CIFAR-10's photos, hashtags from its weights, and a
model of clips of 8 frames from scratch, from MAE, and from MAE then hashtags; and from MAE one that sees
a single frame. Everything runs through tools/launch.py, one thread a run; what is done is not done
again. Prints one JSON line a model and seed, and the table. No number of it is from a paper.
"""

import argparse
import concurrent.futures
import json
import time
from pathlib import Path

from cifar10_two_stage import over_seeds, prepare, record
from detection_raccoon import ARMS, COMMON, WSP, stage_one, train

CLASSES = ("circular", "horizontal", "vertical")
VIDEO = [
    "model.encoder=vit_mini8",
    "model.image_size=32",
    "model.mean=[0, 0, 0]",  # the clips' black background: else nothing is learned for hundreds of steps
    "model.drop_path=0",
    "model.head.classes=3",
    "objective={name: video, sampling: segments, crop_scale: [0.9, 1.0], flip: true, mixup: 0, cutmix: 0, "
    "smoothing: 0, erasing: 0, augment: null}",
    "data.train=shapes",
    "optim.layer_decay=1",
    "optim.warmup=10%",
    "optim.lr_end=0",
    "batch_size=16",
    "checkpoint.best=false",
    "evaluators=[{name: video, data: shapes, sampling: segments, clips: 1, crops: 1, every: 100%}]",
    *COMMON,
]
FRAMES = {"8": ["model.frames=8"], "1": ["model.frames=1", "model.tube=1"]}


def furnish(work: Path, data: Path) -> None:
    """Writes the card of the clips and the list of each split."""
    clips = json.loads((data / "clips.json").read_text())
    card = f"classes: [{', '.join(CLASSES)}]\n"
    for split in ("train", "val"):
        named = [one for one in clips if one["split"] == split]
        lines = [f"{one['file']} {CLASSES.index(one['label'])}\n" for one in named]
        listing = work / "data" / f"shapes_{split}.txt"
        listing.write_text("".join(lines))
        card += f'{split}: {{source: video, path: "{data}", listing: "{listing}"}}\n'
    (work / "datasets" / "shapes.yaml").write_text(card)


def models(work: Path, arm: str, frames: str, seed: int, given: argparse.Namespace) -> None:
    """A model of clips, and the hashtags that come before, once stage one is there."""
    its = f"seed={seed}"
    if arm == "two_stage":
        hashtags = [*WSP, f"length={given.hashtags}it", its]
        train(work, f"two_stage_{seed}", "wsp", hashtags, f"mae_{seed}")
    asked = [*VIDEO, *FRAMES[frames], f"optim.lr={given.lr}", f"length={given.steps}it", its]
    init = None if arm == "scratch" else f"{arm}_{seed}"
    train(work, f"video_{frames}_{arm}_{seed}", "finetune/ssv2_b", asked, init)


def main() -> None:
    """Trains, evaluates, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--mae", type=int, default=500, help="steps of 128 images")
    parser.add_argument("--hashtags", type=int, default=250, help="steps of 64 images")
    parser.add_argument("--steps", type=int, default=600, help="steps of 16 clips")
    parser.add_argument("--lr", type=float, default=1.6e-2, help="per 256 clips")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    given = parser.parse_args()
    start, work, data = time.time(), given.work.resolve(), given.data.resolve()
    prepare(work, data / "cifar10")
    furnish(work, data / "shape_actions")
    seeds = range(given.seeds)
    asked = [(arm, "8") for arm in ARMS] + [("mae", "1")]
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda seed: stage_one(work, seed, given.mae), seeds))
        every = [(*one, seed) for seed in seeds for one in asked]
        list(pool.map(lambda one: models(work, *one, given), every))
    table = {}
    for arm, frames in asked:
        rows = []
        for seed in seeds:
            run = f"video_{frames}_{arm}_{seed}"
            results = json.loads((work / "runs" / run / "results.json").read_text())
            rows.append({"top1": results["video/shapes"]["top1"]})
            print(json.dumps({"run": run, **rows[-1]}), flush=True)
        table[f"{arm}, {frames} frames"] = over_seeds(rows)
    command = (
        f"video_shape_actions.py --data FOLDER --seeds {given.seeds} --mae {given.mae} "
        f"--hashtags {given.hashtags} --steps {given.steps} --lr {given.lr:g}"
    )
    record(given.out, command, start, table=table)


if __name__ == "__main__":
    main()
