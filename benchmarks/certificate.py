"""What the images that leaked into the training data do to a result: on CIFAR-10, whose test images have
near-copies among its training images, and on captions, with near-copies planted by us.

    python benchmarks/certificate.py --data FOLDER --work runs/certificate --out
    benchmarks/results/certificate.json

FOLDER holds cifar10/ (train.parquet and val.parquet) and flickr8k_1k/ (shards). CIFAR-10: a small ViT
learns the classes' names as hashtags, and is measured by evaluators of three kinds, by the lists of stage
leaks at its defaults and with fine: 60, which finds more and is right, too (docs/copies.md). Captions: CLIP
on four fifths of the photos, "clean", and "leaky", on these and copies, smaller and encoded anew, of every
fourth of the others, with their captions; retrieval is measured on the others. With --detector, the run of
detection_coco.py (FOLDER then holds coco/, too): its training images, encoded anew, are what it was trained
on, and average precision is measured on these and the others together, and on the others. Everything runs in this process, in one thread. What is
done is not done again.
"""

import argparse
import io
import json
import os
import tarfile
import time
from pathlib import Path

import torch
from cifar10_two_stage import WSP, record, tool
from flickr_clip import STAGE_TWO
from PIL import Image

import prepretrain
from prepretrain import launch
from prepretrain.curation import commands
from prepretrain.curation.engine import Machines
from prepretrain.data.card import load_card
from prepretrain.evaluation import leaks

CIFAR = """description: CIFAR-10
licence: as the photos
classes: [airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck]
train: {source: parquet, path: "%(data)s/cifar10/train.parquet"}
val: {source: parquet, path: "%(data)s/cifar10/val.parquet"}
"""
SHARDS = "description: {0}\nlicence: as the photos\ntrain: {{source: shards, path: {0}}}\n"
OBJECTS = "description: some of COCO\nlicence: as the photos\nval: {{source: coco, path: {}/images, listing: {}}}\n"
LISTS = {"defaults": "{}", "fine 60": "{fine: 60}"}
RECIPE = "meta:\nlook:\nleaks: {against: ['%s'], %s}\n"
EVALUATORS = {
    "k-NN": ("knn", {"share": 1.0}),
    "linear probe": ("linear", {"share": 1.0, "protocol": "ridge"}),
    "low-shot": ("lowshot", {"shots": [10]}),
}
MODEL = (
    "model={encoder: vit_test8, image_size: 64, positions: learned, joint: {width: 64, pool: class}, "
    "text: {name: open_clip, architecture: ViT-B-32, width: 64, layers: 2, heads: 2, context: 32}}"
)
HELD_OUT, PLANTED = 5, 4  # every so many


def curated(work: Path, data: str, against: str, name: str, options: str) -> str:
    """A curation's folder, with the list of one set's leaks."""
    out = work / "curated" / name
    recipe = work / f"{name}.yaml"
    recipe.write_text(RECIPE % (against, options.strip("{}")))
    commands.run(data, str(recipe), out, None, Machines())
    return str(out)


def cifar(work: Path, data: Path, steps: int) -> dict[str, dict]:
    """The results of each evaluator by each list."""
    (work / "datasets/cifar.yaml").write_text(CIFAR % {"data": data})
    (work / "datasets/tagged.yaml").write_text(SHARDS.format("tagged"))
    if not (work / "data/tagged").exists():
        packed = ("cifar10.tagged", f"path={data}/cifar10/train.parquet")
        tool(work, "datasets/make_shards.py", *packed, "--out", "data/tagged")
        counted = ("--min-count", "50", "--out", "data/hashtags.json")
        tool(work, "datasets/hashtags.py", "tagged", *counted)
    if not Path("runs/tags/export").exists():
        keys = [k for k in WSP if not k.startswith("model=")]
        keys += ["model={encoder: vit_test8, positions: learned}", f"length={steps}it"]
        launch("wsp", [*keys, "evaluators=[]"], out="runs/tags")
    found: dict[str, dict] = {}
    for name, options in LISTS.items():
        folder = curated(work, "tagged", "cifar:val", f"tagged_{name.replace(' ', '_')}", options)
        for title, (evaluator, asked) in EVALUATORS.items():
            results = prepretrain.evaluate(
                prepretrain.load("runs/tags"),
                evaluator,
                data="cifar",
                pool="class",
                leaks=folder,
                folder="evaluated",
                **asked,
            )
            found.setdefault(title, {})[name] = results
            print(json.dumps({"set": "cifar10", "list": name, title: results}), flush=True)
    return found


def captions(work: Path, data: Path, steps: int) -> dict[str, dict]:
    """What stage leaks finds of the planted copies, and the retrieval's results."""
    (work / "datasets/flickr.yaml").write_text(
        SHARDS.format(data / "flickr8k_1k") + "val: {source: shards, path: others}\n"
    )
    for name in ("clean", "leaky"):
        (work / f"datasets/{name}.yaml").write_text(SHARDS.format(name))
    whole = load_card("flickr").open("train")
    others = range(0, len(whole), HELD_OUT)
    planted = list(others)[::PLANTED]
    if not (work / "data/leaky").exists():
        kept = [(f"{n:04d}", whole[n]) for n in range(len(whole)) if n % HELD_OUT]
        copies = [
            (f"copy_{n:04d}", {**whole[n], "image": copied(whole[n]["image"])}) for n in planted
        ]
        write(work / "data/others", [(f"{n:04d}", whole[n]) for n in others])
        write(work / "data/clean", kept)
        write(work / "data/leaky", [*kept, *copies])
    folder = curated(work, "leaky", "flickr:val", "leaky", "{}")
    numbers = leaks.content_of(Path(folder))["sets"]["flickr:val"]["leaked"]
    hits = len({list(others)[number] for number in numbers} & set(planted))
    found: dict[str, dict] = {
        "copies": {"planted": len(planted), "found": hits, "false": len(numbers) - hits}
    }
    for name in ("clean", "leaky"):
        if not Path(f"runs/{name}/export").exists():
            keys = [
                *STAGE_TWO,
                MODEL,
                "objective={name: clip, crop_scale: [0.5, 1.0]}",
                "evaluators=[]",
            ]
            launch(
                "wsp_clip", [*keys, f"data.train={name}", f"length={steps}it"], out=f"runs/{name}"
            )
        model = prepretrain.load(f"runs/{name}")
        found[name] = prepretrain.evaluate(model, "retrieval", data="flickr", leaks=folder)
    return found


def objects(work: Path, data: Path, detector: str) -> dict[str, dict]:
    """Average precision on training and other images together, with the certificate, and on the others."""
    folder = data / "coco"
    parts = [
        json.loads((folder / f"annotations/instances_{n}.json").read_text())
        for n in ("train", "val")
    ]
    both = {key: parts[0][key] + parts[1][key] for key in ("images", "annotations")}
    (work / "both.json").write_text(json.dumps({**both, "categories": parts[0]["categories"]}))
    (work / "datasets/both.yaml").write_text(OBJECTS.format(folder, work / "both.json"))
    listing = folder / "annotations/instances_val.json"
    (work / "datasets/others.yaml").write_text(OBJECTS.format(folder, listing))
    (work / "datasets/seen.yaml").write_text(SHARDS.format("seen"))
    if not (work / "data/seen").exists():
        files = [folder / "images" / image["file_name"] for image in parts[0]["images"]]
        write(
            work / "data/seen",
            [(f.stem, {"image": copied(f.read_bytes()), "captions": []}) for f in files],
        )
    leaked, model = curated(work, "seen", "both:val", "seen", "{}"), prepretrain.load(detector)
    measure = lambda card, **how: prepretrain.evaluate(
        model, "detection", data=card, pictures=0, **how
    )
    return {"both": measure("both", leaks=leaked), "others": measure("others")}


def copied(data: bytes) -> bytes:
    """A smaller photo, encoded anew."""
    image, file = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    smaller = image.resize([3 * side // 4 for side in image.size], Image.Resampling.BICUBIC)
    smaller.save(file, "JPEG", quality=70)
    return file.getvalue()


def write(folder: Path, samples: list[tuple[str, dict]]) -> None:
    """A shard of photos with captions."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for key, sample in samples:
            texts = json.dumps({"captions": sample["captions"]}).encode()
            for ending, content in (("jpg", sample["image"]), ("json", texts)):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def main() -> None:
    """Trains, evaluates, prints and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/certificate"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--detector", help="a run of detection_coco.py")
    parser.add_argument("--cifar-steps", type=int, default=1500, help="of 128 images")
    parser.add_argument("--clip-steps", type=int, default=400, help="of 128 images")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start, work, data = time.time(), given.work.resolve(), given.data.resolve()
    out = given.out and given.out.resolve()
    (work / "datasets").mkdir(parents=True, exist_ok=True)
    detector = given.detector and str(Path(given.detector).resolve())
    os.environ["PREPRETRAIN_DATA"] = "data"
    os.chdir(work)
    found: dict[str, dict] = {}
    if detector is not None:
        found["coco"] = objects(work, data, detector)
        print(json.dumps(found["coco"]), flush=True)
    found["flickr8k"] = captions(work, data, given.clip_steps)
    print(json.dumps(found["flickr8k"]), flush=True)
    found["cifar10"] = cifar(work, data, given.cifar_steps)
    steps = f"--cifar-steps {given.cifar_steps} --clip-steps {given.clip_steps}"
    steps += " --detector RUN" if detector else ""
    record(out, f"certificate.py --data FOLDER {steps}", start, seed=0, **found)


if __name__ == "__main__":
    main()
