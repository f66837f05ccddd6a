"""Read every map of a card with label maps or depth maps, count what they hold, name what is bad, and draw
some of them to look at.

python datasets/maps.py ade20k:val --out sheet.png
python datasets/maps.py nyuv2
"""

import argparse
import sys
from pathlib import Path

from prepretrain.data.card import load_card
from prepretrain.data.census import bad, maps


def main() -> None:
    """Count, print, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", help="a card, or card:split")
    parser.add_argument("--out", type=Path, help="a picture to write, of images with their maps")
    parser.add_argument("--images", type=int, default=8, help="how many are drawn")
    args = parser.parse_args()
    name, _, split = args.card.partition(":")
    card = load_card(name)
    source = card.open(split or "train")
    found = maps.count(source)
    print(f"{len(source):,} images; of {len(found.bad):,} the map is bad")
    for line in found.lines(source.classes):
        print(line)
    for line in bad.lines(found.bad):
        print(line)
    if args.out is not None:
        chosen = bad.some_usable(source, found.bad, args.images)
        maps.draw(card, source, chosen).save(args.out)
        print(f"{args.out}: {len(chosen)} images with their maps")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
