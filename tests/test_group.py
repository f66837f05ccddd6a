"""Which device a process computes on, and what is said where that is not what was meant."""

import pytest
import torch

from prepretrain.distributed import group as distributed


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
        ("0,1", "driver version is insufficient"),
        ("GPU-8f2", "driver version is insufficient"),
        (None, "driver version is insufficient"),
    ],
)
def test_the_reason_is_named(hidden_gpus, monkeypatch, visible, said):
    def fails() -> None:
        raise RuntimeError("CUDA driver version is insufficient\nfor CUDA runtime version")

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


def test_two_processes_on_one_gpu_are_refused_and_other_kinds_are_said(caplog):
    two = [("node1", "a", "H100"), ("node1", "b", "H100")]
    distributed.check_gpus(two)
    distributed.check_gpus([*two, ("node2", "a", "H100")])  # the same number on another machine
    with pytest.raises(ValueError, match="3 processes on node1 see 2 GPUs .H100."):
        distributed.check_gpus([*two, two[0], ("node2", "a", "H100")])
    assert not caplog.records
    distributed.check_gpus([*two, ("node1", "c", "A100")])
    assert "GPUs differ" in caplog.text
