"""Host memory of loading from shards of ten million images with four workers: of all processes
together, and whether it grows over many batches; one JSON line.

python benchmarks/host_memory.py --images 10000000 --batches 20000 --workers 4

The shards are sparse files with an index of the usual form, so the images themselves are blank and
nothing is decoded: what is measured is what the index, the order and the hand-over hold.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from prepretrain.data.loader import Stream
from prepretrain.data.shards import tar_index
from prepretrain.data.sources.shards import Shards

SIZE, SHARD = 1024, 100_000  # bytes of a blank image, images of a shard


def main() -> None:
    """Exits 1 if the processes hold 1 GiB together or more, or grow."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--batches", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=4)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for number in range(asked.images // SHARD):
            made(Path(place, f"{number:05d}.tar"), number)
        source = Shards(path=place)
        before = held()
        given = {"batch_size": asked.batch, "seed": 0, "workers": asked.workers}
        batches, mib = Stream(source, blank, **given).batches(), {}
        for number in range(1, asked.batches + 1):
            next(batches)
            if number % (asked.batches // 10) == 0:
                mib[number] = round(held(), 1)
    seen = list(mib.values())
    half = len(seen) // 2
    # pages of the index that are read for the first time stay mapped, as long as memory is free
    grown = round(max(seen[half:]) - seen[half], 1)
    row = {"figure": "host_memory", **vars(asked), "before_mib": round(before, 1), "mib": mib}
    print(json.dumps({**row, "most_mib": max(seen), "grown_mib_second_half": grown}))
    sys.exit(max(seen) - before >= 1024 or grown > 0.02 * seen[half])


def made(shard: Path, number: int) -> None:
    """A sparse shard and its index."""
    with shard.open("w") as file:
        file.truncate(SHARD * (SIZE + 512))
    keys = [f"{number:05d}{row:07d}" for row in range(SHARD)]
    spans = [{"jpg": (row * (SIZE + 512) + 512, SIZE)} for row in range(SHARD)]
    tar_index.walk = lambda path: (keys, spans, {})  # in the place of headers, which it lacks
    assert tar_index.read_head(shard)["file"].name.endswith(".index")


def blank(sample: dict) -> dict:
    """A transform that decodes nothing."""
    return {"image": torch.zeros(3, 32, 32, dtype=torch.uint8), "bytes": len(sample["image"])}


def held() -> float:
    """MiB of this process and its children, each shared page counted once (PSS)."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for process in ("self", *children):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


if __name__ == "__main__":
    main()
