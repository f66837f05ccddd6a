"""Finds a part by the name of its file, and builds it from the options its constructor declares."""

import difflib
import importlib
import importlib.resources
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from prepretrain import contracts, ranges

KINDS = {  # the folder of each kind of part
    "curation_stages": "prepretrain.curation.stages",
    "encoders": "prepretrain.models.encoders",
    "evaluators": "prepretrain.evaluation.evaluators",
    "heads": "prepretrain.models.heads",
    "objectives": "prepretrain.objectives",
    "optimizers": "prepretrain.training.optimizers",
    "sources": "prepretrain.data.sources",
    "towers": "prepretrain.models.text",
}
TRUSTED = "PREPRETRAIN_PLUGINS"  # packages whose modules files may name, separated by commas
NAMING = ("name", "encoder", "source")  # keys of files under which a part may stand
# files in these folders that are no part, and that parts import
SHARED = ("base", "captions", "supervised")
_INDEX = re.compile(r"\[\d+\]")  # of an entry of a list, in a key


def folders(name: str, packaged: str) -> list[Path]:
    """Where the files of a folder are looked for: `name` in the current directory, then the one
    that comes with the package.

    A wheel holds that one as `packaged` (setup.py); in a checkout it lies beside the package.
    """
    package = Path(str(importlib.resources.files("prepretrain")))
    installed = package / packaged
    return [Path(name), installed if installed.is_dir() else package.parent / name]


def require(package: str, extra: str, where: str) -> None:
    """Raises ValueError if a package that only one feature needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{where}: needs the package {package}, which is not installed. "
            f'pip install "prepretrain[{extra}]"'
        )


def names(kind: str) -> list[str]:
    """The parts of a kind ("objectives", "encoders", …): one per file of that folder."""
    package = importlib.import_module(KINDS[kind])
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in SHARED)


def find(kind: str, name: str) -> type:
    """The class in the file `name` of the kind's folder, or in a dotted module outside of it.

    Raises ValueError also for a name that the file's classes define and nobody asks for: see
    `contracts.check`.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"{kind}.name: must be a name, not {name!r}. There are: {', '.join(names(kind))}."
        )
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(unknown(f"{kind}: no module", name, names(kind), quote=True))
    if "." not in name and name not in names(kind):
        raise ValueError(
            unknown(f"no {kind.rstrip('s').replace('_', ' ')}", name, names(kind), quote=True)
        )
    if "." in name and not _is_module(name):
        raise ValueError(f"{kind}: {name!r} is no name of a module, such as my_lab.jepa.")
    module = name if "." in name else f"{KINDS[kind]}.{name}"
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise ValueError(
                f"{kind}: there is no module '{module}'. Is its folder on PYTHONPATH?"
            ) from error
        raise
    base = _base(kind)
    classes = [c for c in vars(loaded).values() if inspect.isclass(c) and c.__module__ == module]
    for one in classes:
        contracts.check(one, base)
    found = [c for c in classes if issubclass(c, base)]
    if len(found) != 1:
        raise ValueError(
            f"{module}: must define one {base.__name__}, and defines {len(found)}: "
            f"{', '.join(c.__name__ for c in found) or 'none'}."
        )
    return found[0]


def modules(content: Any) -> set[str]:
    """The modules outside of the package that values of a file name as parts."""
    found, left = set(), [content]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            found |= {v for k, v in one.items() if k in NAMING and _is_module(v)}
            left += one.values()
        elif isinstance(one, (list, tuple)):
            left += one
    return found


def _is_module(name: Any) -> bool:
    """Whether a value is a dotted name that could be imported."""
    return isinstance(name, str) and "." in name and all(p.isidentifier() for p in name.split("."))


def check_trusted(content: Any, where: str, known: Collection[str] = ()) -> None:
    """Raises ValueError if what was read from a file names a module that is not trusted.

    To import a module runs it, and a file may be somebody else's. Trusted are modules that are
    imported already, those of the packages in PREPRETRAIN_PLUGINS, and `known` ones, which the user
    has named.
    """
    packages = [p.strip() for p in os.environ.get(TRUSTED, "").split(",") if p.strip()]
    for name in sorted(modules(content)):
        trusted = any(name == p or name.startswith(f"{p}.") for p in packages)
        if not trusted and name not in sys.modules and name not in known:
            raise ValueError(
                f"{where}: names the module {name!r}, which is no part of prepretrain and would be "
                f"run. If you trust it, set {TRUSTED}={name.partition('.')[0]}."
            )


def _base(kind: str) -> type:
    loaded = importlib.import_module(f"{KINDS[kind]}.base")
    return getattr(loaded, kind.rpartition("_")[2].rstrip("s").capitalize())


def options(factory: Any) -> dict[str, inspect.Parameter]:
    """The keyword options of a constructor or function, by name."""
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def check(factory: Any, given: dict[str, Any], where: str) -> dict[str, Any]:
    """Checks option names, fills nothing in, and coerces the values by annotation.

    Raises ValueError naming the key, the value and the way out.
    """
    known = options(factory)
    hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    for key in given:
        if key not in known:
            raise ValueError(
                unknown(f"{where}.{key}: unknown option", key, sorted(known), prefix=where)
            )
    missing = [k for k, p in known.items() if p.default is p.empty and k not in given]
    if missing:
        raise ValueError(
            f"{where}: missing {', '.join(f'{where}.{k}' for k in missing)}, which has no default."
        )
    values = {k: coerce(v, hints.get(k, Any), f"{where}.{k}") for k, v in given.items()}
    # parts of others may give our names another meaning
    section = _INDEX.sub("", where) if factory.__module__.startswith("prepretrain.") else ""
    for key, value in values.items():
        ranges.check(section, key, value, f"{where}.{key}")
    return values


def defaults(factory: Any) -> dict[str, Any]:
    """The options that have a default, with it."""
    return {k: p.default for k, p in options(factory).items() if p.default is not p.empty}


def build(kind: str, name: str, *args: Any, **given: Any) -> Any:
    """Builds the part `name` of a kind with positional parts and checked options."""
    factory = find(kind, name)
    return factory(*args, **check(factory, given, kind.rstrip("s")))


def unknown(
    what: str, name: str, known: list[str], *, prefix: str = "", quote: bool = False
) -> str:
    """An error text that offers the nearest name and lists all of them."""
    dot = f"{prefix}." if prefix else ""
    near = difflib.get_close_matches(str(name), known, n=1)
    text = f"{what} '{name}'." if quote else f"{what}."
    if near:
        text += f" Did you mean '{near[0]}'?" if quote else f" Did you mean {dot}{near[0]}?"
    return f"{text} There are: {', '.join(known) or 'none'}."


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type, where no information is lost; else ValueError.

    YAML reads 1e-4 as a string and an override is always text, so "1e-4" is a float where one is
    due.
    """
    if hint is Any or hint is inspect.Parameter.empty:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, arguments, hint, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ValueError(f"{where}: {value!r} is none of {', '.join(map(repr, arguments))}.")
    if origin in (list, tuple):
        return _coerce_sequence(value, origin, arguments, where)
    if origin is dict or hint is dict:
        if isinstance(value, dict):
            return value
        raise ValueError(f"{where}: {value!r} is not a mapping.")
    return _coerce_scalar(value, hint, where)


def _coerce_union(value: Any, arguments: tuple, hint: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    for one in arguments:
        if one is not type(None):
            try:
                return coerce(value, one, where)
            except ValueError:
                continue
    raise ValueError(f"{where}: {value!r} is not of type {_readable(hint)}.")


def _coerce_sequence(value: Any, origin: type, arguments: tuple, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: {value!r} is not a list.")
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise ValueError(f"{where}: {value!r} must have {len(arguments)} values.")
        return tuple(
            coerce(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, arguments))
        )
    inner = arguments[0] if arguments else Any
    return origin(coerce(v, inner, f"{where}[{i}]") for i, v in enumerate(value))


def _coerce_scalar(value: Any, hint: type, where: str) -> Any:
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    raise ValueError(f"{where}: {value!r} is not of type {_readable(hint)}.")


def _readable(hint: Any) -> str:
    return (
        getattr(hint, "__name__", str(hint))
        if not typing.get_args(hint)
        else str(hint).replace("typing.", "")
    )
