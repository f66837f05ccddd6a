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
    for name, text in (
        ("plan", "check all runs of a study, and say what they cost"),
        ("run", "train and measure what is not done yet"),
        ("status", "how far each run is"),
        ("collect", "write the table of its runs, runs.csv and runs.parquet"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("study", metavar="STUDY.yaml")
        command.add_argument("--out", help="the study's folder (default: runs/<the file's name>)")
        command.add_argument("--nodes", type=int, default=1, help="machines of each run")
        command.add_argument("--procs", type=int, default=1, help="processes on each")
        if name == "run":
            command.add_argument("--jobs", type=int, default=1, help="runs at a time, here")
            command.add_argument("--slurm", metavar="PARTITION", help="submit all to SLURM")
            command.add_argument(
                "--hours", type=float, default=72.0, help="time limit of a SLURM job"
            )
        if name == "status":
            command.add_argument("--watch", type=float, metavar="SECONDS", help="again and again")
    complete(parser)
    asked = vars(parser.parse_args())
    if asked["command"] != "analyse":
        return _study(asked)
    return _analyse(argparse.Namespace(**asked))


def _study(asked: dict) -> None:
    """One of the commands on a study."""
    from prepretrain.scaling import commands
    from prepretrain.training.fit import Stopped

    try:
        getattr(commands, asked.pop("command"))(**asked)
    except Stopped as stopped:
        sys.exit(f"scaling: {stopped}")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"scaling: {error}")


def _analyse(asked: argparse.Namespace) -> None:
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
