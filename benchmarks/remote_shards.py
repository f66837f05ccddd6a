"""An epoch of training's batches from a web server that answers late and slowly, with shards fetched ahead
and without, beside the same shards here.

    python benchmarks/remote_shards.py --shards DIR [--latency 0.05] [--rate 40] [--out FILE.json]

The server is of this machine: it waits before each answer, and sends so many MB/s a connection. The cache
is empty before each epoch and holds half of the shards; a batch's computation is a pause. Seconds are of
the wall. Without --shards a few are made.
"""

import argparse
import http.server
import io
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from prepretrain.data.loader import Stream
from prepretrain.data.shards.cache import ShardCache
from prepretrain.data.sources.base import Source
from prepretrain.data.sources.shards import Shards


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends files, or parts of them, late and slowly."""

    protocol_version = "HTTP/1.1"
    folder, latency, rate = Path(), 0.0, 1e9

    def do_HEAD(self) -> None:
        """Says how large a file is."""
        self.answer(body=False)

    def do_GET(self) -> None:
        """Sends it."""
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        """What both answer."""
        time.sleep(self.latency)
        file = self.folder / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        size, span = file.stat().st_size, self.headers.get("Range")
        start, end = map(int, span.removeprefix("bytes=").split("-")) if span else (0, size - 1)
        self.send_response(206 if span else 200)
        self.send_header("ETag", str(file.stat().st_mtime_ns))
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        with open(file, "rb") as stream:
            stream.seek(start)
            while body and start <= end:
                data = stream.read(min(1 << 18, end - start + 1))
                with suppress(ConnectionError):  # a worker that has ended
                    self.wfile.write(data)
                start += len(data)
                time.sleep(len(data) / self.rate)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def make(folder: Path) -> None:
    """A few shards where no others are given."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number in range(4):
                member = tarfile.TarInfo(f"{shard}{number}.jpg")
                member.size = 500
                archive.addfile(member, io.BytesIO(b"\xff" * 500))


def epoch(source: Source, args: argparse.Namespace) -> float:
    """The seconds of an epoch."""
    transform = lambda sample: {"bytes": len(sample["image"])}
    stream = Stream(source, transform, batch_size=args.batch, seed=0, workers=1, window=args.window)
    begin = time.perf_counter()
    batches = stream.batches()
    for _ in range(len(source) // args.batch):
        next(batches)
        time.sleep(args.compute)
    batches.close()
    return time.perf_counter() - begin


def empty() -> None:
    """Removes the shards of the cache; their indexes stay."""
    for file in ShardCache().folder.glob("*.tar*"):
        if file.suffix != ".index":
            file.unlink()


def main() -> None:
    """Measures, prints the medians, and writes them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, metavar="DIR")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=40.0, help="MB/s of each connection")
    parser.add_argument("--compute", type=float, default=0.02, help="seconds of each batch")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=4, help="how often each shard is there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "served")
        folder.mkdir()
        if args.shards is None:
            make(folder)
        found = [] if args.shards is None else sorted(args.shards.glob("*.tar"))
        for number, shard in enumerate(found * args.repeat):
            (folder / f"{number:05d}.tar").symlink_to(shard.absolute())
        shards = sorted(folder.glob("*.tar"))
        sizes = [shard.stat().st_size for shard in shards]
        os.environ["PREPRETRAIN_CACHE"] = place
        os.environ["PREPRETRAIN_CACHE_GB"] = str(max(4 * max(sizes), sum(sizes) / 2) / 1e9)
        Handler.folder, Handler.latency, Handler.rate = folder, args.latency, args.rate * 1e6
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # a worker that has ended reads no more
        serving = multiprocessing.get_context("fork").Process(target=server.serve_forever)
        serving.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/"
            here = Shards(path=str(folder))
            there = Shards(path=[url + shard.name for shard in shards])
            assert here.fingerprint == there.fingerprint
            times: dict[str, list[float]] = {"here": [], "fetched ahead": [], "when needed": []}
            for _ in range(args.rounds):
                times["here"].append(epoch(here, args))
                empty()
                times["fetched ahead"].append(epoch(there, args))
                empty()
                with patch.object(there, "read_ahead", lambda indexes: None):
                    times["when needed"].append(epoch(there, args))
        finally:
            serving.terminate()
            serving.join()
    figures: dict[str, Any] = {
        "command": f"python benchmarks/remote_shards.py --latency {args.latency} --rate {args.rate} "
        f"--compute {args.compute} --batch {args.batch} --window {args.window} --repeat "
        f"{args.repeat} --rounds {args.rounds}",
        "shards": len(sizes),
        "MB": round(sum(sizes) / 1e6, 1),
        "images": len(here),
        "images_a_second": {
            name: round(len(here) / float(np.median(seconds))) for name, seconds in times.items()
        },
        "seconds": {
            name: [round(one, 2) for one in sorted(seconds)] for name, seconds in times.items()
        },
        "share_of_here": {
            name: round(statistics.median(a / b for a, b in zip(times["here"], seconds)), 2)
            for name, seconds in times.items()
        },
    }
    print(json.dumps(figures, indent=1))
    if args.out is not None:
        stated = {"date": str(date.today()), "commit": os.environ.get("COMMIT", "unknown")}
        args.out.write_text(json.dumps(figures | stated, indent=1) + "\n")


if __name__ == "__main__":
    main()
