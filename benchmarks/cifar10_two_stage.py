"""Does MAE before hashtags help, at the same budget of hashtag training? On 50,000 real
photographs.

    python benchmarks/cifar10_two_stage.py --data FOLDER --work runs/cifar10 --out
    benchmarks/results/cifar10_two_stage.json

FOLDER holds train.parquet and val.parquet of CIFAR-10. For each seed: stage one, then stage two
from its weights and from scratch, with the same number of images, at two budgets. Everything runs
through tools/launch.py; seeds run side by side, one thread each. Prints one JSON line per model and
seed, and the table. A model that is done is not trained again.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from pyarrow import parquet

ROOT = Path(__file__).resolve().parents[1]
CARD = """description: CIFAR-10's training photos with noisy hashtags, made by benchmarks/cifar10_two_stage.py
licence: as the photos
train: {source: shards, path: shards}
"""
PHOTOS = """description: CIFAR-10
licence: as the photos
classes: [airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck]
train: {source: parquet, path: probe.parquet, images: 10_000}
val: {source: parquet, path: "%s/val.parquet"}
"""
EVALUATORS = (
    "evaluators=[{name: linear, data: photos, every: 100%%, protocol: lbfgs, pool: %s}, "
    "{name: lowshot, data: photos, every: 100%%, pool: %s}]"
)
COMMON = [
    "model.image_size=32",
    "data.train=tagged",
    "data.workers=0",
    "shard.precision=fp32",
    "checkpoint.every=50%",
]
MAE = [
    "model.encoder=vit_mini4",
    "objective.decoder_depth=2",
    "objective.decoder_width=96",
    "objective.decoder_heads=3",
    "objective.crop_scale=[0.5,1.0]",
    "optim.lr=1.5e-3",
    "batch_size=256",
    "base=[]",
    *COMMON,
]
WSP = [
    "objective={name: hashtag, vocabulary: hashtags.json, tags: null, head: mlp, crop_scale: [0.5, 1.0]}",
    "model={encoder: vit_mini4, positions: learned}",
    "optim.lr=2e-3",
    "optim.weight_decay=0.05",
    "batch_size=128",
    "optim.schedule=cosine",
    "optim.warmup=10%",
    *COMMON,
]


def tool(work: Path, script: str, *arguments: str) -> None:
    """Runs one of the repository's commands in the work folder, with one thread."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PREPRETRAIN_DATA": "data",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=work,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)}:\n{done.stderr[-2000:]}")


def prepare(work: Path, data: Path) -> None:
    """Photos to shards with hashtags, their vocabulary, the probes' 10,000 training photos, and the
    two cards."""
    (work / "datasets").mkdir(parents=True, exist_ok=True)
    (work / "datasets" / "tagged.yaml").write_text(CARD)
    (work / "datasets" / "photos.yaml").write_text(PHOTOS % data)
    if not (work / "data" / "hashtags.json").exists():
        (work / "data").mkdir(exist_ok=True)
        table = parquet.read_table(
            data / "train.parquet"
        )  # every fifth photo, so that probes are quick on two cores
        parquet.write_table(
            table.take(list(range(0, len(table), 5))), work / "data" / "probe.parquet"
        )
        tool(
            work,
            "datasets/make_shards.py",
            "cifar10.tagged",
            f"path={data}/train.parquet",
            "--out",
            "data/shards",
        )
        tool(
            work,
            "datasets/hashtags.py",
            "tagged",
            "--min-count",
            "100",
            "--out",
            "data/hashtags.json",
        )


def train(
    work: Path, name: str, stage: str, overrides: list[str], seed: int, init: str | None = None
) -> None:
    """One model, unless it is there already."""
    pool = "mean" if stage == "mae" else "class"
    if not (work / "runs" / name / "export").exists():
        start = ["--init", init] if init else []
        tool(
            work,
            "tools/launch.py",
            "--stage",
            stage,
            "--out",
            f"runs/{name}",
            *start,
            *overrides,
            EVALUATORS % (pool, pool),
            f"seed={seed}",
        )


def seed_runs(work: Path, seed: int, epochs: float, budgets: list[float]) -> None:
    """All models of one seed."""
    train(
        work,
        f"untrained_{seed}",
        "mae",
        [*MAE, "length=1it", "optim.warmup=0it", "optim.lr=0"],
        seed,
    )
    train(work, f"mae_{seed}", "mae", [*MAE, f"length={epochs}ep"], seed)
    for budget in budgets:
        length = f"length={budget}ep"
        train(work, f"scratch_{budget:g}ep_{seed}", "wsp", [*WSP, length], seed)
        train(
            work, f"two_stage_{budget:g}ep_{seed}", "wsp", [*WSP, length], seed, f"runs/mae_{seed}"
        )


def tags_top1(run: Path, data: Path) -> float:
    """Accuracy on val of the hashtag head itself: the likeliest of the ten class names."""
    from cifar10.tagged import CLASSES

    from prepretrain.data.sources.parquet import Parquet
    from prepretrain.data.transforms import decode
    from prepretrain.runs.export import load_objective

    os.environ["PREPRETRAIN_DATA"] = str(run.parents[1] / "data")
    objective, source = load_objective(run), Parquet(path=str(data / "val.parquet"))
    columns = objective.vocabulary.ids(["#" + c for c in CLASSES])
    names = [objective.vocabulary.tags[i] for i in columns]
    right = 0
    with torch.no_grad():
        for first in range(0, len(source), 500):
            batch = [source[i] for i in range(first, min(first + 500, len(source)))]
            tokens = objective.model(torch.stack([decode(s["image"]) for s in batch]))
            logits = objective.head(tokens)[:, columns]
            right += sum(
                names[int(i)] == CLASSES[s["label"]] for i, s in zip(logits.argmax(1), batch)
            )
    return 100 * right / len(source)


def over_seeds(rows: list[dict[str, float]]) -> dict[str, dict]:
    """{"mean", "seeds"} of each figure of one model's rows, a row a seed."""
    found = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        mean, seeds = round(statistics.mean(values), 2), [round(v, 2) for v in values]
        found[key] = {"mean": mean, "seeds": seeds}
    return found


def record(out: Path | None, command: str, start: float, **found: dict) -> None:
    """Prints how figures came about, and writes it with them."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    how = {
        "command": f"python benchmarks/{command}",
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "minutes": round((time.time() - start) / 60, 1),
    }
    if out:
        out.write_text(json.dumps(how | found, indent=1) + "\n")
    print(json.dumps(how))


def main() -> None:
    """Trains, evaluates, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--mae-epochs", type=float, default=4)
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.5, 2], help="epochs of stage two"
    )
    given = parser.parse_args()
    start, work, data = time.time(), given.work.resolve(), given.data.resolve()
    prepare(work, data)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda seed: seed_runs(work, seed, given.mae_epochs, given.budgets),
                range(given.seeds),
            )
        )
    names = ["untrained", "mae"] + [
        f"{kind}_{b:g}ep" for b in given.budgets for kind in ("scratch", "two_stage")
    ]
    table = {}
    for name in names:
        rows = []
        for seed in range(given.seeds):
            run = work / "runs" / f"{name}_{seed}"
            results = json.loads((run / "results.json").read_text())
            row = {
                "linear": results["linear/photos"]["top1"],
                "images": results["linear/photos"]["images"],
                **{
                    k: v
                    for k, v in results["lowshot/photos"].items()
                    if k.startswith("top1") and "std" not in k
                },
            }
            if name.startswith(("scratch", "two")):
                row["tags_top1"] = tags_top1(run, data)
            print(json.dumps({"model": name, "seed": seed, **row}), flush=True)
            rows.append(row)
        table[name] = over_seeds(rows)
    command = (
        f"cifar10_two_stage.py --data FOLDER --mae-epochs {given.mae_epochs:g} "
        f"--budgets {' '.join(f'{b:g}' for b in given.budgets)} --seeds {given.seeds}"
    )
    record(given.out, command, start, table=table)


if __name__ == "__main__":
    main()
