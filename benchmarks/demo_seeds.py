"""Does each stage of `make demo` pay, beyond the spread of its seeds? And at its own best rate?

    python benchmarks/demo_seeds.py --work runs/demo_seeds --out benchmarks/results/demo_seeds.json
    python benchmarks/demo_seeds.py --show benchmarks/results/demo_seeds.json

On the data that `make demo` makes, and with its configs. First stage two's learning rates are swept,
with seeds that are not reported: those of the run from scratch and of the run after MAE alike. Then
all stages are run as they are shipped, once for each seed. All in one process of one thread, which
keeps the batches that several runs see: each run is what `tools/launch.py` makes of it. What is done is
not done again. `--show` prints what a file holds.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from cifar10_two_stage import over_seeds, record, tool

import prepretrain
from prepretrain.data.loader import Stream
from prepretrain.runs import run as runs

UNTRAINED = ["length=1it", "optim.lr=0", "optim.warmup=0it"]
READERS = {"linear": ("linear/demo", "top1"), "10-shot": ("lowshot/demo", "top1_10shot")}
DATA = {  # images, seed, how much is said beside the thing: as the Makefile
    "untagged": (8000, 0, 0.125),
    "train": (4000, 1, 0.125),
    "val": (1000, 2, 0.125),
}


class Kept(Stream):
    """A Stream that keeps its batches for the next run of the same seed on the same data."""

    batches_of: dict[str, list[dict]] = {}

    def batches(self, consumed: int = 0) -> Iterator[dict]:
        """See Stream.batches; the runs here start at the beginning."""
        if found := self.batches_of.get(self.fingerprint()):
            yield from map(dict, found)
            return
        self.batches_of.clear()
        kept = self.batches_of[self.fingerprint()] = []
        with contextlib.closing(super().batches(consumed)) as fresh:
            for batch in fresh:
                kept.append(dict(batch))
                yield batch


def prepare(work: Path) -> None:
    """Makes the data of `make demo`, unless it is there."""
    if (work / "data/demo/hashtags.json").exists():
        return
    (work / "data").mkdir(parents=True, exist_ok=True)
    for split, (images, seed, aside) in DATA.items():
        options = [f"images={images}", "size=40", f"seed={seed}", f"aside={aside}"]
        out = ["--out", f"data/demo/{split}"]
        tool(work, "datasets/make_shards.py", "synthetic", *options, *out)
    counted = ["--min-count", "60", "--out", "data/demo/hashtags.json"]
    tool(work, "datasets/hashtags.py", "demo", *counted)


def train(
    name: str, stage: str, seed: int, *options: str, init: str | None = None
) -> dict[str, float]:
    """Runs a stage, unless it is done, and returns what each reader reads from it, in percent."""
    folder = Path("runs", name)
    if not (folder / "export").exists():
        overrides = [*options, f"seed={seed}"]
        prepretrain.launch(f"demo/{stage}", overrides, init=init, out=str(folder))
    results = json.loads((folder / "results.json").read_text())
    return {reader: results[name][key] for reader, (name, key) in READERS.items()}


def sweep(seeds: list[int], rates: list[float]) -> dict[str, dict[str, dict]]:
    """What the readers read after stage two at each rate and seed, from scratch and from the weights
    of one run of MAE."""
    found = {arm: {f"{rate:g}": [] for rate in rates} for arm in ("scratch", "two_stage")}
    mae = f"sweep/mae_{seeds[0]}"
    train(mae, "mae", seeds[0])
    for seed in seeds:
        for arm, init in (("scratch", None), ("two_stage", f"runs/{mae}")):
            for rate in found[arm]:
                name = f"sweep/{arm}_{rate}_{seed}"
                row = train(name, "wsp", seed, f"optim.lr={rate}", init=init)
                print(name, row, flush=True)
                found[arm][rate].append(row)
    return {
        arm: {rate: over_seeds(rows) for rate, rows in by_rate.items()}
        for arm, by_rate in found.items()
    }


def measure_seed(seed: int) -> dict[str, dict[str, float]]:
    """The rows of one seed: all stages as they are shipped."""
    row = {
        "untrained": train(f"untrained_{seed}", "mae", seed, *UNTRAINED),
        "hashtags from scratch": train(f"scratch_{seed}", "wsp", seed),
        "MAE": train(f"mae_{seed}", "mae", seed),
        "MAE, then hashtags": train(f"two_stage_{seed}", "wsp", seed, init=f"runs/mae_{seed}"),
    }
    print(json.dumps({"seed": seed, **row}), flush=True)
    return row


def best_rate(by_rate: dict[str, dict]) -> str:
    """The rate whose readings, on average over the seeds and the readers, are highest."""
    return max(by_rate, key=lambda rate: sum(by_rate[rate][r]["mean"] for r in READERS))


def show(content: dict) -> str:
    """The means and deviations of a result file as a Markdown table, and how rates were chosen."""
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
    scratch, after = (content["sweep"][arm] for arm in ("scratch", "two_stage"))
    others = len(scratch[best_rate(scratch)]["linear"]["seeds"])
    rates = (
        f"Stage two's rate is each one's own best of {', '.join(scratch)} on {others} other seeds: "
        f"{best_rate(scratch)} from scratch, {best_rate(after)} after MAE."
    )
    return "\n".join([*head, chance, *rows, "", rates])


def main() -> None:
    """Sweeps, runs all seeds, prints and writes the table; or shows one that was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="*", default=[2e-3, 4e-3, 8e-3, 16e-3])
    parser.add_argument("--sweep-seeds", type=int, nargs="*", default=[100, 101, 102])
    parser.add_argument("--show", type=Path, metavar="JSON", help="print its table, run nothing")
    given = parser.parse_args()
    if given.show:
        print(show(json.loads(given.show.read_text())))
        return
    start, out = time.time(), given.out and given.out.resolve()
    prepare(given.work.resolve())
    os.chdir(given.work)
    os.environ["PREPRETRAIN_DATA"] = "data"
    torch.set_num_threads(1)
    runs.Stream = Kept
    swept = sweep(given.sweep_seeds, given.rates)
    print(json.dumps(swept), flush=True)
    rows = [measure_seed(seed) for seed in given.seeds]
    table = {arm: over_seeds([row[arm] for row in rows]) for arm in rows[0]}
    print(show({"table": table, "sweep": swept}))
    words = lambda values: " ".join(f"{value:g}" for value in values)
    command = (
        f"demo_seeds.py --seeds {words(given.seeds)} --rates {words(given.rates)} "
        f"--sweep-seeds {words(given.sweep_seeds)}"
    )
    record(out, command, start, table=table, sweep=swept)


if __name__ == "__main__":
    main()
