"""Does each stage of `make demo` pay, beyond the spread of its seeds? And at its own best rate?

    python benchmarks/demo_seeds.py --work runs/demo_seeds --out benchmarks/results/demo_seeds.json
    python benchmarks/demo_seeds.py --show benchmarks/results/demo_seeds.json

First the learning rates of stage two are swept, with a seed that is not reported: those of the run
from scratch and of the run after MAE alike. Then the stages of `make demo` are run as they are
shipped, once for each seed, on the data that `make demo` makes. Two run side by side, one thread
each; what is done is not run again. `--show` prints what a file holds.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cifar10_two_stage import over_seeds, record, tool

SWEEP_SEED = 100
UNTRAINED = ["length=1it", "optim.lr=0", "optim.warmup=0it"]
READERS = {"linear": ("linear/demo", "top1"), "10-shot": ("lowshot/demo", "top1_10shot")}
DATA = {
    "untagged": (8000, 0),
    "train": (4000, 1),
    "val": (1000, 2),
}  # images, seed: as the Makefile


def prepare(work: Path) -> None:
    """Makes the data of `make demo`, unless it is there."""
    if (work / "data/demo/hashtags.json").exists():
        return
    (work / "data").mkdir(parents=True, exist_ok=True)
    for split, (images, seed) in DATA.items():
        options = [f"images={images}", "size=40", f"seed={seed}", "--out", f"data/demo/{split}"]
        tool(work, "datasets/make_shards.py", "synthetic", *options)
    tool(
        work,
        "datasets/hashtags.py",
        "demo",
        "--min-count",
        "60",
        "--out",
        "data/demo/hashtags.json",
    )


def train(work: Path, name: str, stage: str, seed: int, *options: str) -> dict[str, float]:
    """Runs a stage, unless it is done, and returns what each reader reads from it, in percent."""
    path = work / "runs" / name
    if not (path / "export").exists():
        arguments = ["--stage", f"demo/{stage}", "--out", f"runs/{name}", *options, f"seed={seed}"]
        tool(work, "tools/launch.py", *arguments)
    results = json.loads((path / "results.json").read_text())
    return {reader: results[name][key] for reader, (name, key) in READERS.items()}


def sweep(work: Path, rates: list[float]) -> dict[str, dict[str, dict[str, float]]]:
    """What the readers read after stage two at each rate, from scratch and from MAE's weights."""
    train(work, "sweep/mae", "mae", SWEEP_SEED)
    starts = {"scratch": [], "two_stage": ["--init", "runs/sweep/mae"]}

    def measure(job: tuple[str, float]) -> dict[str, float]:
        arm, rate = job
        name = f"sweep/{arm}_{rate:g}"
        return train(work, name, "wsp", SWEEP_SEED, *starts[arm], f"optim.lr={rate:g}")

    jobs = [(arm, rate) for rate in rates for arm in starts]
    with ThreadPoolExecutor(2) as pool:
        rows = dict(zip(jobs, pool.map(measure, jobs)))
    return {arm: {f"{rate:g}": rows[arm, rate] for rate in rates} for arm in starts}


def measure_seed(work: Path, seed: int) -> dict[str, dict[str, float]]:
    """The rows of one seed: all stages as they are shipped."""
    mae = f"runs/mae_{seed}"
    row = {
        "untrained": train(work, f"untrained_{seed}", "mae", seed, *UNTRAINED),
        "hashtags from scratch": train(work, f"scratch_{seed}", "wsp", seed),
        "MAE": train(work, f"mae_{seed}", "mae", seed),
        "MAE, then hashtags": train(work, f"two_stage_{seed}", "wsp", seed, "--init", mae),
    }
    print(json.dumps({"seed": seed, **row}), flush=True)
    return row


def show(content: dict) -> str:
    """The means and deviations of a result file as a Markdown table."""
    seeds = len(next(iter(content["table"].values()))["linear"]["seeds"])
    head = [f"| mean ± deviation of {seeds} seeds | {' | '.join(READERS)} |", "|---|--:|--:|"]
    chance = "| chance | 10.0 | 10.0 |"
    rows = [
        f"| {name} | "
        + " | ".join(
            f"{row[r]['mean']:.1f} ± {statistics.stdev(row[r]['seeds']):.1f}" for r in READERS
        )
        + " |"
        for name, row in content["table"].items()
    ]
    return "\n".join([*head, chance, *rows])


def main() -> None:
    """Sweeps, runs all seeds, prints and writes the table; or shows one that was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--show", type=Path, metavar="JSON", help="print its table, run nothing")
    given = parser.parse_args()
    if given.show:
        print(show(json.loads(given.show.read_text())))
        return
    start, work = time.time(), given.work.resolve()
    prepare(work)
    swept = sweep(work, given.rates)
    print(json.dumps(swept), flush=True)
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda seed: measure_seed(work, seed), range(given.seeds)))
    table = {arm: over_seeds([row[arm] for row in rows]) for arm in rows[0]}
    print(show({"table": table}))
    command = (
        f"demo_seeds.py --seeds {given.seeds} --rates {' '.join(f'{r:g}' for r in given.rates)}"
    )
    record(given.out, command, start, table=table, sweep=swept)


if __name__ == "__main__":
    main()
