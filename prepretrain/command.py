"""The commands of an installed package, `prepretrain`, `prepretrain-plan`, …: each is a script of tools/.

Not `prepretrain.tools.launch:main`, which a wheel has and an editable install has not: setuptools
finds no folder there that has no __init__.py.
"""

import importlib.util
from functools import partial

from prepretrain import plugin


def _run(name: str) -> None:
    """Calls the script's main(), from the wheel or from the checkout."""
    script = plugin.folders("tools", "tools")[1] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"prepretrain.tools.{name}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()


launch = partial(_run, "launch")
plan = partial(_run, "plan")
zoo = partial(_run, "zoo")
report = partial(_run, "report")
scaling = partial(_run, "scaling")
export = partial(_run, "export")
curate = partial(_run, "curate")
