"""What more data, a larger model or longer training would buy: runs of a study, and what they say."""

import argparse
import json
import sys

from prepretrain.runs.completion import complete


def main() -> None:
    """Reads the command line; prints the verdicts, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    analyse = commands.add_parser("analyse", help="correlations, laws, a graded forecast, verdicts")
    analyse.add_argument("--out", metavar="JSON", help="to write the object to as well")
    report = commands.add_parser("report", help="all of it as a page, and its figures as PNGs")
    report.add_argument("--out", required=True, metavar="FOLDER")
    report.add_argument(
        "--two-stage",
        metavar="FILE",
        help="stage two with and without pre-pretraining: images_before, iterations, flops, the metric",
    )
    report.add_argument(
        "--pictures",
        nargs="+",
        default=[],
        metavar="CARD",
        help="images for a run that overfits, and for another, to rebuild",
    )
    rank = commands.add_parser(
        "rank", help="candidates by validation loss, and how far to trust it"
    )
    rank.add_argument("runs", nargs="+", metavar="RUN")
    rank.add_argument("--data", required=True, metavar="CARD", help='held-out images: "demo:val"')
    rank.add_argument("--batch-size", type=int, default=64)
    rank.add_argument("--workers", type=int, default=0)
    for command in (analyse, report, rank):
        _table_options(command)
    for command in (analyse, report):
        _forecast_options(command)
    _study_commands(commands)
    complete(parser)
    asked = parser.parse_args()
    on_tables = {"analyse": _analyse, "report": _report, "rank": _rank}
    if asked.command not in on_tables:
        return _study(vars(asked))
    try:
        said, found = on_tables[asked.command](asked)
    except (ValueError, OSError) as error:
        sys.exit(f"scaling: {error}")
    print(*said, sep="\n\n")
    print(json.dumps(found))


def _table_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--csv", required=not command.prog.endswith("rank"), metavar="FILE", help="a row a run"
    )
    command.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=THEIRS",
        help="the file's names for model, data, iterations, val_loss, params, images, cost, …",
    )
    command.add_argument(
        "--metric",
        nargs="+" if command.prog.endswith("report") else 1,
        default=["top1"],
        metavar="COLUMN",
        help="of which more is better",
    )
    command.add_argument(
        "--sizes",
        nargs="+",
        default=[],
        metavar="DATA=IMAGES",
        help='images by the name of the data: "ImageNet-1K=1281167"; "ImageNet-1K 10%%" follows',
    )


def _forecast_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--budget",
        type=float,
        metavar="COST",
        help="of the next run: GPU-days if there is a column cost, else costs of the best run",
    )
    command.add_argument(
        "--factor",
        type=float,
        default=4.0,
        help="nothing is said of runs this much larger than the largest (4)",
    )


def _study_commands(commands: argparse._SubParsersAction) -> None:
    """Adds plan, run, status and collect."""
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


def _analyse(asked: argparse.Namespace) -> tuple[list[str], dict]:
    from prepretrain.scaling import verdict

    found = verdict.analyse(
        asked.csv,
        asked.columns,
        asked.metric[0],
        asked.sizes,
        budget=asked.budget,
        factor=asked.factor,
        out=asked.out,
    )
    return found["verdicts"], found


def _report(asked: argparse.Namespace) -> tuple[list[str], dict]:
    from prepretrain.reports import study_page

    found = study_page.report(
        asked.csv,
        asked.out,
        asked.columns,
        asked.metric,
        asked.sizes,
        budget=asked.budget,
        factor=asked.factor,
        stages=asked.two_stage,
        cards=asked.pictures,
    )
    verdicts = [text for answer in found["metrics"].values() for text in answer["verdicts"]]
    return list(dict.fromkeys(verdicts)), found


def _rank(asked: argparse.Namespace) -> tuple[list[str], dict]:
    from prepretrain.scaling import proxy, verdict

    table, metric = None, asked.metric[0]
    if asked.csv is not None:
        table, _ = verdict.open_table(asked.csv, asked.columns, [metric], asked.sizes)
    found = proxy.rank(
        asked.runs,
        asked.data,
        table,
        metric,
        batch_size=asked.batch_size,
        workers=asked.workers,
    )
    return found["verdicts"], found


if __name__ == "__main__":
    main()
