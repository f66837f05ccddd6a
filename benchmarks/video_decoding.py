"""Frames of videos beside other decoders': the same pixels, index by index, and clips a second of a core.

    python benchmarks/video_decoding.py FOLDER --out benchmarks/results/video_decoding.json

The others are PyAV that decodes from the start and keeps what is asked for, torchcodec and decord, as far as
they are installed; all with one thread, in CPU time (which other programs do not lengthen), in turns. A clip
is opened, asked how many frames it has, and read: 16 frames with a stride of 4 from a random place
("strided", as for Kinetics), or one of each of 16 parts ("segments", as for Something-Something).
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prepretrain.data.io.names import is_video
from prepretrain.data.random import Random
from prepretrain.data.video.clips import Segments, Strided
from prepretrain.data.video.handles import Video

SAMPLINGS = {"strided": Strided(16, 4), "segments": Segments(16)}
Frames = np.ndarray  # uint8 [T, H, W, 3]


def ours(path: Path) -> Callable[[Sequence[int]], Frames]:
    """Ours: the frames of numbers."""
    video = Video(path)
    assert video.frames
    return lambda numbers: video.read(numbers).permute(0, 2, 3, 1).numpy()


def sequential(path: Path) -> Callable[[Sequence[int]], Frames]:
    """PyAV, from the first frame to the last that is asked for."""

    def read(numbers: Sequence[int]) -> Frames:
        wanted, kept = set(numbers), {}
        for number, frame in enumerate(decoded(path)):
            if number in wanted:
                kept[number] = rgb(frame)
            if number == max(wanted):
                break
        return np.stack([kept[number] for number in numbers])

    return read


def decoded(path: Path) -> Iterator[av.VideoFrame]:
    """All frames, one after the other."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        yield from container.decode(stream)


def rgb(frame: av.VideoFrame) -> Frames:
    """The pixels of a frame."""
    return frame.reformat(format="rgb24", interpolation="BICUBIC", threads=1).to_ndarray()


def torchcodec(path: Path) -> Callable[[Sequence[int]], Frames]:
    """torchcodec, as it is by default: it scans the packets first."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1)
    return lambda numbers: decoder.get_frames_at(list(numbers)).data.permute(0, 2, 3, 1).numpy()


def decord(path: Path) -> Callable[[Sequence[int]], Frames]:
    """decord."""
    from decord import VideoReader

    reader = VideoReader(str(path), num_threads=1)
    return lambda numbers: reader.get_batch(list(numbers)).asnumpy()


DECODERS = {"ours": ours, "pyav_sequential": sequential, "torchcodec": torchcodec, "decord": decord}


def usable() -> dict[str, Callable]:
    """The decoders that can be imported."""
    kept = {}
    for name, decode in DECODERS.items():
        try:
            if name == "torchcodec":
                from torchcodec.decoders import VideoDecoder  # noqa: F401
            elif name == "decord":
                import decord  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        kept[name] = decode
    return kept


def compared(path: Path, decoders: dict[str, Callable]) -> dict:
    """Of each decoder, how many of all frames are those of PyAV's sequential decoding, asked for by their
    numbers, eight at a time; and its last error, if it raised any."""
    row, frames = {"frames": 0} | dict.fromkeys(decoders, 0), decoded(path)
    readers = {name: decode(path) for name, decode in decoders.items()}
    while expected := [rgb(frame) for frame in islice(frames, 8)]:
        numbers = range(row["frames"], row["frames"] + len(expected))
        for name, read in readers.items():
            try:
                row[name] += int((read(numbers) == np.stack(expected)).all((1, 2, 3)).sum())
            except Exception as error:  # other libraries raise what they like
                row[f"{name}_error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        row["frames"] += len(expected)
    return row


def seconds(path: Path, sampling: str, decoders: dict[str, Callable], turns: int) -> dict:
    """The median CPU seconds of a clip with each decoder."""
    video, times = Video(path), {name: [] for name in decoders}
    for turn in range(turns):
        numbers = SAMPLINGS[sampling].train(video, Random(0, 0, turn)("clip"))
        for name in list(decoders)[:: 1 if turn % 2 else -1]:
            before = time.process_time()
            try:
                decoders[name](path)(numbers)
            except Exception:  # counted by `compared`
                continue
            times[name].append(time.process_time() - before)
    return {name: statistics.median(each) for name, each in times.items() if each}


def main() -> None:
    """Compares, measures, and writes one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder of videos")
    parser.add_argument("--turns", type=int, default=9, help="clips of each video")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    paths, decoders = sorted(p for p in args.folder.iterdir() if is_video(p.name)), usable()
    by_number = {name: decode for name, decode in decoders.items() if decode is not sequential}
    result = {
        "command": "python benchmarks/video_decoding.py FOLDER",
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip(),
        "versions": {"ffmpeg of av": av.ffmpeg_version_info}
        | {name: version(name) for name in ("av", "torchcodec", "decord") if find_spec(name)},
        "equal_frames": {path.name: compared(path, by_number) for path in paths},
        "cpu_ms_a_clip": {},
        "clips_a_second": {},
    }  # fmt: skip
    for sampling in SAMPLINGS:
        rows = {path.name: seconds(path, sampling, decoders, args.turns) for path in paths}
        result["cpu_ms_a_clip"][sampling] = {
            name: {key: round(1000 * value, 1) for key, value in row.items()}
            for name, row in rows.items()
        }
        whole = [row for row in rows.values() if row.keys() == decoders.keys()]
        result["clips_a_second"][sampling] = {
            "videos": len(whole),
            **{name: round(len(whole) / sum(row[name] for row in whole), 2) for name in decoders},
        }
        print(json.dumps({sampling: result["clips_a_second"][sampling]}), flush=True)
    text = json.dumps(result, indent=1)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
