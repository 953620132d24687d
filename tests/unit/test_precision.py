import pytest
import torch
from torch import nn

from openeva.engine.precision import Precision, resolve_precision

CPU = torch.device("cpu")


def steps(precision: Precision, bad: list[int]) -> list[float]:
    """The loss scale after each of these steps."""
    scales = []
    for flag in bad:
        precision.found_inf = torch.tensor(float(flag))
        precision.update()
        scales.append(precision.scale.item())
    return scales


def test_first_overflow_only_uses_up_the_hysteresis() -> None:
    precision = Precision("fp16", CPU)
    assert precision.scale.item() == 2**16
    assert steps(precision, [1, 0, 1, 1]) == [2**16, 2**16, 2**15, 2**14]


def test_doubles_after_500_clean_steps_in_a_row() -> None:
    precision = Precision("fp16", CPU)
    scales = steps(precision, [0] * 1000)
    assert scales[498:500] == [2**16, 2**17]
    assert scales[998:] == [2**17, 2**18]
    precision = Precision("fp16", CPU)
    scales = steps(precision, [0] * 300 + [1] + [0] * 500)
    assert scales[799:801] == [2**16, 2**17]


def test_only_growth_refills_the_hysteresis() -> None:
    precision = Precision("fp16", CPU)
    assert steps(precision, [1, 1])[-1] == 2**15
    assert steps(precision, [0] * 499 + [1])[-1] == 2**14
    assert steps(precision, [0] * 500)[-1] == 2**15
    assert steps(precision, [1])[-1] == 2**15
    assert steps(precision, [1])[-1] == 2**14


def test_never_below_one_and_counts_what_was_skipped() -> None:
    precision = Precision("fp16", CPU)
    assert steps(precision, [1] * 30)[-1] == 1.0
    assert (precision.bad_steps.item(), precision.bad_in_a_row.item(), precision.bad_streak()) == (30, 30, 30)
    steps(precision, [0, 1])
    assert (precision.bad_steps.item(), precision.bad_in_a_row.item()) == (31, 1)


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_no_scale_outside_fp16(name: str) -> None:
    precision = Precision(name, CPU)
    assert steps(precision, [1, 1, 0, 1]) == [1.0] * 4
    assert precision.bad_steps.item() == 3


@pytest.mark.parametrize("name", ["fp16", "fp32"])
@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_finish_unscales_and_clips(name: str, clip: float | None) -> None:
    precision, module = Precision(name, CPU), nn.Linear(4, 3)
    x = torch.randn(5, 4)
    expected = torch.autograd.grad(module(x).square().mean(), list(module.parameters()))
    norm = torch.nn.utils.get_total_norm(expected)
    loss = module(x).square().mean()
    precision.backward(loss)
    found = precision.finish(module, loss, clip)
    torch.testing.assert_close(found, norm)
    factor = 1.0 if clip is None else min(1.0, clip / (norm.item() + 1e-6))
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * factor)
    assert precision.found_inf.item() == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_finish_finds_what_is_not_finite(value: float, where: str) -> None:
    precision, module = Precision("fp32", CPU), nn.Linear(2, 2)
    loss = module(torch.ones(1, 2)).sum()
    loss.backward()
    if where == "loss":
        loss = loss.detach() * value
    else:
        module.weight.grad[0, 1] = value
    precision.finish(module, loss, 1.0)
    assert precision.found_inf.item() == 1.0


def test_state_goes_on_where_it_was() -> None:
    one, other = Precision("fp16", CPU), Precision("fp16", CPU)
    steps(one, [0, 1, 1, 0])
    other.load_state_dict(one.state_dict())
    assert steps(one, [1, 0] * 5 + [0] * 500) == steps(other, [1, 0] * 5 + [0] * 500)
    assert one.state_dict() == other.state_dict()


def test_after_a_rewind_the_scale_is_lower_each_time() -> None:
    for rewinds, scale in ((1, 2**14), (2, 2**12), (9, 1)):
        precision = Precision("fp16", CPU)
        precision.bad_in_a_row += 3
        precision.rewound(torch.tensor(7.0), rewinds)
        assert (precision.scale.item(), precision.bad_steps.item(), precision.bad_in_a_row.item()) == (scale, 7, 0)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    with Precision(name, CPU).autocast():
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == dtype


def test_auto_is_what_the_hardware_multiplies() -> None:
    assert resolve_precision("auto", CPU) in {"bf16", "fp32"}
    assert resolve_precision("fp16", CPU) == "fp16"
