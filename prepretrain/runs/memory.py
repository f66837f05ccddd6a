"""What a training step holds in memory, sends and computes: found by running it, as one of N
processes that do not exist, on tensors without storage.

The step is the real one, in torch's eager mode: an objective's, sharded by `shard` and updated by
`optim`. Only this file uses torch's fake tensors and fake process group. torch's own FSDPMemTracker
is not used: it follows one FSDP root, and an objective has several (`shard.find_roots`).

Of a list of equal blocks only a few are run. Whatever a step holds at some block, counted from the
first or from the last, grows by the same bytes with each block that the list is longer, so two short
lists tell what a long one takes, to the byte.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from prepretrain.distributed import group as distributed
from prepretrain.distributed import shard
from prepretrain.objectives.base import Objective
from prepretrain.training import optim
from prepretrain.training.fit import seed_all
from prepretrain.training.optimizers.base import Optimizer

# A CPU's fused attention, which torch counts from 2.15 on only: q, k, v come first, and the gradient
# before them.
_FLOPS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda *args, **_: sdpa_flop_count(*(t.shape for t in args[:3]))
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *args, **_: sdpa_backward_flop_count(*(t.shape for t in args[:4]))
    ),
}
# Collectives of FSDP's (c10d) and of DTensors' own operations: their kind, which of the tensors is whole,
# and how often it is sent: an all-reduce is a reduce-scatter and an all-gather.
_SENDS = {
    "_allgather_base_": ("allgather", "given", 1),
    "allgather_": ("allgather", "given", 1),
    "_reduce_scatter_base_": ("reduce_scatter", "second", 1),
    "allreduce_": ("allreduce", "given", 2),
    "all_gather_into_tensor": ("allgather", "made", 1),
    "reduce_scatter_tensor": ("reduce_scatter", "given", 1),
    "all_reduce": ("allreduce", "given", 2),
}
_MORE = (
    1.05  # not from the paper: what `activations` adds, so that it is not less than a step takes
)
_FEW = 4  # units of a list that is shortened: two at each end, as FSDP gathers one ahead

ADAMW = partial(optim.build, lr=0.0, weight_decay=0.0)

KINDS = ("parameters", "gradients", "optimizer", "activations", "in_flight")


@dataclass(frozen=True)
class Collective:
    """Exchanges of one kind that a process has in a step with the same others.

    ranks: all who take part. bytes: what the process sends, as a ring does.
    """

    kind: str
    ranks: tuple[int, ...]
    number: int
    bytes: int


@dataclass(frozen=True)
class Step:
    """What one process needs for an optimizer step.

    bytes: the largest of each of KINDS, which need not be at the same time. in_flight is what FSDP
    holds for a moment: gathered parameters, and gradients on their way to the processes that keep
    them. peak: bytes of all kinds together where they are most; at_peak: what those are made of.
    flops: forward, what is recomputed, and backward. traffic: bytes that operations, each by itself,
    read from memory and write to it.
    """

    bytes: dict[str, int]
    peak: int
    at_peak: dict[str, int]
    collectives: tuple[Collective, ...]
    flops: int
    traffic: int

    @property
    def sent(self) -> dict[str, int]:
        """The bytes that the process sends in collectives of each kind."""
        sent: Counter[str] = Counter()
        for one in self.collectives:
            sent[one.kind] += one.bytes
        return sent


def simulate(
    build: Callable[[], Objective],
    *,
    images: int,
    accumulate: int = 1,
    world: int,
    group: int | None = None,
    reshard: bool = True,
    precision: Literal["bf16", "fp32", "fp8"] = "bf16",
    recompute: Literal["none", "block", "offload"] = "none",
    fused_attention: bool = True,
    optimizer: Callable[[Objective], Optimizer] = ADAMW,
    shorten: bool = True,
) -> Step:
    """One step of process 0 of `world`, each taking `accumulate` parts of `images` images.

    build: makes the objective on the meta device. fused_attention: a GPU's, else plain matrix
    products. optimizer: makes that of an objective, by default AdamW. shorten: runs a few of equal
    blocks in place of all, which gives the same numbers sooner. The second step is measured,
    when the optimizer has its state. Not simulated: torch.compile, the allocator's rounding and
    fragmentation, workspaces of cuBLAS and NCCL.
    Raises ValueError as `shard.shard` does, RuntimeError if there is a process group.
    """
    if dist.is_initialized():
        raise RuntimeError("a step can only be simulated by a process without a process group.")

    def run(depths: list[int] | None = None) -> _Profile:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        try:
            objective = build()
            if depths is not None:
                _shorten(objective, depths)
            how = {"group": group, "reshard": reshard, "precision": precision}
            shard.wrap(objective, recompute=recompute, **how)
            for module in objective.frozen():
                shard.wrap(module, **how)
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            with fake, _Ledger() as ledger, ledger.resizes(), ledger.trials():
                for module in (objective, *objective.frozen()):
                    shard.materialise(module, precision)
                    shard.fuse_attention(module, fused_attention)
                if recompute == "offload":
                    ledger.offload(shard.blocks(objective))
                ledger.watch(_block_lists(objective))
                objective.train()
                return _measure(objective, optimizer(objective), ledger, images, accumulate)
        finally:
            dist.destroy_process_group()

    built = build()
    lists, numbered = _block_lists(built), _numbered(built)
    units = [shard.together(blocks) if world > 1 else 1 for blocks in lists]
    few = [
        len(blocks) if blocks in numbered else _few(blocks, unit)
        for blocks, unit in zip(lists, units)
    ]
    longer = [i for i, blocks in enumerate(lists) if len(blocks) > few[i]]
    if not shorten or sum(few) * (1 + len(longer)) >= sum(map(len, lists)):
        return run().step()
    short = result = run(few)
    for i in longer:
        more = run([depth + units[i] * (i == j) for j, depth in enumerate(few)])
        result = result.plus(more.less(short), (len(lists[i]) - few[i]) // units[i])
    return result.step()


def activations(
    objective: Objective,
    images: int,
    *,
    precision: Literal["bf16", "fp32"] = "bf16",
    recompute: Literal["none", "block", "offload"] = "none",
) -> int:
    """The bytes that activations take in a step, or somewhat more: what a forward pass without sharding
    keeps, which is known in a second, where `simulate` takes several and there may be no process group.

    objective: on the meta device; afterwards of no other use.
    """
    width, kept = 4 if precision == "fp32" else 2, _Kept()
    parts = (objective, *objective.frozen())
    with distributed.apart(), FakeTensorMode(allow_non_fake_inputs=True):
        for module in parts:
            module.to_empty(device="cpu")
            shard.fill_buffers(module)
            shard.fuse_attention(module, True)
        kept.leave_out([t for m in parts for t in (*m.parameters(), *m.buffers())])
        for block in shard.blocks(objective):
            block.register_forward_pre_hook(kept.enter)
            block.register_forward_hook(kept.leave)
        batch = {
            k: torch.empty(v.shape, dtype=v.dtype) for k, v in objective.example(images).items()
        }
        with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
            loss = objective.train()(batch)["loss"]
    del loss  # until here all that is kept is there, so that no two have one address
    inside, given = sum(kept.blocks), sum(kept.inputs)
    one = max(kept.blocks, default=0)
    held = kept.outside + {"none": inside, "block": given + one, "offload": one}[recompute]
    return round(_MORE * (held + one / 2) * width)  # a block's backward pass has gradients, too


class _Kept:
    """Counts the numbers that are kept for a backward pass, outside of blocks and in each."""

    def __init__(self) -> None:
        self.outside, self.blocks, self.inputs = 0, [], []
        self.seen: set[int] = set()  # addresses of storages
        self.within = False

    def leave_out(self, tensors: list[Tensor]) -> None:
        """Does not count these, which are not made by the pass."""
        self.seen |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def enter(self, block: nn.Module, given: tuple) -> None:
        """A hook before a block."""
        self.within = True
        self.blocks.append(0)
        self.inputs.append(given[0].numel())

    def leave(self, block: nn.Module, given: tuple, output: Any) -> None:
        """A hook after a block."""
        self.within = False

    def note(self, tensor: Tensor) -> Tensor:
        """A hook for each tensor that is kept."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            numbers = storage.nbytes() // tensor.element_size()
            if self.within:
                self.blocks[-1] += numbers
            else:
                self.outside += numbers
        return tensor


def _block_lists(objective: Objective) -> list[nn.ModuleList]:
    parts = (objective, *objective.frozen())
    return [blocks for part in parts for blocks in shard.block_lists(part)]


def _numbered(objective: Objective) -> list[nn.ModuleList]:
    """The lists of which a head reads blocks by their numbers; they stay as they are."""
    encoder, head = objective.model.encoder, objective.model.head
    every = _block_lists(objective) if head is not None and head.layers else []
    inside = {id(module) for module in encoder.modules()}
    return [blocks for blocks in every if id(blocks) in inside]


def _few(blocks: nn.ModuleList, unit: int) -> int:
    """How many of a list's blocks tell of all: few units if all blocks have the same parameters and
    buffers, of which the last is as full as the list's."""
    kinds = {
        tuple((n, t.shape, t.requires_grad) for n, t in (*b.named_parameters(), *b.named_buffers()))
        for b in blocks
    }
    few = _FEW * unit + len(blocks) % unit
    short = len(kinds) == 1 and len(blocks) > few + unit  # that many run as well
    return few if short else len(blocks)


def _shorten(objective: Objective, depths: list[int]) -> None:
    """Takes blocks out of the middle of each list."""
    for blocks, depth in zip(_block_lists(objective), depths):
        del blocks[depth // 2 : depth // 2 + len(blocks) - depth]


def _measure(
    objective: Objective, optimizer: Optimizer, ledger: "_Ledger", images: int, accumulate: int
) -> "_Profile":
    frozen = [p for module in objective.frozen() for p in module.parameters()]
    held = [*objective.parameters(), *frozen, *objective.buffers()]
    example = objective.example(images).items()

    def update() -> None:
        ledger.begin()
        seed_all(0, 0)  # mixup and erasing draw what they do: the same at every depth
        for part in range(accumulate):
            ledger.enter("part")
            batch = {k: torch.empty(v.shape, dtype=v.dtype) for k, v in example}
            shard.send_gradients(objective, part == accumulate - 1)
            objective(batch)["loss"].backward()
            del batch
            if part < accumulate - 1:  # all that a part leaves behind is gradients
                ledger.label_rest("gradients")
        ledger.label("parameters", held)
        ledger.label("gradients", [p.grad for p in objective.parameters()])
        ledger.enter("optimizer")
        optimizer.step()
        ledger.label("optimizer", list(optimizer.state.values()))
        ledger.enter("end")
        optimizer.zero_grad()

    update()
    update()
    return ledger.summary()


@dataclass(frozen=True)
class _Profile:
    """Numbers of a step, by names under which a deeper model has them, too. Each grows evenly with
    depth; what is largest is only found when all have grown."""

    phases: dict[
        tuple, Counter
    ]  # bytes: ("peak", kind) where all together are most, ("largest", kind)
    # over the step: ("flops",), ("traffic",), ("number", collective, ranks), ("sent", collective, ranks)
    totals: Counter

    def less(self, other: "_Profile") -> "_Profile":
        """What this one has more, of phases that both have."""
        both = [where for where in self.phases if where in other.phases]
        phases = {where: _minus(self.phases[where], other.phases[where]) for where in both}
        return _Profile(phases, _minus(self.totals, other.totals))

    def plus(self, change: "_Profile", times: int) -> "_Profile":
        """This one, with a change so many times, of phases that both have."""
        both = [where for where in self.phases if where in change.phases]
        phases = {where: _sum(self.phases[where], change.phases[where], times) for where in both}
        return _Profile(phases, _sum(self.totals, change.totals, times))

    def step(self) -> Step:
        """What is largest over all phases, and the totals."""
        phases = self.phases.values()
        largest = {kind: max(one["largest", kind] for one in phases) for kind in KINDS}
        peaks = [{kind: one["peak", kind] for kind in KINDS} for one in phases]
        peak = max(peaks, key=lambda one: sum(one.values()))
        collectives = tuple(
            Collective(*name[1:], number, self.totals[("sent", *name[1:])])
            for name, number in self.totals.items()
            if name[0] == "number"
        )
        flops, traffic = self.totals[("flops",)], self.totals[("traffic",)]
        return Step(largest, sum(peak.values()), peak, collectives, flops, traffic)


def _sum(one: Counter, other: Counter, times: int) -> Counter:
    return Counter({key: one[key] + times * other[key] for key in {**one, **other}})


def _minus(one: Counter, other: Counter) -> Counter:
    return _sum(one, other, -1)


class _Storage:
    """A tensor's memory: its size now, and what it is for."""

    def __init__(self, kind: str):
        self.kind, self.size = kind, 0


class _Ledger(TorchDispatchMode):
    """Follows all memory that operations make, and the collectives among them."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, _Storage] = {}  # by address of torch's storage, while that lives
        self.events: list[tuple[_Storage, int]] = []  # changes of size, in order
        self.before: list[tuple[_Storage, int]] = []  # as they were when the step began
        self.marks: list[tuple[int, tuple]] = []  # where in `events` a phase begins, and its name
        self.totals: Counter[tuple] = Counter()
        self.trying = False

    def begin(self) -> None:
        """Starts a step: forgets what has happened, not what is there."""
        self.before = [(one, one.size) for one in self.known.values()]
        self.events, self.marks, self.totals = [], [], Counter()

    def enter(self, *phase: Any) -> None:
        """Begins a phase; a second one of the same name is another."""
        times = sum(name[: len(phase)] == phase for _, name in self.marks)
        self.marks.append((len(self.events), (*phase, times)))

    def watch(self, lists: list[nn.ModuleList]) -> None:
        """Begins a phase with each forward and backward pass of a block, by the block's number from
        the nearer end of its list."""

        def forward(number: tuple, block: nn.Module, given: tuple) -> None:
            self.enter("forward", *number)

        def backward(number: tuple, block: nn.Module, given: tuple, output: Any) -> None:
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self.enter("backward", *number))

        for i, blocks in enumerate(lists):
            for j, block in enumerate(blocks):
                number = (i, j if j < len(blocks) / 2 else j - len(blocks))
                block.register_forward_pre_hook(partial(forward, number))
                block.register_forward_hook(partial(backward, number))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and enters what it made."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # comes again, as an operation on this process's part
        result = func(*args, **(kwargs or {}))
        if self.trying:
            return result
        moving = func.namespace in ("fsdp", "c10d", "_c10d_functional")
        given, made = _tensors((args, kwargs)), _tensors(result)
        for tensor in (*given, *made) if moving else made:
            storage = self._of(tensor)
            if moving and storage.kind == "activations":
                storage.kind = "in_flight"
        if func._overloadpacket.__name__ in _SENDS and moving:
            self._count(func, args, result)
            return result
        if func._overloadpacket in _FLOPS:
            counted = _FLOPS[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
            self.totals[("flops",)] += counted
        asks = func.is_view or func.namespace == "prim" or "empty" in func._overloadpacket.__name__
        if not asks:  # it touches what is in memory
            self.totals[("traffic",)] += sum(map(_bytes, (*given, *made)))
        return result

    def _of(self, tensor: Tensor) -> _Storage:
        actual = tensor.untyped_storage()
        address = actual._cdata
        if address not in self.known:
            self.known[address] = _Storage("activations")
            self._resize(self.known[address], actual.nbytes())
            weakref.finalize(actual, self._freed, address).atexit = False
        return self.known[address]

    def _resize(self, storage: _Storage, size: int) -> None:
        self.events.append((storage, size - storage.size))
        storage.size = size

    def _freed(self, address: int) -> None:
        self._resize(self.known.pop(address), 0)

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Also follows what no operation tells of: FSDP's buffers for gathered parameters, which it
        empties and fills in place."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self.known:
                found = self.known[storage._cdata]
                found.kind = "in_flight"
                self._resize(found, size)
            return result

        torch.UntypedStorage.resize_ = resize
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original

    @contextmanager
    def trials(self) -> Iterator[None]:
        """Leaves out DTensor's trials of an operation, which tell it the result's shape: they are on
        whole parameters and take no memory."""
        original = ShardingPropagator._propagate_tensor_meta_non_cached

        def trial(*given: Any) -> Any:
            self.trying = True
            try:
                return original(*given)
            finally:
                self.trying = False

        ShardingPropagator._propagate_tensor_meta_non_cached = trial
        try:
            yield
        finally:
            ShardingPropagator._propagate_tensor_meta_non_cached = original

    def offload(self, blocks: list[nn.Module]) -> None:
        """Takes each block's input for absent between its forward and backward pass: `.to("cpu")`
        does nothing on a machine that has no other device."""

        def leave(block: nn.Module, given: tuple, output: Tensor) -> None:
            storage = self._of(given[0])
            size = storage.size
            output.register_hook(lambda gradient: self._resize(storage, size))
            self._resize(storage, 0)

        for block in blocks:
            block.register_forward_hook(leave)

    def label(self, kind: str, values: list[Any]) -> None:
        """Says what tensors are for, since they were made."""
        for tensor in _tensors(values):
            self._of(tensor).kind = kind

    def label_rest(self, kind: str) -> None:
        """Says it of all that nothing is known of."""
        for storage in self.known.values():
            if storage.kind == "activations":
                storage.kind = kind

    def _count(self, func: Any, args: Any, result: Any) -> None:
        kind, tensors, times = _SENDS[func._overloadpacket.__name__]
        ranks = tuple(dist.get_process_group_ranks(_group(args)))
        if len(ranks) == 1:
            return
        share = (len(ranks) - 1) / len(ranks)
        whole = {"given": args[:1], "second": args[1:2], "made": result}[tensors]
        bytes_ = sum(t.numel() * t.element_size() for t in _tensors(whole))
        self.totals["number", kind, ranks] += 1
        self.totals["sent", kind, ranks] += round(times * share * bytes_)

    def summary(self) -> _Profile:
        """Goes through the step again, now that every storage's kind is known."""
        now = Counter(dict.fromkeys(KINDS, 0))
        for storage, size in self.before:
            now[storage.kind] += size
        phases: dict[tuple, Counter] = {}
        ends = [*(at for at, _ in self.marks[1:]), len(self.events)]
        for (begin, phase), end in zip(self.marks, ends):
            largest, peak = Counter(now), Counter(now)
            for storage, change in self.events[begin:end]:
                now[storage.kind] += change
                largest[storage.kind] = max(largest[storage.kind], now[storage.kind])
                if now.total() > peak.total():
                    peak = Counter(now)
            phases[phase] = Counter(
                {
                    **{("largest", kind): size for kind, size in largest.items()},
                    **{("peak", kind): size for kind, size in peak.items()},
                }
            )
        return _Profile(phases, self.totals)


def _group(args: tuple) -> dist.ProcessGroup:
    """The processes that a collective is among: an object, or the last argument's name."""
    found = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
    return _resolve_process_group(args[-1]) if found is None else dist.ProcessGroup.unbox(found)


def _bytes(tensor: Tensor) -> int:
    """What reading a tensor reads: of an expanded one, what there is."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in nested lists; of a distributed one, this process's part."""
    found = [v for v in tree_leaves(values) if isinstance(v, Tensor)]
    return [t.to_local() if isinstance(t, DTensor) else t for t in found]
