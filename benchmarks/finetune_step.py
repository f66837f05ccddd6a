"""A fine-tuning step beside a bare loop around timm's own ViT, on one CPU thread: ViT-S/16, 1,000
classes, layer decay .65, float32.

    python benchmarks/finetune_step.py

Both take the same weights, and the script stops where their losses differ. Steps are forward, loss,
backward and AdamW; ours is that of `fit()`, from uint8 images, with the norm of the gradient. timm's is
from normalised images, with its layer decay and the AdamW that its `create_optimizer` takes by default.
"""

import argparse
from collections.abc import Callable
from functools import partial

import timm
import torch
from mae_step import training_step
from timing import interleaved, report
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.testing import assert_close

from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.models.model import Model
from prepretrain.objectives.classify import Classify
from prepretrain.training import optim

LAYERS = {"lr": 1e-5, "weight_decay": 0.05, "layer_decay": 0.65}


def timm_step(model: nn.Module, image: Tensor, label: Tensor) -> Callable[[], None]:
    """A bare training step."""
    optimizer = create_optimizer_v2(model, "adamw", **LAYERS)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(image), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def main() -> None:
    """Parity, then one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init()
    theirs = timm.create_model("vit_small_patch16_224", num_classes=1000).train()
    with torch.device("meta"):
        head = {"classes": 1000, "pool": "class"}
        objective = Classify(Model(encoder="vit_s16", positions="learned", head=head))
    shard.shard(objective, precision="fp32")
    shard.initialise(objective, 0)
    state = theirs.state_dict()
    ours = objective.model
    ours.encoder.load_state_dict({k: state[k] for k in ours.encoder.state_dict()})
    ours.head.linear.load_state_dict(theirs.head.state_dict())
    batch = {
        "image": torch.randint(0, 256, (asked.batch, 3, 224, 224), dtype=torch.uint8),
        "label": torch.arange(asked.batch),
    }
    image = ours.normalise(batch["image"])
    expected = nn.functional.cross_entropy(theirs(image), batch["label"])
    assert_close(objective.train()(batch)["loss"], expected)
    optimizer = optim.build(objective, **LAYERS)
    steps = {
        "timm": timm_step(theirs, image, batch["label"]),
        "ours": partial(training_step, objective, optimizer, batch),
    }
    times = interleaved(steps, asked.steps)
    setting = {"batch": asked.batch, "pixels": 224, "encoder": "vit_s16", "threads": 1}
    report("finetune_step_fp32", times["timm"], times["ours"], **setting, clock="cpu")
    distributed.shutdown()


if __name__ == "__main__":
    main()
