"""What every evaluator says of four models on real photographs: untrained, after MAE, after
hashtags from scratch, and after MAE then hashtags.

    python benchmarks/cifar10_evaluators.py --data FOLDER --work runs/cifar10 --frost FOLDER --out
    benchmarks/results/cifar10_evaluators.json

WORK is where benchmarks/cifar10_two_stage.py trained them; FOLDER holds CIFAR-10's train.parquet and
val.parquet, and the second one the published frost textures. Each model's evaluations are one suite,
two models side by side, one thread each; the same command continues what was cut off. Prints the
table.
"""

import argparse
import concurrent.futures
import json
import time
from pathlib import Path

from cifar10_two_stage import record, tool
from omegaconf import OmegaConf

CARD = """description: CIFAR-10
licence: as the photos
classes: [airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck]
train: {source: parquet, path: "%s/train.parquet", images: 50_000}
val: {source: parquet, path: "%s/val.parquet", images: 10_000}
"""
SHOTS = [1, 2, 5, 10]
ADAPTERS = ("vpt", "vpt_deep", "lora", "adaptformer")


def suite(pool: str, frost: Path) -> list[dict]:
    """The evaluations of a model whose images are read from one pool of tokens."""

    def entry(stage: str, label: str | None = None, **options) -> dict:
        evaluator = {"pool": pool, "workers": 0, **options}
        found = {"stage": f"eval/{stage}", "data": "cifar", "evaluator": evaluator}
        return found | ({"label": label} if label else {})

    few = {
        "shots": SHOTS,
        "crop_scale": [0.5, 1.0],
        "seeds": 2,
        "val_images": 2000,
        "epochs": 30,
        "warmup": 3,
        "precision": "fp32",
    }
    tuned = {
        "stage": "finetune",
        "data": {"train": "cifar", "workers": 0},
        "model": {"drop_path": 0.0, "head": {"classes": 10}},
        "objective": {"augment": "rand-m5-n1-mstd0.5-inc1", "crop_scale": [0.5, 1.0]},
        "optim": {"lr": 5e-4, "warmup": "10%"},
        "batch_size": 128,
        "length": "0.25ep",
        "shard": {"precision": "fp32"},
        "evaluators": [{"name": "accuracy", "every": "100%", "share": 1.0}],
    }
    return [
        entry("knn", share=1.0),
        *(entry("linear", p, protocol=p, share=1.0) for p in ("mae", "sweep", "lbfgs")),
        entry("lowshot", shots=SHOTS),
        entry("lowshot", method="linear", **few),
        *(entry(f"lowshot_{method}", **few) for method in ADAPTERS),
        entry(
            "robustness",
            corruptions=["all"],
            table="cifar",
            frost=str(frost),
            images=500,
            share=1.0,
        ),
        tuned,
    ]


def evaluate(work: Path, name: str, frost: Path) -> dict:
    """All results of one model."""
    pool = "mean" if name.startswith(("untrained", "mae")) else "class"
    path, out = work / f"suite_{pool}.yaml", f"evaluated/{name}"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create({"suite": suite(pool, frost)})))
    tool(work, "tools/launch.py", "--stage", str(path), "--init", f"runs/{name}", "--out", out)
    return json.loads((work / out / "results.json").read_text())


def figures(found: dict) -> dict[str, float]:
    """A row of the table."""
    row = {"k-NN": found["knn/cifar"]["top1"]}
    row |= {f"linear {p}": found[f"linear/cifar/{p}"]["top1"] for p in ("mae", "sweep", "lbfgs")}
    for method in ("logistic", "linear", *ADAPTERS):
        key = "lowshot/cifar" + ("" if method == "logistic" else f"/{method}")
        row |= {f"{method} {k}-shot": found[key][f"top1_{k}shot"] for k in SHOTS}
    robust = found["robustness/cifar"]
    row |= {"clean, 500 images": robust["top1"], "corrupted": 100 - robust["mean_corruption_error"]}
    kinds = {k.split("/")[1]: v for k, v in robust.items() if k.count("/") == 2 and "/top1" in k}
    row |= {f"corrupted by {kind}": value for kind, value in kinds.items()}
    row["fine-tuned"] = found["finetune/cifar"]["accuracy/cifar"]["top1"]
    return {key: round(value, 2) for key, value in row.items()}


def main() -> None:
    """Evaluates, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--frost", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", default="1", help="epochs of stage two, as trained in WORK")
    given = parser.parse_args()
    start, work, data = time.time(), given.work.resolve(), given.data.resolve()
    (work / "datasets" / "cifar.yaml").write_text(CARD % (data, data))
    runs = {
        "untrained": "untrained_0",
        "MAE": "mae_0",
        "hashtags": f"scratch_{given.budget}ep_0",
        "MAE, then hashtags": f"two_stage_{given.budget}ep_0",
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda run: evaluate(work, run, given.frost.resolve()), runs.values())
        table = {name: figures(results) for name, results in zip(runs, found)}
    names = list(table)
    print("| | " + " | ".join(names) + " |\n|---|" + "--:|" * len(names))
    for key in table[names[0]]:
        print(f"| {key} | " + " | ".join(f"{table[name][key]:.1f}" for name in names) + " |")
    command = f"cifar10_evaluators.py --data FOLDER --frost FOLDER --budget {given.budget}"
    record(given.out, command, start, table=table)


if __name__ == "__main__":
    main()
