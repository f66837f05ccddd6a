"""An objective for tests, outside the package: MAE that fails where it is told to."""

import os
import signal
import time
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prepretrain.distributed import group as distributed
from prepretrain.models.model import Model
from prepretrain.objectives.mae import MAE


class Poisoned(MAE):
    """Fails for batches that hold a position of the data from `first` to `last`, on one process or
    on all: `nan` in the loss, `inner` in a part of the encoder, `large` gradients, `hang`, `stop`
    (the process stands still) or `kill`."""

    def __init__(
        self,
        model: Model,
        *,
        decoder_depth: int = 1,
        decoder_width: int = 32,
        decoder_heads: int = 2,
        first: int = -1,
        last: int = -1,
        rank: int | None = None,
        harm: Literal["nan", "inner", "large", "hang", "stop", "kill"] = "nan",
    ):
        super().__init__(
            model,
            decoder_depth=decoder_depth,
            decoder_width=decoder_width,
            decoder_heads=decoder_heads,
        )
        self.first, self.last, self.rank, self.harm = first, last, rank, harm
        self.model.encoder.blocks[1].mlp.spoilt = Spoilt()
        self.model.encoder.blocks[1].mlp.register_forward_hook(
            lambda part, given, made: part.spoilt(made)
        )

    def losses(self, batch: dict[str, Any]) -> Tensor:
        """See MAE."""
        positions = batch.get("position", [])  # none where FLOPs are counted
        hit = [self.first <= p <= self.last for p in positions]
        here = any(hit) and self.rank in (None, distributed.rank())
        self.model.encoder.blocks[1].mlp.spoilt.on = here and self.harm == "inner"
        losses = super().losses(batch)
        if here and self.harm == "hang":
            time.sleep(600)
        if here and self.harm in ("stop", "kill"):
            os.kill(os.getpid(), signal.SIGSTOP if self.harm == "stop" else signal.SIGKILL)
        if here and self.harm in ("nan", "large"):
            factor = float("nan") if self.harm == "nan" else 1e4
            losses = torch.where(torch.tensor(hit), losses * factor, losses)
        return losses


class Spoilt(nn.Module):
    """Passes on what it is given, or something too large."""

    on = False

    def forward(self, given: Tensor) -> Tensor:
        """[…] to the same."""
        return given * float("inf") if self.on else given
