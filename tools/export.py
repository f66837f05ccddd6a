"""Writes a run's encoder as safetensors under timm's names, with the options that make it again."""

import argparse
import sys
from pathlib import Path

from prepretrain.runs.completion import complete


def main() -> None:
    """Reads the command line and exports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="RUN", help="a run's folder or a weights file")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="default: RUN/export")
    parser.add_argument(
        "--released",
        action="store_true",
        help="a SimMIM run's file under the released files' names, decoder included",
    )
    parser.add_argument(
        "--labels",
        action="store_true",
        help="a hashtag run's head and vocabulary, as runs write at their end, below the folder",
    )
    complete(parser)
    asked = parser.parse_args()
    # here and not above, as importing torch takes seconds, which --help does not need
    from prepretrain.runs.export import export, export_labels, export_released

    write = export_released if asked.released else export_labels if asked.labels else export
    try:
        print(write(asked.source, asked.out or Path(asked.source) / "export"))
    except (ValueError, OSError) as error:
        sys.exit(f"export: {str(error) or repr(error)}")


if __name__ == "__main__":
    main()
