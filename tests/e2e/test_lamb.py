"""LAMB over two processes that share the weights is LAMB in one that has them all."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from e2e.toy import join, start
from openeva.engine import distributed
from openeva.engine.optim import OptimConfig, build_optimizer


class Uneven(nn.Module):
    """Weights that do not divide evenly, and one of which a process has nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 3)])
        self.logit_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x * self.logit_scale


def steps(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    for step in range(4):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        module(x).square().mean().backward()
        optimizer.found_inf = torch.tensor(float(step == 1))
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.named_parameters()}
    moments = {name: optimizer.state[p]["exp_avg_sq"] for name, p in module.named_parameters()}
    full = {f"{name}.v": v.full_tensor() if isinstance(v, DTensor) else v for name, v in moments.items()}
    return {name: value.detach().clone() for name, value in (weights | full).items()}


def sharded_and_not(name: str) -> None:
    world = distributed.start("cpu")
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.1)
    whole, shared = Uneven(), Uneven()
    expected = steps(whole, build_optimizer(whole, config, no_decay=(), num_layers=0))
    shared = distributed.wrap(shared, [*shared.blocks], world, "fsdp", "off", torch.float32)
    assert all(isinstance(parameter, DTensor) for parameter in shared.parameters())
    actual = steps(shared, build_optimizer(shared, config, no_decay=(), num_layers=0))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    distributed.stop()


@pytest.mark.parametrize("name", ["lamb", "nvlamb"])
def test_two_sharded_processes(name: str, tmp_path: Path) -> None:
    join(start(sharded_and_not, name, size=2, errors=tmp_path), tmp_path)
