"""Does a small ViT of ours learn to find the objects of the images that it trains on? On some of COCO's.

    python benchmarks/detection_coco.py --data FOLDER --init runs/raccoon/runs/mae_0 --work runs/coco --out
    benchmarks/results/detection_coco.json

FOLDER holds coco/ (images/, annotations/instances_train.json, instances_val.json, in COCO's format: the
record is of 123 images and 88). Boxes and masks by Mask R-CNN on the encoder of a run of stage one, here that
of detection_raccoon.py; mirrored, but neither resized at random nor cut, so that the training images are learned by
heart. It shows that all parts of training and evaluation fit together, and nothing else: of 80 classes a
hundred images teach no detector that finds them elsewhere. A run that was cut off continues. Beside the
figures lies a picture of what is found in some of the training images. No number of it is from a paper.
"""

import argparse
import json
import time
from pathlib import Path

from cifar10_two_stage import record, tool
from detection_raccoon import PLAIN
from PIL import Image

CARD = """description: some of COCO's images
licence: CC BY 4.0 (annotations); the photos' own, from Flickr
train: {source: coco, path: "%(folder)s/images", listing: "%(folder)s/annotations/instances_train.json"}
val: {source: coco, path: "%(folder)s/images", listing: "%(folder)s/annotations/instances_%(val)s.json"}
"""
READ = {"train": "few_train", "val": "few"}  # the cards whose val is each split
DETECTION = [
    "model.image_size=160",
    "model.window=16",
    "model.head={name: mask_rcnn, classes: 80, channels: 32, hidden: 256, anchors: [8, 16, 32, 64, 128], "
    "candidates: [300, 150], proposals: [150, 150], sampled_anchors: 128, sampled_regions: 64}",
    "objective.scale=[1.0,1.0]",
    "data.train=few",
    "optim.lr=48e-3",
    "batch_size=4",
    f"evaluators=[{', '.join(f'{{name: detection, data: {card}, every: 100%}}' for card in READ.values())}]",
    *PLAIN,
    "optim.warmup=5%",
    "optim.clip=1.0",
    "shard.precision=bf16",
    "checkpoint.every=5%",
]


def shrink(sheet: Path, picture: Path) -> None:
    """Saves a sheet as a picture that a page shows."""
    with Image.open(sheet) as whole:
        small = whole.convert("RGB")
    small.thumbnail((500, 1500))
    small.save(picture, quality=70)


def main() -> None:
    """Trains, evaluates, prints and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--init", type=Path, required=True, help="a run of stage one")
    parser.add_argument("--work", type=Path, default=Path("runs/coco"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=6000, help="of 4 images")
    given = parser.parse_args()
    start, work, data = time.time(), given.work.resolve(), given.data.resolve()
    (work / "datasets").mkdir(parents=True, exist_ok=True)
    for split, card in READ.items():
        content = CARD % {"folder": data / "coco", "val": split}
        (work / "datasets" / f"{card}.yaml").write_text(content)
    asked = [*DETECTION, f"length={given.steps}it"]
    init = ["--init", str(given.init.resolve())]
    stage = ["--stage", "finetune/coco_vitdet_b", "--out", "runs/detector"]
    tool(work, "tools/launch.py", *stage, *init, *asked)
    results = json.loads((work / "runs/detector/results.json").read_text())
    found = {split: results[f"detection/{card}"] for split, card in READ.items()}
    print(json.dumps(found))
    if given.out:
        sheet = work / "runs/detector/predictions" / f"detection-{READ['train']}-val" / "sheet.png"
        shrink(sheet, given.out.with_suffix(".jpg"))
    command = (
        f"detection_coco.py --data FOLDER --init runs/raccoon/runs/mae_0 --steps {given.steps}"
    )
    record(given.out, command, start, seed=0, found=found)


if __name__ == "__main__":
    main()
