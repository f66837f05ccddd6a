"""Notes the signals that ask a run to stop."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

from prepretrain.distributed import group as distributed

_AGAIN = 1.0  # seconds: a launcher passes one Ctrl-C on to processes that have had it already
INTERRUPTED = 130  # the exit status of a process that Ctrl-C ended, as shells have it


class Signals:
    """SIGTERM, SIGUSR2 and SIGINT (Ctrl-C) only set a flag, from when it is made until `restore`;
    `fit` saves at a step's end. A second Ctrl-C ends the process at once."""

    def __init__(
        self, numbers: Collection[int] = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    ) -> None:
        self.received: int | None = None  # which one came
        self.pressed: float | None = None  # when Ctrl-C first was
        if threading.current_thread() is not threading.main_thread():
            numbers = ()  # only the main thread may, and gets them
        self.old = {number: signal.signal(number, self._set) for number in numbers}

    def stop(self) -> None:
        """Asks for what a signal asks for."""
        self.received = signal.SIGTERM

    @contextlib.contextmanager
    def passed_on(self) -> Iterator[None]:
        """For what takes long and saves nothing: where others handle signals too they are theirs, and
        so is one that came since the loop last looked."""
        others = {number: handler for number, handler in self.old.items() if _handles(handler)}
        for number, handler in others.items():
            signal.signal(number, handler)
        try:
            if self.received in others:
                signal.raise_signal(self.received)
            yield
        finally:
            for number in others:
                signal.signal(number, self._set)

    def _set(self, number: int, frame: Any) -> None:
        self.received = number
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self.pressed is None:
            self.pressed = now
            if distributed.is_main():  # not by print, which a signal may meet in the middle of one
                os.write(2, b"\nstops after this step, and saves; Ctrl-C again leaves at once\n")
        elif now - self.pressed > _AGAIN:
            os._exit(INTERRUPTED)

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started within ignore Ctrl-C, until they say otherwise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def _handles(handler: Any) -> bool:
    """Whether somebody handles a signal, which Python itself does for Ctrl-C only, by raising."""
    return callable(handler) and handler is not signal.default_int_handler
