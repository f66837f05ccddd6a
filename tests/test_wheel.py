"""The wheel: what it holds, and a stage that is started from it, outside of the checkout."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(*arguments, cwd: Path, path: Path | None = None) -> str:
    """What a Python prints that finds the package in `path`, and not in the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which a wheel of this checkout has been installed, without what it requires."""
    place = tmp_path_factory.mktemp("wheel")
    checkout = place / "checkout"  # a copy, as building writes into its folder
    for folder in ("prepretrain", "configs", "datasets", "tools"):
        shutil.copytree(ROOT / folder, checkout / folder)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    quiet = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    python(*quiet, "wheel", "--no-deps", "--no-build-isolation", "./checkout", cwd=place)
    (wheel,) = place.glob("prepretrain-*.whl")
    python(*quiet, "install", "--no-deps", "--target", place / "site", wheel, cwd=place)
    return place / "site"


def test_a_wheel_holds_every_module_config_card_and_tool(installed):
    folders = {"prepretrain": "", "configs": "configs", "datasets": "cards", "tools": "tools"}
    for folder, packaged in folders.items():
        expected = {
            p.relative_to(ROOT / folder)
            for kind in ("*.yaml", "*.py", "*.html", "*.css", "*.js")
            for p in (ROOT / folder).rglob(kind)
        }
        place = installed / "prepretrain" / packaged
        assert expected and expected <= {p.relative_to(place) for p in place.rglob("*")}, folder
    assert (installed / "prepretrain/py.typed").exists()


def test_every_command_of_a_wheel_says_what_it_takes(installed, tmp_path):
    (package,) = (d for d in distributions(path=[str(installed)]) if d.name == "prepretrain")
    commands = {entry.name: entry.value for entry in package.entry_points}
    others = ("plan", "zoo", "report", "scaling", "export", "curate")
    assert set(commands) == {"prepretrain", *(f"prepretrain-{name}" for name in others)}
    for name, value in commands.items():
        module, _, function = value.partition(":")
        start = f"import sys; sys.argv[:] = ['{name}', '--help']"
        call = f"{start}; from {module} import {function}; {function}()"
        assert f"usage: {name} " in python("-c", call, cwd=tmp_path, path=installed)
        assert f"usage: {name} " in python("-c", call, cwd=tmp_path, path=ROOT)  # as if editable


def test_a_stage_is_planned_by_a_wheel_outside_of_the_checkout(installed, tmp_path):
    where = "import prepretrain; print(prepretrain.__file__)"
    assert python("-c", where, cwd=tmp_path, path=installed).startswith(str(installed))
    command = ("-m", "prepretrain.tools.launch", "--stage", "mae", "--dry-run")
    options = ("base=size/vit_b16.yaml", "data.train=imagefolder", "length=100it")
    said = python(*command, *options, cwd=tmp_path, path=installed)
    facts = json.loads(said.splitlines()[-1])
    assert facts["encoder"] == "vit_b16" and facts["steps"] == 100
    assert str(installed) in facts["data"]  # the card that is named as lacking its data


def test_a_config_and_a_card_here_come_before_those_of_a_wheel(installed, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "datasets").mkdir()
    (tmp_path / "configs/mae.yaml").write_text("mine")
    (tmp_path / "datasets/demo.yaml").write_text("train: {source: synthetic, images: 3, seed: 0}")
    code = (
        "from prepretrain import config, open_data\n"
        "print(config.find('mae'), config.find('wsp'), len(open_data('demo')))"
    )
    mine, theirs, images = python("-c", code, cwd=tmp_path, path=installed).split()
    assert (mine, images) == ("configs/mae.yaml", "3") and theirs.startswith(str(installed))


def test_a_wheel_writes_the_zoo_page_only_where_it_is_told_to(installed, tmp_path):
    script = ("-m", "prepretrain.tools.zoo", "write")
    with pytest.raises(AssertionError, match="the following arguments are required: --out"):
        python(*script, cwd=tmp_path, path=installed)
    python(*script, "--out", "page.md", cwd=tmp_path, path=installed)
    assert (tmp_path / "page.md").read_text() == (ROOT / "MODEL_ZOO.md").read_text()
