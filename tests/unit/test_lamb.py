"""LAMB beside its formula: which steps change nothing, what a resumed run needs, lengths of steps."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from openeva.engine.lamb import Lamb
from openeva.engine.loop import step_unless_skipped
from openeva.engine.optim import OptimConfig, build_optimizer
from openeva.engine.precision import Precision
from openeva.engine.state import Checkpoints, Progress, TrainState

both_rules = pytest.mark.parametrize("rule", ["deepspeed", "nvlamb"])
SKIPPED, DONE = torch.tensor(1.0), torch.tensor(0.0)


class Mixed(nn.Module):
    """Tensors of several axes, one, one element, and none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4)
        self.vector = nn.Parameter(torch.ones(1))
        self.scalar = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.vector + self.scalar


def made(rule: str = "deepspeed") -> tuple[Mixed, Lamb]:
    module = Mixed()
    config = OptimConfig(name="lamb" if rule == "deepspeed" else "nvlamb", lr=0.1, weight_decay=0.1)
    optimizer = build_optimizer(module, config, no_decay=(), num_layers=0)
    assert isinstance(optimizer, Lamb)
    return module, optimizer


def train(module: nn.Module, optimizer: Lamb, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        module(x).square().mean().backward()
        step_unless_skipped(optimizer, DONE)
        optimizer.zero_grad()


def everything(module: nn.Module, optimizer: Lamb) -> list[Tensor]:
    state = [value for parameter in module.parameters() for value in optimizer.state[parameter].values()]
    return [value.detach().clone() for value in [*module.parameters(), *state]]


@both_rules
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_skipped_step_changes_nothing(rule: str, steps_before: int) -> None:
    module, optimizer = made(rule)
    train(module, optimizer, range(steps_before))
    weights = [p.detach().clone() for p in module.parameters()]
    state = everything(module, optimizer)[len(weights) :]
    for parameter, bad in zip(module.parameters(), (torch.nan, torch.inf, -torch.inf, torch.nan), strict=True):
        parameter.grad = torch.full_like(parameter, bad)
    step_unless_skipped(optimizer, SKIPPED)
    after = everything(module, optimizer)
    assert all(torch.equal(one, other) for one, other in zip(after, weights, strict=False))
    expected = state or [torch.zeros_like(value) for value in after[len(weights) :]]
    assert all(torch.equal(one, other) for one, other in zip(after[len(weights) :], expected, strict=True))
    optimizer.zero_grad()
    train(module, optimizer, range(steps_before, 5))  # as if it had never been
    undisturbed = made(rule)
    train(*undisturbed, range(5))
    pairs = zip(everything(module, optimizer), everything(*undisturbed), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@both_rules
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(rule: str, tmp_path: Path) -> None:
    module, optimizer = made(rule)
    train(module, optimizer, range(3))
    device = torch.device("cpu")
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(TrainState(module, optimizer, Precision("fp32", device), Progress(3)))
    other, other_optimizer = made(rule)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert checkpoints.load(TrainState(other, other_optimizer, Precision("fp32", device), Progress()))
    assert not checkpoints.changed_settings
    for run in ((module, optimizer), (other, other_optimizer)):
        train(*run, range(3, 6))
    pairs = zip(everything(module, optimizer), everything(other, other_optimizer), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_length_of_a_step_is_the_rate_times_that_of_the_weight() -> None:
    weights = [nn.Parameter(torch.full((8, 4), size)) for size in (0.1, 1.0)]
    optimizer = Lamb(weights, lr=0.01)
    before = [w.detach().clone() for w in weights]
    for weight, size in zip(weights, (1e3, 1e-3), strict=True):  # whatever the length of the gradient
        weight.grad = torch.full_like(weight, size)
    optimizer.step()
    bias_correction = (1 - 0.999) ** 0.5 / (1 - 0.9)
    for weight, start in zip(weights, before, strict=True):
        ratio = (weight.detach() - start).norm() / start.norm()
        assert ratio.item() == pytest.approx(0.01 * bias_correction, rel=1e-4)


def test_the_ratio_has_bounds_and_is_one_for_a_weight_of_zeros() -> None:
    for size, expected in ((1e4, 10.0), (1e-6, 0.01), (0.0, 1.0)):
        weight = nn.Parameter(torch.full((2, 2), size, dtype=torch.float64))
        optimizer = Lamb([weight], lr=1e-3, betas=(0.0, 0.0))  # the step itself is then 1 in each place
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert size - weight[0, 0].item() == pytest.approx(1e-3 * expected, rel=1e-6)


def test_nvlamb_leaves_the_steps_of_tensors_without_decay_alone() -> None:
    for decay, expected in ((0.0, 1.0), (1e-9, 50.0)):
        weight = nn.Parameter(torch.full((2, 2), 50.0, dtype=torch.float64))
        optimizer = Lamb([weight], lr=1e-3, betas=(0.0, 0.0), weight_decay=decay, rule="nvlamb")
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert 50 - weight[0, 0].item() == pytest.approx(1e-3 * expected, rel=1e-6)


def test_tensors_without_a_gradient_stay_and_keep_no_state() -> None:
    module, optimizer = made()
    before = module.linear.weight.detach().clone()
    module.vector.grad = torch.ones(1)
    optimizer.step()
    assert torch.equal(module.linear.weight, before)
    assert module.vector.item() != 1.0
    assert list(optimizer.state) == [module.vector]
