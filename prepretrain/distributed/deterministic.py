"""Kernels that give the same bits each time."""

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def kernels(asked: bool) -> Iterator[None]:
    """Within it, if asked for, torch takes deterministic kernels only, and raises RuntimeError, naming
    the operation, where there is none. On a CPU, whose kernels are, nothing else changes.

    Attention is flash attention, whose backward pass has a deterministic form, or plain matrix
    products. Memory that is not yet written is not filled, as torch would by default.
    """
    if not asked:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first called
    before = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    attention = [torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.MATH]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with torch.nn.attention.sdpa_kernel(attention):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills
