"""Does drawing images by the inverse square root of their tags' frequencies help? Real tags, long-tailed.

    python benchmarks/tag_resampling.py --data FOLDER --work runs/tags --out
    benchmarks/results/tag_resampling.json

FOLDER holds fashion_titles: shards of shop photos with tags, in img2dataset's layout. A fixed fifth is held
out. For each seed: a small ViT learns the tags from scratch, with every photo equally often, and by
data.resample's inverse_sqrt with an epoch of the same length; both see equally many images. Measured on
the photos that are held out, for frequent and for rare tags apart: the share of a tag's photos on which it
is among the seven highest scores (each photo has seven tags), its cross-entropy there, and how well it
ranks the photos, as average precision, which does not depend on how frequent it is taken to be; all
averaged over tags. One thread a run. Prints one JSON line a model and seed, and the table. A model that is done is not
trained again.
"""

import argparse
import concurrent.futures
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from cifar10_two_stage import over_seeds, record, tool

CARD = """description: fashion_titles, of which a fifth is held out
licence: as the photos; not part of this repository
train: {{source: captions.held_out, path: "{path}", part: train}}
val: {{source: captions.held_out, path: "{path}", part: val}}
"""
RUN = [
    "model={encoder: vit_test8, image_size: 32, positions: learned}",
    "objective={name: hashtag, vocabulary: tags.json, tags: null, head: mlp, crop_scale: [0.5, 1.0]}",
    "data.train=fashion_titles",
    "data.window=0",
    "data.workers=0",
    "optim.lr=4e-3",
    "optim.weight_decay=0.1",
    "optim.schedule=cosine",
    "optim.warmup=10%",
    "batch_size=128",
    "shard.precision=fp32",
    "checkpoint.every=100%",
]
LAWS = {
    "uniform": [],
    "inverse_sqrt": ["data.resample={by: hashtags, law: inverse_sqrt, epoch: 1.0}"],
}
GROUPS = {  # by the share of the training photos that have a tag
    "head (10 % or more)": (0.1, 1.0),
    "middle": (0.01, 0.1),
    "tail (under 1 %)": (0.0, 0.01),
}
SCORES = 7  # tags of a photo


def prepare(work: Path, data: Path) -> None:
    """The card, and the vocabulary of the tags."""
    (work / "datasets").mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    card = CARD.format(path=data / "fashion_titles")
    (work / "datasets" / "fashion_titles.yaml").write_text(card)
    if not (work / "data" / "tags.json").exists():
        count = ["fashion_titles", "--min-count", "10", "--out", "data/tags.json"]
        tool(work, "datasets/hashtags.py", *count)


def train(work: Path, law: str, seed: int, length: str) -> None:
    """One model, unless it is there already."""
    run = f"runs/{law}_{seed}"
    if not (work / run / "export").exists():
        options = [*RUN, *LAWS[law], f"length={length}", f"seed={seed}"]
        tool(work, "tools/launch.py", "--stage", "wsp", "--out", run, *options)


def measured(work: Path, run: str) -> dict[str, float]:
    """Recall and cross-entropy on what is held out, by group of tags, in percent and nats."""
    from captions.held_out import HeldOut

    from prepretrain.data.loader import evaluation_batches
    from prepretrain.runs.export import load_objective

    os.environ["PREPRETRAIN_DATA"] = str(work / "data")
    path = (work / "datasets" / "fashion_titles.yaml").read_text().split('path: "')[1].split('"')[0]
    source, objective = HeldOut(path=path, part="val"), load_objective(work / "runs" / run)
    tags = len(objective.vocabulary)
    found, loss, count = np.zeros(tags), np.zeros(tags), np.zeros(tags)
    scores, truth = [], []
    batches = evaluation_batches(source, objective.transform(train=False), batch_size=256)
    with torch.inference_mode():
        for batch in batches:
            logits = objective.head(objective.model(batch["image"])).float()
            best, entropy = logits.topk(SCORES).indices, -logits.log_softmax(1)
            for row in batch["mask"].nonzero().flatten().tolist():
                own = batch["tags"][row][batch["tags"][row] >= 0]
                scores.append(-entropy[row].numpy())
                truth.append(np.isin(np.arange(tags), own.numpy()))
                found[own] += torch.isin(own, best[row]).numpy()
                loss[own] += entropy[row, own].numpy()
                count[own] += 1
    precision = average_precision(np.stack(scores), np.stack(truth))
    share = np.array(objective.vocabulary.counts) / objective.vocabulary.images
    figures = {}
    for name, (low, high) in GROUPS.items():
        group = (share >= low) & (share < high) & (count > 0)
        figures[f"{name}: tags"] = int(group.sum())
        figures[f"{name}: recall"] = float(100 * np.mean(found[group] / count[group]))
        figures[f"{name}: loss"] = float(np.mean(loss[group] / count[group]))
        figures[f"{name}: average precision"] = float(100 * np.mean(precision[group]))
        chance = np.stack(truth)[:, group].mean()
        figures[f"{name}: average precision by chance"] = float(100 * chance)
    figures["all mentions: recall"] = float(100 * found.sum() / count.sum())
    return figures


def average_precision(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """That of each tag, of scores and truth [photos, tags]: the mean, over the photos that have it, of the
    share of such among those that score no less; NaN for a tag that none has."""
    order = np.argsort(-scores, axis=0, kind="stable")
    right = np.take_along_axis(truth, order, 0)
    precision = right.cumsum(0) / np.arange(1, len(right) + 1)[:, None]
    return (precision * right).sum(0) / np.where(right.any(0), right.sum(0), np.nan)


def main() -> None:
    """Trains, evaluates, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/tags"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--length", default="38400img", help="of each run")
    given = parser.parse_args()
    os.environ["PREPRETRAIN_PLUGINS"] = "captions"  # the card names its source
    start, work, table = time.time(), given.work.resolve(), {}
    prepare(work, given.data.resolve())
    runs = [(law, seed) for law in LAWS for seed in range(given.seeds)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: train(work, *run, given.length), runs))
    for law, seed in runs:
        row = measured(work, f"{law}_{seed}")
        print(json.dumps({"model": law, "seed": seed, **row}), flush=True)
        table.setdefault(law, []).append(row)
    command = f"tag_resampling.py --data FOLDER --length {given.length} --seeds {given.seeds}"
    record(given.out, command, start, table={law: over_seeds(rows) for law, rows in table.items()})


if __name__ == "__main__":
    main()
