"""Does curation pay? 10,000 photos with as much junk among them: MAE and then hashtags on all, on what
tools/curate.py keeps, and on the photos alone, with as many images seen.

    python benchmarks/cifar10_curation.py --data FOLDER --work runs/curation --out
    benchmarks/results/cifar10_curation.json

FOLDER holds train.parquet and val.parquet of CIFAR-10; the junk is cifar10/junk.py's. Prints one JSON line per model and seed. What is done is not done again.
"""

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as parquet
import torch
from cifar10.junk import Junk
from cifar10_two_stage import EVALUATORS, MAE, WSP, over_seeds, record, tool

from prepretrain import launch

SETS = ("all", "curated", "clean")
# Thresholds are read off the histograms of what came in, as a user would.
RECIPE = """
meta:
look:
duplicates:
filter:
  rules:
    look.error: {'null': true}
    look.entropy: {above: 6}  # blanks and most text pictures
    meta.bytes: {at_most: 1100}  # noise, which JPEG cannot make smaller
keep: {name: decide, reasons: [duplicates, filter]}
write:
"""
ENCODER = "vit_test8"  # 2 blocks of width 32, 16 tokens of 32 pixels
PROBED = """description: CIFAR-10
licence: as the photos
classes: [airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck]
train: {source: parquet, path: probe.parquet, subset: 5000}
val: {source: parquet, path: "%s/val.parquet", subset: 5000}
"""
CARD = "description: {0}\nlicence: as the photos\ntrain: {{source: shards, path: {0}}}\n"


def prepare(work: Path, data: Path) -> dict:
    """The three sets, their cards and vocabularies; says what of which kind was kept."""
    (work / "datasets").mkdir(parents=True, exist_ok=True)
    for name in SETS:
        (work / f"datasets/{name}.yaml").write_text(CARD.format(name))
    (work / "datasets/photos.yaml").write_text(PROBED % data)
    (work / "recipe.yaml").write_text(RECIPE)
    if not (work / "data/clean.json").exists():
        (work / "data").mkdir(exist_ok=True)
        table = parquet.read_table(data / "train.parquet")
        probe = table.take(list(range(0, len(table), 5)))
        parquet.write_table(probe, work / "data/probe.parquet")
        made = ("cifar10.junk", f"path={data}/train.parquet")
        tool(work, "datasets/make_shards.py", *made, "--out", "data/all")
        tool(work, "datasets/make_shards.py", *made, "junk=false", "--out", "data/clean")
        asked = ("run", "all", "--recipe", "recipe.yaml", "--out", "curated", "--workers", "2")
        tool(work, "tools/curate.py", *asked)
        (work / "data/curated").symlink_to(work / "curated/write")
        for name in SETS:
            count = ("--min-count", "50", "--out", f"data/{name}.json")
            tool(work, "datasets/hashtags.py", name, *count)
    return kept(work, data)


def kept(work: Path, data: Path) -> dict[str, dict[str, int]]:
    """{kind: {reason or "kept": images}} of what went in."""
    source = Junk(path=str(data / "train.parquet"))
    files = sorted((work / "curated/keep").glob("*.parquet"))
    reasons = [r for file in files for r in parquet.read_table(file)["reason"].to_pylist()]
    kinds = [
        source[n]["key"].split("/")[0] if n >= source.count else "photo" for n in range(len(source))
    ]
    found: dict[str, dict[str, int]] = {}
    for (kind, reason), number in sorted(Counter(zip(kinds, map(str, reasons))).items()):
        found.setdefault(kind, {})["kept" if reason == "None" else reason] = number
    return found


def train(name: str, seed: int, mae: int, wsp: int) -> None:
    """Both stages on one set, in this process; what stage two makes is probed. What is done is kept."""
    own = [f"data.train={name}", f"seed={seed}", f"model.encoder={ENCODER}"]
    first, second = f"runs/{name}_mae_{seed}", f"runs/{name}_wsp_{seed}"
    if not Path(first, "export").exists():
        launch("mae", [*_without(MAE), *own, f"length={mae}it"], out=first)
    if not Path(second, "export").exists():
        keys = [key.replace("hashtags.json", f"{name}.json") for key in _without(WSP)]
        keys = [key.replace("encoder: vit_mini4, ", "") for key in keys]
        keys += [*own, f"length={wsp}it", EVALUATORS % ("class", "class")]
        launch("wsp", keys, out=second, init=first)


def _without(keys: list[str]) -> list[str]:
    return [key for key in keys if not key.startswith(("data.train=", "model.encoder="))]


def main() -> None:
    """Trains, evaluates, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/curation"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--mae-steps", type=int, default=400)
    parser.add_argument("--wsp-steps", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    start, work, data = time.time(), given.work.resolve(), given.data.resolve()
    out = given.out and given.out.resolve()
    counts = prepare(work, data)
    print(json.dumps(counts), flush=True)
    os.environ["PREPRETRAIN_DATA"] = "data"
    os.chdir(work)
    for seed in range(given.seeds):
        for name in SETS:
            train(name, seed, given.mae_steps, given.wsp_steps)
    table = {}
    for name in SETS:
        rows = []
        for seed in range(given.seeds):
            results = json.loads((work / f"runs/{name}_wsp_{seed}/results.json").read_text())
            shots = {k: v for k, v in results["lowshot/photos"].items() if k.startswith("top1")}
            row = {"linear": results["linear/photos"]["top1"]}
            rows.append(row | {k: v for k, v in shots.items() if "std" not in k})
            print(json.dumps({"model": name, "seed": seed, **rows[-1]}), flush=True)
        table[name] = over_seeds(rows)
    command = (
        f"cifar10_curation.py --data FOLDER --mae-steps {given.mae_steps} "
        f"--wsp-steps {given.wsp_steps} --seeds {given.seeds}"
    )
    record(out, command, start, kept=counts, table=table)


if __name__ == "__main__":
    main()
