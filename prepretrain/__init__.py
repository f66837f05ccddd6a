"""Makes visual foundation models in two stages: masked autoencoding, then weak supervision.

import prepretrain as pp

model = pp.load("maws/vit_l16")  # a Model, with its weights: a release, a run's folder or a file
pp.releases()  # the releases, by name
pp.evaluate(model, "knn", data="cifar10", pool="mean")  # {"top1": …}
pp.open_data("cifar10:val")  # a Source: a card's split
pp.launch("mae", ["data.train=mine"])  # what the command `prepretrain --stage mae` does
pp.fit(objective, stream, optimizer, schedule, folder=…)  # the training loop alone

A part of your own subclasses pp.Encoder, pp.Head, pp.Objective, pp.Evaluator or pp.Source.
Everything that is not in `__all__` is internal and may move.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names once more, as type checkers do not run __getattr__
    from prepretrain.data.card import open_data as open_data
    from prepretrain.data.sources.base import Source as Source
    from prepretrain.evaluation.evaluators.base import Evaluator as Evaluator
    from prepretrain.evaluation.measure import evaluate as evaluate
    from prepretrain.models.encoders.base import Encoder as Encoder
    from prepretrain.models.heads.base import Head as Head
    from prepretrain.models.load import load as load
    from prepretrain.models.model import Model as Model
    from prepretrain.objectives.base import Objective as Objective
    from prepretrain.runs.launch import launch as launch
    from prepretrain.training.fit import fit as fit
    from prepretrain.zoo.releases import releases as releases

_PUBLIC = {  # a name, and where it is defined
    "Encoder": "prepretrain.models.encoders.base.Encoder",
    "Evaluator": "prepretrain.evaluation.evaluators.base.Evaluator",
    "Head": "prepretrain.models.heads.base.Head",
    "Model": "prepretrain.models.model.Model",
    "Objective": "prepretrain.objectives.base.Objective",
    "Source": "prepretrain.data.sources.base.Source",
    "evaluate": "prepretrain.evaluation.measure.evaluate",
    "fit": "prepretrain.training.fit.fit",
    "launch": "prepretrain.runs.launch.launch",
    "load": "prepretrain.models.load.load",
    "open_data": "prepretrain.data.card.open_data",
    "releases": "prepretrain.zoo.releases.releases",
}
__all__ = list(_PUBLIC)

if not TYPE_CHECKING:  # for type checkers, a name that is not above is an error

    def __getattr__(name: str) -> Any:
        """Imports a public name when it is first used: `import prepretrain` alone imports no
        torch."""
        if name not in _PUBLIC:
            raise AttributeError(f"module 'prepretrain' has no attribute '{name}'")
        module, _, attribute = _PUBLIC[name].rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
