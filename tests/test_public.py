"""The public names of `prepretrain`, and what importing them costs."""

import ast
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_features import tiny_model

import prepretrain as pp
from prepretrain import plugin

ROOT = Path(__file__).parents[1]


def modules_after(*arguments: str) -> set[str]:
    """The modules that a new Python has imported when it is done."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('imported', *sys.modules, file=sys.stderr))\n"
        f"sys.argv = {list(arguments)!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split()[1:])


def test_the_listing_for_type_checkers_is_the_table():
    tree = ast.parse(Path(pp.__file__).read_text())
    listed = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("prepretrain.")
        for alias in node.names
    }
    assert listed == pp._PUBLIC


@pytest.mark.parametrize("name", pp.__all__)
def test_a_public_name_is_what_its_module_defines(name):
    found = getattr(pp, name)
    assert f"{found.__module__}.{found.__name__}" == pp._PUBLIC[name]
    assert name in dir(pp)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        pp.laod  # noqa: B018


def test_importing_the_package_imports_no_torch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import prepretrain; assert 'evaluate' in dir(prepretrain)")
    assert "torch" not in modules_after(str(script))


@pytest.mark.parametrize("tool", sorted(p.name for p in (ROOT / "tools").glob("*.py")))
def test_the_help_of_a_tool_imports_no_torch(tool):
    assert "torch" not in modules_after(f"tools/{tool}", "--help")


def test_a_model_is_measured_in_one_line(place):
    found = pp.evaluate(tiny_model(), "knn", data="colours", pool="mean", k=5, workers=0)
    assert found["images"] == 60 and 0 <= found["top1"] <= 100
    assert sorted(p.name for p in place.iterdir()) == ["data", "datasets", "small.yaml"]
    assert not torch.distributed.is_initialized()


def test_features_are_kept_in_a_folder_that_is_named(place):
    model = tiny_model()
    options = {"data": "colours", "pool": "mean", "k": 5, "workers": 0}
    found = pp.evaluate(model, "knn", folder="kept", **options)
    assert any(Path("kept/features").iterdir())
    assert pp.evaluate(model, "knn", folder="kept", **options) == found


def test_an_evaluator_that_trains_is_run_too(place):
    options = {"method": "linear", "shots": [2], "seeds": 1, "workers": 0}
    options |= {"epochs": 1, "warmup": 0}
    assert pp.evaluate(tiny_model(), "lowshot", data="colours", **options)
    assert not torch.distributed.is_initialized()


def test_an_option_that_an_evaluator_does_not_have_is_named(place):
    with pytest.raises(ValueError, match="evaluator.neighbours: unknown option"):
        pp.evaluate(tiny_model(), "knn", data="colours", neighbours=5)


def test_the_objective_that_contributing_shows_trains(place, monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = re.search(r"    from functools.*?(?=\n    PYTHONPATH)", text, re.DOTALL).group()
    Path("my_lab").mkdir()
    Path("my_lab/rotation.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(place)
    folder = pp.launch("small.yaml", ["objective={name: my_lab.rotation}", "length=3it"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(0 < row["loss"] < 10 for row in rows)


def test_a_package_that_one_feature_needs_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    plugin.require("torch", "text", "model.text")
    with pytest.raises(ValueError, match=r'model.text: .*pip install "prepretrain\[text\]"'):
        plugin.require("sentencepiece", "text", "model.text")


def test_a_run_without_tensorboard_is_logged_all_the_same(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    folder = pp.launch("small.yaml", ["length=3it"])
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert not (folder / "tensorboard").exists()
