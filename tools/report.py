"""Curves, tables, reconstructions and features of runs, as files to look at."""

import argparse
import sys

from prepretrain.runs.completion import complete


def main() -> None:
    """Reads the command line and calls the report it names."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    lines = commands.add_parser(
        "curves", help="loss over images seen, a panel an objective, as a PNG"
    )
    lines.add_argument("runs", nargs="+", metavar="RUN")
    lines.add_argument("--keys", nargs="+", default=["loss"], help="what to draw of metrics.jsonl")
    lines.add_argument("--out", required=True, metavar="PNG")
    table = commands.add_parser("table", help="the headline metric of each evaluation, in Markdown")
    table.add_argument("runs", nargs="+", metavar="RUN")
    table.add_argument("--out", metavar="FILE", help="to write it to as well: .md or .csv")
    table.add_argument(
        "--published",
        nargs="+",
        default=[],
        metavar="GROUP",
        help="published rows below: maws, mae, simmim, …",
    )
    table.add_argument("--chance", action="store_true", help="with the row of a guesser")
    pictures = commands.add_parser(
        "reconstructions", help="original, masked, and what each run makes of it, as a PNG"
    )
    pictures.add_argument("runs", nargs="+", metavar="RUN")
    pictures.add_argument(
        "--data", required=True, metavar="CARD", help='a card, or a split: "demo:val"'
    )
    pictures.add_argument("--images", type=int, default=8)
    pictures.add_argument("--out", required=True, metavar="PNG")
    colours = commands.add_parser(
        "features", help="what each run makes of images' patches, as colours, as a PNG"
    )
    colours.add_argument("runs", nargs="+", metavar="RUN")
    colours.add_argument(
        "--data", required=True, metavar="CARD", help='a card, or a split: "demo:val"'
    )
    colours.add_argument("--images", type=int, default=8)
    colours.add_argument("--size", type=int, help="pixels of a side; by default the first run's")
    colours.add_argument("--out", required=True, metavar="PNG")
    for command in (lines, table, pictures, colours):
        command.add_argument("--names", nargs="+", default=[], help="of the runs, to show")
    complete(parser)
    asked = parser.parse_args()
    # here and not above, as importing torch takes seconds, which --help does not need
    from prepretrain.reports import curves, features, reconstructions, tables

    try:
        if asked.command == "curves":
            curves.draw(asked.runs, asked.out, asked.keys, asked.names)
        elif asked.command == "table":
            tables.compare(
                asked.runs, asked.out, asked.names, asked.published, guesser=asked.chance
            )
        elif asked.command == "features":
            features.colour(
                asked.runs, asked.data, asked.images, asked.out, asked.names, asked.size
            )
        else:
            reconstructions.reconstruct(
                asked.runs, asked.data, asked.images, asked.out, asked.names
            )
    except (ValueError, OSError) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    main()
