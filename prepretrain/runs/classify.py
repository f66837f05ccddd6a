"""Classifies image files by the names of classes, with a model's text tower."""

from pathlib import Path

import torch

from prepretrain.evaluation.evaluators import zeroshot
from prepretrain.models.load import load


def classify(
    source: str, images: list[Path], names: list[str], templates: list[str]
) -> list[dict[str, float]]:
    """{name: probability} of each image file, by a model with a text tower.

    Raises ValueError naming an image that cannot be read, or names that are empty or not different.
    """
    model, rows = load(source), []
    for path in images:
        try:
            rows.append(model.preprocess(path, share=1.0))
        except OSError as error:
            raise ValueError(f"{path}: {error}") from error
    found = zeroshot.probabilities(model, torch.stack(rows), names, templates)
    return [dict(zip(names, row.tolist())) for row in found]
