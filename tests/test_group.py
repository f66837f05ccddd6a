"""Which device a process computes on, and what is said where that is not what was meant."""

import logging
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import processes

from prepretrain.distributed import group as distributed
from prepretrain.distributed import heartbeat


@pytest.fixture
def hidden_gpus(monkeypatch):
    """A machine with GPUs that torch cannot use."""
    monkeypatch.setattr(distributed, "_has_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    distributed.shutdown()
    monkeypatch.setattr(distributed, "_cpu_asked", False)


def test_a_cpu_is_not_used_silently_where_there_are_gpus(hidden_gpus):
    with pytest.raises(ValueError, match="device: this machine has GPUs.*with device=cpu"):
        distributed.init()
    assert distributed.init("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("visible", "said"),
    [
        ("", "CUDA_VISIBLE_DEVICES='' hides them"),
        ("-1", "CUDA_VISIBLE_DEVICES='-1' hides them"),
        ("0,1", "driver on your system is too old .found version 11040.; CUDA_VISIBLE.*='0,1'"),
        ("9", "too old .*; CUDA_VISIBLE_DEVICES='9'.. Mend that, or compute"),
        ("GPU-8f2", "too old .*; CUDA_VISIBLE_DEVICES='GPU-8f2'.. Mend that, or compute"),
        (None, "driver on your system is too old .found version 11040... Mend that, or compute"),
    ],
)
def test_the_reason_is_named(hidden_gpus, monkeypatch, visible, said):
    def fails() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040).\nPlease update"
        )

    monkeypatch.setattr(torch.cuda, "init", fails)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=said):
        distributed.init()


def test_a_build_of_torch_without_cuda_is_named(hidden_gpus, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ValueError, match="torch .* is a build without CUDA"):
        distributed.init()


def test_two_processes_on_one_gpu_are_refused_and_on_others_are_not():
    two, other = [["node1", "a", "H100"], ["node1", "b", "H100"]], ["node2", "a", "H100"]
    distributed.check_gpus(two)
    distributed.check_gpus([*two, other])  # the same number on another machine
    with pytest.raises(ValueError, match="3 processes on node1 see 2 GPUs .H100."):
        distributed.check_gpus([*two, two[0], other])


def _joins(rank: int, kinds: list[str], folder: str) -> None:
    """Joins as a process of a machine with these GPUs, of which gloo takes NCCL's part."""
    join = dist.init_process_group
    gpu = lambda device: SimpleNamespace(uuid=f"GPU-{device.index}", name=kinds[device.index])
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: len(kinds)
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_properties = gpu
    dist.init_process_group = lambda backend, device_id, **how: join("gloo", **how)
    logging.basicConfig(filename=f"{folder}/{rank}.txt", format="%(message)s")
    try:
        assert distributed.init() == torch.device("cuda", rank)
        assert distributed.all_gather_object(rank) == list(range(len(kinds)))
        distributed.shutdown()
    except ValueError as error:
        assert not dist.is_initialized(), "NCCL was asked first"
        logging.error("%s", error)


def test_more_processes_than_gpus_are_refused_on_each_before_nccl_is_asked(tmp_path):
    processes(3, _joins, ["H100", "H100"], str(tmp_path))
    said = {(tmp_path / f"{rank}.txt").read_text() for rank in range(3)}
    assert len(said) == 1
    assert re.match("--procs: 3 processes on .* see 2 GPUs .H100.. Start as many as", said.pop())


def test_gpus_of_different_kinds_are_used_and_said_once(tmp_path):
    processes(2, _joins, ["H100", "A100"], str(tmp_path))
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert "GPUs differ, and all wait for the slowest: {'H100': 1, 'A100': 1}" in said[0]
    assert not said[1]


def _waits(rank: int, folder: str) -> None:
    heartbeat._PERIOD = 0.2
    distributed.init()
    lost = pytest.raises(RuntimeError, match="process 1 has ended or stands still; see its output")
    with lost, heartbeat.watching(Path(folder), None):
        distributed.barrier()
        if rank == 1:
            time.sleep(0.5)
            os._exit(0)
        # what the watch of NCCL says of the process that waits
        raise dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(…)")


def test_a_time_out_of_nccl_names_the_process_that_is_lost(tmp_path):
    processes(2, _waits, str(tmp_path))
