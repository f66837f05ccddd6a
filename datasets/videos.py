"""Open every video of a card, count what they hold, name what is bad, and draw some of them to look at.

python datasets/videos.py ucf101:val --out sheet.png
python datasets/videos.py k400 --decode      # every frame is decoded
"""

import argparse
import sys
from pathlib import Path

from prepretrain.data.card import open_data
from prepretrain.data.census import bad, videos


def main() -> None:
    """Count, print, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", help="a card, or card:split")
    parser.add_argument("--decode", action="store_true", help="decode every frame")
    parser.add_argument("--out", type=Path, help="a picture to write, of some videos' frames")
    parser.add_argument("--videos", type=int, default=8, help="how many are drawn")
    args = parser.parse_args()
    source = open_data(args.card)
    census = videos.count(source, decode=args.decode)
    print(f"{len(source):,} videos, {len(census.bad):,} of them bad")
    for line in census.lines():
        print(line)
    for line in bad.lines(census.bad):
        print(line)
    if args.out is not None:
        chosen = bad.some_usable(source, census.bad, args.videos)
        videos.draw(source, chosen).save(args.out)
        print(f"{args.out}: {len(chosen)} videos")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
