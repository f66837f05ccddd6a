"""The architecture: which file may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prepretrain"

# A file imports only from rows above its own.
ROWS = [
    {"ports"},
    {
        *("plugin", "clock", "distributed", "download", "transforms", "hashtags", "heads"),
        *("index", "labels", "slurm", "store", "text"),
    },
    {
        *(
            "log",
            "lease",
            "results",
            "config",
            "weights",
            "sources",
            "encoders",
            "shard",
            "checkpoint",
            "zoo",
        ),
        *("corruptions", "watch"),
    },
    {
        "model",
        "card",
        "optim",
        "decoder",
        "probing/logistic",
        "probing/adapters",
        "catalogue",
        "contrastive",
        "published",
    },
    {"loader", "objectives", "probing/subsets", "numerics"},
    {"train", "features", "memory", "probing/probes"},
    {"validation", "probing/tuning"},
    {"evaluators"},
    {"plan"},
    {"run", "capacity"},
    {"suite", "replay", "doctor"},
    {"launch", "report"},
]
PLUG_INS = {"objectives", "evaluators", "sources", "encoders"}
READERS_OF_CONFIG = {"plan", "capacity", "run", "suite", "launch", "replay", "doctor"}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def noun(path: Path) -> str:
    """The row's name for a file: itself, or its folder if that is one of plug-ins."""
    return _row_name(path.relative_to(PACKAGE).with_suffix("").parts)


def _row_name(parts: tuple[str, ...]) -> str:
    inside = (PACKAGE / parts[0]).is_dir() and parts[0] not in PLUG_INS
    return "/".join(parts[: 1 + inside])


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """The rows' names that a file imports from."""
    names = {n for n in imported(path) if n.startswith("prepretrain.")} - {"prepretrain.probing"}
    return {_row_name(tuple(name.split(".")[1:])) for name in names} - {noun(path)}


def row(name: str) -> int:
    """The number of a name's row."""
    return next(i for i, names in enumerate(ROWS) if name in names)


def test_every_file_has_a_row_and_every_row_a_file():
    assert {noun(p) for p in FILES} == set.union(*ROWS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_rows_above_its_own(path):
    below = {name for name in ours(path) if row(name) >= row(noun(path))}
    assert not below, f"{path.name} imports {below}"


def test_plug_ins_of_a_kind_do_not_import_each_other():
    for path in FILES:
        kind = path.parent.name
        if kind in PLUG_INS:
            peers = {n for n in imported(path) if n.startswith(f"prepretrain.{kind}.")}
            assert all(n.startswith(f"prepretrain.{kind}.base") for n in peers), f"{path}: {peers}"


def test_only_what_plans_and_starts_runs_reads_the_config():
    assert {noun(p) for p in FILES if "config" in ours(p)} == READERS_OF_CONFIG


def test_only_the_encoders_import_timms_models():
    for path in FILES:
        if noun(path) != "encoders":
            assert not any(name.startswith("timm.models") for name in imported(path)), path


def test_only_its_encoder_the_text_towers_and_zero_shot_import_open_clip():
    for path in FILES:
        if path.stem not in ("openclip", "text", "zeroshot"):
            assert not any(name.split(".")[0] == "open_clip" for name in imported(path)), path


def test_nothing_imports_the_tools():
    for path in FILES:
        assert not any(name.split(".")[0] in ("tools", "datasets") for name in imported(path)), path


def test_scripts_are_no_packages():
    assert not list((ROOT / "tools").glob("__init__.py")) and not list(
        (ROOT / "datasets").rglob("__init__.py")
    )
