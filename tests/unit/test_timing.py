import time

import pytest
import torch

from openeva.engine import timing


@pytest.fixture(autouse=True)
def _no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_current", None)


def test_sections_add_up_until_they_are_taken() -> None:
    times = timing.start(torch.device("cpu"))
    for _ in range(2):
        with timing.section("teacher"):
            time.sleep(0.01)
    with timing.section("data", on_host=True):
        pass
    taken = times.take()
    assert 0.02 <= taken["teacher"] < 0.5
    assert 0 <= taken["data"] < 0.01
    assert times.take() == {}


def test_outside_a_loop_nothing_is_measured() -> None:
    with timing.section("teacher"):
        pass
    assert timing.start(torch.device("cpu")).take() == {}


@pytest.mark.gpu
def test_device_times_come_without_waiting() -> None:
    times = timing.start(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with timing.section("student"):
            for _ in range(50):
                a = a @ a * 1e-3
        early = times.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert early.get("student", 0.0) + times.take().get("student", 0.0) > 1e-4
