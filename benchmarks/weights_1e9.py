"""What the weights of a billion images take: bytes on disk, seconds to build, memory to open and to draw.

    python benchmarks/weights_1e9.py --work FOLDER --out benchmarks/results/weights_1e9.json

The rows are made from their numbers: a fifth is left out, as by a curation; the others have the factor of a
tag, whose frequencies fall as 1 / rank, by the law inverse_sqrt with an epoch of 5.0 / 3.0 times as many
images. They lie in shards of 10,000, shuffled in windows of 64. The sums are built once, in a process of
their own; another one opens them, and draws from positions all over an epoch, as a run does that goes on
anywhere. FOLDER takes 4 GB. Prints one JSON line.
"""

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
from cifar10_two_stage import record

from prepretrain.data.order import Order
from prepretrain.data.sampling import weights

TAGS, SHARD, BATCH = 28_000, 10_000, 1024


def made(rows: int) -> weights.Weights:
    """The weights of so many rows, computed from their numbers."""
    share = 1 / np.arange(1, TAGS + 1)
    factors = np.sqrt(share[-1] / share).astype(np.float32)
    ranks = np.searchsorted(np.cumsum(share) / share.sum(), np.arange(1 << 16) / (1 << 16))
    table = factors[ranks]
    table[::5] = 0
    table *= 5 / 3 / table.mean() * 0.8

    def read(where: slice | np.ndarray) -> np.ndarray:
        rows_read = where if isinstance(where, np.ndarray) else np.arange(*where.indices(rows))
        mixed = rows_read.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return table[(mixed >> np.uint64(48)).astype(np.int64)]

    return weights.Weights(rows, f"made-{rows}", read)


def memory() -> dict[str, float]:
    """MiB of this process: its own, and of files that it shares with others."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return {
        name: round(int(sizes[key].split()[0]) / 1024, 1)
        for name, key in (("own_mib", "RssAnon"), ("shared_mib", "RssFile"))
    }


def order_of(rows: int, seed: int) -> Order:
    """The order of these rows."""
    groups = [SHARD] * (rows // SHARD)
    return Order(groups, seed=seed, window=64, repeats=made(rows))


def build(rows: int, pipe) -> None:
    """Builds the sums."""
    begin, cpu, before = time.perf_counter(), time.process_time(), memory()
    order_of(rows, 0)
    pipe.send(
        {
            "seconds": round(time.perf_counter() - begin, 1),
            "seconds_of_a_core": round(time.process_time() - cpu, 1),
            "before": before,
            "after": memory(),
        }
    )


def draw(rows: int, draws: int, pipe) -> None:
    """Opens them, and draws batches from all over an epoch."""
    before, begin = memory(), time.perf_counter()
    order = order_of(rows, 0)
    opened, after_open = time.perf_counter() - begin, memory()
    starts = np.random.default_rng(0).integers(0, order.length, draws // BATCH)
    begin = time.process_time()
    for start in starts.tolist():
        order(start + np.arange(BATCH))
    pipe.send(
        {
            "images_of_an_epoch": order.length,
            "open_ms": round(1e3 * opened, 1),
            "draw_us_an_image": round((time.process_time() - begin) / draws * 1e6, 2),
            "before": before,
            "after_opening": after_open,
            "after_drawing": memory(),
        }
    )


def alone(function, *arguments) -> dict:
    """What a function says, called in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=function, args=(*arguments, theirs)
    )
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def main() -> None:
    """Builds, opens, draws, prints and writes what that took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000_000)
    parser.add_argument("--draws", type=int, default=1_024_000)
    given = parser.parse_args()
    start = time.time()
    os.environ["XDG_CACHE_HOME"] = str(given.work.resolve())
    found = {"rows": given.rows, "build": alone(build, given.rows)}
    found["draw"] = alone(draw, given.rows, given.draws)
    (file,) = given.work.rglob("*.sums")
    found["bytes"] = file.stat().st_size
    found["bytes_an_image"] = round(found["bytes"] / given.rows, 3)
    print(json.dumps(found))
    command = f"weights_1e9.py --work FOLDER --rows {given.rows} --draws {given.draws}"
    record(given.out, command, start, **found)


if __name__ == "__main__":
    main()
