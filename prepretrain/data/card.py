"""What a dataset is: a YAML card with its splits, licence and class names, and how to open one."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prepretrain import plugin
from prepretrain.data import labels, subset
from prepretrain.data.io.paths import find_shards
from prepretrain.data.shards.files import Shard
from prepretrain.data.sources.base import Source, check_fields

_TEXTS = ("description", "licence")
_PATTERN = "*?[{"
_PATHS = ("path", "maps", "listing", "keep")  # options of sources that start at the data folder
_VARIANTS = ("corruption", "severity")
_REPEATED = 10_000  # not from the paper: values that a card's aliases stand for, in all


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
    groups: labels.Groups | None  # where its classes are some of another card's, or groups of them
    answers: Path | None  # the right classes of each image of `val`, several or none
    values: dict[str, Any]  # options of all its sources: what the numbers in its maps mean

    @property
    def images(self) -> dict[str, int | None]:
        """The number of images of each split, as declared; None where it is left to the data."""
        return {
            split: self._subset(split).count(options.get("images"), self._where(split))
            for split, options in self.splits.items()
        }

    def open(
        self, split: str, *, corruption: str | None = None, severity: int | None = None
    ) -> Source:
        """The source of one split, checked against what the card declares.

        A split with `corruptions` is opened with one of them and a severity. Raises MissingData
        where there is nothing, and ValueError for what is not as declared.
        """
        where = f"{self.path}: {split}"
        options = self._options(split)
        options.pop("subset", None)
        declared, name = options.get("images"), options.pop("source")
        if any(key in options for key in _VARIANTS) or (corruption, severity) != (None, None):
            options["path"] = self._variant(split, corruption, severity)
        for key in _VARIANTS:
            options.pop(key, None)
        for key in _PATHS:
            if key in options:
                options[key] = self._located(options[key], split)
        try:
            if "images" not in plugin.options(plugin.find("sources", name)):
                options.pop("images", None)  # a source that makes its images takes it itself
            source = plugin.build("sources", name, **options)
            check_fields(source.fields, f"source '{name}'")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if declared is not None and declared != len(source):
            raise ValueError(
                f"{where}: the card declares images: {declared}, and the data holds "
                f"{len(source)}. Correct the card, or complete the data."
            )
        if source.classes:
            self._check_classes(where, len(source.classes))
            self._check_other_splits(where, split, source.classes)
        return self._subset(split).of(source, self._where(split))

    def shards(self, split: str) -> list[Shard]:
        """The tar shards of a split, which are not opened. Raises ValueError for one of other files."""
        options = self._options(split)
        if options["source"] != "shards":
            raise ValueError(
                f"{self.path}: {split}: is read by {options['source']}, not from shards."
            )
        try:
            return find_shards(self._located(options["path"], split))
        except ValueError as error:
            raise ValueError(f"{self.path}: {split}: {error}") from error

    def _subset(self, split: str) -> subset.Choice:
        """Which images of its data a split holds."""
        return subset.choice(self.splits[split].get("subset", "100%"), self._where(split))

    def _where(self, split: str) -> str:
        return f"{self.path}: {split}.subset"

    def corruptions(self, split: str = "val") -> dict[str, list[int]]:
        """{corruption: its severities}, which a split declares; {} for one without."""
        options = self._options(split)
        return {name: list(options["severity"]) for name in options.get("corruption", ())}

    def missing(self, split: str = "val") -> dict[str, list[int]]:
        """Those of `corruptions` whose folder is not there; {} where all are."""
        absent = {
            name: [n for n in levels if not (data_folder() / self._path(split, name, n)).is_dir()]
            for name, levels in self.corruptions(split).items()
        }
        return {name: levels for name, levels in absent.items() if levels}

    def open_answers(self, split: str) -> list[list[int]]:
        """The classes that are right for each image of a split, in the order of its source.

        An image without one is left out of the score ("Are we done with ImageNet?", Beyer et al.
        2020). Raises MissingData without the file or the images, and ValueError for an image whose
        name has no number, or one that the file does not reach.
        """
        where = f"{self.path}: {split}"
        if self.answers is None:
            raise ValueError(f"{where}: the card has no answers, such as answers: real.json.")
        self._require(self.answers, f"{self.path}: answers")
        source = self.open(split)
        try:
            return labels.answers(self.answers, map(source.key, range(len(source))))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _options(self, split: str) -> dict:
        if split not in self.splits:
            raise ValueError(
                plugin.unknown(f"{self.path}: no split", split, list(self.splits), quote=True)
            )
        options = {**self.values, **self.splits[split]}
        if self.splits[split]["source"] == "label_maps":
            options["classes"] = self.classes or []
        if self.splits[split]["source"] == "video":
            options.setdefault("classes", self.classes)
        return options

    def _path(self, split: str, corruption: str, severity: int) -> str:
        path = str(self.splits[split]["path"])
        return path.replace("{corruption}", corruption).replace("{severity}", str(severity))

    def _variant(self, split: str, corruption: str | None, severity: int | None) -> str:
        """The path of one corruption and severity that the split declares, and that is there."""
        where, declared = f"{self.path}: {split}", self.corruptions(split)
        if not declared:
            raise ValueError(
                f"{where}: has no corruptions, so there is no {corruption!r} of severity "
                f"{severity!r}."
            )
        if corruption not in declared:
            raise ValueError(
                plugin.unknown(f"{where}: no corruption", str(corruption), [*declared], quote=True)
            )
        if severity not in declared[corruption]:
            raise ValueError(
                f"{where}: no severity {severity!r}. There are: "
                f"{', '.join(map(str, declared[corruption]))}."
            )
        path, missing = self._path(split, corruption, severity), self.missing(split)
        if severity in missing.get(corruption, ()):
            every = "; ".join(f"{n} {', '.join(map(str, levels))}" for n, levels in missing.items())
            raise MissingData(
                f"{where}: there is nothing at {data_folder() / path}. All that is missing: {every}."
            )
        return path

    def _check_classes(self, where: str, count: int) -> None:
        """Raises ValueError where the data has another number of classes than the card."""
        named = self.classes if self.groups is None else self.groups.classes
        if named and len(named) != count:
            verb = "names" if self.groups is None else "groups"
            raise ValueError(
                f"{where}: the card {verb} {len(named)} classes, and the data has {count}: labels "
                "would not mean the same."
            )

    def _check_other_splits(self, where: str, split: str, classes: list[str]) -> None:
        """Raises ValueError where the classes of another split, read in the same way, are others."""
        for other, options in self.splits.items():
            if other == split or options["source"] != self.splits[split]["source"]:
                continue
            if any(key in options for key in _VARIANTS):
                continue
            try:
                named = self._class_names(other)
            except (ValueError, OSError):  # which is said where that split is opened
                continue
            if named is not None and named != classes:
                raise ValueError(
                    f"{where}: its classes are not those of split '{other}', so labels would not mean the "
                    f"same: {_difference(classes, named, other)}. Where some have no images in one of them, "
                    f"make empty folders for those, and list all in the key `classes` of both splits."
                )

    def _class_names(self, split: str) -> list[str] | None:
        options = self._options(split)
        options.pop("subset", None)
        kind = plugin.find("sources", options.pop("source"))
        if "images" not in plugin.options(kind):
            options.pop("images", None)
        for key in _PATHS:
            if key in options:
                options[key] = self._located(options[key], split)
        return kind.class_names(**plugin.check(kind, options, "source"))

    def _located(self, path: object, split: str) -> str | list[str]:
        if isinstance(path, list):
            return [self._located(one, split) for one in path]
        path = str(path)
        if "://" in path:
            return path
        located = data_folder() / path
        solid = located
        while any(sign in solid.name for sign in _PATTERN):
            solid = solid.parent
        self._require(located, f"{self.path}: {split}", solid)
        return str(located)

    def _require(self, located: Path, where: str, solid: Path | None = None) -> None:
        if not os.path.exists(solid or located):  # no error for a name that no file can have
            raise MissingData(
                f"{where}: there is nothing at {located}. Put the data of card '{self.name}' there, "
                f"or set PREPRETRAIN_DATA, the folder that relative paths start from (now "
                f"'{data_folder()}')."
            )


def _difference(classes: list[str], named: list[str], other: str) -> str:
    """What tells two lists of classes apart, in words."""
    here, there = set(classes) - set(named), set(named) - set(classes)
    if not here and not there:
        place = next(i for i, (one, two) in enumerate(zip(classes, named)) if one != two)
        return f"label {place} is {classes[place]}, and {named[place]} in '{other}'"
    few = lambda some: ", ".join(sorted(some)[:5]) + (", …" if len(some) > 5 else "")
    parts = [f"only here {few(here)}"] if here else []
    return "; ".join([*parts, *([f"only in '{other}' {few(there)}"] if there else [])])


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
        content = yaml.load(path.read_bytes(), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: a card is a mapping with at least one split, such as "
            "train: {source: folder, path: photos}. This file holds "
            f"{'nothing' if content is None else type(content).__name__}."
        )
    return _card(path, content)


class _Loader(yaml.SafeLoader):
    """YAML whose aliases (*name) stand for so many values at most: a few lines of them could stand
    for more than fits into memory."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self.repeated = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if alias is not None:
            self.repeated += _size(node)
            # the end of a value that an alias within it names has not been met yet
            if node.end_mark is None or self.repeated > _REPEATED:
                what = f"aliases stand for more than {_REPEATED} values, or for themselves"
                raise yaml.composer.ComposerError(None, None, what, alias.start_mark)
        return node


def _size(node: Any) -> int:
    """How many values a value of YAML holds, itself included; counted as far as may be."""
    count, left = 0, [node]
    while left and count <= _REPEATED:
        one = left.pop()
        count += 1
        if isinstance(one, yaml.MappingNode):
            left += [part for pair in one.value for part in pair]
        elif isinstance(one, yaml.SequenceNode):
            left += one.value
    return count


def open_data(address: str) -> Source:
    """The source at "card:split"; without a split, the card's train."""
    if address.endswith(".yaml") or ":" not in address:
        return load_card(address).open("train")
    name, split = address.rsplit(":", 1)
    return load_card(name).open(split)


def _folders() -> list[Path]:
    return plugin.folders("datasets", "cards")


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"no card at {name}. Cards by name: {', '.join(card_names())}.")
        return Path(name)
    for folder in _folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    card, _, split = name.rpartition(":")
    if card in card_names():
        raise ValueError(
            f"no card '{name}': here a card is named without a split, as '{card}'. Its split '{split}' is "
            f"read where a single one is asked for, as in data.train."
        )
    if (
        inside := next((p for p in (data_folder() / name, Path(name)) if p.is_dir()), None)
    ) and name:
        raise ValueError(
            f"no card '{name}', but a folder {inside}. Of a folder of images a card is made: a file "
            f"datasets/mine.yaml with the line  train: {{source: folder, path: {inside.absolute()}}}"
        )
    raise ValueError(
        plugin.unknown("no card", name, card_names(), quote=True)
        + f" A new one is a file datasets/{name}.yaml (datasets/README.md)."
    )


def _card(path: Path, content: dict) -> Card:
    content = dict(content)
    if odd := [key for key in content if not isinstance(key, str)]:
        raise ValueError(f"{path}: the key {odd[0]!r} is no text. Put it in quotes.")
    texts = {key: _text(content.pop(key, None), f"{path}: {key}") or "" for key in _TEXTS}
    classes = _classes(path, content.pop("classes", None))
    vocabulary = _text(content.pop("vocabulary", None), f"{path}: vocabulary")
    names = _names(path, content.pop("names", None), classes)
    templates = _templates(path, content.pop("templates", None))
    groups = _groups(path, content.pop("groups", None), classes)
    answers = _text(content.pop("answers", None), f"{path}: answers")
    values = _values(path, content.pop("values", None))
    for split, options in content.items():
        _check_split(f"{path}: {split}", options)
        if options["source"] == "label_maps" and classes is None:
            raise ValueError(
                f"{path}: classes: are missing; label maps hold numbers, and only the card says of what."
            )
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
        groups,
        data_folder() / answers if answers else None,
        values,
    )


def _text(given: object, where: str) -> str | None:
    if given is None or isinstance(given, str):
        return given
    raise ValueError(f"{where}: {given!r} is not a text. Put it in quotes.")


def _classes(path: Path, classes: object) -> list[str] | None:
    if classes is None:
        return None
    if isinstance(classes, list):
        for name in classes:
            _text("" if name is None else name, f"{path}: classes")
    if not isinstance(classes, list) or not classes or len(set(classes)) != len(classes):
        raise ValueError(f"{path}: classes: must be a list of different names, in label order.")
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


def _groups(path: Path, given: object, classes: list[str] | None) -> labels.Groups | None:
    if given is None:
        return None
    groups = labels.read_groups(given, f"{path}: groups")
    _find(groups.of)  # raises where there is no such card
    if classes is not None and len(classes) != len(groups.classes):
        raise ValueError(
            f"{path}: groups.classes: there are {len(groups.classes)}, and {len(classes)} classes."
        )
    return groups


def _values(path: Path, given: object) -> dict[str, Any]:
    """What the numbers in a card's maps mean: options of their source that all splits have."""
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"{path}: values: {given!r} must be a mapping, such as {{void: [255]}}.")
    return given


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
            "description, licence, classes, names, templates, vocabulary, groups, answers, values."
        )
    if odd := [key for key in options if not isinstance(key, str)]:
        raise ValueError(f"{where}: the key {odd[0]!r} is no text. Put it in quotes.")
    plugin.check_trusted(options, where)
    _check_variants(where, options)
    subset.choice(options.get("subset", "100%"), f"{where}.subset")
    images = options.get("images")
    if images is not None and (
        not isinstance(images, int) or isinstance(images, bool) or images < 1
    ):
        raise ValueError(
            f"{where}.images: {images!r} is not a number of images. Leave the key out "
            "to count the data."
        )


def _check_variants(where: str, options: dict) -> None:
    """A path with {corruption} and {severity} wants the lists of both, and they want it."""
    path = str(options.get("path", ""))
    if not any(key in options or f"{{{key}}}" in path for key in _VARIANTS):
        return
    for key in _VARIANTS:
        values = options.get(key)
        if f"{{{key}}}" not in path or not isinstance(values, list) or not values:
            raise ValueError(
                f"{where}: {{{key}}} in the path and a list {key}: […] of its values go together; "
                f"the path is {path!r}, the list {values!r}."
            )
    if not all(type(level) is int for level in options["severity"]):
        raise ValueError(f"{where}.severity: {options['severity']!r} are not all numbers.")
    if not all(isinstance(name, str) for name in options["corruption"]):
        raise ValueError(f"{where}.corruption: {options['corruption']!r} are not all texts.")
