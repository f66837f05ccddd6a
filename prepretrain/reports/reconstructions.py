"""Draws images as the objectives of runs see and rebuild them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prepretrain.data.card import open_data
from prepretrain.data.loader import evaluation_batches
from prepretrain.data.subset import evenly_spaced
from prepretrain.reports.figure import INK, blank, save
from prepretrain.runs.export import load_objective


def reconstruct(
    runs: Sequence[str | Path], data: str, images: int, path: str | Path, names: Sequence[str] = ()
) -> None:
    """Draws `images` images of a card, spread evenly over it, as the objectives of one or several
    runs see and rebuild them.

    Masks are drawn by each image's place: runs with equal masks share a column for them. names: of
    the runs, by default their folders'. Raises ValueError for runs of other image sizes, or that
    predict no pixels.
    """
    source = open_data(data)
    if not 1 <= images <= len(source):
        raise ValueError(f"--images: {images} does not fit; '{data}' has {len(source)} images.")
    if names and len(names) != len(runs):
        raise ValueError(f"--names: {len(names)} names for {len(runs)} runs.")
    some = evenly_spaced(source, images)
    columns: dict[str, Tensor] = {}
    masked: Tensor | None = None
    for run, name in zip(runs, names or [Path(run).resolve().name for run in runs]):
        objective = load_objective(run)
        needed, centre = some.only(objective.fields), objective.transform(False)
        batch = next(iter(evaluation_batches(needed, centre, batch_size=images)))
        versions = objective.reconstruct(batch)
        original = columns.setdefault("original", versions["original"])
        if original.shape != versions["original"].shape:
            raise ValueError(
                f"{run}: sees images of {versions['original'].shape[-1]} pixels, and {runs[0]} of "
                f"{original.shape[-1]}: they cannot be drawn side by side."
            )
        if masked is None or not torch.equal(masked, versions["masked"]):
            masked = versions["masked"]
            title = "masked" if "masked" not in columns else f"masked for {name}"
            columns[title] = masked
        columns["reconstructed" if len(runs) == 1 else name] = versions["reconstructed"]
    draw(columns, path)


def draw(columns: dict[str, Tensor], path: str | Path) -> None:
    """Draws a grid: a row an image, its versions side by side. All uint8 [N, 3, H, W]."""
    first = next(iter(columns.values()))
    for name, version in columns.items():
        if version.dtype.is_floating_point or version.shape != first.shape or first.shape[1] != 3:
            raise ValueError(
                f"report: '{name}' must be uint8 of shape [N, 3, H, W] like the originals, "
                f"and is {version.dtype} of shape {list(version.shape)}."
            )
    # sets beside each other, so that many images stay on a page
    sets, wide = 1 if len(first) < 4 or len(columns) > 4 else 2, len(columns)
    deep = -(-len(first) // sets)
    figure = blank(1.6 * (wide * sets + 0.15 * (sets - 1)), 1.6 * deep + 0.3)
    outer = figure.add_gridspec(
        1, sets, wspace=0.06, left=0.01, right=0.99, bottom=0.01, top=1 - 0.3 / (1.6 * deep + 0.3)
    )
    for i in range(len(first)):
        inner = outer[i // deep].subgridspec(deep, wide, wspace=0.03, hspace=0.03)
        for column, (name, version) in enumerate(columns.items()):
            axes = figure.add_subplot(inner[i % deep, column])
            axes.imshow(version[i].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_axis_off()
            if i % deep == 0:
                axes.set_title(name, fontsize=10, color=INK, pad=4)
    save(figure, path)
