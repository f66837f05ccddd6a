"""Writes a run's encoder as safetensors under timm's names, with the options that make it again."""

import argparse
from pathlib import Path

from prepretrain import run


def main() -> None:
    """Reads the command line and exports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="RUN", help="a run's folder or a weights file")
    parser.add_argument("--out", required=True, metavar="FOLDER", type=Path)
    asked = parser.parse_args()
    print(run.export(asked.source, asked.out))


if __name__ == "__main__":
    main()
