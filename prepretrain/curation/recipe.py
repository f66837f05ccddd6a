"""A recipe: which stages a curation has, in their order, and their options."""

from pathlib import Path
from typing import Any

import yaml

from prepretrain import plugin
from prepretrain.curation.stages.base import Stage

_NO_TABLES = ("tasks",)  # folders of a curation that are something else


class Recipe:
    """The stages of a recipe by the name of their table, in order."""

    def __init__(self, path: Path, content: Any):
        """Raises ValueError for what is no recipe, or reads what no earlier stage makes."""
        self.path, self.content = path, content
        self.stages: dict[str, Stage] = {}
        self.options: dict[str, dict[str, Any]] = {}
        if not isinstance(content, dict) or not content:
            raise ValueError(
                f"{path}: a recipe is a mapping of stages to their options, such as look: {{}}."
            )
        for name, options in content.items():
            self._add(name, options)

    def _add(self, name: Any, options: Any) -> None:
        where = f"{self.path}: {name}"
        if options is None:
            options = {}
        if not isinstance(name, str) or not name.isidentifier() or name in _NO_TABLES:
            raise ValueError(f"{where}: is no name of a stage: letters, digits and _.")
        if not isinstance(options, dict):
            raise ValueError(f"{where}: {options!r} is no mapping of options.")
        given = {"name": name, **options}
        try:
            stage = plugin.build(
                "curation_stages", given["name"], **{k: v for k, v in given.items() if k != "name"}
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        table = stage.table or name
        if table in self.stages:
            raise ValueError(f"{where}: a second stage that makes the table '{table}'.")
        for earlier, columns in stage.reads.items():
            self._check_reads(where, earlier, columns)
        self.stages[table] = stage
        self.options[table] = given

    def _check_reads(self, where: str, earlier: str, columns: tuple[str, ...]) -> None:
        if earlier not in self.stages:
            raise ValueError(
                f"{where}: reads the table '{earlier}', which no stage before it makes. Before it are: "
                f"{', '.join(self.stages) or 'none'}."
            )
        known = list(self.stages[earlier].columns)
        for column in columns:
            if column not in known:
                raise ValueError(
                    plugin.unknown(
                        f"{where}: the table '{earlier}' has no column", column, known, quote=True
                    )
                )


def load(name: str | Path) -> Recipe:
    """The recipe of a file, or of configs/curate by its name."""
    path = _find(str(name))
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    return Recipe(path, content)


def _find(name: str) -> Path:
    places = [Path(name)] if name.endswith((".yaml", ".yml")) else []
    folders = [folder / "curate" for folder in plugin.folders("configs", "configs")]
    places += [folder / f"{name}.yaml" for folder in folders]
    for place in places:
        if place.is_file():
            return place
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise ValueError(plugin.unknown("--recipe: no recipe", name, known, quote=True))
