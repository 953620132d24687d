import pytest
from hypothesis import given
from hypothesis import strategies as st

from openeva.engine.schedule import Schedule


def test_warm_up_includes_both_ends_and_the_cosine_starts_at_the_peak_again() -> None:
    schedule = Schedule(base=2.0, final=0.5, total_steps=10, warmup_steps=4)
    values = [schedule.at(step) for step in range(10)]
    assert values[:5] == pytest.approx([0.0, 2 / 3, 4 / 3, 2.0, 2.0])
    assert values[7] == pytest.approx(1.25)  # half-way of the six decaying steps
    assert 0.5 < values[9] < values[8]
    assert schedule.at(10) == schedule.at(1000) == values[9]


def test_linear_reaches_the_final_value() -> None:
    schedule = Schedule(1.0, 0.2, total_steps=5, shape="linear")
    assert [schedule.at(step) for step in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_warm_up_from_the_first_step_rises_in_equal_parts() -> None:
    schedule = Schedule(base=2.0, final=0.0, total_steps=10, warmup_steps=4, warmup_from="first_step")
    values = [schedule.at(step) for step in range(10)]
    assert values[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    without = Schedule(base=2.0, final=0.0, total_steps=10, warmup_steps=4)
    assert values[4:] == [without.at(step) for step in range(4, 10)]
    assert Schedule(2.0, 0.0, 3, 1, warmup_from="first_step").at(0) == 2.0


@given(
    base=st.floats(1e-8, 10), share=st.floats(0, 1), total=st.integers(1, 500), warm=st.floats(0, 1),
    shape=st.sampled_from(["cosine", "linear"]), warmup_from=st.sampled_from(["zero", "first_step"]),
)  # fmt: skip
def test_stays_between_its_ends_and_only_falls_after_the_peak(base, share, total, warm, shape, warmup_from) -> None:
    warmup = round(warm * total)
    schedule = Schedule(base, base * share, total, warmup, shape, warmup_from)
    values = [schedule.at(step) for step in range(total)]
    rise, fall = values[:warmup], values[warmup:]
    assert all(0 <= value <= base * (1 + 1e-12) for value in values)
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert not fall or (fall[0] == pytest.approx(base) and fall[-1] >= base * share - 1e-12 * base)


@pytest.mark.parametrize("warmup", [-1, 11])
def test_a_warm_up_that_does_not_fit_is_refused(warmup: int) -> None:
    with pytest.raises(ValueError, match=f"warm-up of {warmup} steps does not fit into a run of 10"):
        Schedule(1.0, 0.0, 10, warmup)
