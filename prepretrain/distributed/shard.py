"""Moves a module from the meta device to its devices: precision, activation checkpointing,
torch.compile, FSDP, initial values."""

import logging
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import Shard
from torch.utils._pytree import tree_map_only

from prepretrain import contracts
from prepretrain.distributed import float8
from prepretrain.distributed import group as distributed
from prepretrain.distributed.compile import compile_block
from prepretrain.distributed.group import put

PRECISIONS = {
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "fp32": MixedPrecisionPolicy(param_dtype=torch.float32),
}


# A unit of several blocks costs the host less (of four 1.66 times less, forward and backward, on a CPU)
# and holds as many gathered at once: not from the paper, parameters that it has at most.
UNIT, BLOCKS = 64_000_000, 4
# Before it had this, torch left a unit gathered of whose blocks not all had run (evaluators' `layer`).
_PARTS_OF_UNITS = hasattr(FSDPState, "_force_complete_incomplete_states")

logger = logging.getLogger(__name__)

# FSDP warns of modules that return a view (timm's SwinV2 blocks do), since changing it in place
# would lose its hook; nothing here does.
warnings.filterwarnings("ignore", message=".*returned a view tensor")


def chosen(precision: Literal["auto", "bf16", "fp32", "fp8"]) -> Literal["bf16", "fp32", "fp8"]:
    """The precision that "auto" stands for on this process's device."""
    emulated = distributed.device().type == "cpu" and not _has_bf16()
    return ("fp32" if emulated else "bf16") if precision == "auto" else precision


def shard(
    module: nn.Module,
    *,
    group: int | None = None,
    reshard: bool = True,
    precision: Literal["bf16", "fp32", "fp8"] = "bf16",
    recompute: Literal["none", "block", "offload"] = "none",
    compile: bool = False,
) -> None:
    """Prepares a module that was built on the meta device, in place; its parameters are then on
    their devices.

    group: processes that share one copy of the parameters; 1 replicates, None (or more than there
    are) shards over all of them, a number between shards within a group and replicates across
    groups. reshard: free a unit's gathered parameters after its forward pass, and gather them again for
    the backward pass; False keeps them until then. precision: of computing; fp8 is bf16 but for the
    products of blocks' linear layers. recompute: keep every activation; or recompute
    each block's in the backward pass; or keep each block's input in host memory and recompute the
    rest. Raises ValueError for a group
    that does not divide the processes, a parameter outside of any child, or fp8 on a GPU without it.
    """
    device = distributed.device()
    if device.type == "cpu" and (precision == "fp8" or precision == "bf16" and not _has_bf16()):
        logger.warning(
            "this CPU emulates %s, many times slower than float32: use shard.precision=fp32.",
            precision,
        )
    if device.type == "cuda" and precision == "fp8":
        float8.check_gpu(device)
    how = {"precision": precision, "recompute": recompute, "compile": compile}
    wrap(module, group=group, reshard=reshard, **how)
    materialise(module, precision)


def wrap(
    module: nn.Module,
    *,
    group: int | None = None,
    reshard: bool = True,
    precision: Literal["bf16", "fp32", "fp8"] = "bf16",
    recompute: Literal["none", "block", "offload"] = "none",
    compile: bool = False,
) -> None:
    """The first half of `shard`: all but memory for the parameters, which stay on the meta
    device."""
    device = distributed.device()
    alone = size(group, distributed.world()) == distributed.world() == 1
    shard_unit = _alone if alone else _sharded(_mesh(group), reshard)
    units: set[nn.Module] = set()
    if precision == "fp8":
        for listed in block_lists(module):
            for block in listed:
                float8.convert(block, emulate=device.type == "cpu")
        precision = "bf16"  # of all else

    def unit(parts: list[nn.Module], around: str) -> None:
        own = _precision(parts[0], precision)
        shard_unit(parts, own)
        units.update(parts)
        if own != around:
            for part in parts:
                part.register_forward_hook(_cast_output)

    # The order matters: recomputation inside of compilation inside of sharding. The other ways either
    # compile the checkpoint's own bookkeeping, or gather parameters again within a recomputed block.
    for root in find_roots(module):
        # on a CPU in bf16 the fused attention's backward is slower than plain products (benchmarks/)
        fuse_attention(root, not (device.type == "cpu" and precision == "bf16"))
        for blocks in _block_lists(root):
            for i, block in enumerate(blocks):
                exceptions = _exceptions(block, precision, units)
                for part in exceptions:
                    unit([part], around=precision)
                blocks[i] = _recomputed(block, recompute)
                if compile:
                    compile_block(blocks[i], recompute == "none" and not exceptions)
            for some in _together(blocks, precision):
                unit(some, around=_precision(blocks, precision))
        for part in _exceptions(root, precision, units):
            unit([part], around=precision)
        unit([root], around=_precision(root, precision))
        if alone:
            _cast_parameters(root, precision)
    # No share_comm_ctx for the roots, which torch has for pipelines whose roots take turns: in one
    # backward pass of several, the first that ends clears the order of units that others prefetch by.


def together(blocks: Sequence[nn.Module]) -> int:
    """How many of a list's blocks make a unit: as many as UNIT allows of the largest."""
    largest = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
    return max(1, min(BLOCKS, UNIT // max(1, largest))) if _PARTS_OF_UNITS else 1


def _together(blocks: Sequence[nn.Module], precision: str) -> Iterator[list[nn.Module]]:
    """The blocks of each unit of a list; those of a unit compute in one precision."""
    most, unit = together(blocks), []
    for block in blocks:
        differs = unit and _precision(block, precision) != _precision(unit[0], precision)
        if len(unit) == most or differs:
            yield unit
            unit = []
        unit.append(block)
    if unit:
        yield unit


def _sharded(mesh: DeviceMesh, reshard: bool) -> Callable[[list[nn.Module], str], None]:
    """What makes modules one of FSDP's units on a mesh."""
    place = partial(_dimension, group=mesh["shard"].size())
    how = {
        "mesh": mesh,
        "shard_placement_fn": place,
        "reshard_after_forward": None if reshard else False,
    }

    def shard_unit(parts: list[nn.Module], precision: str) -> None:
        given = parts if len(parts) > 1 else parts[0]
        fully_shard(given, mp_policy=PRECISIONS[precision], **how)

    return shard_unit


def _alone(parts: list[nn.Module], precision: str) -> None:
    """A unit of a process without others: it takes its inputs in its own precision, as FSDP's do, and
    has nothing to gather, which would cost more than a small model's step (benchmarks/gpu.py)."""
    dtype = PRECISIONS[precision].param_dtype
    for part in parts:
        part.register_forward_pre_hook(partial(_cast_inputs, dtype), with_kwargs=True)


def _cast_inputs(dtype: torch.dtype, part: nn.Module, args: tuple, kwargs: dict) -> tuple:
    """A hook: what a unit is given, in its dtype."""
    return _cast((args, kwargs), dtype)


def _cast_parameters(module: nn.Module, precision: str) -> None:
    """Lets a module and all in it, but for exceptions, read their parameters in bf16, as FSDP's units
    do; the parameters themselves, and their gradients, stay float32."""
    own = _precision(module, precision)
    if own == "bf16":
        names = tuple(name for name, p in module._parameters.items() if p is not None)
        if names:
            module.__class__ = _casting(type(module), names)
    for child in module.children():
        _cast_parameters(child, own)


@cache
def _casting(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A module's class, in which its parameters are read in bf16."""
    readers = {name: property(partial(_in_bf16, name)) for name in names}
    return type(f"Cast{kind.__name__}", (kind,), {**readers, "__module__": kind.__module__})


def _in_bf16(name: str, module: nn.Module) -> Tensor:
    return module._parameters[name].bfloat16()


def _precision(module: nn.Module, given: str) -> str:
    """The compute dtype of a module. A submodule that needs float32 sets `precision = "fp32"`."""
    return module.precision if isinstance(module, contracts.Precise) else given


def _exceptions(module: nn.Module, precision: str, units: set[nn.Module]) -> list[nn.Module]:
    """Returns the outermost submodules whose compute dtype differs from `precision` and which are
    in no unit yet."""
    if _precision(module, precision) != precision:
        return []
    found = []
    for child in module.children():
        if child in units:  # a block, which has seen to its own
            continue
        if _precision(child, precision) != precision:
            found.append(child)
        else:
            found += _exceptions(child, precision, units)
    return found


def keep_float32(module: nn.Module, patterns: Sequence[str]) -> None:
    """Computes submodules of a bf16 run in float32: those whose names match one of the patterns, as
    `model.head` or `*.norm*`, and all in them.

    Each match becomes its own FSDP unit; its output is cast back to bf16. Raises ValueError for a
    pattern that matches no module that is called and has parameters.
    """
    called = {
        name: one
        for name, one in module.named_modules()
        if name
        and not _is_container(one)
        and not isinstance(one, (nn.ModuleList, nn.ModuleDict))
        and any(True for _ in one.parameters())
    }
    found = set()
    for pattern in patterns:
        matching = {name for name in called if fnmatchcase(name, pattern)}
        if not matching:
            known = sorted({".".join(name.split(".")[:3]) for name in called})
            raise ValueError(
                f"shard.float32: no part is called '{pattern}'. There are {', '.join(known)}, and what "
                f"is in them."
            )
        found |= matching
    for name in found:
        for one in called[name].modules():
            one.precision = "fp32"


def _cast_output(part: nn.Module, given: tuple, output: Any) -> Any:
    """A hook: what follows an exception computes in bf16."""
    return _cast(output, torch.bfloat16)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Nested tensors, of which those of real numbers are in a dtype."""
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)


def _dimension(parameter: nn.Parameter, group: int) -> Shard | None:
    """Another dimension than the first where that is shorter than the group, which FSDP would pad to
    it: a position table [1, N, D] would be sent as often as there are processes."""
    if len(parameter) >= group:
        return None
    even = [i for i, length in enumerate(parameter.shape) if length % group == 0]
    return Shard(even[-1]) if even else None


def materialise(module: nn.Module, precision: Literal["bf16", "fp32", "fp8"] = "bf16") -> None:
    """The second half of `shard`: memory on this process's device, without values but for
    buffers."""
    module.to_empty(device=distributed.device())
    fill_buffers(module)
    for part in module.modules():
        for buffer in part.buffers(recurse=False):
            if _precision(part, precision) != "fp32" and buffer.is_floating_point():
                # as autocast would, where they meet parameters
                buffer.data = buffer.data.bfloat16()


def fill_buffers(module: nn.Module) -> None:
    """Computes again the buffers that no checkpoint holds (SwinV2's position tables and masks), which
    `to_empty` leaves without values: every submodule's `init_non_persistent_buffers`, timm's name.

    Raises ValueError for one that nothing fills: it would hold whatever lay in memory.
    """
    for _, buffer in _unsaved_buffers(module):
        buffer.fill_(_unset(buffer))
    for one in module.modules():
        if isinstance(one, contracts.FillsBuffers):
            one.init_non_persistent_buffers()
    for name, buffer in _unsaved_buffers(module):
        left = buffer.isnan() if buffer.is_floating_point() else buffer == _unset(buffer)
        # a plan's tensors hold no numbers
        if buffer.numel() and not isinstance(buffer, FakeTensor) and left.all():
            raise ValueError(
                f"{name}: no checkpoint holds this buffer, and nothing computes it again. Give its module "
                f"an init_non_persistent_buffers(); a module of timm's has one in newer versions."
            )


def _unsaved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The numbers among the buffers that are in no state dict."""
    for place, owner in module.named_modules():
        for name in owner._non_persistent_buffers_set:
            buffer = getattr(owner, name)
            if buffer is not None and buffer.dtype != torch.bool:
                yield f"{place}.{name}".lstrip("."), buffer


def _unset(buffer: Tensor) -> float:
    return torch.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min


def _has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AMX or AVX512-BF16; other makes are not known)."""
    flags = Path("/proc/cpuinfo")
    known = flags.read_text() if flags.exists() else ""
    return "flags" not in known or "amx_bf16" in known or "avx512_bf16" in known


def size(group: int | None, world: int) -> int:
    """How many processes share a copy of the weights. Raises ValueError for a group that does not
    divide them."""
    inside = world if group is None else min(group, world)
    if inside < 1 or world % inside:
        raise ValueError(f"shard.group: {group} must divide the number of processes, {world}.")
    return inside


def _mesh(group: int | None) -> DeviceMesh:
    world = distributed.world()
    return _mesh_of(dist.group.WORLD, distributed.device().type, world, size(group, world))


@lru_cache(maxsize=4)  # each new one would make process groups that nothing ever frees
def _mesh_of(processes: dist.ProcessGroup, device: str, world: int, inside: int) -> DeviceMesh:
    if inside == world:  # no copies, so nothing to add up between them
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(device, (world // inside, inside), mesh_dim_names=names)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, contracts.Container) and module.container


def find_roots(module: nn.Module) -> list[nn.Module]:
    """The outermost submodules with a `forward` that is called: children of the objective and of
    its Model.

    The objective itself is never one: as FSDP's root it would have to run before its encoder may.
    Raises ValueError naming a parameter that hangs on a container and so would belong to nobody.
    """
    roots = []
    for child in module.children():
        if _is_container(child):
            roots += find_roots(child)
        elif any(True for _ in child.parameters()):
            roots.append(child)
    for name, _ in module.named_parameters(recurse=False):
        raise ValueError(
            f"{type(module).__name__}.{name}: a parameter must belong to a child module, "
            f"so that it can be sharded."
        )
    return roots


def blocks(module: nn.Module) -> list[nn.Module]:
    """Every block that `shard` treats as one, recomputed and gathered by itself."""
    return [block for some in block_lists(module) for block in some]


def block_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The lists that hold the `blocks` of a module."""
    return [some for root in find_roots(module) for some in _block_lists(root)]


def send_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward passes of a sharded module add up its gradients over all processes,
    or each process keeps its own until one does."""
    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.set_requires_gradient_sync(now, recurse=False)


def _block_lists(root: nn.Module) -> list[nn.ModuleList]:
    lists = [m for m in root.named_modules() if isinstance(m[1], (nn.ModuleList, nn.Sequential))]
    return [m for name, m in lists if name.rpartition(".")[2] in contracts.BLOCKS]


def _recomputed(block: nn.Module, how: str) -> nn.Module:
    if how == "none":
        return block
    if how == "block":
        return checkpoint_wrapper(block)
    from fairscale.nn.checkpoint import checkpoint_wrapper as offloading_wrapper

    return offloading_wrapper(block, offload_to_cpu=True)


def fuse_attention(module: nn.Module, fused: bool) -> None:
    """Lets every attention in a module compute by the fused kernel, or by plain matrix products."""
    for part in module.modules():
        if isinstance(part, contracts.FusedAttention):
            part.fused_attn = fused


@torch.no_grad()
def initialise(module: nn.Module, seed: int, *, frozen: bool = True) -> None:
    """Fills every parameter by a generator of (seed, name), the same for any number of processes;
    without `frozen` only those that are trained.

    Everything is NaN first, so a parameter without a rule shows in step one; with an unknown layer
    it raises.
    """
    for name, parameter in module.named_parameters():
        if not (frozen or parameter.requires_grad):
            continue
        parameter.fill_(float("nan"))
        full = torch.empty(parameter.shape)
        # into one hash, since torch's CPU generator takes 32 bits of a seed and drops the others
        mixed = zlib.crc32(f"{seed} {plain(name)}".encode())
        generator = torch.Generator().manual_seed(mixed)
        _fill(module, name, full, generator)
        put(parameter, full)
    for name, _ in module.named_buffers():
        parts = name.split(".")
        above = (module.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
        if not any(isinstance(one, contracts.FillsBuffers) for one in above):
            raise ValueError(
                f"{name}: buffers are not initialised. Make it from the options in forward instead, "
                f"or give its module an `init_non_persistent_buffers()`."
            )


def plain(name: str) -> str:
    """A parameter's name without what recomputation adds to it."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _fill(module: nn.Module, name: str, full: Tensor, generator: torch.Generator) -> None:
    """The nearest module with a rule for the name, from outside in; then the rule of the layer's
    type."""
    parts = name.split(".")
    for i in range(len(parts)):
        owner = module.get_submodule(".".join(parts[:i]))
        rest = plain(".".join(parts[i:]))
        if isinstance(owner, contracts.Initialises) and owner.initialise(rest, full, generator):
            return
    layer, leaf = module.get_submodule(".".join(parts[:-1])), parts[-1]
    if isinstance(layer, nn.LayerNorm):
        full.fill_(1.0 if leaf == "weight" else 0.0)
    elif isinstance(layer, nn.Linear | nn.Conv2d) and leaf == "weight":
        nn.init.xavier_uniform_(full.flatten(1), generator=generator)  # of a patch, as MAE's code
    elif isinstance(layer, nn.Linear | nn.Conv2d):
        full.zero_()
    else:
        raise ValueError(
            f"{name}: no rule to initialise a {type(layer).__name__}. "
            f"Give its module an `initialise(name, tensor, generator)`."
        )
