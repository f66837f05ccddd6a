"""Released checkpoints: lists them, fetches them, verifies their files, writes MODEL_ZOO.md."""

import argparse
import json
import sys
from pathlib import Path

from prepretrain.runs.completion import complete
from prepretrain.zoo import catalogue
from prepretrain.zoo import releases as zoo


def main() -> None:
    """Reads the command line and calls what it names."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="all released models, as a table")
    listing.add_argument("--json", action="store_true", help="a list of objects instead")
    fetch = commands.add_parser("fetch", help="downloads one, prints where it lies")
    fetch.add_argument("name", metavar="NAME", help="as in maws/vit_l16")
    verify = commands.add_parser("verify", help="checks a file against what is known of it")
    verify.add_argument("source", metavar="FILE_OR_NAME")
    write = commands.add_parser("write", help="writes MODEL_ZOO.md")
    page = Path(__file__).parents[1] / "MODEL_ZOO.md"  # of a checkout; a wheel holds none
    write.add_argument("--out", type=Path, default=page, required=not page.exists())
    complete(parser)
    asked = parser.parse_args()
    try:
        if asked.command == "list":
            rows = list(zoo.releases().values())
            print(catalogue.as_json(rows) if asked.json else catalogue.text(rows))
        elif asked.command == "fetch":
            print(zoo.fetch(asked.name))
        elif asked.command == "verify":
            print(json.dumps(zoo.verify(asked.source)))
        else:
            asked.out.write_text(catalogue.markdown())
    except (ValueError, OSError) as error:
        sys.exit(f"zoo: {error}")


if __name__ == "__main__":
    main()
