"""The configuration: a dataclass schema over OmegaConf's YAML, with base files, a.b=c overrides and
clear errors.

Only runs/ reads it. Nothing is inferred into it: derived values (the scaled learning rate, steps,
accumulation) are computed where they are used, and logged.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prepretrain import plugin, ranges
from prepretrain.files import draft


@dataclass
class Data:
    """What a run trains on."""

    # a card's name, with a split after a colon if it is not "train"; or a mix, a list of
    # {card, share, subset}: share of the images of an epoch, which holds as many as one of all parts
    train: str | list[dict[str, Any]]
    # a random part of it, a share (10%) or a number of images, or the options of data/subset.py
    subset: str | dict[str, Any] | None = None
    # loading processes of each process; 0 loads in the process itself, null takes up to 4, as many as
    # there are cores for
    workers: int | None = None
    window: int = 0  # shards that images are shuffled within; 0 shuffles over all of them
    max_bad: float = 0.01  # share of substituted images past which the run stops
    # {by, law, t, vocabulary}: how often images come by their tags: data/sampling/resample.py
    resample: dict[str, Any] | None = None
    # [{from: 50%, train, subset, resample}]: other data from a step on; what a change does not name stays
    changes: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Optim:
    """An optimizer and its schedule. Durations carry a unit: 90ep, 3e9img, 1000it, 5%.

    In a file the optimizer's own options (AdamW's betas) stand beside these keys.
    """

    lr: float  # per 256 images: the peak is lr x batch_size / 256
    name: str = "adamw"  # a file of training/optimizers/
    options: dict[str, Any] = field(default_factory=dict)  # the optimizer's own, all of them
    weight_decay: float = 0.05
    layer_decay: float = 1.0  # 1: the same rate for all layers
    clip: float | None = None  # largest norm of the gradient; null does not clip
    ema: float | None = None  # decay of an average of the weights, which is evaluated and exported
    warmup: str = "5%"
    schedule: str = "cosine"  # or linear, step, poly: see training/schedule.py
    lr_end: float = 0.0  # per 256 images, as lr
    milestones: tuple[str, ...] = ()  # for schedule: step
    decay: float = 0.1  # what a milestone multiplies the rate by
    power: float = 1.0  # of schedule: poly


@dataclass
class Shard:
    """How a model is sharded over processes, and its precision and memory; changes results by
    rounding only."""

    # most processes that share a copy of the weights; 1 replicates; null: on GPUs the fewest that hold
    # it well (Plan.sharding), on a CPU all
    group: int | None = None
    # gather a unit's weights again for the backward pass; null: only where keeping them takes memory
    # that is needed
    reshard: bool | None = None
    # auto: bf16, but fp32 on a CPU that has no instructions for it; fp8: bf16 with the products of
    # blocks' linear layers in 8 bits, for a ViT-H or larger, with compile
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    recompute: Literal["none", "block", "offload"] = "none"  # activation checkpointing
    compile: bool = False
    float32: tuple[str, ...] = ()  # parts that a bf16 run computes in float32: model.head, *.norm*


@dataclass
class Copies:
    """How a model that is evaluated lies on the processes; changes results by rounding only."""

    # processes that share a copy of the weights: 1 gives each its own, null does, too, where that
    # takes no more than a quarter of a GPU, and shards over all processes where it takes more
    group: int | None = None


@dataclass
class Checkpoint:
    """When a run saves itself."""

    every: str = "10%"
    keep: int = 2  # the newest, which are all that is needed to go on
    permanent: str | None = None  # also save this often, and never remove those
    # train on while one is written, from a copy in host memory; null: where it is a GPU that trains
    async_save: bool | None = None
    best: bool = False  # also export, to best/, what the first of `evaluators` found best


@dataclass
class Numerics:
    """Decides what to do about NaN, Inf and gradient spikes: see training/numerics.py. Whatever it
    decides, the failing step is dumped to dumps/ for `--replay`."""

    skip: int = 0  # most non-finite steps to skip among any 1000
    # after that, how often to roll back to the newest checkpoint and continue after the offending
    # batch
    rollbacks: int = 0
    sigma: float = 6.0  # a spike is a gradient norm above the mean + sigma standard deviations
    window: int = 128  # steps over which mean and standard deviation are computed
    skip_spikes: bool = False  # also skip a spike's step; otherwise it is only logged


@dataclass
class Validation:
    """The loss on a fixed set, with fixed crops and masks."""

    data: str | None = None  # a card's split, as cifar10:val; null measures none
    every: str = "5%"
    images: int | None = None  # how many, evenly spaced over the split; null takes all


@dataclass
class Slurm:
    """What --slurm asks for beside the partition, --nodes, --procs and --hours; changes no result."""

    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    memory: str | None = None  # of a node, as 500GB
    gpus: int | None = None  # of a node; null: one for each process, where the partition has GPUs
    cpus: int | None = None  # of a process
    requeues: int = 3  # times that a job starts again after a crash
    extra: tuple[str, ...] = ()  # further options of sbatch, as --exclude=node7


@dataclass
class Training:
    """A run that trains: `objective:` says for what."""

    objective: dict[str, Any]
    data: Data
    optim: Optim
    batch_size: int  # images in an optimizer step, over all processes
    length: str
    model: dict[str, Any] = field(
        default_factory=dict
    )  # encoder: a size's name, and that family's options
    batch_per_process: int | None = (
        None  # most images at a time in a process; the rest is accumulated
    )
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"  # auto: a GPU for each process, where there are GPUs
    deterministic: bool = False  # on a GPU take kernels that give the same bits each time, or none
    log_every: str = "10it"
    shard: Shard = field(default_factory=Shard)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    numerics: Numerics = field(default_factory=Numerics)
    hang: float | None = 1800.0  # seconds without a batch until a process ends itself; null: never
    # {name, data (by default that of training), every, options}
    evaluators: list[dict[str, Any]] = field(default_factory=list)
    validation: Validation = field(default_factory=Validation)
    slurm: Slurm = field(default_factory=Slurm)
    wandb: str | None = None  # a Weights & Biases project that the run is logged to as well
    branches: tuple[str, ...] = ()  # shorter lengths that will branch off this run: see `branch`
    branch: str | None = None  # set by --branch: the run whose constant rate this one continues
    init: str | None = None  # set by --init: weights to start from


@dataclass
class Evaluating:
    """A run that evaluates a model: `evaluator:` says how."""

    evaluator: dict[str, Any]
    data: str  # a card's name
    model: dict[str, Any] = field(
        default_factory=dict
    )  # options to load it with instead, as in model.image_size
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"  # auto: a GPU for each process, where there are GPUs
    label: str | None = None  # results are under <evaluator>/<card>/<label>
    shard: Copies = field(default_factory=Copies)
    slurm: Slurm = field(default_factory=Slurm)
    init: str | None = None  # set by --init: the model to evaluate


@dataclass
class Suite:
    """Several stages of one model, run as one job: see suite.py."""

    suite: list[dict[str, Any]]  # {stage, label, out, and keys over that stage's config}
    device: Literal["auto", "cpu"] = "auto"  # auto: a GPU for each process, where there are GPUs
    jobs: Literal["one", "each"] = "one"  # with --slurm: a job for all, or one for each entry
    slurm: Slurm = field(default_factory=Slurm)
    init: str | None = None  # set by --init: the model that every entry starts from


Config = Training | Evaluating | Suite

# Keys that may change between a run and its continuation: those that change the result by rounding
# only, and the limits of `numerics`, so that a run that stopped can be continued past that step.
CHANGEABLE = (
    "data.workers",
    "data.max_bad",
    "data.changes",  # of steps that are still to come: those before are in the data's fingerprint
    "batch_per_process",
    "device",
    "deterministic",
    "shard",
    "log_every",
    "checkpoint",
    "numerics",
    "hang",
    "evaluators",
    "validation",
    "slurm",
    "wandb",
    "branches",
)


def load(
    stage: str,
    overrides: list[str] | dict[str, Any],
    init: str | None = None,
    branch: str | None = None,
) -> Config:
    """A stage's config: its file over the files that it names as `base`, then overrides: `a.b=value`
    each, or nested as in a file.

    Raises ValueError naming the stage, file or key, the value, and the way out.
    """
    given = dict(overrides) if isinstance(overrides, dict) else _overrides(overrides)
    merged = merge(stored(stage, given.pop("base", None)), given)
    merged |= {k: v for k, v in (("init", init), ("branch", branch)) if v is not None}
    return checked(merged)


def stored(stage: str, base: str | list[str] | None = None) -> dict[str, Any]:
    """What a stage's file says, over its base files or over others."""
    return _read(find(stage), bases=base)


def checked(merged: dict[str, Any]) -> Config:
    """The config that a mapping describes, whose sections say of what kind. Raises as `load`."""
    _check_keys(merged, "")
    kinds = {"suite": Suite, "evaluator": Evaluating}
    schema = next((kind for key, kind in kinds.items() if key in merged), Training)
    return check(schema, merged, "")


def _check_keys(given: Any, where: str) -> None:
    """Raises ValueError for a key that is no text; YAML has numbers, dates and others as well."""
    for key, value in given.items() if isinstance(given, dict) else enumerate(given):
        if isinstance(given, dict) and not isinstance(key, str):
            raise ValueError(
                f"{where or 'the config'}: {key!r} is no key, which is a name. Write name: value."
            )
        if isinstance(value, (dict, list, tuple)):
            _check_keys(value, f"{where}.{key}" if where else str(key))


def find(stage: str) -> Path:
    """The file of a stage: a path to a .yaml, or a name under configs/, first here, then in the
    package."""
    named = [folder / f"{stage}.yaml" for folder in _folders()]
    places = [Path(stage)] if stage.endswith(".yaml") else named
    for place in places:
        if place.is_file():
            return place
    raise ValueError(plugin.unknown("--stage: no stage", stage, stages(), quote=True))


def stages() -> list[str]:
    """The stages that can be named: configs here and in the package that are a run by themselves."""
    files = {p.relative_to(f) for f in _folders() for p in f.rglob("*.yaml")}
    return sorted(str(p.with_suffix("")) for p in files if p.parts[0] not in ("size", "curate"))


def _read(path: Path, seen: tuple[Path, ...] = (), bases: Any = None) -> dict[str, Any]:
    """A file over the files it names as `base` (or over others), looked for beside it and in
    configs/."""
    if path in seen:
        raise ValueError(f"{path}: is its own base.")
    own = _loaded(path)
    named = own.pop("base", [])
    bases = named if bases is None else bases
    merged: dict[str, Any] = {}
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(
            f"{path}: base: {bases!r} is no file's name, nor a list of them, as size/vit_l16.yaml."
        )
    for base in bases:
        merged = merge(merged, _read(_base(base, path), (*seen, path)))
    return merge(merged, own)


def _loaded(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ValueError with its name."""
    try:
        own = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except Exception as error:  # PyYAML's own errors
        raise ValueError(f"{path}: is not YAML: {error}") from error
    if not isinstance(own, dict) or not own:
        raise ValueError(f"{path}: is empty. A config names an objective, an evaluator or a suite.")
    return own


def _folders() -> list[Path]:
    return plugin.folders("configs", "configs")


def _base(name: str, path: Path) -> Path:
    for folder in (path.parent, *_folders()):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{path}: base: there is no {name} beside it or in configs/.")


# Keys whose values are texts that may look like numbers: durations, which need a unit, and amounts.
_TEXTS = ("length", "every", "permanent", "warmup", "log_every", "subset")


def _overrides(given: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for one in given:
        key, equals, _ = one.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ValueError(
                f"{one!r}: an override is key=value, as in optim.lr=1e-4; flags are --stage --init --out "
                f"--nodes --procs --slurm --hours --dry-run --replay --doctor --list."
            )
        try:
            result = merge(result, OmegaConf.to_container(OmegaConf.from_dotlist([one])))
        except Exception as error:  # OmegaConf's and PyYAML's
            quote = ""
            if "{" in one or "[" in one:
                quote = f" A shell cuts values at blanks: quote it, as in '{key}={{name: value}}'."
            raise ValueError(f"{one!r}: cannot be read: {error}{quote}") from error
    return result


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`high` over `low`, section by section; a section whose `name` changes starts empty."""
    result = dict(low)
    for key, value in high.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            other = "name" in value and "name" in old and value["name"] != old["name"]
            result[key] = dict(value) if other else merge(old, value)
        else:
            result[key] = value
    return result


def check(schema: type, given: Any, where: str) -> Any:
    """`given` as a dataclass, every value coerced by its annotation. Raises ValueError naming the
    key."""
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {given!r} is no section. It has: {', '.join(_names(schema))}.")
    if schema is Optim:
        return _optim(given, where)
    if schema is Training:
        given = _moved(given)
    return schema(**_values(schema, given, where, _names(schema)))


def _moved(given: dict[str, Any]) -> dict[str, Any]:
    """A run's values with data.resample in place of the hashtag objective's own option, by which older
    versions repeated images of rare tags."""
    objective, data = given.get("objective"), given.get("data")
    if not isinstance(objective, dict) or "resample" not in objective or not isinstance(data, dict):
        return given
    if objective.get("name") != "hashtag":  # others mean another thing by it
        return given
    objective = dict(objective)
    threshold = objective.pop("resample")
    if threshold is not None:
        if data.get("resample") is not None:
            raise ValueError(
                f"objective.resample: {threshold} stands beside data.resample, which takes its place. "
                f"Leave it out."
            )
        law = {"by": "hashtags", "law": "repeat_factor", "t": threshold}
        data = data | {"resample": law | {"vocabulary": objective.get("vocabulary")}}
    return given | {"objective": objective, "data": data}


def _optim(given: dict[str, Any], where: str) -> Optim:
    """The section whose keys are those of Optim and the options of the optimizer that it names."""
    name, keys = given.get("name", Optim.name), _names(Optim)
    optimizer = plugin.find("optimizers", name)
    options = plugin.options(optimizer)
    if taken := sorted(options.keys() & set(keys)):
        raise ValueError(
            f"{where}.name: {name} calls an option {', '.join(taken)}, which is a key of {where} "
            f"already. Rename the option."
        )
    own = {k: v for k, v in given.items() if k not in options}
    chosen = {k: v for k, v in given.items() if k in options}
    values = _values(Optim, own, where, [*keys, *options])
    every = plugin.defaults(optimizer) | plugin.check(optimizer, chosen, where)
    return Optim(**values, options=every)


def _values(schema: type, given: dict[str, Any], where: str, known: list[str]) -> dict[str, Any]:
    """The coerced values of a dataclass's fields; known: the keys that an error lists."""
    hints, values, dot = typing.get_type_hints(schema), {}, f"{where}." if where else ""
    for key, value in given.items():
        if key not in known:
            text = plugin.unknown(f"{dot}{key}: unknown key", key, known, prefix=where)
            raise ValueError(text + _meant(schema, key))
        if dataclasses.is_dataclass(hints[key]):
            values[key] = check(hints[key], value, f"{dot}{key}")
        else:
            if key in _TEXTS and type(value) in (int, float):  # its own message says what to write
                value = str(value)
            if schema is Evaluating and key == "data" and isinstance(value, dict):
                raise ValueError(
                    f"{key}: {value!r} is no card. An evaluation reads one: data=CARD."
                )
            values[key] = plugin.coerce(value, hints[key], f"{dot}{key}")
            ranges.check(where, key, values[key], f"{dot}{key}")
    for one in dataclasses.fields(schema):
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and one.name not in values:
            raise ValueError(f"{dot}{one.name}: is missing, and has no default.")
    return values


def _meant(schema: type, key: str) -> str:
    """What a key may be meant as that other programs have."""
    if schema is Training and key in ("epochs", "steps", "iterations"):
        return f" For {key} write length=90ep or length=1000it."
    if schema is Evaluating:
        return f" An evaluator's own options stand under it: evaluator.{key}."
    return ""


def _names(schema: type) -> list[str]:
    """The keys of a section; an optimizer's options stand beside Optim's, not under a key."""
    left_out = ("options",) if schema is Optim else ()
    return [f.name for f in dataclasses.fields(schema) if f.name not in left_out]


def with_change(data: Data, change: dict[str, Any], where: str) -> Data:
    """The data section from a change of it on: what it names, over what was before."""
    known = ("from", "train", "subset", "resample")
    for key in change:
        if key not in known:
            raise ValueError(plugin.unknown(f"{where}.{key}: unknown key", key, [*known]))
    if "from" not in change:
        raise ValueError(f"{where}.from: is missing: the step of the change, as in from: 50%.")
    values = {key: value for key, value in change.items() if key != "from"}
    return check(Data, {**dataclasses.asdict(data), **values, "changes": []}, where)


def plain(config: Config) -> dict[str, Any]:
    """Every key of a checked config with its value, defaults included, as YAML can hold it."""
    values = _listed(dataclasses.asdict(config))
    if "optim" in values:
        values["optim"] |= values["optim"].pop("options")
    return values


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def write(values: dict[str, Any], path: Path) -> None:
    """Saves a plain config, whole or not at all."""
    with draft(path) as place:
        OmegaConf.save(OmegaConf.create(values), place)


def text(config: Config) -> str:
    """A checked config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config))).rstrip()


def read(path: Path, asked: Config | None = None) -> dict[str, Any]:
    """A plain config that `write` saved.

    asked: what the user asks for now. Raises ValueError for a file that is damaged, or that names a
    module which is not trusted and not named by `asked` (see plugin.check_trusted).
    """
    values = _loaded(path)
    known = () if asked is None else plugin.modules(dataclasses.asdict(asked))
    plugin.check_trusted(values, str(path), known)
    return values


def read_training(path: Path, asked: Config | None = None) -> Training:
    """The checked config of a run that trained, read as `read` does; keys that are newer than the
    run have their defaults."""
    try:
        return check(Training, read(path, asked), "")
    except ValueError as error:
        raise ValueError(error if str(path) in str(error) else f"{path}: {error}") from error


def differences(
    old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...] = CHANGEABLE
) -> list[str]:
    """'optim.lr: 0.1 -> 0.2' for every key that differs and is not `free` to."""
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = [k for k in sorted({*before, *after}) if before.get(k) != after.get(k)]
    return [
        f"{k}: {before.get(k)} -> {after.get(k)}"
        for k in keys
        if not any(k == c or k.startswith(c + ".") for c in free)
    ]


def _flat(value: Any, where: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for k, v in value.items() for pair in _flat(v, f"{where}.{k}" if where else k)]
    return [(where, value)]
