"""Count the images, objects and classes of a card with objects, and draw some of them to look at.

python datasets/objects.py coco:val --out sheet.png
python datasets/objects.py objects --decode      # every image is decoded, and what is bad is named
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from prepretrain.data.card import open_data
from prepretrain.data.census import bad, objects
from prepretrain.data.subset import evenly


def main() -> None:
    """Count, print, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", help="a card, or card:split")
    parser.add_argument("--decode", action="store_true", help="decode every image, too")
    parser.add_argument("--out", type=Path, help="a picture to write, of images with objects")
    parser.add_argument("--images", type=int, default=12, help="how many are drawn")
    parser.add_argument("--top", type=int, default=20, help="how many classes to show")
    args = parser.parse_args()
    source = open_data(args.card)
    found = objects.count(source, decode=args.decode)
    show(source, found, args.top)
    for line in bad.lines(found.bad):
        print(line)
    if args.out is not None:
        usable = np.flatnonzero(found.of_image)
        chosen = usable[evenly(len(usable), args.images)].tolist()
        objects.ground_truth_sheet(source, chosen).save(args.out)
        print(f"{args.out}: {len(chosen)} images with all that is annotated in them")


def show(source, found: objects.Census, top: int) -> None:
    """Prints the counts, and the classes with the most objects."""
    some = int((found.objects > 0).sum())
    print(f"{len(source):,} images, {int((found.of_image == 0).sum()):,} without an object")
    print(f"{int(found.objects.sum()):,} objects, of {some:,} of {len(found.objects):,} classes")
    print(f"{found.crowds:,} crowds; {found.without_area:,} without area; ", end="")
    print(", ".join(f"{count:,} {name}" for name, count in found.sizes.items()))
    print(f"of an image: {np.median(found.of_image):g} in the median, {found.of_image.max()} most")
    print(f"masks: {'yes' if 'masks' in source.fields else 'no'}; ", end="")
    print(f"{len(found.bad):,} images are bad")
    for label in np.argsort(-found.objects, kind="stable")[:top].tolist():
        print(f"{found.objects[label]:9,} in {found.images_of[label]:7,}  {source.classes[label]}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
