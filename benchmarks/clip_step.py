"""A CLIP training step beside open_clip's, on one CPU thread: ViT-S/16 with the text tower of its
ViT-S-16, fp32.

    python benchmarks/clip_step.py

First, parity: the text towers hold the same weights, and their features of the captions agree, or
the script stops. Then steps as the two training loops make them: forward, loss, backward, AdamW.
Ours is that of `fit()`, from uint8 images, with texts as long as the batch's longest; open_clip's is
that of its `train_one_epoch`, from normalised images, with texts of 77 tokens.
"""

import argparse
from collections.abc import Callable
from functools import partial

import open_clip
import torch
from mae_step import training_step
from timing import interleaved, report
from torch import Tensor, nn
from torch.testing import assert_close

from prepretrain.data.loader import Stream
from prepretrain.data.sources.synthetic import Synthetic
from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.models.model import Model
from prepretrain.objectives.clip import CLIP
from prepretrain.training import optim

RATE = 1e-5


def open_clip_step(model: nn.Module, image: Tensor, tokens: Tensor) -> Callable[[], None]:
    """A step of open_clip's training script, with its AdamW and its two groups."""
    loss_of = open_clip.ClipLoss()
    named = [*model.named_parameters()]
    plain = [p for name, p in named if p.ndim < 2 or "bn" in name or "ln" in name]
    others = [p for name, p in named if not (p.ndim < 2 or "bn" in name or "ln" in name)]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss = loss_of(*model(image, tokens))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        loss.item()

    return step


def main() -> None:
    """Parity, then one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="vit_s16", help="ours")
    parser.add_argument("--architecture", default="ViT-S-16", help="open_clip's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--whole", action="store_true", help="texts of 77 tokens in both")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init()
    theirs = open_clip.create_model(asked.architecture).train()
    text = {"name": "open_clip", "architecture": asked.architecture}
    size = theirs.visual.image_size[0]
    with torch.device("meta"):
        joint = {"width": theirs.text_projection.shape[1]}
        model = Model(encoder=asked.encoder, image_size=size, text=text, joint=joint)
        objective = CLIP(model)
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    ours = objective.model.text.tower
    ours.load_state_dict({name: theirs.state_dict()[name] for name in ours.state_dict()})
    scenes = Synthetic(images=asked.batch, size=size)
    made = objective.transform(train=True)
    batch = next(Stream(scenes, made, batch_size=asked.batch, seed=0).batches())
    batch["tokens"], short = (
        nn.functional.pad(batch["tokens"], (0, 77 - batch["tokens"].shape[1])),
        batch["tokens"],
    )
    with torch.no_grad():
        expected = theirs.encode_text(batch["tokens"])
        assert_close(objective.model.text(short) @ theirs.text_projection, expected)
    image = objective.model.normalise(batch["image"])
    other = open_clip_step(theirs, image, batch["tokens"])
    if not asked.whole:
        batch["tokens"] = short
    optimizer = optim.build(objective.train(), lr=RATE, weight_decay=0.2)
    steps = {"open_clip": other, "ours": partial(training_step, objective, optimizer, batch)}
    times = interleaved(steps, asked.steps)
    report(
        "clip_step_fp32",
        times["open_clip"],
        times["ours"],
        batch=asked.batch,
        pixels=size,
        encoder=asked.encoder,
        tokens=batch["tokens"].shape[1],
        threads=1,
        clock="cpu",
    )
    distributed.shutdown()


if __name__ == "__main__":
    main()
