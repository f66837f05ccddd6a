"""What more data, a larger model or longer training would buy, from a table of runs."""

import argparse
import json
import sys

from prepretrain.runs.completion import complete


def main() -> None:
    """Reads the command line; prints the verdicts, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    analyse = commands.add_parser("analyse", help="correlations, laws, a graded forecast, verdicts")
    analyse.add_argument("--csv", required=True, metavar="FILE", help="a row a run")
    analyse.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=THEIRS",
        help="the file's names for model, data, iterations, val_loss, params, images, cost",
    )
    analyse.add_argument(
        "--metric", default="top1", metavar="COLUMN", help="of which more is better"
    )
    analyse.add_argument(
        "--sizes",
        nargs="+",
        default=[],
        metavar="DATA=IMAGES",
        help='images by the name of the data: "ImageNet-1K=1281167"; "ImageNet-1K 10%%" follows',
    )
    analyse.add_argument(
        "--budget",
        type=float,
        metavar="COST",
        help="of the next run: GPU-days if there is a column cost, else costs of the best run",
    )
    analyse.add_argument(
        "--factor",
        type=float,
        default=4.0,
        help="nothing is said of runs this much larger than the largest (4)",
    )
    analyse.add_argument("--out", metavar="JSON", help="to write the object to as well")
    complete(parser)
    asked = parser.parse_args()
    from prepretrain.scaling import verdict

    try:
        found = verdict.analyse(
            asked.csv,
            asked.columns,
            asked.metric,
            asked.sizes,
            budget=asked.budget,
            factor=asked.factor,
            out=asked.out,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"scaling: {error}")
    print(*found["verdicts"], sep="\n\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
