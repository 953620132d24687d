import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from openeva.engine.log import Meter, RunLog, read_log

CPU = torch.device("cpu")


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value)


def test_meter_means_leave_skipped_steps_out() -> None:
    meter = Meter(CPU)
    meter.add({"loss": scalar(1.0)}, skipped=scalar(0.0))
    meter.add({"loss": scalar(float("nan"))}, skipped=scalar(1.0))
    meter.add({"loss": scalar(4.0)}, skipped=scalar(0.0))
    meter.add({"loss": scalar(100.0)}, skipped=scalar(1.0))  # its gradient was not finite
    meter.flush({"step": 3}, {"bad": scalar(1.0)})
    meter.add({"loss": scalar(10.0)}, skipped=scalar(0.0))
    meter.flush({"step": 4}, {"bad": scalar(1.0)})
    assert list(meter.ready()) == [{"step": 3, "loss": 2.5, "bad": 1.0}, {"step": 4, "loss": 10.0, "bad": 1.0}]
    assert list(meter.ready(wait=True)) == []


def test_an_interval_of_skipped_steps_only_has_no_mean(tmp_path: Path) -> None:
    meter = Meter(CPU)
    meter.add({"loss": scalar(float("inf"))}, skipped=scalar(1.0))
    meter.flush({"step": 1}, {})
    with RunLog(tmp_path, active=True, total_steps=1) as log:
        log.write_all(meter.ready())
    assert read_log(tmp_path)[0]["loss"] is None  # JSON has no NaN
    json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)


@pytest.mark.gpu
def test_meter_does_not_wait_for_the_device() -> None:
    device = torch.device("cuda")
    meter, loss = Meter(device), torch.ones((), device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            meter.add({"loss": loss}, skipped=loss * 0)
        meter.flush({"step": 3}, {"bad": loss})
        early = list(meter.ready())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [*early, *meter.ready(wait=True)] == [{"step": 3, "loss": 1.0, "bad": 1.0}]


def test_what_a_killed_run_left_behind_spoils_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path, active=True, total_steps=9) as log:
        log.write({"step": 1, "loss": 1.0})
        log.write({"step": 2, "loss": 2.0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]
    with RunLog(tmp_path, active=True, total_steps=9) as log:
        log.write({"step": 2, "loss": 2.5})
        log.write({"step": 2, "held_out_loss": 7.0})
    assert all(json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    records = read_log(tmp_path)
    assert [(r["step"], r.get("loss"), r.get("held_out_loss")) for r in records] == [
        (1, 1.0, None), (2, None, 7.0), (2, 2.5, None),
    ]  # fmt: skip


def test_a_first_line_cut_short_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step"')
    with RunLog(tmp_path, active=True, total_steps=1) as log:
        log.say("hello")
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["message"] == "hello"


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", active=False, total_steps=1) as log:
        log.write({"step": 1, "loss": 1.0})
        log.say("hello")
        log.advance(1)
        log.write_summary({})
    assert not (tmp_path / "run").exists()


def test_curves_and_summary(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, active=True, total_steps=2) as log:
        for step in (1, 2):
            log.write({"step": step, "loss": 1.0 / step, "lr": float("nan")})
        log.write_summary({"broken_files": 3})
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in curves.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert curves.Tags()["scalars"] == ["loss"]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"broken_files": 3}


RECORD = {"step": 5, "loss": -0.5, "lr": 1e-3, "grad_norm": 2.0, "samples_per_s": 100.0, "mfu": 0.25, "share_data": 0.5}


def test_rates_name_what_is_counted(tmp_path: Path) -> None:
    out = io.StringIO()
    with RunLog(tmp_path, active=True, total_steps=10, console=Console(file=out, width=200), unit="clips") as log:
        log.write(RECORD)
    assert "100 clips/s" in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_console(terminal: bool, tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    with RunLog(tmp_path, active=True, total_steps=10, console=console) as log:
        log.write({**RECORD, "skipped_steps": 2.0})
        log.write({"step": 5, "held_out_loss": -0.25})
        log.say("skipped a broken file: a.jpg")
        log.advance(5)
    text = out.getvalue()
    for part in ("loss -0.5000", "100 img/s", "25% MFU", "data 50%", "2 skipped", "held_out_loss -0.25", "a.jpg"):
        assert part in text, part


def test_without_wandb_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"openeva\[wandb\]"):
        RunLog(tmp_path, active=True, total_steps=1, wandb_project="p")


class Wandb:
    """What the log asks of W&B."""

    def __init__(self) -> None:
        self.begun, self.logged, self.metrics = [], [], []

    def init(self, **settings: object) -> "Wandb":
        self.begun.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, record: dict, step: int | None = None) -> None:
        assert step is None, "W&B drops what comes with a lower step than before"
        self.logged.append(record)

    def finish(self) -> None:
        pass


def test_wandb_goes_on_with_the_same_run_and_shows_steps_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for folder in ("one", "one", "other"):
        with RunLog(tmp_path / folder, active=True, total_steps=1, wandb_project="p") as log:
            log.write({"step": 2, "loss": 1.0})
            log.write({"step": 1, "loss": 2.0})
    one, again, other = (settings["id"] for settings in wandb.begun)
    assert one == again
    assert one != other
    assert all(settings["resume"] == "allow" for settings in wandb.begun)
    assert wandb.metrics == [("*", "step")] * 3
    assert [record["step"] for record in wandb.logged] == [2, 1] * 3
