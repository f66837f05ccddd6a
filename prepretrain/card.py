"""What a dataset is: a YAML card with its splits, licence and class names, and how to open one."""

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from prepretrain import plugin
from prepretrain.sources.base import Source

_HERE = Path(__file__).resolve().parents[1] / "datasets"
_TEXTS = ("description", "licence")
_PATTERN = "*?[{"


class MissingData(ValueError):
    """There is nothing where a card says that its data lies."""


@dataclass(frozen=True)
class Card:
    """A dataset by name; nothing is read from its data until `open`."""

    name: str
    path: Path
    description: str
    licence: str
    classes: list[str] | None
    vocabulary: Path | None
    splits: dict[str, dict]
    names: dict[str, list[list[str]]]  # for zero-shot, by language: each class's synonyms
    templates: dict[str, list[str]]  # for zero-shot, by language

    @property
    def images(self) -> dict[str, int | None]:
        """The declared number of images of each split; None where it is left to the data."""
        return {split: options.get("images") for split, options in self.splits.items()}

    def open(self, split: str) -> Source:
        """The source of one split, checked against what the card declares."""
        where = f"{self.path}: {split}"
        if split not in self.splits:
            raise ValueError(
                plugin.unknown(f"{self.path}: no split", split, list(self.splits), quote=True)
            )
        options = dict(self.splits[split])
        declared, name = options.get("images"), options.pop("source")
        if "path" in options:
            options["path"] = self._located(str(options["path"]), split)
        try:
            if "images" not in plugin.options(plugin.find("sources", name)):
                options.pop("images", None)  # a source that makes its images takes it itself
            source = plugin.build("sources", name, **options)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if declared is not None and declared != len(source):
            raise ValueError(
                f"{where}: the card declares images: {declared}, and the data holds "
                f"{len(source)}. Correct the card, or complete the data."
            )
        if self.classes and source.classes and len(self.classes) != len(source.classes):
            raise ValueError(
                f"{where}: the card names {len(self.classes)} classes, and the data "
                f"has {len(source.classes)}: labels would not mean the same."
            )
        return source

    def _located(self, path: str, split: str) -> str:
        if "://" in path:
            return path
        located = data_folder() / path
        solid = located
        while any(sign in solid.name for sign in _PATTERN):
            solid = solid.parent
        if not solid.exists():
            raise MissingData(
                f"{self.path}: {split}: there is nothing at {located}. Put the data of card "
                f"'{self.name}' there, or set PREPRETRAIN_DATA, the folder that relative paths "
                f"start from (now '{data_folder()}')."
            )
        return str(located)


def data_folder() -> Path:
    """Where relative data paths of cards start: $PREPRETRAIN_DATA, or ./data."""
    return Path(os.environ.get("PREPRETRAIN_DATA") or "data")


def card_names() -> list[str]:
    """The cards that can be asked for by name."""
    return sorted({file.stem for folder in _folders() for file in folder.glob("*.yaml")})


def load_card(name: str | Path) -> Card:
    """The card of this name, or in this .yaml file."""
    path = _find(str(name))
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: a card is a mapping with at least one split, such as "
            "train: {source: folder, path: photos}. This file holds "
            f"{'nothing' if content is None else type(content).__name__}."
        )
    return _card(path, content)


def open_source(address: str) -> Source:
    """The source at "card:split"; without a split, the card's train."""
    if address.endswith(".yaml") or ":" not in address:
        return load_card(address).open("train")
    name, split = address.rsplit(":", 1)
    return load_card(name).open(split)


def _folders() -> list[Path]:
    return [Path("datasets"), _HERE]


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"no card at {name}. Cards by name: {', '.join(card_names())}.")
        return Path(name)
    for folder in _folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise ValueError(
        plugin.unknown("no card", name, card_names(), quote=True)
        + f" A new one is a file datasets/{name}.yaml (datasets/README.md)."
    )


def _card(path: Path, content: dict) -> Card:
    content = dict(content)
    texts = {key: str(content.pop(key, "")) for key in _TEXTS}
    classes = _classes(path, content.pop("classes", None))
    vocabulary = content.pop("vocabulary", None)
    names = _names(path, content.pop("names", None), classes)
    templates = _templates(path, content.pop("templates", None))
    for split, options in content.items():
        _check_split(f"{path}: {split}", options)
    if not content:
        raise ValueError(
            f"{path}: no split. A card has at least one, such as "
            "train: {source: folder, path: photos}."
        )
    return Card(
        path.stem,
        path,
        texts["description"],
        texts["licence"],
        classes,
        data_folder() / vocabulary if vocabulary else None,
        content,
        names,
        templates,
    )


def _classes(path: Path, classes: object) -> list[str] | None:
    if classes is None:
        return None
    if not isinstance(classes, list) or len(set(map(str, classes))) != len(classes) or not classes:
        raise ValueError(f"{path}: classes: must be a list of different names, in label order.")
    if not all(isinstance(name, str) for name in classes):
        odd = next(name for name in classes if not isinstance(name, str))
        raise ValueError(f"{path}: classes: {odd!r} is not a text. Put it in quotes.")
    return classes


def _names(path: Path, given: object, classes: list[str] | None) -> dict[str, list[list[str]]]:
    """{language: [[synonym, …] of each class]}; a list alone is English."""
    names = {}
    for language, rows in _by_language(given).items():
        where = f"{path}: names" + (f".{language}" if isinstance(given, dict) else "")
        if not isinstance(rows, list):
            raise ValueError(f"{where}: {rows!r} is not a list of names, in label order.")
        names[language] = [row if isinstance(row, list) else [row] for row in rows]
        check_names(names[language], where)
        if classes is not None and len(rows) != len(classes):
            raise ValueError(
                f"{where}: holds {len(rows)} names, and there are {len(classes)} classes. Name each, "
                f"in label order."
            )
    return names


def check_names(names: list[list[str]], where: str) -> None:
    """Raises ValueError for a class without a name, or a name of two classes, which no text could
    tell apart."""
    if not names:
        raise ValueError(f"{where}: there are no names.")
    seen: dict[str, int] = {}
    for number, synonyms in enumerate(names):
        for name in synonyms or [""]:
            if not isinstance(name, str) or not name.strip():
                raise ValueError(
                    f"{where}: class {number} has the name {name!r}, which is empty or no text."
                )
            if seen.setdefault(name.strip().casefold(), number) != number:
                raise ValueError(
                    f"{where}: classes {seen[name.strip().casefold()]} and {number} are both called "
                    f"{name!r}, so no text tells them apart. Name them differently."
                )


def _templates(path: Path, given: object) -> dict[str, list[str]]:
    """{language: [template with {} for the name, …]}; a list alone is English."""
    templates = _by_language(given)
    for language, rows in templates.items():
        where = f"{path}: templates" + (f".{language}" if isinstance(given, dict) else "")
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{where}: {rows!r} is not a list of templates.")
        check_templates(rows, where)
    return templates


def check_templates(templates: list[str], where: str) -> None:
    """Raises ValueError for a template without exactly one place, {}, for the name."""
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(
                f"{where}: {template!r} must hold {{}} once, where the name goes, as in "
                f"'a photo of a {{}}.'."
            )


def _by_language(given: object) -> dict[str, object]:
    if given is None:
        return {}
    if isinstance(given, dict):
        return {str(language): rows for language, rows in given.items()}
    return {"en": given}


def _check_split(where: str, options: object) -> None:
    if not isinstance(options, dict) or "source" not in options:
        raise ValueError(
            f"{where}: a split is a mapping with a source, such as {{source: shards, "
            f"path: …}}, not {options!r}. Other keys of a card: "
            "description, licence, classes, names, templates, vocabulary."
        )
    images = options.get("images")
    if images is not None and (
        not isinstance(images, int) or isinstance(images, bool) or images < 1
    ):
        raise ValueError(
            f"{where}.images: {images!r} is not a number of images. Leave the key out "
            "to count the data."
        )
