"""The architecture: which room, and which file in it, may import which."""

import ast
import importlib
import inspect
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from prepretrain import contracts
from prepretrain.plugin import KINDS, SHARED

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prepretrain"

# A room imports only from rows above its own.
ROWS = [
    {"contracts", "files", "jsonl", "ranges"},
    {"plugin", "distributed"},
    {"command", "config", "data", "zoo", "cluster"},
    {"models", "training"},
    {"losses"},
    {"objectives"},
    {"evaluation"},
    {"runs"},
    {"scaling", "curation"},
    {"reports"},
]
READERS_OF_CONFIG = {"runs", "scaling"}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")
ROOMS = sorted(set.union(*ROWS))


def module(path: Path) -> str:
    """The dotted name of a file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module(p): p for p in FILES}


def room(name: str) -> str:
    """The room of a module: `models` of prepretrain.models.encoders.vit."""
    return name.split(".")[1]


@cache
def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, and the names that it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@cache
def ours(name: str) -> set[str]:
    """Our modules that one of them imports."""
    return imported(MODULES[name]) & MODULES.keys()


def row(name: str) -> int:
    """The number of a room's row."""
    return next(i for i, names in enumerate(ROWS) if name in names)


def test_every_file_is_in_a_room_and_every_room_has_a_file():
    assert {room(name) for name in MODULES} == set(ROOMS)


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_only_from_rows_above_its_own(name):
    others = {one for one in ours(name) if room(one) != room(name)}
    below = {one for one in others if row(room(one)) >= row(room(name))}
    assert not below, f"{name} imports {below}"


@pytest.mark.parametrize("name", ROOMS)
def test_no_files_of_a_room_import_each_other_in_a_circle(name):
    inside = {one: ours(one) for one in MODULES if room(one) == name}
    TopologicalSorter(inside).prepare()  # raises CycleError, which names the files


def test_no_folders_of_data_import_each_other_in_a_circle():
    folder = {name: name.split(".")[2] for name in MODULES if name.count(".") == 3}
    inside = {name: at for name, at in folder.items() if name.startswith("prepretrain.data.")}
    others = {at: set() for at in inside.values()}
    for name, at in inside.items():
        # sources, which are plug-ins, share their base with all
        others[at] |= {inside[one] for one in ours(name) & inside.keys()} - {at, "sources"}
    TopologicalSorter(others).prepare()
    assert {"shards", "tags", "video"} <= others["sources"]


@pytest.mark.parametrize("folder", KINDS.values(), ids=KINDS)
def test_plug_ins_of_a_kind_do_not_import_each_other(folder):
    found = {name for name in MODULES if name.startswith(f"{folder}.")}
    shared = {f"{folder}.{name}" for name in SHARED}
    assert f"{folder}.base" in found
    for name in found:
        assert ours(name) & found <= shared, name


def test_only_what_plans_and_starts_runs_reads_the_config():
    readers = {room(name) for name in MODULES if "prepretrain.config" in ours(name)}
    assert readers == READERS_OF_CONFIG


def users(library: str) -> set[str]:
    """The modules that import a library, or a part of it."""
    return {
        name
        for name, path in MODULES.items()
        if any(f"{one}.".startswith(f"{library}.") for one in imported(path))
    }


def test_only_the_encoders_import_timms_models():
    assert all(name.startswith("prepretrain.models.encoders.") for name in users("timm.models"))


def test_only_its_encoder_the_text_towers_and_zero_shot_import_open_clip():
    allowed = ("models.encoders.", "models.text.", "evaluation.evaluators.zeroshot")
    for name in users("open_clip"):
        assert name.removeprefix("prepretrain.").startswith(allowed), name


def test_only_the_engine_of_curation_imports_datatrove_and_duckdb():
    assert users("datatrove") | users("duckdb") == {"prepretrain.curation.engine"}


def test_nothing_imports_the_tools():
    assert not users("tools") and not users("datasets")


def test_scripts_are_no_packages():
    assert not list((ROOT / "tools").glob("__init__.py")) and not list(
        (ROOT / "datasets").rglob("__init__.py")
    )


@pytest.mark.parametrize("name", MODULES)
def test_no_class_has_a_name_that_is_nearly_one_that_others_ask_for(name):
    loaded = importlib.import_module(name)
    for one in vars(loaded).values():
        if inspect.isclass(one) and one.__module__ == name:
            contracts.check(one)
