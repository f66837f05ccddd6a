"""Reads a scaling study: a base stage, axes over keys of its config, and what to measure of each run."""

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from prepretrain import config as configs
from prepretrain import plugin
from prepretrain.config import Suite, Training

KEYS = ("stage", "set", "axes", "evaluations", "images_per_second")
Values = dict[str, dict[str, Any]]  # of an axis: {label: what it sets, nested as in a config}


@dataclass(frozen=True)
class Run:
    """One point of the grid."""

    name: str  # of its folder
    labels: dict[str, str]  # its value on each axis
    config: Training
    folder: Path

    def suite(self, evaluations: list[dict[str, Any]]) -> Suite:
        """What is measured of it once it is trained."""
        config = configs.plain(self.config)
        given = {"suite": evaluations, "slurm": config["slurm"], "device": config["device"]}
        return configs.check(Suite, given | {"init": str(self.folder)}, "")


@dataclass(frozen=True)
class Study:
    """A grid of runs in one folder."""

    path: Path
    folder: Path
    stage: str
    base: dict[str, Any]  # what every run sets over its stage
    axes: dict[str, Values]
    evaluations: list[dict[str, Any]]
    images_per_second: float | dict[str, float] | None  # of training, by a label of an axis

    @cached_property
    def runs(self) -> list[Run]:
        """All points of the grid. Raises one ValueError with everything that is wrong."""
        self._check_alone()
        problems, found = Problems(self.path), {}
        for chosen in itertools.product(*self.axes.values()):
            labels = dict(zip(self.axes, chosen))
            name = "-".join(map(_file_name, chosen)) or "run"
            with problems.of(name):
                if name in found:
                    raise ValueError(f"axes: two runs are called {name}. Give values other labels.")
                config = self._config(*(self.axes[axis][label] for axis, label in labels.items()))
                found[name] = Run(name, labels, config, self.folder / name)
        problems.refuse()
        return list(found.values())

    def setting(self, section: str) -> list[str]:
        """The axes that set a key of a section of the config, as data."""
        return [
            axis
            for axis, values in self.axes.items()
            if any(section in given for given in values.values())
        ]

    def _check_alone(self) -> None:
        """Looks at each value of each axis alone, so that what is wrong with one is said once."""
        try:
            self._config()
        except ValueError:
            return  # an axis may set what is missing; else every run says so
        problems = Problems(self.path, "value")
        for axis, values in self.axes.items():
            for label, given in values.items():
                with problems.of(f"{axis}: {label}"):
                    self._config(given)
        problems.refuse()

    def _config(self, *given: dict[str, Any]) -> Training:
        merged = dict(self.base)
        for one in given:
            merged = configs.merge(merged, one)
        config = configs.checked(configs.merge(self._stored(merged), merged))
        if not isinstance(config, Training):
            raise ValueError(f"stage: {self.stage} does not train. Name one that does, as mae.")
        return config

    def _stored(self, merged: dict[str, Any]) -> dict[str, Any]:
        """The stage's file over the base files that a run names, which are read once."""
        base = merged.pop("base", None)
        if str(base) not in self._files:
            self._files[str(base)] = configs.stored(self.stage, base)
        return self._files[str(base)]

    @cached_property
    def _files(self) -> dict[str, dict[str, Any]]:
        return {}


class Problems:
    """Collects ValueErrors, to raise one that holds all."""

    def __init__(self, path: Path, what: str = "run"):
        self.path, self.what = path, what
        self.names: dict[str, list[str]] = {}  # that have it, of each problem

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Keeps a ValueError that the block raises, as a problem of this name."""
        try:
            yield
        except ValueError as error:
            self.names.setdefault(str(error), []).append(name)

    def refuse(self) -> None:
        """Raises all problems as one, if there are any."""
        if not self.names:
            return
        lines = [
            f"{error}\n    ({len(names)} {self.what}{'s' if names[1:] else ''}: "
            f"{', '.join(names[:3])}{', …' if names[3:] else ''})"
            for error, names in self.names.items()
        ]
        raise ValueError(f"{self.path}: nothing was started, because of\n  " + "\n  ".join(lines))


def read(path: str | Path, out: str | Path | None = None) -> Study:
    """The study in a YAML file; its runs go to `out`, by default runs/<its name>.

    Raises one ValueError with everything that is wrong with the file.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("axes"), dict):
        raise ValueError(
            f"{path}: a study names a stage and its axes, as in stage: mae, "
            "axes: {data.subset: [10%, 100%], length: [1000it, 4000it]}."
        )
    problems, axes = Problems(path, "place"), {}
    for key in content:
        with problems.of(str(key)):
            if key not in KEYS:
                raise ValueError(plugin.unknown("no key", str(key), list(KEYS), quote=True))
    with problems.of("stage"):
        if not isinstance(content.get("stage"), str):
            raise ValueError("stage: is missing: a stage's name, as mae, or a .yaml file.")
    for name, given in content["axes"].items():
        with problems.of(f"axes.{name}"):
            axes[str(name)] = _axis(str(name), given)
    for one, other in itertools.combinations(axes, 2):
        with problems.of(f"axes.{one}"):
            _tell_apart(one, axes[one], other, axes[other])
    evaluations, speed = content.get("evaluations") or [], content.get("images_per_second")
    with problems.of("evaluations"):
        if not isinstance(evaluations, list) or not all(isinstance(e, dict) for e in evaluations):
            raise ValueError("is a list of stages, as [{stage: eval/knn, data: cifar10}].")
    with problems.of("images_per_second"):
        speeds = speed.values() if isinstance(speed, dict) else [1 if speed is None else speed]
        if not all(isinstance(v, (int, float)) and v > 0 for v in speeds):
            raise ValueError("is a number above 0, or {label of an axis: number}.")
    problems.refuse()
    return Study(
        path,
        Path("runs", path.stem) if out is None else Path(out),
        content["stage"],
        _nested(content.get("set") or {}),
        axes,
        evaluations,
        speed,
    )


def _axis(name: str, given: Any) -> Values:
    """The values of an axis: a list of a key's values, or {label: {key: value}}."""
    if isinstance(given, list) and given:
        if any(isinstance(value, (dict, list)) for value in given):
            raise ValueError(
                f"axes.{name}: a value of several parts needs a label, as in "
                f"{{small: {{{name}: …}}, large: {{…}}}}."
            )
        values = {str(value): _nested({name: value}) for value in given}
    elif isinstance(given, dict) and given and all(isinstance(v, dict) for v in given.values()):
        values = {str(label): _nested(keys) for label, keys in given.items()}
    else:
        raise ValueError(
            f"axes.{name}: is a list of the key's values, or {{label: {{key: value}}}}; not {given!r}."
        )
    if len(values) != len(given):
        raise ValueError(f"axes.{name}: names a value twice.")
    return values


def _tell_apart(one: str, ours: Values, other: str, theirs: Values) -> None:
    """Raises ValueError if two axes set the same key, or one of them a part of it."""
    keys, others = ({k for v in values.values() for k in _leaves(v)} for values in (ours, theirs))
    same = [k for k in sorted(keys) if any(_within(k, o) or _within(o, k) for o in others)]
    if same:
        raise ValueError(
            f"axes {one} and {other} both set {', '.join(same)}. Let one of them do so."
        )


def _within(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.")


def _nested(given: dict[str, Any]) -> dict[str, Any]:
    """{"model.width": 64} as {"model": {"width": 64}}."""
    nested: dict[str, Any] = {}
    for key, value in given.items():
        for part in reversed(str(key).split(".")):
            value = {part: value}
        nested = configs.merge(nested, value)
    return nested


def _leaves(given: dict[str, Any], where: str = "") -> list[str]:
    """The full names of the keys that a nested mapping sets; one with a `name` is set as a whole."""
    found = []
    for key, value in given.items():
        whole = f"{where}{key}"
        inner = isinstance(value, dict) and value and "name" not in value
        found += _leaves(value, f"{whole}.") if inner else [whole]
    return found


def _file_name(label: str) -> str:
    """A label as part of a folder's name: 10pct of 10%."""
    return re.sub(r"[^\w.+]+", "_", label.replace("%", "pct")).strip("_") or "none"
