"""What a module may offer beside what its base class says: one Protocol each, asked for by isinstance.

Sharding, weight files and optimizers look for these on every module of a model, wherever it stands:
ours, a user's, timm's. A module offers one by defining the name; `check` refuses a name that is
nearly one.
"""

import difflib
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Generator, Tensor

BLOCKS = ("blocks", "resblocks", "layer")  # as timm, open_clip and transformers call their lists
NEAR = 0.85  # how alike two names are, of 1, from which one is the other misspelt


def _declared(cls: type) -> set[str]:
    """The public names that a class itself defines or annotates."""
    own = {} if cls is object else {**vars(cls), **vars(cls).get("__annotations__", {})}
    return {name for name in own if not name.startswith("_")}


@runtime_checkable
class Container(Protocol):
    """Is never called itself: its children are sharded one by one."""

    container: bool


@runtime_checkable
class Precise(Protocol):
    """Computes in a precision of its own within a run of another: "fp32" or "bf16"."""

    precision: str


@runtime_checkable
class Initialises(Protocol):
    """Fills parameters below it with their first values, by name; False leaves one to others."""

    def initialise(self, name: str, tensor: "Tensor", generator: "Generator") -> bool: ...


@runtime_checkable
class FillsBuffers(Protocol):
    """Computes again the buffers that no checkpoint holds; timm's name."""

    def init_non_persistent_buffers(self) -> None: ...


@runtime_checkable
class NoWeightDecay(Protocol):
    """Names the parameters without weight decay, beside all 1-d ones; timm's name."""

    def no_weight_decay(self) -> set[str]: ...


@runtime_checkable
class Layered(Protocol):
    """Says which parameters form a layer, for layer-wise rates; timm's name. What no pattern of it
    names has the head's rate."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]: ...


@runtime_checkable
class Adapts(Protocol):
    """Fits a checkpoint's tensor to its own options (positions to another image size)."""

    def adapt(self, name: str, tensor: "Tensor", before: dict[str, Any]) -> "Tensor": ...


@runtime_checkable
class MayBeMissing(Protocol):
    """Names groups of parameters, each of which has its first values (`initialise`) where weights hold
    none of the group: positions that compute nothing at zero."""

    def may_be_missing(self) -> list[set[str]]: ...


@runtime_checkable
class ReadsReleased(Protocol):
    """Knows the names in the files that others released: theirs to ours, None for no use."""

    def released(self, names: list[str]) -> dict[str, str | None]: ...


@runtime_checkable
class WritesReleased(Protocol):
    """Gives its tensors under the names of the files that others released."""

    def release(self, *state: Any) -> dict[str, "Tensor"]: ...


@runtime_checkable
class FusedAttention(Protocol):
    """timm's attention, which computes by the fused kernel if told to."""

    fused_attn: bool


@runtime_checkable
class DropsPaths(Protocol):
    """timm's stochastic depth: the share of rows that it drops, and whether the others make up."""

    drop_prob: float
    scale_by_keep: bool


_ALL = (Container, Precise, Initialises, FillsBuffers, NoWeightDecay, Layered)
_ALL += (Adapts, MayBeMissing, ReadsReleased, WritesReleased, FusedAttention, DropsPaths)
NAMES = {name for contract in _ALL for name in _declared(contract)}


def check(cls: type, base: type = object) -> None:
    """Raises ValueError if a class defines a public name that nobody would ask for: nearly one that
    `base`, the base class of its kind, declares or, of a module, nearly a contract's."""
    from torch import nn  # not above: reading a config needs no torch

    known = _declared(base) if issubclass(cls, base) else set()
    known |= NAMES if issubclass(cls, nn.Module) else set()
    inherited = {name for parent in cls.__mro__[1:] for name in _declared(parent)}
    for name in _declared(cls) - known - inherited:
        near = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
        if near:
            raise ValueError(
                f"{cls.__module__}.{cls.__name__}.{name}: nobody asks for this name. Did you mean "
                f"{near[0]}? If not, take a name that is less like it."
            )
