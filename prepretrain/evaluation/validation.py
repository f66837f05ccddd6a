"""The validation loss of an objective, the central measure of arXiv 2206.04664: on a fixed set, with
fixed crops and masks."""

import logging
from typing import Any

import torch

from prepretrain.data.loader import evaluation_batches, to_device
from prepretrain.distributed import group as distributed
from prepretrain.evaluation.features import frozen
from prepretrain.objectives.base import Objective

logger = logging.getLogger(__name__)

SEED = 0  # of crops and masks: the same for every run, whatever the run's own


def check(objective: Objective, source: Any, name: str) -> None:
    """Raises ValueError where an objective has no loss per image, or the data do not serve it."""
    if type(objective).losses is Objective.losses:
        kind = type(objective).__module__.rpartition(".")[2]
        raise ValueError(
            f"validation.data: objective '{kind}' has no validation loss. mae, simmim and feature_mae "
            f"have; measure others with evaluators."
        )
    lacking = [f for f in objective.fields if f not in source.fields]
    if lacking:
        raise ValueError(f"validation.data={name}: has no {', '.join(lacking)}.")


def measure(
    objective: Objective, source: Any, *, batch_size: int, workers: int = 0
) -> tuple[float, int]:
    """(mean loss, images it was measured on), the same on every rank, for any number of them.

    Without dropout and gradients; each image once, cropped at its centre, its mask drawn by its
    place in the source. Images that cannot be read are left out and counted. Raises ValueError if
    none can.
    """
    total = torch.zeros(2, dtype=torch.float64)
    batches = evaluation_batches(
        source,
        objective.transform(False),
        batch_size=batch_size,
        workers=workers,
        seed=SEED,
        leave_out=True,
    )
    with frozen(objective):
        for batch in batches:
            losses = objective.losses(to_device(batch)).double().cpu()
            total += torch.stack([losses[batch["mask"]].sum(), batch["mask"].sum().double()])
    loss, images = distributed.all_sum(total).tolist()
    if images < len(source):
        logger.warning(
            "validation: %d of %d images could not be read, so the loss is of %d",
            len(source) - images,
            len(source),
            images,
        )
    return loss / images, int(images)
