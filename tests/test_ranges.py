"""Every number of a config has a range, and one outside of it is refused before anything starts."""

import dataclasses
import inspect
import itertools
import math
import random
import time
import typing
from collections.abc import Iterator

import pytest

from prepretrain import config, plugin, ranges
from prepretrain.data.sampling.mix import Part
from prepretrain.data.sampling.resample import Resample
from prepretrain.data.subset import Choice
from prepretrain.data.video.views import Views
from prepretrain.evaluation.probing.adapters import ADAPTERS
from prepretrain.models.encoders.vit import ViT
from prepretrain.models.joint import Joint
from prepretrain.models.model import Model
from prepretrain.runs.launch import launch

SECTIONS = {
    "curation_stages": "curation_stage",
    "encoders": "model",
    "evaluators": "evaluator",
    "heads": "model.head",
    "objectives": "objective",
    "optimizers": "optim",
    "sources": "source",
    "towers": "model.text",
}
UNBOUNDED: set[str] = set()  # on purpose: that they are finite is all that can be said


def numeric(hint) -> bool:
    return hint in (int, float) or any(numeric(one) for one in typing.get_args(hint))


def declared() -> Iterator[tuple[str, str]]:
    """(section, option) of every number that a config can set."""
    waiting = [("", schema) for schema in (config.Training, config.Evaluating, config.Suite)]
    while waiting:
        section, schema = waiting.pop()
        for name, hint in typing.get_type_hints(schema).items():
            if dataclasses.is_dataclass(hint):
                waiting.append((name, hint))
            elif numeric(hint):
                yield section, name
    parts = [(s, plugin.find(k, n)) for k, s in SECTIONS.items() for n in plugin.names(k)]
    parts += [("model", Model), ("model.joint", Joint), ("data.subset", Choice), ("views", Views)]
    parts += [("data.resample", Resample), ("data.train", Part)]
    for section, factory in [*parts, *(("adapter", one) for one in ADAPTERS.values())]:
        hints = typing.get_type_hints(factory.__init__)
        for name in plugin.options(factory):
            if numeric(hints[name]):
                yield section, name


def test_every_number_of_a_config_has_a_range_and_every_range_a_number():
    found = set(declared())
    lacking = {f"{s}.{n}" for s, n in found if not ranges.known(s, n)}
    assert lacking == UNBOUNDED and len(found) > 90
    named = {name for s, n in found for name in (f"{s}.{n}" if s else n, n)}
    assert not ranges.RANGES.keys() - named and not ranges._WAYS.keys() - ranges.RANGES.keys()


def test_a_number_outside_of_its_range_is_refused_by_key_value_and_way_out():
    with pytest.raises(ValueError, match=r"^optim.clip: 0 must be finite and above 0; null does"):
        ranges.check("optim", "clip", 0, "optim.clip")
    with pytest.raises(ValueError, match=r"^evaluators\[0\].shots\[1\]: -1 must be at least 1"):
        ranges.check("evaluator", "shots", (1, -1), "evaluators[0].shots")
    for value, bounds in itertools.product((math.nan, math.inf, -math.inf), ranges.RANGES.values()):
        assert not ranges._within(value, bounds)
    for value in (math.nan, math.inf, 2**63, -(2**63)):
        with pytest.raises(ValueError, match="must be a finite number"):
            ranges.check("mine", "alpha", value, "objective.alpha")
    ranges.check("optim", "wandb", None, "wandb")
    ranges.check("", "flag", True, "flag")


def test_the_defaults_of_every_part_lie_in_their_ranges():
    for kind, section in SECTIONS.items():
        for name in plugin.names(kind):
            factory = plugin.find(kind, name)
            for key, value in plugin.defaults(factory).items():
                ranges.check(section, key, value, f"{name}.{key}")


class Mine:
    """A part of somebody else's."""

    def __init__(self, *, mask_ratio: float, layers: int = 0):
        """Their names mean something else."""


Mine.__module__ = "my_lab.mine"


def test_a_part_of_ones_own_may_give_a_name_of_ours_another_range():
    asked = {"mask_ratio": 7, "layers": -3}
    assert plugin.check(Mine, asked, "objective") == asked
    with pytest.raises(ValueError, match="objective.mask_ratio: nan must be"):
        plugin.check(Mine, asked | {"mask_ratio": "nan"}, "objective")
    assert inspect.getdoc(Mine)


BAD = ["optim.ema=nan", "optim.ema=-1", "optim.ema=2", "optim.clip=-1", "optim.clip=0"]
BAD += ["optim.layer_decay=0", "data.max_bad=nan", "hang=nan", "optim.lr=nan", "optim.lr=-1"]
BAD += ["optim.betas=[1,0.9]", "optim.eps=-1", "seed=-1", "data.workers=-1", "optim.lr_end=nan"]
BAD += ["objective.crop_scale=[1,0]", "objective.crop_scale=[0.9,0.1]", "model.std=[0,0,0]"]
BAD += ["objective.decoder_depth=-1", "model.depth=-1", "length=1e300it", "length=1e308ep"]
BAD += ["objective.decoder_width=0", "objective.decoder_heads=0", "model.heads=0", "model.width=0"]
BAD += [
    "model.patch_size=0",
    "optim.weight_decay=inf",
    "objective.mask_ratio=nan",
    "length=1e400it",
]
BAD += ["optim.clip=nan", "model.image_size=9223372036854775808", "batch_size=1e30"]
BAD += ["base=5", "base=[1]", "model.encoder=5", "model.encoder=[1]", "model.encoder={a: 1}"]
BAD += ["model.encoder=-1e400", "optim={1: 2}", "model.head={1: 2}", "objective={1: 2, name: mae}"]
BAD += ["objective.name=.", "objective.name=..", "optim.name=..x", "model.1=2", "shard.group=0"]
BAD += ["optim=1", "model=1", "evaluators=1", "evaluators=[1]", "model.text=1", "model.joint=1"]
BAD += ["model.text={name: [1]}", "evaluators=[{name: knn}]", "data.train=", "data.train=[1]"]
BAD += ["checkpoint.permanent=0.000001it", "validation={data: colours, every: 1e300%}"]


@pytest.mark.parametrize("override", BAD)
def test_a_slip_is_refused_before_anything_starts_and_by_its_key(place, override):
    with pytest.raises(ValueError) as caught:
        launch("small.yaml", [override], out="runs/a", dry_run=True)
    key = override.partition("=")[0]
    assert key.split(".")[0] in str(caught.value), caught.value
    assert not (place / "runs").exists()


VALUES = """nan inf -inf -1 0 1 2 3 7 1e-400 1e400 -1e400 1e30 -1e30 0.5 1.5 -0.0 9223372036854775808
1000000000000000000000000000000 null true no ~ [] [1] [0,0] [nan,nan] [1,2,3] [[1],[2]] [null] {} {1:2}
{name:mae} {name:base} {name:[1]} {name:..base} {a:1} '' "" . .. ../.. /etc/passwd colours colours:val
colours:nope: scenes mae knn vit_test8 vit_mini8 swinv2_test open_clip xlmr 5% 200% 1ep 0ep -1ep 1e300it
1e308ep 1it 3img 0.5it 1e-9it ${x} ${oc.env:HOME} $ !!binary 2020-01-01 0x10 1_000 +1 a=b \u4e2d
\ud83d\ude00 *x &x [1 {a """.split()
USUAL = (
    "1 2 8 0.5 0.9 1e-3 null true false 5% 2it 1ep [0.5,0.9] colours:val fp32 linear mean".split()
)
VALUES += ["", " ", "a b", "\x00", "\n", "x" * 5000, "[" * 200 + "]" * 200]

STAGES = [  # small.yaml with these
    {},
    {
        "model": {"encoder": "vit_test8"},
        "objective": {"name": "hashtag", "vocabulary": "tags.json"},
        "data": {"train": "scenes", "workers": 0},
    },
    {
        "model": {"encoder": "vit_test8", "head": {"classes": 3}},
        "objective": {"name": "classify"},
        "optim": {"name": "lars"},
    },
    {"objective": {"name": "simmim", "cell": 8, "target_window": None}},
    {
        "evaluators": [{"name": "knn", "every": "50%", "pool": "mean"}],
        "validation": {"data": "colours:val"},
    },
]


def keys(given: dict, where: str = "") -> Iterator[str]:
    for key, value in given.items():
        yield f"{where}{key}"
        if isinstance(value, dict):
            yield from keys(value, f"{where}{key}.")


def slips(rng: random.Random) -> Iterator[list[str]]:
    """Overrides of a stage, one or two of them with a value that few would give."""
    known = []
    for stage in STAGES:
        given = [f"{key}={_inline(value)}" for key, value in stage.items()]
        made = config.plain(config.load("small.yaml", given))
        parts = [
            ("model", ViT),
            ("objective", plugin.find("objectives", made["objective"]["name"])),
        ]
        options = {f"{section}.{key}" for section, one in parts for key in plugin.options(one)}
        known.append((given, sorted({*keys(made), *options})))
    while True:
        given, names = rng.choice(known)
        more = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            name = rng.choice(names)
            name += rng.choice([".x", "x", ".", ".0", "[0]"]) if rng.random() < 0.03 else ""
            more.append(f"{name}={rng.choice(rng.choice([VALUES, USUAL]))}")
        yield [*given, *more]


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.faults)])
def test_random_overrides_are_taken_or_refused_and_never_a_fault_of_the_program(
    place, count, capsys
):
    taken, slowest = 0, 0.0
    for given in itertools.islice(slips(random.Random(count)), count):
        before = time.monotonic()
        try:
            launch("small.yaml", given, out="runs/a", dry_run=True)
            taken += 1
        except (ValueError, OSError) as error:
            assert str(error).strip(), given
        except Exception as error:
            raise AssertionError(f"{given}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.monotonic() - before)
    assert count / 20 < taken < count * 19 / 20 and not (place / "runs").exists()
    capsys.readouterr()
    print(f"{count} overrides, {taken} taken, the slowest in {slowest:.1f} s")


def _inline(value) -> str:
    """A value as an override writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return "null" if value is None else str(value)
