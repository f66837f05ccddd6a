"""Counting the hashtags of img2dataset's shards on one core, in CPU time: as read one by one, which was
the only way before, as one pass over the members, and from the Parquet files beside the shards.

    python benchmarks/tag_counting.py --shards DIR --place json.tags [--out FILE.json]

DIR holds shards of img2dataset's with their Parquet files; they are repeated, with keys of their own, into
shards of 10,000 samples, as img2dataset writes them. The three ways take turns, and must agree. A count
is the vocabulary and each image's rarest tag; indexes are built before, and measured apart. Without
--shards a few are made.
"""

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prepretrain.data.shards import columns
from prepretrain.data.shards.indexing import read_heads
from prepretrain.data.sources.shards import Shards
from prepretrain.data.tags import counting
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.data.transforms import BadImage

Sample = tuple[dict[str, bytes], dict[str, Any]]  # members, and the row of the Parquet file


def samples_in(folder: Path) -> Iterator[Sample]:
    """The samples of shards with their rows, whose order is the same."""
    for shard in sorted(folder.glob("*.tar")):
        rows = pq.read_table(shard.with_suffix(".parquet")).to_pylist()
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, ending = member.name.partition(".")
                members.setdefault(key, {})[ending] = archive.extractfile(member).read()
        yield from zip(members.values(), (row for row in rows if row["status"] == "success"))


def made() -> Iterator[Sample]:
    """A few samples where no others are given."""
    for number in range(50):
        row = {"tags": ["all", f"tag{number}"], "caption": "a thing", "status": "success"}
        yield {"jpg": b"\xff" * 900, "json": json.dumps(row).encode(), "txt": b"a thing"}, row


def repeat(samples: list[Sample], count: int, size: int, folder: Path) -> None:
    """Writes so many samples, again and again the same, in shards of a size."""
    endless = cycle(samples)
    for shard in range(-(-count // size)):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number, (members, row) in enumerate(
                islice(endless, min(size, count - shard * size))
            ):
                key = f"{shard:05d}{number:04d}"
                content = json.dumps(json.loads(members["json"]) | {"key": key}).encode()
                for ending, data in (members | {"json": content}).items():
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                rows.append(row | {"key": key})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")


def one_by_one(source: Shards, place: Path) -> tuple[Vocabulary, np.ndarray]:
    """As it was done before: the JSON of each sample, one after another."""
    tags = []
    for index in range(len(source)):
        try:
            tags.append(source.hashtags(index))
        except BadImage:
            tags.append([])
    vocabulary = Vocabulary.count(tags, source=source.fingerprint, min_count=2)
    return vocabulary, np.array([vocabulary.rarest(found) for found in tags])


def by_map(source: Shards, place: Path) -> tuple[Vocabulary, np.ndarray]:
    """As datasets/hashtags.py does it, in one process."""
    vocabulary, rarest, counts = counting.count(source, place, min_count=2, processes=1)
    assert not counts.said, counts.said
    return vocabulary, rarest


def of_members(source: Shards) -> dict[str, float]:
    """CPU seconds of the two steps of counting by members that no way of counting can leave out: the json
    members are mapped and copied, and the value of a name is found in each."""
    seconds = Counter[str]()
    for group in range(len(source.groups)):
        begin = time.process_time()
        shard = source._shard(group)
        lines = columns._taken(
            np.asarray(np.memmap(shard.path, np.uint8, "r")), shard.index.spans("json") - (1, 0)
        )
        read = time.process_time()
        assert columns._written(lines, source.places["hashtags"].partition(".")[2]) is not None
        seconds.update(read=read - begin, find=time.process_time() - read)
    return seconds


def main() -> None:
    """Measures, prints the medians, and writes them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, metavar="DIR")
    parser.add_argument("--place", default="json.tags", help="where the hashtags are")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=10_000, help="samples of a shard")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    samples = list(made() if args.shards is None else samples_in(args.shards))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        repeat(samples, args.samples, args.size, place)
        (place / "members").mkdir()
        for shard in place.glob("*.tar"):
            (place / "members" / shard.name).hardlink_to(shard)
        shards = sorted(place.glob("*.tar"))
        before = time.process_time()
        read_heads(shards, processes=1)
        indexing = (time.process_time() - before) / args.samples
        whole = Shards(path=folder, hashtags=args.place)
        bare = Shards(path=str(place / "members"), hashtags=args.place)
        ways: dict[str, Callable[[], tuple[Vocabulary, np.ndarray]]] = {
            "one by one": lambda: one_by_one(bare, place),
            "members": lambda: by_map(bare, place / "out"),
            "parquet": lambda: by_map(whole, place / "out"),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        steps: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            results = {}
            for name, way in ways.items():
                before = time.process_time()
                results[name] = way()
                times[name].append((time.process_time() - before) / args.samples)
            for name, taken in of_members(bare).items():
                steps.setdefault(name, []).append(taken / args.samples)
            first, *others = results.values()
            for vocabulary, rarest in others:
                assert (vocabulary.tags, vocabulary.counts) == (first[0].tags, first[0].counts)
                assert (rarest == first[1]).all()
        json_bytes = sum(len(members["json"]) for members, _ in samples) / len(samples)
        figures: dict[str, Any] = {
            "command": f"python benchmarks/tag_counting.py --place {args.place} --samples "
            f"{args.samples} --size {args.size} --rounds {args.rounds}",
            "bytes_of_a_json_member": round(json_bytes),
            "tags_in_the_vocabulary": len(first[0]),
            "index_us_a_sample": round(1e6 * indexing, 2),
        }
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        ratios = sorted(old / new for old, new in zip(times["one by one"], times[name]))
        figures[name] = {
            "us_a_sample": round(1e6 * seconds, 2),
            "samples_a_second": round(1 / seconds),
            "times_as_fast": round(statistics.median(ratios), 1),
            "of_pairs": [round(ratios[0], 1), round(ratios[-1], 1)],
        }
    figures["members"]["us_of"] = {
        name: round(1e6 * statistics.median(values), 2) for name, values in steps.items()
    }
    print(json.dumps(figures, indent=1))
    if args.out is not None:
        stated = {"date": str(date.today()), "commit": os.environ.get("COMMIT", "unknown")}
        args.out.write_text(json.dumps(figures | stated, indent=1) + "\n")


if __name__ == "__main__":
    main()
