"""Notes the signals that ask a run to stop."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Signals:
    """SIGTERM and SIGUSR2 only set a flag, from when it is made until `restore`; `fit` saves at a
    step's end."""

    def __init__(self) -> None:
        self.received: int | None = None  # which one came
        self.old = {s: signal.signal(s, self._set) for s in (signal.SIGTERM, signal.SIGUSR2)}

    @contextlib.contextmanager
    def passed_on(self) -> Iterator[None]:
        """For what takes long and saves nothing: where others handle signals too they are theirs, and
        so is one that came since the loop last looked."""
        others = {number: handler for number, handler in self.old.items() if callable(handler)}
        for number, handler in others.items():
            signal.signal(number, handler)
        if self.received in others:
            signal.raise_signal(self.received)
        yield
        for number in others:
            signal.signal(number, self._set)

    def _set(self, number: int, frame: Any) -> None:
        self.received = number

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
