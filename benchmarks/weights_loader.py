"""Images per second of the loader with weights, over those without.

    python benchmarks/weights_loader.py --out benchmarks/results/weights_loader.json

Photo-like JPEGs in shards go through the first stage's crop and flip to batches, in one process: once with
every image equally often, once with weights from 0 to 3 by a file beside the shards, once as a mix of two
cards, and once more as the first, which says what the noise is. CPU time of a batch of each, in turns that
go forth and back; the median of the ratios of all turns, and their quartiles. Prints one JSON line.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cifar10_two_stage import record
from loader import BATCH, SCALE, SIZE, textures, write

from prepretrain import plugin
from prepretrain.data.loader import Stream
from prepretrain.data.order import Interleaved, Order
from prepretrain.data.sampling.mix import Mix
from prepretrain.data.sources.base import Source
from prepretrain.data.transforms import decode, flip, random_resized_crop

QUARTILES = (0.25, 0.5, 0.75)


def transform(sample: dict) -> dict:
    """What stage one makes of an image."""
    random, image = sample["random"], decode(sample["image"])
    image = random_resized_crop(image, SIZE, random("crop"), scale=SCALE)
    return {"image": flip(image, random("flip"))}


def shards(place: Path, count: int, each: int) -> list[Path]:
    """Shards of images, of which 64 differ, and a file of weights for each."""
    rng, images = np.random.default_rng(0), list(textures(64)) * (each // 64)
    (place / "keep").mkdir()
    for number in range(count):
        write(images, place / f"{number:05d}.tar")
        weight = rng.choice([0, 1, 1.39, 3], each).astype(np.float32)
        table = {"row": np.arange(each), "keep": weight > 0, "weight": weight}
        pq.write_table(pa.table(table), place / "keep" / f"{number:05d}.parquet")
    return sorted(place.glob("*.tar"))


def streams(place: Path) -> dict[str, Stream]:
    """Of the same shards, without weights, with, and as a mix."""
    opened = partial(plugin.build, "sources", "shards")
    plain = opened(path=str(place))
    kept = opened(path=str(place), keep=str(place / "keep"))
    order = lambda source: Order(source.groups, seed=0, window=4, repeats=source.weights)
    mixed = Interleaved([order(plain), order(kept)], [len(plain), len(kept)], [3, 1])
    read: dict[str, tuple[Source, Order | Interleaved]] = {
        "plain": (plain, order(plain)),
        "weights": (kept, order(kept)),
        "mix": (Mix(["a", "b"], [plain, kept]), mixed),
        "plain again": (plain, order(plain)),
    }
    how = {"batch_size": BATCH}
    return {name: Stream(s, transform, order=o, **how) for name, (s, o) in read.items()}


def main() -> None:
    """Measures, prints and writes the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    start, seconds = time.time(), {}
    with tempfile.TemporaryDirectory() as place:
        shards(Path(place), 8, 512)  # windows are larger than the blocks of a mix
        running = {name: stream.batches() for name, stream in streams(Path(place)).items()}
        names = list(running)
        for number in range(given.rounds + 1):
            for name in names[:: 1 if number % 2 else -1]:
                begin = time.process_time()
                next(running[name])
                seconds.setdefault(name, []).append(time.process_time() - begin)
    taken = {name: np.array(some[1:]) for name, some in seconds.items()}
    ratios = {name: np.quantile(taken["plain"] / some, QUARTILES) for name, some in taken.items()}
    found = {
        "images_per_second": {n: round(BATCH / np.median(some), 1) for n, some in taken.items()},
        "over_plain": {name: round(some[1], 4) for name, some in ratios.items()},
        "quartiles": {name: some.round(3).tolist() for name, some in ratios.items()},
    }
    print(json.dumps(found))
    command = f"weights_loader.py --rounds {given.rounds}"
    record(given.out, command, start, **found)


if __name__ == "__main__":
    main()
