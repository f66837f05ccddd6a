"""A hashtag training step, the tags as padded ids, beside the same step with a dense multi-hot
target.

    python benchmarks/hashtag_step.py

ViT-B/16, 28,672 tags, 1 to 5 an image, one CPU thread. Everything but the target and the loss is
the same, the optimizer too. The dense form gets its target as float32 from the loader, as is usual,
so building it costs nothing here, and computes -sum(target x log_softmax).
"""

import argparse
from functools import partial

import torch
from mae_step import training_step
from timing import interleaved, report
from torch import Tensor

from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.models.model import Model
from prepretrain.objectives.hashtag import Hashtag
from prepretrain.training import optim


class DenseHashtag(Hashtag):
    """The same objective on a target [B, C] whose rows sum to 1."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.head(self.model(batch["image"]))
        loss = -(batch["target"] * torch.log_softmax(logits.float(), 1)).sum(1).mean()
        best = logits.detach().argmax(1, keepdim=True)
        return {"loss": loss, "accuracy": (batch["target"].gather(1, best) > 0).float().mean()}


def training(
    kind: type[Hashtag], encoder: str, tags: int, precision: str
) -> tuple[Hashtag, torch.optim.Optimizer]:
    """An objective with its optimizer, as a run makes them."""
    with torch.device("meta"):
        objective = kind(Model(encoder=encoder), vocabulary="unread.json", tags=tags)
    shard.shard(objective, precision=precision)
    shard.initialise(objective, 0)
    return objective.train(), optim.build(objective, lr=1e-5, weight_decay=0.1)


def make_batch(images: int, size: tuple[int, int], tags: int) -> dict[str, Tensor]:
    """Random images, with 1 to 5 different tags each in both forms."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(images, tags, generator=generator).argsort(1)[:, :5]
    count = torch.randint(1, 6, (images, 1), generator=generator)
    known = torch.arange(5) < count
    target = torch.zeros(images, tags).scatter_(1, ids, (known / count).float())
    image = torch.randint(0, 256, (images, 3, *size), dtype=torch.uint8, generator=generator)
    return {"image": image, "tags": ids.where(known, -1), "target": target}


def main() -> None:
    """One JSON line, once the two forms' losses agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="vit_b16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tags", type=int, default=28672)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init()
    sparse, dense = (
        training(kind, asked.encoder, asked.tags, asked.precision)
        for kind in (Hashtag, DenseHashtag)
    )
    size = sparse[0].model.encoder.image_size
    batch = make_batch(asked.batch, size, asked.tags)
    torch.testing.assert_close(sparse[0](batch)["loss"], dense[0](batch)["loss"])
    times = interleaved(
        {
            "dense": partial(training_step, *dense, batch),
            "sparse": partial(training_step, *sparse, batch),
        },
        asked.steps,
    )
    report(
        f"hashtag_step_{asked.precision}",
        times["dense"],
        times["sparse"],
        batch=asked.batch,
        tags=asked.tags,
        pixels=size[1],
        encoder=asked.encoder,
        threads=1,
        clock="cpu",
    )
    distributed.shutdown()


if __name__ == "__main__":
    main()
