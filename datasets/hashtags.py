"""Count a card's hashtags into the vocabulary that the second stage predicts.

python datasets/hashtags.py demo --min-count 5 --out data/demo/hashtags.json
"""

import argparse
import sys
from pathlib import Path

from prepretrain.data import counting, rarest
from prepretrain.data.card import open_data


def main() -> None:
    """Count, write, and show the most frequent tags and how many images are left without one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", help="a card, or card:split")
    parser.add_argument(
        "--min-count", type=int, required=True, help="how many images a tag must be in"
    )
    parser.add_argument("--out", type=Path, required=True, help="the vocabulary to write")
    parser.add_argument("--top", type=int, default=20, help="how many tags to show")
    args = parser.parse_args()
    source = open_data(args.card)
    if "hashtags" not in source.fields:
        raise ValueError(
            f"{args.card}: has no hashtags. It has: {', '.join(source.fields)}. Tar shards have them in "
            f"json members, Parquet files in a column: see the options of both in datasets/README.md. Of "
            f"a folder a class, make_shards.py folder path=… --class-tags packs the names as hashtags."
        )
    vocabulary, tag_of_images, counts = counting.count(source, args.min_count, args.out.parent)
    counts.log()
    vocabulary.save(args.out)
    rarest.write(args.out, vocabulary, tag_of_images)
    for tag, count in list(zip(vocabulary.tags, vocabulary.counts))[: args.top]:
        print(f"{count:10d}  {tag}")
    without = int((tag_of_images < 0).sum())
    print(
        f"{args.out}: {len(vocabulary)} tags in at least {args.min_count} of {len(source)} "
        f"images; {without} images have none of them"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
