"""What do features find that hashes do not? Planted near-copies, by the features of models trained here.

    python benchmarks/feature_copies.py --data FOLDER --work runs/copies --out
    benchmarks/results/feature_copies.json

FOLDER holds cifar10, fashion_titles and flickr8k_1k. A small ViT learns by MAE and then from hashtags, once
on CIFAR-10's training photos and once on the shop's. Of each set some pictures are changed and stand as an
evaluation set beside all pictures of the set. Both kinds of features, and the hashes, look for them: recall
is the share of changed pictures found with their own original; false pairs are those with another picture
that is not the original's file. Then stages `leaks` and `semantic` run at the thresholds that were
chosen. Prints one JSON line a set and model. A model that is done is not trained again.
"""

import argparse
import json
import time
from pathlib import Path

from cifar10_two_stage import MAE, WSP, record, tool
from cifar10_two_stage import prepare as prepare_photos

SHOP = """description: shop photos with tags
licence: as the photos; not part of this repository
train: {{source: shards, path: "{path}", hashtags: json.tags}}
"""
TRAINED = {  # the card, its vocabulary, epochs of MAE and of hashtags
    "photos": ("tagged", "hashtags.json", 2, 1),
    "shop": ("shop", "shop.json", 12, 10),
}


def prepare(work: Path, data: Path) -> None:
    """The cards and vocabularies that the models are trained with."""
    prepare_photos(work, data / "cifar10")
    (work / "datasets/shop.yaml").write_text(SHOP.format(path=data / "fashion_titles"))
    if not (work / "data/shop.json").exists():
        tool(work, "datasets/hashtags.py", "shop", "--min-count", "10", "--out", "data/shop.json")


def train(work: Path, name: str) -> None:
    """Both stages of one model, unless they are there already."""
    card, vocabulary, *epochs = TRAINED[name]
    keys = [key for key in MAE if not key.startswith("data.train=")]
    tags = [key.replace("hashtags.json", vocabulary) for key in WSP if "data.train=" not in key]
    start = ["--init", f"runs/{name}_mae"]
    for stage, options, length, init in (("mae", keys, epochs[0], []), ("wsp", tags, epochs[1], start)):
        out = f"runs/{name}_{stage}"
        if not (work / out / "export").exists():
            own = [*options, f"data.train={card}", f"length={length}ep"]
            tool(work, "tools/launch.py", "--stage", stage, "--out", out, *init, *own)


def main() -> None:
    """Trains, evaluates, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/copies"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    start, work, data = time.time(), given.work.resolve(), given.data.resolve()
    prepare(work, data)
    for name in TRAINED:
        train(work, name)


if __name__ == "__main__":
    main()
