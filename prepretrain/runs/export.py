"""Writes a run's weights for others to load."""

from pathlib import Path

import torch

from prepretrain import config as configs
from prepretrain import contracts
from prepretrain.distributed import checkpoint, shard
from prepretrain.files import draft
from prepretrain.models import tagger, weights
from prepretrain.models.export import save
from prepretrain.models.load import load
from prepretrain.objectives.base import Objective
from prepretrain.runs.plan import build_objective


def load_objective(folder: Path) -> Objective:
    """A run's trained objective on the CPU, decoder and heads included."""
    given = configs.read_training(Path(folder) / "config.yaml")
    objective = build_objective(given)
    objective.to_empty(device="cpu")
    shard.fill_buffers(objective)
    saved = checkpoint.newest(Path(folder))
    if saved is None:
        raise ValueError(f"{folder}: holds no complete checkpoint.")
    shapes, read, _ = checkpoint.open_tensors(saved)
    weights.fill(objective, weights.Weights(str(folder), shapes, read))
    return objective.eval()


def export(source: str, folder: Path) -> Path:
    """Writes a run's or file's encoder for others to load; returns the weights' path."""
    return save(load(source), folder, source)


def export_released(run: Path, folder: Path) -> Path:
    """Writes a run's tensors as `released.pth`, under the names of the files that the objective's
    authors released; returns its path. Raises ValueError for an objective without such files."""
    objective = load_objective(run)
    if not isinstance(objective, contracts.WritesReleased):
        raise ValueError(f"--released: {run} is of an objective without released files of its own.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "released.pth"
    with draft(path) as place:
        torch.save({"model": objective.release()}, place)
    return path


def export_labels(run: str, folder: Path) -> Path:
    """Writes what a run predicts beside features, of its newest checkpoint; returns the folder. Raises
    ValueError for an objective that predicts no named labels."""
    load_objective(Path(run)).export(folder)
    if not (folder / tagger.FOLDER).is_dir():
        raise ValueError(f"--labels: {run} is of an objective without labels that have names.")
    return folder / tagger.FOLDER
