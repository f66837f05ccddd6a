"""Rows that all processes of a machine read and that lie there once: a file in memory, which has no
name any more."""

import logging
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from prepretrain.distributed import group as distributed

logger = logging.getLogger(__name__)

_MEMORY = "/dev/shm"  # before the folder of temporary files, which may be a disk
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells machines of one name apart


class SharedRows:
    """A tensor of zeros of this shape that one process of each machine fills, and all of it read.

    Made, filled and finished by all processes together. Where they cannot share a file (no room, other
    folders), each has a copy of its own.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        empty = torch.empty(0, dtype=dtype)
        self._shape, self._kind = shape, empty.numpy().dtype
        size = int(np.prod(shape)) * empty.element_size()
        self._file, writes = _file_of_this_machine(size)
        self._rows: Tensor | None = None
        if self._file is None:
            self._rows = torch.zeros(shape, dtype=dtype)
        elif writes:
            self._rows = self._mapped("r+")

    def put(self, position: Tensor, values: Tensor) -> None:
        """Fills these rows, on the process of this machine whose task that is."""
        if self._rows is not None:
            self._rows[position] = values.cpu()

    def finish(self) -> Tensor:
        """All rows, when every process has filled its own; changing them changes no other's."""
        if self._file is None:
            return self._rows
        self._rows = None
        distributed.barrier()
        with self._file:
            return self._mapped("c")

    def _mapped(self, mode: str) -> Tensor:
        return torch.from_numpy(np.memmap(self._file, self._kind, mode, shape=self._shape))


def _file_of_this_machine(size: int) -> tuple[BinaryIO | None, bool]:
    """An open file of so many zeros that this machine's processes share, and whether this one is to
    write it; no file where a process has none to share it with, or they cannot."""
    boot = _BOOT.read_text() if _BOOT.exists() else ""
    machines = distributed.all_gather_object((socket.gethostname(), boot))
    first = machines.index(machines[distributed.rank()])
    if len(set(machines)) == len(machines):
        return None, True
    writes = first == distributed.rank()
    path = _made(size) if writes else None
    path = distributed.all_gather_object(path)[first]
    file = None
    with suppress(OSError, TypeError):
        file = open(path, "r+b")
    shared = all(distributed.all_gather_object(file is not None))
    if writes and path is not None:
        os.unlink(path)  # what is killed from here on leaves nothing behind
    if not shared:
        logger.info("features: %.1f GB are held by each process, as they share no file", size / 1e9)
        file = file.close() if file is not None else None
    return file, writes


def _made(size: int) -> str | None:
    """The path of a new file with room for so many bytes, of memory if there is as much."""
    for folder in (_MEMORY, tempfile.gettempdir()):
        path = None
        try:
            number, path = tempfile.mkstemp(prefix="prepretrain-", dir=folder)
            with open(number, "r+b"):
                os.posix_fallocate(number, 0, size)
            return path
        except OSError:  # no such folder, or no room in it
            if path is not None:
                os.unlink(path)
    return None
