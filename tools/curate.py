"""Curates a split of a card: measures its samples, finds copies, decides what is kept, and shows it.

prepretrain-curate plan web --recipe web --out curated/web
prepretrain-curate run web --recipe web --out curated/web --workers 16
prepretrain-curate run web --recipe configs/curate/web.yaml --out curated/web --slurm cpu
prepretrain-curate report curated/web
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from prepretrain.runs.completion import complete


def main() -> None:
    """Reads the command line, and runs one command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("plan", "say what would be done, and about how long it takes"),
        ("run", "do what is missing, and say what is kept"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("data", metavar="CARD[:SPLIT]", help="of the source shards; train")
        command.add_argument("--recipe", required=True, help="a file, or a name in configs/curate")
        command.add_argument("--out", required=True, type=Path, help="the folder of the tables")
        command.add_argument("--tasks", type=int, help="into how many the shards are divided, once")
        command.add_argument("--workers", type=int, help="tasks at a time (1; elsewhere all)")
        command.add_argument("--slurm", metavar="PARTITION", help="run the tasks as arrays of jobs")
        command.add_argument("--ray", action="store_true", help="run the tasks on a cluster of Ray")
        command.add_argument("--hours", type=float, default=24.0, help="limit of a job of SLURM")
        command.add_argument("--cpus", type=int, default=1, help="of a task, on SLURM and Ray")
        command.add_argument("--memory", type=int, default=2, help="GB a CPU, there")
        command.add_argument("--gpus", type=int, default=0, help="of a task that uses one, there")
        command.add_argument(
            "--sbatch", nargs="+", default=[], metavar="KEY=VALUE", help="as account=x"
        )
        if name == "run":
            command.add_argument(
                "--again", action="store_true", help="make anew what other options made"
            )
    page = commands.add_parser("report", help="show what became of the samples, as a page of HTML")
    page.add_argument("out", type=Path, metavar="OUT", help="the folder of the tables")
    page.add_argument("--page", type=Path, help="the file to write (OUT/report.html)")
    page.add_argument("--pictures", type=int, default=20, help="of each reason (20)")
    complete(parser)
    asked = vars(parser.parse_args())

    command = asked.pop("command")
    try:
        _report(**asked) if command == "report" else _curate(command, asked)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"curate: {error}")


def _report(**asked: Any) -> None:
    from prepretrain.reports.curation_page import report

    print(report(**asked))


def _curate(command: str, asked: dict[str, Any]) -> None:
    from prepretrain.curation import commands as curation
    from prepretrain.curation.engine import Machines

    asked["sbatch"] = tuple(asked["sbatch"])
    machines = Machines(**{field.name: asked.pop(field.name) for field in fields(Machines)})
    data, named = asked.pop("data"), asked.pop("recipe")
    getattr(curation, command)(data, named, machines=machines, **asked)


if __name__ == "__main__":
    main()
