"""A MAE training step beside facebookresearch/mae's, on one CPU thread: ViT-B/16, 224 px,
normalised pixels.

    git clone https://github.com/facebookresearch/mae /tmp/mae
    python benchmarks/mae_step.py --reference /tmp/mae

First, parity: with the same weights, images and noise, the losses and all gradients in fp32 agree,
or the script stops. Then steps as the two training loops make them: forward, backward, gradient
norm, AdamW. Ours are those of `fit()`, from uint8 images; the reference's are those of its engine,
from normalised images.

The reference is patched in memory where it does not run any more (np.float; timm's Block without
qk_scale), with the attention of the timm release that it pins. Nothing of it is part of this
project.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from unittest import mock

import numpy as np
import timm.models.vision_transformer as vision_transformer
import torch
from timing import interleaved, report
from torch import Tensor, nn

from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.models.model import Model
from prepretrain.objectives.mae import MAE
from prepretrain.training import optim
from prepretrain.training.outcome import Gradients, Outcome

RENAMED = {
    "decoder_embed": "embed",
    "decoder_blocks": "blocks",
    "decoder_norm": "norm",
    "decoder_pred": "pred",
    "mask_token": "mask_token",
    "decoder_pos_embed": "pos_embed",
}


class PinnedBlock(vision_transformer.Block):
    """timm's Block as timm 0.3.2 has it: it takes qk_scale, and attends by plain matrix
    products."""

    def __init__(self, *arguments: object, qk_scale: None = None, **options: object):
        super().__init__(*arguments, **options)
        self.attn.fused_attn = False


def reference_model(folder: str, size: str = "base") -> nn.Module:
    """The reference's ViT-B/16 (or "large") with its own initial values."""
    sys.path.insert(0, folder)
    np.float = float  # removed from numpy since
    with mock.patch.object(vision_transformer, "Block", PinnedBlock):
        import models_mae
    return getattr(models_mae, f"mae_vit_{size}_patch16")(norm_pix_loss=True)


def our_objective(encoder: str, state: dict[str, Tensor], precision: str) -> MAE:
    """Our objective, sharded as a run shards it, with the reference's weights."""
    with torch.device("meta"):
        objective = MAE(Model(encoder=encoder, positions="fixed"))
    shard.shard(objective, precision=precision)
    full = {our_name(name): value for name, value in state.items()}
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            distributed.put(parameter, full.pop(name))
    if full:
        raise RuntimeError(f"the reference's {', '.join(full)} have no counterpart")
    return objective.train()


def our_name(name: str) -> str:
    """The reference's parameter name as one of ours."""
    first, dot, rest = name.partition(".")
    return f"decoder.{RENAMED[first]}{dot}{rest}" if first in RENAMED else f"model.encoder.{name}"


def check_parity(reference: nn.Module, encoder: str, batch: dict[str, Tensor]) -> dict[str, float]:
    """The largest relative differences of the loss and of a gradient, in fp32; raises past 1e-4."""
    objective = our_objective(encoder, reference.state_dict(), "fp32")
    images = objective.model.normalise(batch["image"])
    with mock.patch("torch.rand", lambda *shape, **options: batch["noise"]):
        expected = reference(images)[0]
    expected.backward()
    loss = objective(batch)["loss"]
    loss.backward()
    ours = {
        name: distributed.whole(p.grad)
        for name, p in objective.named_parameters()
        if p.grad is not None
    }
    theirs = {
        our_name(name): p.grad for name, p in reference.named_parameters() if p.grad is not None
    }
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"gradients differ in {sorted(ours.keys() ^ theirs.keys())}")
    worst = max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in ours)
    difference = {
        "loss": abs(loss.item() / expected.item() - 1),
        "gradient": worst,
        "gradients": len(ours),
    }
    if max(difference["loss"], worst) > 1e-4:
        raise RuntimeError(f"no parity: {difference}")
    reference.zero_grad()
    return difference


def reference_step(
    state: dict[str, Tensor], folder: str, images: Tensor, bf16: bool
) -> Callable[[], None]:
    """A step of the reference's engine, with its default optimizer."""
    model = reference_model(folder).train()
    model.load_state_dict(state)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for _, p in named if p.ndim == 1]
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(images, mask_ratio=0.75)[0]
        loss.item()
        loss.backward()
        torch.norm(torch.stack([torch.norm(p.grad.detach(), 2.0) for _, p in named]), 2.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(
    encoder: str, state: dict[str, Tensor], batch: dict[str, Tensor], precision: str
) -> Callable[[], None]:
    """A step as `fit()` makes it."""
    objective = our_objective(encoder, state, precision)
    optimizer = optim.build(objective, lr=1e-5, weight_decay=0.05)
    return partial(training_step, objective, optimizer, batch)


def training_step(
    objective: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> None:
    """The body of `fit()`'s loop, without data, log and files."""
    figures = objective(batch)
    figures["loss"].backward()
    gradients = Gradients([p for group in optimizer.param_groups for p in group["params"]])
    figures = {name: value.detach() for name, value in figures.items()}
    outcome = Outcome(figures, gradients.norms(), stop=False, bad=0)
    optim.step(optimizer, outcome.left_out())
    outcome.send()
    assert outcome.read().finite
    optimizer.zero_grad()


def main() -> None:
    """Parity, then one JSON line a figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reference", required=True, metavar="DIR", help="a checkout of facebookresearch/mae"
    )
    parser.add_argument("--encoder", default="vit_b16", help="the reference's, by our name")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--only", choices=["bf16", "fp32", "shipped"], help="one of the three figures"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init()
    torch.manual_seed(0)
    model = Model(encoder=asked.encoder, positions="fixed")
    height, width = model.encoder.image_size
    batch = {
        "image": torch.randint(0, 256, (asked.batch, 3, height, width), dtype=torch.uint8),
        "noise": torch.rand(asked.batch, model.encoder.cells),
    }
    reference = reference_model(asked.reference)
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    parity = check_parity(reference, asked.encoder, batch)
    images = model.normalise(batch["image"])
    del reference, model
    makers = {"bf16": (True, "bf16"), "fp32": (False, "fp32"), "shipped": (False, "bf16")}
    for figure, (reference_bf16, precision) in makers.items():
        if asked.only in (None, figure):
            times = interleaved(
                {
                    "reference": reference_step(state, asked.reference, images, reference_bf16),
                    "ours": our_step(asked.encoder, state, batch, precision),
                },
                asked.steps,
            )
            report(
                f"mae_step_{figure}",
                times["reference"],
                times["ours"],
                batch=asked.batch,
                pixels=width,
                encoder=asked.encoder,
                reference="bf16" if reference_bf16 else "fp32",
                precision=precision,
                threads=1,
                clock="cpu",
                parity=parity,
            )
    distributed.shutdown()


if __name__ == "__main__":
    main()
