"""Write lists of the images of a card's most frequent classes, which the source `listed` reads: a path
and a label a line. Random subsets need no list: data.subset=10%.

python datasets/subset.py imagenet22k --classes 5000 --val 250000 --out data/imagenet5k
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from prepretrain.data.card import open_data
from prepretrain.data.sources.base import Files

Rows = list[tuple[str, int]]  # the path of an image, from the source's folder, and its label


def most_frequent(source: Files, classes: int, val: int, seed: int) -> dict[str, Rows]:
    """{"train", "val"}: all images of the `classes` classes with the most, split at random.

    Of two classes of the same size the one with the lower label comes first. The labels count
    anew, in the old ones' order. ("Delving Deeper into Data Scaling in Masked Image Modeling",
    section 3.5; its own list and seed are not published.)
    """
    labels = np.array([source.label(i) for i in range(len(source))])
    present, counts = np.unique(labels, return_counts=True)
    if not 1 <= classes <= len(present):
        raise ValueError(f"--classes {classes}: there are {len(present)} classes.")
    chosen = np.sort(present[np.argsort(-counts, kind="stable")[:classes]])
    images = np.flatnonzero(np.isin(labels, chosen))
    if not 1 <= val < len(images):
        raise ValueError(f"--val {val}: these classes hold {len(images)} images, to be split.")
    mixed = np.random.default_rng(seed).permutation(images)
    parts = {"train": np.sort(mixed[val:]), "val": np.sort(mixed[:val])}
    anew = {int(label): number for number, label in enumerate(chosen)}
    return {
        name: [(source.key(int(i)), anew[int(labels[i])]) for i in part]
        for name, part in parts.items()
    }


def write(lists: dict[str, Rows], out: Path) -> None:
    """<out>/<name>.txt for each list; all of them, or none."""
    if out.exists():
        raise ValueError(f"{out}: exists already. Choose another --out, or remove it.")
    draft = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        for name, rows in lists.items():
            text = "".join(f"{path} {label}\n" for path, label in rows)
            (draft / f"{name}.txt").write_text(text, errors="surrogateescape")
        os.rename(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def main() -> None:
    """Parse, choose, write, and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", help="a card, or card:split, of images in files with labels")
    parser.add_argument("--classes", type=int, required=True, help="how many classes")
    parser.add_argument("--val", type=int, required=True, help="how many images val gets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    args = parser.parse_args()
    source = open_data(args.card)
    if not isinstance(source, Files) or "label" not in source.fields:
        raise ValueError(f"{args.card}: a subset is chosen from image files with labels.")
    lists = most_frequent(source, args.classes, args.val, args.seed)
    write(lists, args.out)
    for name, rows in lists.items():
        classes = len({label for _, label in rows})
        print(f"{args.out / name}.txt: {len(rows):,} of {len(source):,} images, {classes} classes")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
