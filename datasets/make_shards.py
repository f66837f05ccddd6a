"""Pack a source into tar shards in img2dataset's layout: KEY.jpg, KEY.txt, KEY.json, KEY.cls.

python datasets/make_shards.py synthetic images=20000 seed=0 --out data/demo/train
python datasets/make_shards.py folder path=photos/train --out data/photos/train
python datasets/make_shards.py folder path=photos/train --class-tags --out data/photos/train
python datasets/make_shards.py parquet path=cifar10/train.parquet --out data/cifar10/train
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

os.environ["WDS_SECURE"] = "1"  # before webdataset is imported: no pickles, no shell commands

import webdataset
import yaml

from prepretrain import plugin
from prepretrain.data.card import data_folder
from prepretrain.data.sources.base import Source
from prepretrain.data.transforms import BadImage

STARTS = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif"}
STARTS |= {b"MM\0*": "tif", b"P6": "ppm", b"P5": "pgm"}


def extension(image: bytes) -> str | None:
    """What a file of these bytes is called; None for what the source shards does not read."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return next((name for start, name in STARTS.items() if image.startswith(start)), None)


class ClassTags(Source):
    """A source whose images have the names of their classes as hashtags."""

    def __init__(self, source: Source):
        if "label" not in source.fields or source.classes is None:
            raise ValueError("--class-tags: the source has no classes with names, as folders have.")
        self.source, self.classes, self.groups = source, source.classes, source.groups
        self.fields = (*source.fields, "hashtags")

    def __getitem__(self, index: int) -> dict:
        sample = self.source[index]
        return sample | {"hashtags": [self.classes[sample["label"]]]}


def located(path: str) -> str:
    """A source's path: from here or, as in a card, from the folder of data."""
    there = data_folder() / path
    return path if os.path.lexists(path) or not there.exists() else str(there)


def members(number: int, sample: dict) -> dict:
    """The files of one image; its own key goes to the json, as it may hold dots and folders. Raises
    BadImage for what is no image."""
    kind = extension(sample["image"])
    if kind is None:
        raise BadImage("no image of a kind that shards hold", key=sample["key"])
    details = {"key": sample["key"]}
    if "hashtags" in sample:
        details["hashtags"] = sample["hashtags"]
    if "captions" in sample:
        details["captions"] = sample["captions"]
    files = {"__key__": f"{number:09d}", kind: sample["image"], "json": details}
    if "text" in sample:
        files["txt"] = sample["text"]
    if "label" in sample:
        files["cls"] = sample["label"]
    return files


def pack(source: Source, out: Path, per_shard: int) -> None:
    """Write all shards under a temporary name, index them, then give the folder its name."""
    if out.exists():
        raise ValueError(f"{out}: exists already. Choose another --out, or remove it.")
    draft = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    draft.mkdir(parents=True)
    bad: list[BadImage] = []
    try:
        for shard, first in enumerate(range(0, len(source), per_shard)):
            numbers = range(first, min(first + per_shard, len(source)))
            bad += write(source, numbers, draft / f"{shard:05d}.tar")
        if bad:
            raise ValueError(
                f"{len(bad):,} of {len(source):,} images cannot be packed: "
                f"{'; '.join(map(str, bad[:5]))}{'; …' if bad[5:] else ''}. Convert or remove them first."
            )
        plugin.build("sources", "shards", path=str(draft))  # builds the indices
        os.rename(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write(source: Source, numbers: range, path: Path) -> list[BadImage]:
    """One shard; its bytes depend on the images only, as no time is written into it. Returns what was
    wrong with those that it lacks."""
    bad = []
    # webdataset's ShardWriter opens files through what WDS_SECURE switches off; TarWriter does not.
    with open(path, "wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
        for number in numbers:
            try:
                writer.write(members(number, source[number]))
            except BadImage as error:
                bad.append(error)
    return bad


def main() -> None:
    """Parse, pack, and say what there is now."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder, parquet, synthetic, or a module of your own")
    parser.add_argument("options", nargs="*", help="its options, as key=value")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--per-shard", type=int, default=1000, help="images in a shard")
    parser.add_argument(
        "--class-tags", action="store_true", help="give each image its folder's name as a hashtag"
    )
    args = parser.parse_args()
    options = {}
    for option in args.options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"{option}: is not key=value.")
        options[key] = yaml.safe_load(value)
    if isinstance(options.get("path"), str):
        options["path"] = located(options["path"])
    source = plugin.build("sources", args.source, **options)
    pack(ClassTags(source) if args.class_tags else source, args.out, args.per_shard)
    made = plugin.build("sources", "shards", path=str(args.out))
    print(
        f"{args.out}: {len(made)} images in {len(made.groups)} shards, with "
        f"{', '.join(made.fields)}; fingerprint {made.fingerprint}"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
