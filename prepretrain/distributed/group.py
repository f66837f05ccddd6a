"""One process group, always: the same code for one process, for eight and for a cluster."""

import contextlib
import datetime
import json
import logging
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from prepretrain.distributed import ports

logger = logging.getLogger(__name__)

TIMEOUT = datetime.timedelta(minutes=30)


_cpu_asked = False  # by init(device="cpu")
_apart = False  # within `apart`


def init(device: Literal["auto", "cpu"] = "auto") -> torch.device:
    """Joins the process group that the environment describes (torchrun's variables), or makes one
    of one.

    Returns this process's device: a GPU where there is one, unless "cpu" is asked for. With CUDA the
    group is `cuda:nccl,cpu:gloo`, so that checkpoint planning and flags go over gloo; without it,
    gloo. Raises ValueError where there are GPUs that torch cannot use, and for two processes on one.
    """
    global _cpu_asked
    if not dist.is_initialized():
        _cpu_asked = device == "cpu"
        if not _cpu_asked and not torch.cuda.is_available() and _has_gpus():
            raise ValueError(_unusable())
        store, number, count = _met()
        joining = {"store": store, "rank": number, "world_size": count, "timeout": TIMEOUT}
        if not on_gpu():
            dist.init_process_group("gloo", **joining)
        else:
            gpu = torch.device("cuda", local_rank())
            torch.cuda.set_device(gpu)
            # before NCCL is asked, which has other words for two processes on one
            gpus = _of_each(_gpu(gpu), store, number, count)
            check_gpus(gpus)
            # named, so that NCCL connects now, and not within the first step
            dist.init_process_group("cuda:nccl,cpu:gloo", device_id=gpu, **joining)
            if is_main():
                say_kinds(gpus)
    return _device()


def _met() -> tuple[dist.Store, int, int]:
    """The store in which the processes of the environment find each other, this one's number, and
    how many they are; without such an environment those of a process alone."""
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    return next(dist.rendezvous("env://", timeout=TIMEOUT))


def _of_each(text: list[str], store: dist.Store, number: int, count: int) -> list[list[str]]:
    """What each process says, by a store, in order of rank; no process leaves before all have read
    it, since one of them holds the store and may end of what it reads."""
    store.set(f"said by {number}", json.dumps(text))
    said = [json.loads(store.get(f"said by {other}")) for other in range(count)]
    store.set(f"read by {number}", "")
    if number == 0:
        store.wait([f"read by {other}" for other in range(count)])
    return said


def on_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available() and not _cpu_asked


def _has_gpus() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _unusable() -> str:
    """Why torch sees no GPU on a machine that has some, and the way out."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.backends.cuda.is_built():
        reason = f"torch {torch.__version__} is a build without CUDA"
    elif visible is not None and not re.search(r"[^-1, ]", visible):
        reason = f"CUDA_VISIBLE_DEVICES={visible!r} hides them"
    else:
        try:
            torch.cuda.init()
            reason = "torch.cuda.is_available() is False"
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
        if visible is not None:  # which may name none that is there
            reason += f"; CUDA_VISIBLE_DEVICES={visible!r}"
    return (
        f"device: this machine has GPUs, and torch cannot use them ({reason}). Mend that, or compute "
        f"on the CPU with device=cpu."
    )


def _gpu(device: torch.device) -> list[str]:
    """[machine, GPU, its kind]."""
    found = torch.cuda.get_device_properties(device)
    return [socket.gethostname(), str(found.uuid), found.name]


def check_gpus(gpus: list[list[str]]) -> None:
    """Raises ValueError if two processes have one [machine, GPU, kind]."""
    if shared := [one for one, count in Counter(map(tuple, gpus)).items() if count > 1]:
        machine, _, kind = shared[0]
        here = sum(one[0] == machine for one in gpus)
        there = len({one[1] for one in gpus if one[0] == machine})
        raise ValueError(
            f"--procs: {here} processes on {machine} see {there} GPUs ({kind}). Start as many as there "
            f"are GPUs, or look at CUDA_VISIBLE_DEVICES."
        )


def say_kinds(gpus: list[list[str]]) -> None:
    """Warns of GPUs of different kinds, the slowest of which all others wait for."""
    kinds = Counter(kind for *_, kind in gpus)
    if len(kinds) > 1:
        logger.warning("GPUs differ, and all wait for the slowest: %s", dict(kinds))


def machine() -> tuple[int | None, int]:
    """The bytes of memory of the smallest GPU, None on the CPU; and how many processes share a machine.
    All call it together."""
    own = memory()
    seen = all_gather_object((socket.gethostname(), own))
    here = min(Counter(name for name, _ in seen).values())
    return None if own is None else min(size for _, size in seen), here


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number on its machine; where each process sees one GPU only, always 0."""
    rank_here = int(os.environ.get("LOCAL_RANK", 0))
    return rank_here % torch.cuda.device_count() if on_gpu() else rank_here


def device() -> torch.device:
    """The GPU of this process, or the CPU; the CPU where the group is simulated (`memory`)."""
    if dist.is_initialized() and dist.get_backend() == "fake":
        return torch.device("cpu")
    return torch.device("cuda", local_rank()) if on_gpu() else torch.device("cpu")


def memory() -> int | None:
    """Bytes that this process's GPU has; None on the CPU."""
    return torch.cuda.get_device_properties(device()).total_memory if on_gpu() else None


_device = device  # `init` has an option of this name


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within it this process is as one without a group: for steps that are counted, not taken."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


def rank() -> int:
    """This process's number; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() and not _apart else 0


def world() -> int:
    """The number of processes; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() and not _apart else 1


def is_main() -> bool:
    """Whether this process is the one that writes what is written once."""
    return rank() == 0


def barrier() -> None:
    """Waits for all processes, over gloo."""
    all_sum(torch.zeros(1))


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes; the argument is left as it was."""
    total = tensor.clone()
    if world() > 1:
        dist.all_reduce(total)
    return total


def all_rows(tensor: Tensor) -> Tensor:
    """Every process's [B, …], in order of rank, as [world x B, …]; gradients flow back to all of
    them, so that a loss may compare rows of different processes."""
    if world() == 1 or tensor.is_meta:  # meta: a plan that counts, for which one process is enough
        return tensor
    return _AllRows.apply(tensor)


class _AllRows(torch.autograd.Function):
    """Gathers; its gradient is the sum of what all processes have for this one's rows."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        rows = tensor.new_empty(world() * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(rows, tensor.contiguous())
        return rows

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        mine = gradient.new_empty(len(gradient) // world(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(mine, gradient.contiguous())
        return mine


def all_gather_object(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """Every process's value, in order of rank. Values come from our own processes, never from
    data."""
    if world() == 1:
        return [value]
    gathered: list = [None] * world()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def second_group(patience: datetime.timedelta) -> dist.ProcessGroup:
    """All processes once more, over gloo: for what they say to each other after an error, when
    exchanges in the first group may no longer match. A process that waits longer than `patience`
    for the others gets a RuntimeError."""
    return dist.new_group(backend="gloo", timeout=patience)


def together(
    count: int,
    function: Callable[..., Any],
    *arguments: Any,
    device: Literal["auto", "cpu"] = "auto",
) -> None:
    """Runs function(*arguments) in `count` processes here that have joined a group, or in this one if
    that is one, or one of those that the environment describes. Raises what the first to fail did."""
    if count == 1 or "RANK" in os.environ:
        _joined(None, None, device, function, arguments)
        return
    where = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports.free())}
    environment = os.environ | where  # as it is now, not as it was when the server of forks began
    given = (environment, device, function, arguments)
    multiprocessing.start_processes(_joined, given, nprocs=count, start_method="forkserver")


def _joined(
    number: int | None,
    where: dict[str, str] | None,
    device: Literal["auto", "cpu"],
    function: Callable,
    arguments: tuple,
) -> None:
    if where is not None:
        os.environ.update(where, RANK=str(number), LOCAL_RANK=str(number))
    init(device)
    try:
        function(*arguments)
    finally:
        shutdown()


def second_store(patience: datetime.timedelta) -> dist.TCPStore:
    """The store that the processes found each other by, over a connection of its own, so that one
    who waits does not keep others from asking."""
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*where, is_master=False, wait_for_workers=False, timeout=patience)


def from_main(value: Any) -> Any:
    """Rank 0's value, on every process."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards, which the processes call for together; one that is not sharded
    as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; one that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(tensor: Tensor) -> int:
    """How many processes hold the same part of a tensor as this one, itself among them."""
    if not isinstance(tensor, DTensor):
        return world()
    parts = math.prod(
        tensor.device_mesh.size(dimension)
        for dimension, placement in enumerate(tensor.placements)
        if placement.is_shard()
    )
    return world() // parts


def put(target: Tensor, full: Tensor) -> None:
    """Copies a whole tensor into a parameter; of a sharded one, each process keeps its own
    shard."""
    full = full.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        # every process holds the same tensor, so nothing needs to be sent
        full = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
    target.detach().copy_(full)
