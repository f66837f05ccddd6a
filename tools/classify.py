"""How likely each of some names is for an image, by a model with a text tower.

python tools/classify.py photo.jpg --names "a cat,a dog" --model runs/wsp_clip
python tools/classify.py *.jpg --names "cat,dog" --template "a photo of a {}." --model runs/wsp_lit
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Reads the command line and prints, for each image, the names, the likeliest first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--names", required=True, help='texts between commas: "a cat,a dog"')
    parser.add_argument("--model", required=True, help="a run's folder, an export or a file")
    parser.add_argument(
        "--template", action="append", help="where {} is the name; may be given several times"
    )
    asked = parser.parse_args()
    # here and not above, as importing torch takes seconds, which --help does not need
    from prepretrain.runs.classify import classify

    names = [name.strip() for name in asked.names.split(",")]
    try:
        found = classify(asked.model, asked.images, names, asked.template or ["{}"])
    except (ValueError, OSError) as error:
        sys.exit(f"classify: {error}")
    for path, row in zip(asked.images, found):
        print(path)
        for name, share in sorted(row.items(), key=lambda pair: -pair[1]):
            print(f"  {100 * share:5.1f} %  {name}")


if __name__ == "__main__":
    main()
