"""Build the indexes of a card's shards on all cores, and say what the shards hold and what img2dataset
counted when it made them.

python datasets/index.py web
python datasets/index.py web --rank 3 --world 16        # on 16 machines, one command each; then once without
"""

import argparse
import sys


def main() -> None:
    """Index, and print what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", help="a card, or card:split")
    parser.add_argument("--rank", type=int, default=0, help="which share of the shards is indexed")
    parser.add_argument("--world", type=int, default=1, help="of how many shares")
    args = parser.parse_args()
    if not 0 <= args.rank < args.world:
        raise ValueError(f"--rank {args.rank}: must be from 0 to --world {args.world} less one.")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
