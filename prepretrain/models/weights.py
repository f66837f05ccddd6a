"""Reads weights one tensor at a time and puts them into a module, accounting for every key."""

import hashlib
import logging
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from prepretrain import contracts
from prepretrain.distributed.group import put
from prepretrain.files import read_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Named tensors, read when asked for, so that a sharded 6.5B model never lies whole in
    memory."""

    source: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    options: dict[str, Any] | None = None  # what made the model they belong to
    whole: bool = True  # False: the encoder of a file that also holds parts it has no place for

    def part(self, prefix: str) -> "Weights":
        """The keys under `prefix.`, without it. Raises ValueError if there are none."""
        dot = prefix + "."
        shapes = {k.removeprefix(dot): s for k, s in self.shapes.items() if k.startswith(dot)}
        if not shapes:
            parts = sorted({k.split(".")[0] for k in self.shapes})
            raise ValueError(
                f"{self.source}: has no part '{prefix}'. There are: {', '.join(parts)}."
            )
        return replace(self, shapes=shapes, read=lambda name: self.read(dot + name))

    def under(self, prefix: str) -> "Weights":
        """The same tensors, named as a part of something larger."""
        dot = prefix + "."
        return replace(
            self,
            shapes={dot + k: s for k, s in self.shapes.items()},
            read=lambda name: self.read(name.removeprefix(dot)),
        )

    def unwrapped(self) -> "Weights":
        """The tensors without what torch.compile and DistributedDataParallel put before names."""
        plain = {key: re.sub(r"(^|\.)_orig_mod\.", r"\1", key) for key in self.shapes}
        while plain and all(name.startswith("module.") for name in plain.values()):
            plain = {key: name.removeprefix("module.") for key, name in plain.items()}
        return self.named(plain)

    def renamed(self, rules: Sequence[tuple[str, str]], unused: Sequence[str] = ()) -> "Weights":
        """The tensors under the names that rules of (pattern, replacement), applied in order, give
        them, without those whose own name a pattern of `unused` matches.

        A pattern must match a whole key. Raises ValueError if two keys get the same name.
        """
        names: dict[str, str | None] = {}
        for key in self.shapes:
            name = key
            for pattern, replacement in rules:
                if match := re.fullmatch(pattern, name):
                    name = match.expand(replacement)
            names[key] = None if any(re.fullmatch(p, key) for p in unused) else name
        return self.named(names)

    def named(self, names: dict[str, str | None]) -> "Weights":
        """The tensors under other names; None leaves one out, which is logged.

        Raises ValueError if two keys get the same name.
        """
        origin: dict[str, str] = {}
        for key, name in names.items():
            if name is not None and origin.setdefault(name, key) != key:
                raise ValueError(f"{self.source}: {key} and {origin[name]} both become {name}.")
        dropped = [key for key, name in names.items() if name is None]
        if dropped:
            count, some = len(dropped), ", ".join(dropped[:8])
            logger.info("%s: %d tensors are not taken: %s", self.source, count, some)
        shapes = {name: self.shapes[key] for name, key in origin.items()}
        return replace(self, shapes=shapes, read=lambda name: self.read(origin[name]))


def open_file(path: Path, inside: str = "") -> Weights:
    """A .safetensors file, or a .pt / .pth file of plain tensors (read with weights_only, never
    unpickled).

    inside: of a .pt file with several dictionaries of tensors, the one to take, as `teacher`.
    Options come from the `model.json` beside a file of ours. Raises ValueError for anything else.
    """
    if path.suffix == ".safetensors":
        shapes, read = _open_safetensors(path)
    elif path.suffix in (".pt", ".pth", ".bin", ".torch"):
        shapes, read = _open_torch(path, inside.partition(".")[0])
    else:
        raise ValueError(f"{path}: is neither .safetensors nor .pt / .pth.")
    beside = path.with_name("model.json")
    options = checked_options(read_json(beside), beside) if beside.exists() else None
    return Weights(str(path), shapes, read, options).unwrapped()


def checked_options(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The options of a model in what a file says of it. Raises ValueError if there are none."""
    options = content.get("options")
    if not isinstance(options, dict):
        raise ValueError(f"{path}: is damaged: it says no options of a model.")
    return options


def _open_safetensors(path: Path) -> tuple[dict, Callable[[str], Tensor]]:
    try:
        file = safe_open(path, "pt")
    except Exception as error:  # the library's own exception type is not public
        raise ValueError(
            f"{path}: cannot be read as safetensors ({error}). Is it complete?"
        ) from error
    return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}, file.get_tensor


class _Inert:
    """Stands in for a class that a file names beside its tensors; nothing of that class runs."""

    def __new__(cls, *arguments: Any) -> OrderedDict:
        """A dictionary, the one thing besides tensors that weights_only fills."""
        return OrderedDict()


# Settings that training code saves beside the weights: SimMIM's (a dict) and MAE's.
_INERT = [(_Inert, name) for name in ("yacs.config.CfgNode", "argparse.Namespace")]


def _open_torch(path: Path, inside: str) -> tuple[dict, Callable[[str], Tensor]]:
    try:
        with torch.serialization.safe_globals(_INERT):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )  # torch's format from before 1.6 is no zip, and cannot be mapped
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be read with weights_only ({error}). A file that holds more than "
            f"tensors is refused: save its state_dict alone."
        ) from error
    for wrapper in (inside, "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            under = f"{wrapper}." if wrapper == inside else ""
            content = {f"{under}{key}": value for key, value in content[wrapper].items()}
    odd = (
        [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
        if isinstance(content, dict)
        else ["?"]
    )
    if odd:
        parts = [k for k in odd if k != "?" and isinstance(content[k], dict) and content[k]]
        way = f" To take the weights under one of them, write {path}:{parts[0]}." if parts else ""
        raise ValueError(f"{path}: holds things that are no tensors: {', '.join(odd[:5])}.{way}")
    return {k: tuple(v.shape) for k, v in content.items()}, content.__getitem__


def sha256(weights: Weights) -> str:
    """Of the names, types, shapes and bytes of all tensors: a checkpoint and its export have the
    same."""
    digest = hashlib.sha256()
    for name in sorted(weights.shapes):
        tensor = weights.read(name).detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def fill(module: nn.Module, weights: Weights) -> None:
    """Copies weights into every parameter and buffer of a module, sharded or not; raises as `check`
    does."""
    weights = _renamed(module, weights)
    _check(module, weights)
    targets = module.state_dict(keep_vars=True)
    missing = _may_be_missing(module, weights)
    for name, target in targets.items():
        if name in missing:
            put(target, _first_values(*missing[name], target))
            continue
        put(target, _adapted(module, name, weights.read(name), weights.options or {}))
    left = [k for k in weights.shapes if k not in targets]
    if left:
        logger.info(
            "%s: %d keys not used, as asked: %s", weights.source, len(left), ", ".join(left[:8])
        )


def check(module: nn.Module, weights: Weights) -> None:
    """Raises one ValueError that lists every key that is missing, left over or of another shape.

    Nothing is read but names and shapes. Keys may be left over only where the encoder of a file was
    asked for, and only of modules that it has not.
    """
    _check(module, _renamed(module, weights))


def _renamed(module: nn.Module, weights: Weights) -> Weights:
    """The weights under the names of the module's encoder, which knows those of released files."""
    names: dict[str, str | None] = {name: name for name in weights.shapes}
    for place, owner in module.named_modules():
        if isinstance(owner, contracts.ReadsReleased):
            dot = f"{place}." if place else ""
            inside = [n.removeprefix(dot) for n in weights.shapes if n.startswith(dot)]
            for old, new in owner.released(inside).items():
                names[dot + old] = None if new is None else dot + new
    return weights.named(names)


def _check(module: nn.Module, weights: Weights) -> None:
    targets = module.state_dict(keep_vars=True)
    problems = []
    owned = {_owner(name) for name in targets}
    for name, shape in weights.shapes.items():
        if name not in targets and (weights.whole or _owner(name) in owned):
            problems.append(f"left over {name} {tuple(shape)}")
    for name in [k for k in targets if k in weights.shapes]:
        given = torch.empty(weights.shapes[name], device="meta")
        shape = tuple(_adapted(module, name, given, weights.options or {}).shape)
        if shape != tuple(targets[name].shape):
            problems.append(f"{name} is {shape} and must be {tuple(targets[name].shape)}")
    known = weights.shapes.keys() | _may_be_missing(module, weights).keys()
    problems += [f"missing {k}" for k in targets if k not in known]
    if problems:
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"{weights.source}: does not fit, {len(problems)} keys:\n  "
            + "\n  ".join(problems[:20])
            + more
            + f"\nIs it the right model.encoder? {_way_out(weights, list(targets))}".rstrip()
        )


def _may_be_missing(module: nn.Module, weights: Weights) -> dict[str, tuple[nn.Module, str]]:
    """(owner, its name there) of each parameter of which the weights hold no group: see
    contracts.MayBeMissing."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for place, owner in module.named_modules():
        if isinstance(owner, contracts.MayBeMissing):
            for group in owner.may_be_missing():
                names = {f"{place}.{name}".lstrip("."): (owner, name) for name in group}
                found |= {} if names.keys() & weights.shapes.keys() else names
    return found


def _first_values(owner: nn.Module, name: str, target: Tensor) -> Tensor:
    """What a parameter starts with, the same at each call."""
    values = torch.empty(target.shape)
    owner.initialise(name, values, torch.Generator().manual_seed(0))
    return values


def _owner(name: str) -> str:
    """The outermost module of an encoder that a tensor belongs to, as `blocks`."""
    return name.removeprefix("encoder.").partition(".")[0]


def _way_out(weights: Weights, targets: list[str]) -> str:
    """What to write instead: the prefix under which the tensors lie, or the encoder alone."""
    place, _, part = weights.source.partition(":")
    wanted = {t.removeprefix("encoder.") for t in targets}
    names = [name.removeprefix("encoder.") for name in weights.shapes]
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(
            ".".join(parts[:i]) for i in range(1, len(parts)) if ".".join(parts[i:]) in wanted
        )
    prefix, count = counts.most_common(1)[0] if counts else ("", 0)
    if count > sum(name in wanted for name in names):
        prefix = prefix if part in ("", "encoder") else f"{part}.{prefix}"
        return f"Its tensors lie under '{prefix}.': write {place}:{prefix}."
    return "" if part else f"To take the encoder of a larger file alone, write {place}:encoder."


def _adapted(module: nn.Module, name: str, tensor: Tensor, before: dict[str, Any]) -> Tensor:
    """The tensor as the outermost submodule with an `adapt` wants it (positions for another image
    size)."""
    parts = name.split(".")
    for i in range(len(parts)):
        inner = module.get_submodule(".".join(parts[:i]))
        if isinstance(inner, contracts.Adapts):
            return inner.adapt(".".join(parts[i:]), tensor, before)
    return tensor
