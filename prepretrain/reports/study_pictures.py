"""Reconstructions of a study's run that overfits, beside those of one that does not."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prepretrain.reports import reconstructions
from prepretrain.reports.study import Chart, Study

IMAGES = 3  # of each card: side by side with what becomes of them, legible on a phone


def pictures(study: Study, cards: Sequence[str], folder: Path) -> Chart:
    """Images of some cards, rebuilt by both runs, as Figure 5 of arXiv 2206.04664; written to the
    folder as PNGs, too."""
    name, title = "reconstructions", "What a run that overfits rebuilds, and one that does not"
    if not cards:
        return Chart(name, title, ["not asked for, as no card was named."])
    pair = overfitting_pair(study)
    if pair is None:
        why = "of no model are there the folders of a run that overfits and of one that does not."
        return Chart(name, title, [why])
    worse, better = (study.label(i) for i in pair)
    words = [
        "From left to right: an image; what the runs see of it; what the run that overfits makes of it "
        f"({worse}); what the one that does not makes of it ({better})."
    ]
    images = {}
    for card in cards:
        path = folder / f"reconstructions_{card.replace(':', '_')}.png"
        runs = [study.folders[i] for i in pair]
        reconstructions.reconstruct(runs, card, IMAGES, path, ["overfits", "does not"])
        images[card] = path.read_bytes()
    return Chart(name, title, words, images=images)


def overfitting_pair(study: Study) -> tuple[int, int] | None:
    """The run that overfits most, by what its loss is above that of a run of the same model which
    does not overfit, and that run; None where no such two have folders here."""
    loss = study.table.loss
    here = np.array([folder is not None for folder in study.folders])
    best: tuple[float, int, int] | None = None
    for i in np.flatnonzero(here & study.over):
        others = np.flatnonzero(here & ~study.over & study.of(study.table.model[i]))
        if len(others):
            other = int(others[loss[others].argmin()])
            found = (float(loss[i] - loss[other]), int(i), other)
            best = found if best is None else max(best, found)
    return None if best is None else best[1:]
