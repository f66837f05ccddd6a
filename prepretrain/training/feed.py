"""Brings batches to the device, on a GPU while it computes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from prepretrain.data.loader import to_device
from prepretrain.distributed import group as distributed


class Feed:
    """A stream's batches, one after another, on this process's device.

    On a GPU the next batch is copied from pinned memory, on a stream of its own, as soon as `prepare`
    is called: after the step before it has been queued, so that the device waits for neither.
    """

    def __init__(
        self, batches: Iterator[dict[str, Any]], waiting: Callable[[], AbstractContextManager]
    ):
        """waiting: what to be in while the host waits for data."""
        self.batches, self.waiting = batches, waiting
        self.copies = torch.cuda.Stream() if distributed.on_gpu() else None
        self.ahead: tuple[dict[str, Any], torch.cuda.Event] | None = None

    def take(self) -> dict[str, Any]:
        """The next batch; work that is queued from here on finds it whole."""
        if self.copies is None:
            return to_device(self._next())
        if self.ahead is None:
            self.prepare()
        (batch, copied), self.ahead = self.ahead, None
        here = torch.cuda.current_stream()
        here.wait_event(copied)
        for value in batch.values():
            if isinstance(value, Tensor):
                value.record_stream(here)  # else the next copy might be given its memory too early
        return batch

    def prepare(self) -> None:
        """Starts to copy the batch after the last one that was taken, on a GPU; a CPU has nothing to
        do beside it."""
        if self.copies is not None:
            batch = self._next()
            with torch.cuda.stream(self.copies):
                self.ahead = to_device(batch), self.copies.record_event()

    def _next(self) -> dict[str, Any]:
        with self.waiting():
            return next(self.batches)
