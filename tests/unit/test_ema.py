import pytest
import torch
from torch import nn

from openeva.engine.ema import Ema

NO, YES = torch.zeros(()), torch.ones(())


def moved(module: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)


def test_follows_the_weights() -> None:
    module = nn.Linear(2, 3)
    start = module.weight.detach().clone()
    ema = Ema(module, decay=0.9)
    for _ in range(2):
        moved(module, 1.0)
        ema.update(NO)
    torch.testing.assert_close(ema.state_dict()["weight"], start + 0.9 * 0.1 + 0.1 * 2)


def test_a_skipped_step_leaves_it_alone() -> None:
    module = nn.Linear(2, 3)
    ema = Ema(module, decay=0.5)
    moved(module, 1.0)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    ema.update(YES)
    assert all(torch.equal(value, before[name]) for name, value in ema.state_dict().items())


def test_is_kept_in_fp32_and_leaves_frozen_weights_out() -> None:
    module = nn.Linear(2, 3).to(torch.bfloat16)
    module.bias.requires_grad_(False)
    ema = Ema(module, decay=0.999)
    assert list(ema.state_dict()) == ["weight"]
    assert ema.state_dict()["weight"].dtype == torch.float32


def test_applied_only_within_the_context() -> None:
    module = nn.Linear(2, 3)
    ema = Ema(module, decay=0.5)
    averaged = module.weight.detach().clone()
    moved(module, 1.0)
    with pytest.raises(RuntimeError, match="inside"), ema.applied():  # noqa: PT012  also when the evaluation fails
        assert torch.equal(module.weight, averaged)
        raise RuntimeError("inside")
    torch.testing.assert_close(module.weight.detach(), averaged + 1)


def test_goes_by_the_names_of_the_module_itself() -> None:
    assert list(Ema(nn.Sequential().append(nn.ModuleDict({"module": nn.Linear(2, 3)})), 0.5).state_dict()) == [
        "0.module.weight", "0.module.bias",
    ]  # fmt: skip
    assert list(Ema(nn.ModuleDict({"module": nn.Linear(2, 3)}), 0.5).state_dict()) == ["module.weight", "module.bias"]


def test_continues_from_its_state() -> None:
    module = nn.Linear(2, 3)
    one, other = Ema(module, 0.9), Ema(module, 0.9)
    moved(module, 1.0)
    one.update(NO)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.state_dict()["bias"], one.state_dict()["bias"])
