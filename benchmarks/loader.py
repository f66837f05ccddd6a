"""Images per second of one core, from shards of JPEGs to a batch: ours beside the usual pipeline.

    python benchmarks/loader.py                               photo-like textures, 500 x 375
    python benchmarks/loader.py --images FOLDER                 real photos

The usual one is webdataset, PIL, torchvision's RandomResizedCrop (bicubic), flip, ToTensor and
Normalize, to float32; ours ends in uint8, as the rest happens on the device. Both with one
thread, in CPU time, in turns; the ratio is that of the medians. Prints one JSON line.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torchvision import transforms as v1

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prepretrain import plugin
from prepretrain.data.loader import Stream
from prepretrain.data.transforms import decode, flip, random_resized_crop

SIZE, BATCH, SCALE = 224, 64, (0.2, 1.0)


def textures(count: int) -> Iterator[bytes]:
    """JPEGs of 500 x 375 with a photo's spectrum and about ImageNet's 4.4 bits a pixel."""
    rng = np.random.default_rng(0)
    fy, fx = np.fft.fftfreq(375)[:, None], np.fft.fftfreq(500)[None]
    falloff = 1 / np.maximum(np.hypot(fy, fx), 1 / 500)
    for _ in range(count):
        spectrum = np.fft.fft2(rng.normal(size=(3, 375, 500))) * falloff
        planes = np.fft.ifft2(spectrum).real
        planes = planes[:1] + 0.3 * planes[1:].sum(0) + 0.4 * planes
        pixels = 128 + 55 * planes / planes.std()
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(
            file, "JPEG", quality=91
        )
        yield file.getvalue()


def write(images: list[bytes], path: Path) -> None:
    """One shard."""
    with webdataset.TarWriter(str(path)) as writer:
        for number, data in enumerate(images):
            writer.write({"__key__": f"{number:09d}", "jpg": data})


def ours(path: Path) -> Iterator[torch.Tensor]:
    """Batches as the first stage sees them."""

    def transform(sample: dict) -> dict:
        random, image = sample["random"], decode(sample["image"])
        image = random_resized_crop(image, SIZE, random("crop"), scale=SCALE)
        return {"image": flip(image, random("flip"))}

    source = plugin.build("sources", "shards", path=str(path))
    for batch in Stream(source, transform, batch_size=BATCH, seed=0).batches():
        yield batch["image"]


def usual(path: Path) -> Iterator[torch.Tensor]:
    """Batches as the reference implementations make them."""
    transform = v1.Compose(
        [
            v1.RandomResizedCrop(SIZE, scale=SCALE, interpolation=v1.InterpolationMode.BICUBIC),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    data = (
        webdataset.WebDataset(str(path), shardshuffle=False)
        .repeat()
        .map(lambda sample: transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")))
    )
    batch = []
    for image in data:
        batch.append(image)
        if len(batch) == BATCH:
            yield torch.stack(batch)
            batch = []


def rate(batches: Iterator[torch.Tensor], count: int) -> float:
    """Images per second of CPU time over `count` batches."""
    start = time.process_time()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.process_time() - start)


def measure(path: Path, rounds: int, count: int) -> tuple[list[float], list[float]]:
    """The rates of both, taken in the order A B B A."""
    pipelines, rates = (ours(path), usual(path)), ([], [])
    for batches in pipelines:
        next(batches)
    for turn in range(rounds):
        for number in ((0, 1), (1, 0))[turn % 2]:
            rates[number].append(rate(pipelines[number], count))
    return rates


def main() -> None:
    """Make or read the images, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="a folder of JPEGs to use instead")
    parser.add_argument("--count", type=int, default=128, help="textures")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2, help=f"of {BATCH} images, a round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(args.images.rglob("*.jpg")) if args.images else []
    images = [file.read_bytes() for file in files] if args.images else list(textures(args.count))
    if not images:
        sys.exit(f"error: {args.images}: holds no .jpg file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00000.tar"
        write(images, path)
        mine, theirs = measure(path, args.rounds, args.batches)
    print(
        json.dumps(
            {
                "figure": "loader, images per second of a core",
                "images": len(images),
                "bytes_per_image": round(statistics.mean(map(len, images))),
                "ours": round(statistics.median(mine), 1),
                "usual": round(statistics.median(theirs), 1),
                "ratio": round(statistics.median(mine) / statistics.median(theirs), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
