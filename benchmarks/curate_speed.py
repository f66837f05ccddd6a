"""How many images a second one core curates: the stages meta, look and text on whole shards, and
imagededup's hashes of the same pictures, in CPU time on one thread, interleaved.

    python benchmarks/curate_speed.py CARD.yaml [--reference DIR] [--out JSON]

DIR holds imagededup (pip install --no-deps --target DIR imagededup PyWavelets). `look` makes all
hashes, also those of the mirror image, and the rest of its table; imagededup makes one hash of 64 bits.
"""

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from timing import interleaved

from prepretrain.curation.commands import run
from prepretrain.curation.engine import Machines
from prepretrain.curation.folder import Folder
from prepretrain.curation.shard import Shard
from prepretrain.curation.stages.look import Look
from prepretrain.curation.stages.meta import Meta
from prepretrain.curation.stages.text import Text

KEEP_ALL = "keep: {name: decide, reasons: []}\n"


def main() -> None:
    """Prints one JSON line, and writes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", help="of shards; its first shard is read")
    parser.add_argument("--reference", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, metavar="JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        shard = _first_shard(asked.card, Path(place))
        meta, look, text = Meta(), Look(), Text()
        variants: dict[str, Callable[[], object]] = {
            "meta": lambda: meta.shard(shard),
            "look": lambda: look.shard(shard),
            "text": lambda: text.shard(shard),
        }
        if asked.reference is not None:
            variants |= _imagededup(asked.reference, shard, Path(place))
        times = interleaved(variants, asked.rounds)
    found = {
        "figure": "curate_speed",
        "images": len(shard),
        **{f"{name}_images_a_second": _rates(len(shard), times[name]) for name in variants},
        "rounds": asked.rounds,
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "command": f"python benchmarks/curate_speed.py {asked.card}",
    }
    print(json.dumps(found))
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def _rates(images: int, seconds: list[float]) -> dict[str, int]:
    """The median, and the slowest and fastest round."""
    rates = [round(images / one) for one in seconds]
    return {"median": round(statistics.median(rates)), "least": min(rates), "most": max(rates)}


def _first_shard(card: str, place: Path) -> Shard:
    """The first shard of a card, as a stage is given it."""
    (place / "recipe.yaml").write_text(KEEP_ALL)
    run(card, str(place / "recipe.yaml"), place / "out", None, Machines())
    return Shard(Folder(place / "out"), 0, {})


def _imagededup(reference: Path, shard: Shard, place: Path) -> dict[str, Callable[[], object]]:
    """imagededup's perceptual and difference hash, which read files."""
    sys.path.append(str(reference))
    from imagededup.methods import DHash, PHash

    logging.disable(logging.WARNING)
    files = []
    for row in range(len(shard)):
        files.append(place / f"{row}.jpg")
        files[-1].write_bytes(shard.sample(row)["image"])
    methods = {"imagededup_phash": PHash(verbose=False), "imagededup_dhash": DHash(verbose=False)}
    return {
        name: lambda method=method: [method.encode_image(image_file=file) for file in files]
        for name, method in methods.items()
    }


def _commit() -> str:
    asked = ("git", "rev-parse", "--short", "HEAD")
    done = subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
