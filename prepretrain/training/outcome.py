"""What a step came to. It stays on the device, where it decides whether the step is taken; the host
reads it when it will not have to wait."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prepretrain.distributed import group as distributed

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Agreed:
    """What all processes know of a step. figures: their means. norm: of the whole gradient."""

    finite: bool
    stop: bool
    bad: int
    figures: dict[str, float]
    norm: float


class Gradients:
    """The parameters that an optimizer trains, and what is to be known of their gradients."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.by_copies: dict[int, list[nn.Parameter]] = {}
        for parameter in parameters:
            count = distributed.copies(parameter)
            self.by_copies.setdefault(count, []).append(parameter)

    @torch.no_grad()
    def norms(self) -> "list[Norms]":
        """This process's norm of each gradient."""
        found = [(c, [p for p in ps if p.grad is not None]) for c, ps in self.by_copies.items()]
        return [
            Norms(copies, parameters, torch.stack(torch._foreach_norm(_gradients(parameters), 2)))
            for copies, parameters in found
            if parameters
        ]

    @torch.no_grad()
    def clip(self, norm: Tensor, limit: float) -> None:
        """Scales the gradients so that their norm, given whole, is at most the limit; as
        torch.nn.utils.clip_grads_with_norm_ does."""
        share = (limit / (norm + 1e-6)).clamp(max=1.0)
        for parameters in self.by_copies.values():
            torch._foreach_mul_(_gradients(parameters), share)


@dataclass(frozen=True)
class Norms:
    """The norms [P] of this process's parts of some gradients, of which `copies` processes hold the
    same."""

    copies: int
    parameters: list[nn.Parameter]
    values: Tensor

    def square(self) -> Tensor:
        """Of all of them together: this process's share in the sum over processes."""
        # vector_norm before it is squared: as torch's get_total_norm, to the last bit
        return torch.linalg.vector_norm(self.values).double().square() / self.copies

    def squares(self) -> Tensor:
        """[P], of each."""
        return self.values.double().square() / self.copies


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """This process's parts of the gradients: plain tensors, since on DTensors each operation takes the
    host three times as long."""
    return [distributed.local(p.grad) for p in parameters if p.grad is not None]


class Outcome:
    """A step's figures and its gradient's norm, over all processes: one sum of one small tensor.

    What this process alone has to say (that it was asked to stop, that images were bad) goes with
    them, so that no other exchange is needed in a step.
    """

    def __init__(self, figures: dict[str, Tensor], norms: list[Norms], *, stop: bool, bad: int):
        """stop, bad: this process was asked to stop; its bad images."""
        self.figures, self.norms = figures, norms
        device = figures["loss"].device
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        square = sum((one.square() for one in norms), nothing)
        shown = torch.cat([value.reshape(1) for value in figures.values()])
        mine = torch.cat([shown.double(), square[None]])
        said = [mine.isfinite().all().logical_not().double()]
        said += [torch.full_like(square, float(value)) for value in (stop, bad)]
        self.row = torch.cat([torch.stack(said), mine])
        if distributed.world() > 1:
            dist.all_reduce(self.row)
        self.norm = self.row[-1].sqrt().float()
        self.row[-1] = self.norm
        self.copied: Tensor | None = None

    def left_out(self, limit: float = math.inf) -> Tensor:
        """1.0 if the step must not be taken, else 0.0, on the device: something is not finite on some
        process, or the norm is above the limit."""
        good = (self.row[0] == 0) & (self.row[-1] <= min(limit, _LARGEST))
        return good.logical_not().float()

    def send(self) -> None:
        """Starts to copy it to the host; into pinned memory, where it comes from a GPU."""
        self.copied = self.row.to("cpu", non_blocking=True)
        if self.row.is_cuda:
            self.arrived = torch.cuda.Event(blocking=True)
            self.arrived.record()

    def read(self) -> Agreed:
        """What was sent; waits until the device has come as far as that."""
        if self.row.is_cuda:
            self.arrived.synchronize()
        wrong, stop, bad, *sums, norm = self.copied.tolist()
        means = [value / distributed.world() for value in sums]
        finite = wrong == 0 and norm <= _LARGEST
        return Agreed(finite, stop > 0, round(bad), dict(zip(self.figures, means)), norm)

    def squares(self, named: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """The square of each gradient's norm over all processes, which call for it together."""
        names = {id(parameter): name for name, parameter in named.items()}
        found = {}
        for one in self.norms:
            squares = distributed.all_sum(one.squares()).tolist()
            found |= {names[id(p)]: square for p, square in zip(one.parameters, squares)}
        return found
