"""Lists what a config can name: stages, encoder sizes, parts of every kind, and dataset cards."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from prepretrain import config as configs
from prepretrain import plugin
from prepretrain.data import card as cards
from prepretrain.models.encoders import base as encoders

_SENTENCE = re.compile(r".*?\.(?=\s+[A-Z`]|$)", re.DOTALL)  # does not end at "et al. 2018"


class Catalogue(NamedTuple):
    """One kind of thing: its names, a text about each, and each one's options as lines."""

    names: Callable[[], list[str]]
    about: Callable[[str], str]
    options: Callable[[str], list[str]]


def listing(what: str = "") -> str:
    """Lists everything with a line each, one kind ("objectives"), or one name ("mae") with options.

    A name that several kinds have is shown for each of them. Raises ValueError for an unknown one.
    """
    catalogues = _catalogues()
    if what == "":
        return "\n\n".join(_overview(kind, entries) for kind, entries in catalogues.items())
    if what in catalogues:
        return _overview(what, catalogues[what])
    named = {kind: entries for kind, entries in catalogues.items() if what in entries.names()}
    if not named:
        names = {name for entries in catalogues.values() for name in entries.names()}
        known = [*catalogues, *sorted(names)]
        raise ValueError(plugin.unknown("--list: there is no", what, known, quote=True))
    return "\n\n".join(_details(kind, entries, what) for kind, entries in named.items())


def _catalogues() -> dict[str, Catalogue]:
    parts = {
        kind: Catalogue(*(partial(f, kind) for f in (plugin.names, _part, _part_options)))
        for kind in plugin.KINDS
    }
    return {
        "stages": Catalogue(configs.stages, _stage, _stage_keys),
        **parts,
        "sizes": Catalogue(lambda: sorted(encoders.sizes()), _size, _size_options),
        "cards": Catalogue(cards.card_names, _card, _card_splits),
    }


def _overview(kind: str, entries: Catalogue) -> str:
    names = entries.names()
    column = max(map(len, names), default=0) + 2
    lines = [f"  {name:<{column}}{_first_sentence(entries.about(name))}" for name in names]
    return "\n".join([f"{kind}:", *lines])


def _details(kind: str, entries: Catalogue, name: str) -> str:
    lines = [*entries.about(name).splitlines(), "", *entries.options(name)]
    return "\n".join([f"{kind}: {name}", *(f"  {line}".rstrip() for line in lines)])


def _first_sentence(text: str) -> str:
    paragraph = " ".join(re.split(r"\n(?:\n|  )", text)[0].split())  # commands are indented
    sentence = _SENTENCE.match(paragraph)
    return sentence.group() if sentence else paragraph


def _stage(name: str) -> str:
    """The comment that a config begins with."""
    lines = configs.find(name).read_text().splitlines()
    comment = lines[: next((i for i, line in enumerate(lines) if line[:1] != "#"), len(lines))]
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in comment)


def _stage_keys(name: str) -> list[str]:
    return configs.text(configs.load(name, [])).splitlines()


def _part(kind: str, name: str) -> str:
    return inspect.getdoc(plugin.find(kind, name)) or ""


def _part_options(kind: str, name: str) -> list[str]:
    return _options(plugin.find(kind, name), {})


def _size(name: str) -> str:
    family, preset = encoders.find(name)
    values = ", ".join(f"{key}={value}" for key, value in preset.items())
    return f"{family.__module__.rpartition('.')[2]}: {values or inspect.getdoc(family)}"


def _size_options(name: str) -> list[str]:
    return _options(*encoders.find(name))


def _options(factory: type, values: dict[str, Any]) -> list[str]:
    """What the constructor says of its options, and each with its default (or the value given)."""
    options = [
        option.replace(default=values.get(name, option.default))
        for name, option in plugin.options(factory).items()
    ]
    if not options:
        return ["no options"]
    lines = [str(option) + " (required)" * (option.default is option.empty) for option in options]
    return [*lines, "", *(inspect.getdoc(factory.__init__) or "").splitlines()]


def _card(name: str) -> str:
    return cards.load_card(name).description


def _card_splits(name: str) -> list[str]:
    card = cards.load_card(name)
    splits = [f"{split}: {options}" for split, options in card.splits.items()]
    return [f"file: {card.path}", f"licence: {card.licence}", *splits]
