"""A list of stages on one model, as one job: evaluations, and fine-tunings with what they measure.

All is checked before anything runs. What results.json holds already, of the same weights and data and
asked for with the same options, is not measured again, so a suite that was cut off is continued by the
same command. What fails does not keep the rest from running.
"""

import datetime
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prepretrain import config as configs
from prepretrain.config import Evaluating, Suite, Training
from prepretrain.data import card
from prepretrain.data.sampling import mix
from prepretrain.distributed import group as distributed
from prepretrain.models.load import described, open_weights
from prepretrain.models.model import Model
from prepretrain.runs import results, run
from prepretrain.training.fit import Stopped

logger = logging.getLogger(__name__)

# How long a process whose entry failed waits for the others to say whether theirs failed too.
PATIENCE = datetime.timedelta(minutes=5)


@dataclass(frozen=True)
class Entry:
    """One stage of a suite."""

    name: str  # suite[2] (eval/knn), in messages
    stage: str
    config: Training | Evaluating
    key: str  # of its results in the suite's results.json: linear/cifar10, finetune/cifar10
    folder: Path


def start(config: Suite, folder: Path) -> None:
    """Runs what is not done yet, in this process as one of those that the environment describes.

    Raises ValueError, before anything runs, for what cannot run; RuntimeError at the end, if
    entries failed.
    """
    with run.joined(folder, config.device):
        entries = check(config, folder, distributed.world())
        sha256, votes = run.fingerprint(config.init), distributed.second_group(PATIENCE)
        _check_begun(entries, folder, sha256)
        failed = []
        for entry in entries:
            problem = _attempt(entry, folder, sha256, votes)
            if problem is not None:
                failed.append(f"{entry.name}: {problem}")
        if failed:
            raise RuntimeError(
                f"{folder}: {len(failed)} of {len(entries)} entries of the suite failed; the same "
                "command tries them again and measures nothing else twice:\n  "
                + "\n  ".join(failed)
            )


def check(config: Suite, folder: Path, world: int) -> list[Entry]:
    """The entries, each checked as far as a start would be, data included. Raises one ValueError
    that lists every entry's error."""
    return [entry for entry, _ in _each(config, folder, lambda e, model: _check(e, model, world))]


def dry_run(config: Suite, folder: Path, world: int) -> tuple[list[Entry], list[dict[str, Any]]]:
    """The entries and the facts of each. Data that are not here are no error; "data" then says so."""

    def facts(entry: Entry, model: Model | None) -> dict[str, Any]:
        found = {"stage": entry.stage, "results": entry.key, "folder": str(entry.folder)}
        if isinstance(entry.config, Training):
            return found | run.dry_run(entry.config, entry.folder, entry.stage, world)
        try:
            _check(entry, model, world)
        except card.MissingData as error:
            return found | {"data": f"not here, so not checked: {error}"}
        return found | {"data": "checked"}

    entries, found = zip(*_each(config, folder, facts))
    return list(entries), list(found)


def entries(config: Suite, folder: Path) -> list[Entry]:
    """The entries, of which nothing but the config is looked at."""
    return [
        _entry(given, f"suite[{i}]", config.init, folder) for i, given in enumerate(config.suite)
    ]


def missing(config: Suite, folder: Path) -> list[str]:
    """The results that are not there, or were asked for with other options; neither weights nor data
    are looked at."""
    found, known = results.measured(folder), results.asked(folder)
    return [
        entry.key
        for entry in entries(config, folder)
        if entry.key not in found or not _as_asked(entry, known.get(entry.key, {}))
    ]


def _as_asked(entry: Entry, known: dict[str, Any]) -> bool:
    if isinstance(entry.config, Training):
        return known.get("options") == _options(entry.config) and "unfinished" not in known
    evaluator = run.evaluator_of(entry.config)[1]
    return known.get("options") == run.request(evaluator, entry.config.model, None)["options"]


def _each(
    config: Suite, folder: Path, look: Callable[[Entry, Model | None], Any]
) -> list[tuple[Entry, Any]]:
    """(entry, what `look(entry, the model it evaluates)` returns) of each; ValueErrors together."""
    if not config.suite:
        raise ValueError("suite: is empty. Name one stage or more, as in [{stage: eval/linear}].")
    open_weights(config.init)  # what is wrong with it is wrong once, not in every entry
    found, problems, loaded = [], [], _Described(config.init)
    for i, given in enumerate(config.suite):
        name = f"suite[{i}] ({given['stage']})" if "stage" in given else f"suite[{i}]"
        try:
            entry = _entry(given, name, config.init, folder)
            looked = look(entry, loaded.model(entry.config))
            for other, _ in found:
                _tell_apart(other, entry)
            found.append((entry, looked))
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("nothing was run, because of\n  " + "\n  ".join(problems))
    return found


class _Described:
    """The model that evaluations measure, without weights, kept as long as they ask for it with the
    same options."""

    def __init__(self, source: str):
        self.source, self.held = source, None

    def model(self, config: Training | Evaluating) -> Model | None:
        if isinstance(config, Training):
            return None
        if self.held is None or self.held[0] != config.model:
            self.held = config.model, described(self.source, **config.model)[0]
        return self.held[1]


def _entry(given: dict[str, Any], name: str, init: str, folder: Path) -> Entry:
    given = dict(given)
    stage = given.pop("stage", None)
    if not isinstance(stage, str):
        raise ValueError("stage: is missing, as in {stage: eval/linear, data: cifar10}.")
    fixed = [key for key in ("init", "branch") if key in given]
    if fixed:
        raise ValueError(f"{fixed[0]}: every entry starts from the suite's --init.")
    out, label = given.pop("out", None), given.pop("label", None)
    config = configs.load(stage, given, init)
    if isinstance(config, Suite):
        raise ValueError("is a suite itself. Write its entries here.")
    if isinstance(config, Evaluating):
        if out is not None:
            raise ValueError(
                "out: an evaluation writes into the suite's folder; only training has one "
                "of its own. Tell results apart with a label."
            )
        config.label = label if label is not None else config.label
        return Entry(name, stage, config, run.evaluator_of(config)[0], folder)
    parts = mix.parts(config.data.train, config.data.subset)
    data = "+".join(part.card.name for part in parts)
    key = "/".join([_plain(stage), data, *([] if label is None else [run.checked_label(label)])])
    own = folder / key.replace("/", "_") if out is None else Path(out)
    return Entry(name, stage, config, key, own)


def _plain(stage: str) -> str:
    """A stage's name as part of a file's: without folders and .yaml."""
    return re.sub(r"[^\w.+-]+", "_", stage.removesuffix(".yaml")).strip("_.")


def _check(entry: Entry, model: Model | None, world: int) -> None:
    if isinstance(entry.config, Training):
        run.check(entry.config, entry.folder, world)
        return
    evaluator = run.evaluator_of(entry.config)[1]
    evaluator.check(model)
    evaluator.open_data()


def _check_begun(entries: list[Entry], folder: Path, sha256: str) -> None:
    """Raises ValueError naming the trainings that were begun from weights that --init no longer
    holds: going on would make one run of two models."""
    _, known = results.read(folder)
    old = [
        f"{entry.name}: {entry.folder}"
        for entry in entries
        if isinstance(entry.config, Training)
        and (entry.folder / "config.yaml").exists()
        and known.get(entry.key, {}).get("model", sha256) != sha256
    ]
    if old:
        raise ValueError(
            "trained from other weights than --init holds now:\n  "
            + "\n  ".join(old)
            + "\nRemove these folders, or give the entries another `out` or `label`."
        )


def _tell_apart(first: Entry, second: Entry) -> None:
    """Raises ValueError if two entries would write to the same place."""
    trains = isinstance(first.config, Training) and isinstance(second.config, Training)
    if first.key == second.key or (trains and first.folder == second.folder):
        same = first.key if first.key == second.key else first.folder
        raise ValueError(
            f"its results would be under {same}, as those of {first.name}. Give one of them a "
            "`label`, which is put behind the name."
        )


def _attempt(entry: Entry, folder: Path, sha256: str, votes: dist.ProcessGroup) -> str | None:
    """Runs an entry; what kept it from succeeding, on every process.

    An error that all processes meet, as most are, is theirs to go on from. After one that some met
    alone the others wait in vain for an exchange, so that the job has to end.
    """
    problem = None
    try:
        _run(entry, folder, sha256)
    except Stopped:
        raise
    except Exception as error:  # whatever it is, it must not keep the others from being measured
        problem = f"{type(error).__name__}: {error}"
        unexpected = not isinstance(error, (ValueError, OSError))
        logger.error("%s failed: %s", entry.name, problem, exc_info=unexpected)
    try:
        problems = distributed.all_gather_object(problem, votes)
    except RuntimeError as error:
        raise RuntimeError(
            f"{entry.name}: failed on some processes and not on others, so the suite ends here; the "
            f"same command continues it. On process {distributed.rank()}: {problem or error}"
        ) from error
    return next((p for p in problems if p is not None), None)


def _run(entry: Entry, folder: Path, sha256: str) -> None:
    found, known = results.read(folder)
    asked = _asked(entry, sha256)
    if entry.key in found and known.get(entry.key) == asked:
        logger.info(
            "%s: %s is there, with the same options, weights and data", entry.name, entry.key
        )
    elif isinstance(entry.config, Evaluating):
        run.evaluate(entry.config, folder, sha256)
    else:
        _train(entry, folder, asked)


def _asked(entry: Entry, sha256: str) -> dict[str, Any]:
    if isinstance(entry.config, Evaluating):
        return run.request(run.evaluator_of(entry.config)[1], entry.config.model, sha256)
    return {"options": _options(entry.config), "model": sha256}


def _options(config: Training) -> dict[str, Any]:
    return {k: v for k, v in configs.plain(config).items() if k not in ("slurm", "wandb")}


def _train(entry: Entry, folder: Path, asked: dict[str, Any]) -> None:
    """Trains in a folder of its own, or continues to; its evaluations' results become the suite's."""
    # what it starts from is known from now on; it is done when the mark is gone. Results that were
    # asked for otherwise are no longer its own
    stale = {entry.key: {}} if entry.key in results.read(folder)[0] else {}
    results.add(folder, stale, {entry.key: {**asked, "unfinished": True}})
    entry.folder.mkdir(parents=True, exist_ok=True)
    run.train(entry.config, entry.folder)
    there, _ = results.read(entry.folder)
    found = {key: value for key, value in there.items() if isinstance(value, dict)}
    results.add(folder, {entry.key: found}, {entry.key: asked})
