"""Build the indexes of a card's shards on all cores, and say how many samples they hold and what
img2dataset counted when it made them.

python datasets/index.py web
python datasets/index.py web --rank 3 --world 16     # one of 16 machines, which share a folder or a cache
"""

import argparse
import sys

from prepretrain.data.card import load_card
from prepretrain.data.shards import img2dataset
from prepretrain.data.shards.indexing import read_heads
from prepretrain.data.shards.on_cores import cores


def main() -> None:
    """Index, and print what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", help="a card, or card:split")
    parser.add_argument("--rank", type=int, default=0, help="which share of the shards is indexed")
    parser.add_argument("--world", type=int, default=1, help="how many shares there are")
    parser.add_argument("--processes", type=int, help="how many work here (default: one a core)")
    args = parser.parse_args()
    if not 0 <= args.rank < args.world:
        raise ValueError(f"--rank {args.rank}: must lie between 0 and {args.world - 1} (--world).")
    name, _, split = args.card.partition(":")
    shards = load_card(name).shards(split or "train")[args.rank :: args.world]
    heads = read_heads(shards, args.processes or cores())
    samples = [head["samples"] for head in heads]
    size = sum(head["bytes"] for head in heads)
    print(f"{len(shards):,} shards, {sum(samples):,} samples, {size / 1e9:,.3f} GB")
    downloads, wrong = img2dataset.downloads(shards, samples)
    for what, count in downloads.items():
        print(f"{count:14,d}  {what}")
    for one in wrong:
        print(f"not so: {one}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
