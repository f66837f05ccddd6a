"""The masked-image objectives on 50,000 real photographs, at equal budget; and what a small set does
to the validation loss.

    python benchmarks/cifar10_masked.py --data FOLDER --teacher RUN --work runs/masked \
        --out benchmarks/results/cifar10_masked.json

FOLDER holds train.parquet and val.parquet of CIFAR-10; RUN is a stage-two run of ours
(benchmarks/cifar10_two_stage.py makes some), the teacher of feature_mae. Each model sees the same
number of images; then a linear probe, trained on every fifth photo, reads it on the 10,000 val
photos. The second part trains one model on 1 % and on all of the photos, for the same number of
images, with its validation loss (arXiv 2206.04664, Figure 7). Everything runs through
tools/launch.py, two runs side by side, one thread each. What is done is not done again.
"""

import argparse
import concurrent.futures
import json
import time
from pathlib import Path

from cifar10_two_stage import record, tool
from pyarrow import parquet

CARD = """description: CIFAR-10, made by benchmarks/cifar10_masked.py
licence: as the photos
classes: [airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck]
train: {{source: parquet, path: {train}}}
val: {{source: parquet, path: {val}}}
"""
COMMON = """data: {workers: 0}
batch_size: 256
shard: {precision: fp32}
checkpoint: {every: 50%}
log_every: 10it
"""
OPTIM = "optim: {lr: 1.5e-3, weight_decay: 0.05, betas: [0.9, 0.95], warmup: 10%}\n"
DECODER = "decoder_depth: 2, decoder_width: 96, decoder_heads: 3, crop_scale: [0.5, 1.0]"
VIT = "model: {encoder: vit_mini4, image_size: 32, positions: fixed"
STAGES = {
    "mae": f"{VIT}}}\nobjective: {{name: mae, {DECODER}}}\n{OPTIM}",
    "feature_mae": f"{VIT}}}\nobjective: {{name: feature_mae, teacher: TEACHER, {DECODER}}}\n{OPTIM}",
    "simmim_vit": f"{VIT}, final_norm: false}}\n"
    "objective: {name: simmim, cell: 8, target_window: 15, crop_scale: [0.67, 1.0]}\n" + OPTIM,
    "simmim_swinv2": "model: {encoder: swinv2_mini8}\n"
    "objective: {name: simmim, cell: 8, target_window: 15, crop_scale: [0.67, 1.0]}\n" + OPTIM,
}
PROBE = "evaluators=[{name: linear, data: probe, every: 100%, protocol: lbfgs, pool: mean}]"
UNTRAINED = ["length=1it", "optim.warmup=0it", "optim.lr=0"]
# Photos of 16 pixels and small batches, so that two cores memorise 500 of them within minutes; no
# crops, so that what is memorised are the photos.
OVERFIT = """model: {encoder: vit_mini4, width: 128, depth: 4, heads: 4, image_size: 16, positions: fixed}
objective: {name: mae, mask_ratio: 0.5, decoder_depth: 1, decoder_width: 128, decoder_heads: 4, crop_scale: [1.0, 1.0]}
optim: {lr: 8.0e-3, weight_decay: 0.05, betas: [0.9, 0.95], warmup: 5%, clip: 1.0}
data: {workers: 0}
validation: {data: 'whole:val', every: 400it, images: 1000}
batch_size: 50
shard: {precision: fp32}
checkpoint: {every: 50%}
log_every: 50it
"""


def prepare(work: Path, data: Path, teacher: Path) -> None:
    """The cards: all photos, every hundredth, and every fifth for the probe; and the stages."""
    (work / "datasets").mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    table = parquet.read_table(data / "train.parquet")
    for name, every in (("hundredth", 100), ("probe", 5)):
        parquet.write_table(
            table.take(list(range(0, len(table), every))), work / "data" / f"{name}.parquet"
        )
    places = {"whole": data / "train.parquet", "hundredth": "hundredth.parquet"}
    for name, train in {**places, "probe": "probe.parquet"}.items():
        card = CARD.format(train=train, val=data / "val.parquet")
        (work / "datasets" / f"{name}.yaml").write_text(card)
    for name, text in STAGES.items():
        (work / f"{name}.yaml").write_text(text.replace("TEACHER", str(teacher)) + COMMON)
    (work / "overfit.yaml").write_text(OVERFIT)


def train(work: Path, name: str, stage: str, *overrides: str) -> None:
    """One model, unless it is there already."""
    if not (work / "runs" / name / "export").exists():
        given = (f"{stage}.yaml", "--out", f"runs/{name}", *overrides)
        tool(work, "tools/launch.py", "--stage", *given)


def main() -> None:
    """Trains, evaluates, prints and writes the tables and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/masked"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--images", type=int, default=50_000, help="that each objective sees")
    parser.add_argument("--overfit", type=int, default=250_000, help="images of the second part")
    given = parser.parse_args()
    start, work = time.time(), given.work.resolve()
    prepare(work, given.data.resolve(), given.teacher.resolve())
    length = f"length={given.images}img"
    jobs = [
        ("untrained_vit", "mae", "data.train=whole", *UNTRAINED, PROBE),
        ("untrained_swinv2", "simmim_swinv2", "data.train=whole", *UNTRAINED, PROBE),
        *((name, name, "data.train=whole", length, PROBE) for name in STAGES),
    ]
    parts = {"1_percent": "hundredth", "all": "whole"}
    for part, card in parts.items():
        jobs.append(
            (f"overfit_{part}", "overfit", f"data.train={card}", f"length={given.overfit}img")
        )
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: train(work, *job), jobs))
    probes, curves = {}, {}
    for name in ("untrained_vit", "untrained_swinv2", *STAGES):
        results = json.loads((work / "runs" / name / "results.json").read_text())
        probes[name] = round(results["linear/probe"]["top1"], 2)
        print(json.dumps({"model": name, "linear_top1": probes[name]}), flush=True)
    for part in parts:
        rows = (work / "runs" / f"overfit_{part}" / "metrics.jsonl").read_text().splitlines()
        found = [row for row in map(json.loads, rows) if "val_loss" in row]
        curves[part] = [{k: r[k] for k in ("step", "val_loss", "val_gap")} for r in found]
        lowest = min(curves[part], key=lambda row: row["val_loss"])
        print(json.dumps({"photos": part, "lowest": lowest, "last": curves[part][-1]}), flush=True)
    if given.out:
        runs = [str(work / "runs" / f"overfit_{part}") for part in parts]
        keys = ["--keys", "loss", "val_loss", "--names", "1 % of the photos", "all photos"]
        picture = str(given.out.resolve().with_name("cifar10_overfitting.png"))
        tool(work, "tools/report.py", "curves", *runs, "--out", picture, *keys)
        names = [n for n in STAGES if n != "feature_mae"]
        tool(
            work,
            "tools/report.py",
            "reconstructions",
            *(str(work / "runs" / n) for n in names),
            *("--data", "whole:val", "--images", "6", "--names", *names, "--out"),
            str(given.out.resolve().with_name("cifar10_reconstructions.png")),
        )
    command = (
        "cifar10_masked.py --data FOLDER --teacher RUN "
        f"--images {given.images} --overfit {given.overfit}"
    )
    teacher = given.teacher.name
    record(given.out, command, start, teacher=teacher, linear_top1=probes, validation=curves)


if __name__ == "__main__":
    main()
