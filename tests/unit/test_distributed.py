import pytest
import torch
from torch import nn

from openeva.engine import distributed
from openeva.engine.distributed import World, wrap


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = distributed.start("cpu")
    assert (world.rank, world.size, world.is_main, world.device.type) == (0, 1, True, "cpu")
    assert distributed.any_process(True)
    assert not distributed.any_process(False)
    assert distributed.mean_over_processes(torch.tensor(3.0)).item() == 3.0
    distributed.barrier()
    distributed.stop()


@pytest.mark.parametrize("tf32", [False, True])
def test_full_precision_is_full_on_a_gpu_too(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        distributed.start("cuda", tf32=tf32)
        assert [backend.allow_tf32 for backend in backends] == [tf32, tf32]
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_cuda_asked_for_and_absent() -> None:
    with pytest.raises(ValueError, match="use device=cpu or auto"):
        distributed.start("cuda")


def test_devices_that_do_not_exist_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown device 'gpu'; give auto"):
        distributed.start("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.find_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="'cuda:2' asked for, but torch counts 2"):
        distributed.find_device("cuda:2")


@pytest.mark.parametrize("strategy", ["auto", "none", "ddp", "fsdp"])
def test_one_process_needs_no_wrapper(strategy: str) -> None:
    module = nn.Linear(2, 2)
    assert wrap(module, [], World(0, 1, torch.device("cpu")), strategy, "off", torch.float32) is module
    assert distributed.unwrap(module) is module
    with distributed.gathered(module):
        assert module(torch.zeros(1, 2)).shape == (1, 2)


def test_unconnected_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="strategy none would train 2 unconnected models"):
        wrap(nn.Linear(2, 2), [], World(0, 2, torch.device("cpu")), "none", "off", torch.float32)


def test_nodes_of_different_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="as many processes on each node: 6 are not 4 each"):
        wrap(nn.Linear(2, 2), [], World(0, 6, torch.device("cpu")), "fsdp", "off", torch.float32, "node")


@pytest.mark.parametrize("mode", ["blocks", "model"])
def test_compilation_is_asked_for_where_the_recipe_says(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))  # noqa: PLW0108  a method
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wrap(module, list(module), World(0, 1, torch.device("cpu")), "auto", mode, torch.float32)
    assert compiled == (list(module) if mode == "blocks" else [module])
