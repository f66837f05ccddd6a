"""Plans the runs of a study: checks all of them before any starts, lets lengths share a trunk, and says
what each costs."""

import json
import statistics
from dataclasses import dataclass, replace
from typing import Any

from prepretrain import config as configs
from prepretrain import jsonl
from prepretrain.config import Suite, Training
from prepretrain.data import card
from prepretrain.runs import run as runs
from prepretrain.runs import suite
from prepretrain.runs.plan import Plan, check_trunk, subset_images
from prepretrain.runs.plan import schedule as schedule_of
from prepretrain.runs.results import measured
from prepretrain.scaling.study import Problems, Run, Study
from prepretrain.training.schedule import Schedule

SHARED = ("length", "branches", "branch")  # keys in which runs of one trunk differ


@dataclass(frozen=True)
class Shape:
    """What runs that differ in length and seed only have in common."""

    plan: Plan
    images: int | None  # in an epoch
    said: str  # of its data
    size: dict[str, int]  # encoder_parameters, parameters, flops_per_image


@dataclass(frozen=True)
class Planned:
    """A run of a study, and what it takes."""

    run: Run
    shape: Shape
    schedule: Schedule
    trunk: "Planned | None" = None  # whose checkpoint it starts from
    branches: tuple[str, ...] = ()  # lengths that start from its own
    speed: float | None = None  # images a second

    @property
    def name(self) -> str:
        """As Run.name."""
        return self.run.name

    @property
    def config(self) -> Training:
        """The whole config that it is started with."""
        trunk = None if self.trunk is None else str(self.trunk.run.folder)
        return replace(self.run.config, branch=trunk, branches=self.branches)

    @property
    def steps(self) -> int:
        """Of its weights, those of its trunk included."""
        return self.schedule.steps

    @property
    def own_steps(self) -> int:
        """The steps that it trains itself."""
        return self.steps - (0 if self.trunk is None else self.schedule.milestones[0])

    @property
    def seen(self) -> int:
        """Images, each as often as it comes."""
        return self.steps * self.run.config.batch_size

    @property
    def flops(self) -> float:
        """Of all its steps; a backward pass costs two forward ones."""
        return 3.0 * self.shape.size["flops_per_image"] * self.seen

    @property
    def hours(self) -> float | None:
        """Of its own steps; None where nobody knows the speed."""
        images = self.own_steps * self.run.config.batch_size
        return None if self.speed is None else images / self.speed / 3600

    @property
    def trained(self) -> bool:
        """Whether its training has ended."""
        return "images" in measured(self.run.folder)

    @property
    def stale(self) -> list[str]:
        """The keys that the study changes although the run has begun with others."""
        if not (self.run.folder / "config.yaml").exists():
            return []
        config = replace(self.config, model=self.shape.plan.config.model)
        return runs.changes(config, self.run.folder)


def plan(study: Study, world: int = 1) -> list[Planned]:
    """All runs, checked as far as a start would, trunks before what branches off them.

    Runs that differ in length and seed only are checked once. world: processes of each. Raises one
    ValueError with everything that is wrong.
    """
    problems, shapes = Problems(study.path), _Shapes(study, world)
    groups: dict[str, list[Planned]] = {}
    for run in study.runs:
        with problems.of(run.name):
            shape = shapes.of(run.config)
            schedule = schedule_of(run.config, shape.images, run.config.length, "length")
            group = groups.setdefault(_key(run.config, *SHARED), [])
            group.append(Planned(run, shape, schedule))
    problems.refuse()
    planned = []
    for group in groups.values():
        with problems.of(group[0].name):
            planned += _share(group)
    problems.refuse()
    speeds = _Speeds(study, planned)
    planned = [replace(one, speed=speeds.of(one)) for one in planned]
    return sorted(planned, key=lambda one: one.trunk is not None)


def _key(config: Training, *without: str) -> str:
    values = {k: v for k, v in configs.plain(config).items() if k not in without}
    return json.dumps(values, sort_keys=True)


def _model(config: Training) -> str:
    return json.dumps([config.model, config.objective], sort_keys=True)


class _Shapes:
    """Checks each shape, and counts each model's FLOPs, once."""

    def __init__(self, study: Study, world: int):
        self.study, self.world = study, world
        self.known: dict[str, Shape | ValueError] = {}
        self.sizes: dict[str, dict[str, int]] = {}
        given = {"suite": study.evaluations, "init": str(study.folder)}
        self.evaluations = suite.entries(configs.check(Suite, given, ""), study.folder)
        self.opened = False  # whether the evaluations' data were looked at

    def of(self, config: Training) -> Shape:
        """The shape of a run. Raises ValueError for one that cannot work."""
        whole = replace(config, data=replace(config.data, subset=None))
        shape = self._known(whole)
        if config.data.subset is None:
            return shape
        images = subset_images(config, shape.images)
        # the images of some classes, and images that do not come alike, are counted in the data
        if images is None or shape.plan.weighted:
            return self._known(config)
        return replace(shape, images=images)

    def _known(self, config: Training) -> Shape:
        key = _key(config, *SHARED, "seed")
        if key not in self.known:
            try:
                self.known[key] = self._checked(config)
            except ValueError as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, ValueError):
            raise found
        return found

    def _checked(self, config: Training) -> Shape:
        made, said = runs.checked(config, self.study.folder / ".none", self.world)
        for entry in self.evaluations:
            if isinstance(entry.config, Training):
                continue
            evaluator = runs.evaluator_of(entry.config)[1]
            evaluator.check(made.objective.model)
            try:
                if not self.opened:
                    evaluator.open_data()
            except card.MissingData as error:
                said = f"{entry.name}: not here, so not checked: {error}"
        self.opened = True
        model = _model(made.config)
        if model not in self.sizes:
            self.sizes[model] = made.size
        return Shape(made, made.images, said, self.sizes[model])


def _share(group: list[Planned]) -> list[Planned]:
    """Runs that differ in length alone: where the rate has a constant part, the longest is the trunk
    of the others. What has begun stays what it is."""
    if group[0].run.config.optim.schedule != "step" or not group[0].schedule.milestones:
        return group
    *shorter, longest = sorted(group, key=lambda one: one.steps)
    begun = {one.name: _recorded(one) for one in group}
    trunks = {str(one.run.folder): one for one in group}
    leaving = [one for one in shorter if begun[one.name] is None and _may_leave(one, longest)]
    for one in leaving:
        check_trunk(longest.schedule, one.schedule, f"length: {one.run.config.length}")
    longest = replace(longest, branches=tuple(one.run.config.length for one in leaving))
    new = {one.name for one in leaving}

    def placed(one: Planned) -> Planned:
        if one.name in new:
            return replace(one, trunk=longest)
        recorded = begun[one.name]
        return one if recorded is None else replace(one, trunk=trunks.get(recorded.branch or ""))

    return [placed(longest), *map(placed, shorter)]


def _recorded(one: Planned) -> Training | None:
    """The config that a run has begun with; None if it has not."""
    path = one.run.folder / "config.yaml"
    return configs.read_training(path, one.run.config) if path.exists() else None


def _may_leave(one: Planned, trunk: Planned) -> bool:
    """Whether a run can still branch off: its trunk has not begun, keeps the step, or has not got
    there."""
    recorded = _recorded(trunk)
    if recorded is None or one.run.config.length in recorded.branches:
        return True
    reached = jsonl.last(trunk.run.folder / "metrics.jsonl") or {"step": 0}
    return reached["step"] < one.schedule.milestones[0]


def speeds(one: Planned) -> list[float]:
    """Images a second that a run has noted."""
    rows = jsonl.rows(one.run.folder / "metrics.jsonl")
    return [row["images_per_second"] for row in rows if "images_per_second" in row]


class _Speeds:
    """Images a second: given by the study, or measured by those of its runs that have begun."""

    def __init__(self, study: Study, planned: list[Planned]):
        self.given = study.images_per_second
        self.measured: dict[str, list[float]] = {}
        for one in planned:
            self.measured.setdefault(_model(one.run.config), []).extend(speeds(one))

    def of(self, one: Planned) -> float | None:
        """A run's speed; None where nobody knows it."""
        if isinstance(self.given, dict):
            labels = [label for label in one.run.labels.values() if label in self.given]
            if labels:
                return float(self.given[labels[0]])
        elif self.given is not None:
            return float(self.given)
        found = self.measured[_model(one.run.config)]
        return statistics.median(found) if found else None


def fairness(study: Study, planned: list[Planned]) -> str:
    """Whether runs on more data have as many updates, or as many epochs, as those on fewer: what a
    curve over data means depends on it."""
    axes = set(study.setting("data"))
    groups: dict[tuple[str, ...], list[Planned]] = {}
    for one in planned:
        key = tuple(label for axis, label in one.run.labels.items() if axis not in axes)
        groups.setdefault(key, []).append(one)
    if all(len({one.shape.images for one in group}) == 1 for group in groups.values()):
        return "one amount of data at each length"
    updates = all(len({one.steps for one in group}) == 1 for group in groups.values())
    images = [one.shape.images for one in planned]
    if None in images:
        return (
            "equal updates"
            if updates
            else "epochs are not known, as a card does not count its images"
        )
    epochs = [one.seen / one.shape.images for one in planned]
    span = f"{min(epochs):.3g} to {max(epochs):.3g} epochs"
    if updates:
        return f"equal updates: more data are seen as often in all, each image less often ({span})"
    if all(map(_as_many_epochs, groups.values())):
        return f"equal epochs: more data have more updates ({span})"
    return f"neither equal updates nor equal epochs ({span}): length and amount of data cannot be told apart"


def _as_many_epochs(group: list[Planned]) -> bool:
    """Whether runs have the same number of epochs, to a step, as an epoch may end within one."""
    most = [one.seen / one.shape.images for one in group]
    least = [(one.seen - one.config.batch_size) / one.shape.images for one in group]
    return max(least) < min(most)


def facts(study: Study, planned: list[Planned], world: int) -> dict[str, Any]:
    """The plan as one object."""
    whole, own = (sum(getattr(one, k) for one in planned) for k in ("steps", "own_steps"))
    hours = [one.hours for one in planned]
    return {
        "runs": len(planned),
        "trunks": sum(bool(one.branches) for one in planned),
        "steps": own,
        "steps_without_trunks": whole,
        "flops": sum(one.flops * one.own_steps / one.steps for one in planned),
        "hours": None if None in hours else sum(hours),
        "device_days": None if None in hours else sum(hours) * world / 24,
        "comparison": fairness(study, planned),
        "stale": {one.name: one.stale for one in planned if one.stale},
        "each": [_row(one) for one in planned],
    }


def _row(one: Planned) -> dict[str, Any]:
    return {
        "run": one.name,
        "trunk": one.trunk and one.trunk.name,
        "steps": one.steps,
        "own_steps": one.own_steps,
        "images": one.shape.images,
        "epochs": one.shape.images and one.seen / one.shape.images,
        "parameters": one.shape.size["encoder_parameters"],
        "flops": one.flops,
        "hours": one.hours,
        "data": one.shape.said,
    }


def said(found: dict[str, Any]) -> str:
    """The plan for a person: a table, and what it comes to."""
    head = f"{'run':40} {'steps':>9} {'of them own':>12} {'epochs':>8} {'TFLOPs':>10} {'hours':>8}"
    lines = [head, *map(_line, found["each"])]
    days = "not known: give images_per_second"
    if found["hours"] is not None:
        days = f"{found['hours']:.2f}, {found['device_days']:.3g} device-days"
    saved = 1 - found["steps"] / found["steps_without_trunks"]
    lines += [
        "",
        f"{found['runs']} runs, {found['trunks']} of them trunks of others: {found['steps']:,} steps, "
        f"where without trunks there were {found['steps_without_trunks']:,} ({saved:.0%} saved)",
        f"{found['flops']:.3g} FLOPs of training; hours: {days}; evaluations are not counted",
        f"comparison: {found['comparison']}",
        *sorted({f"data: {row['data']}" for row in found["each"] if row["data"] != "checked"}),
    ]
    for name, keys in found["stale"].items():
        lines.append(f"stale: {name} was started with another config: {'; '.join(keys)}")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    epochs = "?" if row["epochs"] is None else f"{row['epochs']:.3g}"
    hours = "?" if row["hours"] is None else f"{row['hours']:.3f}"
    return (
        f"{row['run']:40} {row['steps']:>9,} {row['own_steps']:>12,} {epochs:>8} "
        f"{row['flops'] / 1e12:>10.4g} {hours:>8}"
    )
