"""Building the index of a tar shard, checksums verified and kept beside it, on one thread, in CPU time.

    python benchmarks/tar_index.py [--reference DIR]

DIR holds webdataset 0.2.111, unpacked, whose `wids` walks through a shard in each process that opens it,
and verifies nothing; later versions have none.
"""

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import webdataset

from prepretrain.data.shards import tar_index

MEMBERS = {"jpg": b"\xff" * 700, "json": b'{"hashtags": ["red"]}'}


def shards(folder: Path, samples: int) -> dict[str, Path]:
    """One as webdataset writes it, with an extended header before each member, and one without."""
    own, plain = folder / "own.tar", folder / "plain.tar"
    with webdataset.TarWriter(str(own)) as writer:
        for number in range(samples):
            writer.write({"__key__": f"{number:09d}", **MEMBERS})
    with tarfile.open(plain, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(samples):
            for ending, data in MEMBERS.items():
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return {"own": own, "plain": plain}


def build(shard: Path) -> None:
    """Walks through a shard and writes its index."""
    shard.with_name(f"{shard.name}.index").unlink(missing_ok=True)
    tar_index.read_head(shard)


def main() -> None:
    """One JSON line for each kind of shard."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, metavar="DIR")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    variants: dict[str, Callable[[Path], object]] = {"ours": build}
    if asked.reference is not None:
        sys.path.insert(0, str(asked.reference))
        from wids.wids_mmtar import MMIndexedTar

        variants["wids"] = lambda shard: MMIndexedTar(str(shard), verbose=False).close()
    with tempfile.TemporaryDirectory() as place:
        for kind, shard in shards(Path(place), asked.samples).items():
            times: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(asked.rounds):
                for name, action in variants.items():
                    before = time.process_time()
                    action(shard)
                    times[name].append(time.process_time() - before)
            medians = {name: statistics.median(values) for name, values in times.items()}
            members = asked.samples * len(MEMBERS)
            print(
                json.dumps(
                    {"figure": f"tar_index_{kind}"}
                    | {f"{n}_us_a_member": round(1e6 * v / members, 2) for n, v in medians.items()}
                    | {"ratio": round(medians.get("wids", 0.0) / medians["ours"], 3)}
                )
            )


if __name__ == "__main__":
    main()
