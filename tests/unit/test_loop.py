"""The loop on a task small enough to see through: the mean of a vector's squares."""

import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openeva.engine import loop as loop_module
from openeva.engine.distributed import World
from openeva.engine.ema import Ema
from openeva.engine.log import Meter, RunLog, read_log
from openeva.engine.loop import LoopConfig, NonFiniteError, StopSignal, run_loop
from openeva.engine.optim import OptimConfig, adamw
from openeva.engine.precision import Precision
from openeva.engine.schedule import Schedule
from openeva.engine.state import Checkpoints, Progress, TrainState
from openeva.engine.timing import section
from openeva.tasks.base import Task

Value = Callable[[int], float]
"""Number of the batch -> factor on its loss."""


class Squares(Task):
    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trainable = nn.Linear(3, 2).to(device)

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with section("teacher"):
            factor = batch["factor"]
        loss = self.trainable(batch["image"]).square().mean() * factor
        return loss, {"half": loss.detach() / 2}


class Numbers:
    """Batch i is drawn from seed i; its loss is multiplied by `value(i)`."""

    def __init__(self, value: Value = lambda number: 1.0, accumulation: int = 1) -> None:
        self.value, self.accumulation, self.broken, self.given = value, accumulation, {}, []

    def batches(self, start_sample: int) -> Iterator[list[dict[str, Any]]]:
        number = start_sample // 4
        while True:
            self.given.append(number)
            image = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
            factor = torch.tensor(self.value(number))
            yield [{"image": part, "factor": factor} for part in image.chunk(self.accumulation)]
            number += 1


class Run:
    """One run of the loop and what is left of it."""

    def __init__(
        self, out: Path, value: Value = lambda number: 1.0, *, precision: str = "fp32", device: str = "cpu"
    ) -> None:
        self.out, self.data, self.task = out, Numbers(value), Squares(device)
        self.world = World(0, 1, torch.device(device))
        optimizer = adamw(self.task.trainable, OptimConfig(), no_decay=set(), num_layers=0)
        ema = Ema(self.task.trainable, 0.5)
        self.state = TrainState(
            self.task.trainable, optimizer, Precision(precision, self.world.device), Progress(), ema
        )  # fmt: skip
        self.checkpoints = Checkpoints(out / "checkpoints", {})

    def __call__(self, steps: int, evaluate: Callable[[int], dict] | None = None, **changes: Any) -> str:
        config = LoopConfig(
            steps, Schedule(0.1, 0.0, steps), Schedule(0.05, 0.05, steps), 4, clip_grad=1.0, log_every=1
        )
        with RunLog(self.out, active=True, total_steps=steps) as log:
            return run_loop(
                self.task, self.data, self.state, replace(config, **changes), world=self.world,
                checkpoints=self.checkpoints, log=log, evaluate=evaluate,
            )  # fmt: skip

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {f"w.{k}": v for k, v in self.task.trainable.state_dict().items()}
        found |= {f"ema.{k}": v for k, v in self.state.ema.state_dict().items()}
        for number, values in enumerate(self.state.optimizer.state.values()):
            found |= {f"adam.{number}.{k}": v for k, v in values.items()}
        return {name: value.clone() for name, value in found.items()}

    def messages(self) -> str:
        return (self.out / "log.jsonl").read_text()


# ------------------------------------------------------------------------------------------------- the plain way


def test_every_line_of_the_log(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run(3, flops_per_sample=2e6, peak_flops=1e9) == "finished"
    records = read_log(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert [r["samples"] for r in records] == [4, 8, 12]
    for record in records:
        assert record["half"] == pytest.approx(record["loss"] / 2)
        assert record["grad_norm"] > 0
        assert record["memory_gib"] > 0.01
        assert record["tflops_per_s"] == pytest.approx(record["samples_per_s"] * 2e-6)
        assert record["mfu"] == pytest.approx(record["tflops_per_s"] * 1e12 / 1e9)
        assert record["step_ms"] == pytest.approx(4000 / record["samples_per_s"])
        shares = [record[f"share_{name}"] for name in ("data", "teacher", "student", "optimiser")]
        assert all(share > 0 for share in shares)
        assert sum(shares) == pytest.approx(1.0)
        assert (record["broken_files"], record["skipped_steps"], record["loss_scale"]) == (0, 0, 1)
    assert records[0]["lr"] == 0.1
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_log_lines_are_means_of_their_interval(tmp_path: Path) -> None:
    Run(tmp_path / "each")(6)
    Run(tmp_path / "third")(6, log_every=4)
    each, third = [[r["loss"] for r in read_log(tmp_path / name)] for name in ("each", "third")]
    assert third == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 2])


def test_accumulation_is_one_large_batch(tmp_path: Path) -> None:
    one, four = Run(tmp_path / "one"), Run(tmp_path / "four")
    four.data.accumulation = 4
    one(5)
    four(5)
    for name, value in one.tensors().items():
        torch.testing.assert_close(four.tensors()[name], value, rtol=1e-4, atol=1e-6)


def test_evaluates_and_saves_when_it_is_due(tmp_path: Path) -> None:
    run, seen = Run(tmp_path), []

    def evaluate(step: int) -> dict[str, float]:
        run.task.eval()
        seen.append(step)
        return {"held_out_loss": float(step)}

    modes = []
    run.task.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    run.checkpoints.keep_last = 10
    run(7, evaluate, evaluate_every=3, save_every=2)
    assert seen == [3, 6, 7]
    assert all(modes)  # back in training mode afterwards
    assert run.checkpoints.steps() == [2, 4, 6, 7]
    assert [r["step"] for r in read_log(tmp_path) if "held_out_loss" in r] == [3, 6, 7]


def test_time_for_saving_is_no_time_for_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    run, save = Run(tmp_path), Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, state: (time.sleep(0.5), save(self, state))[1])
    run(4, save_every=2, log_every=4)
    (record,) = read_log(tmp_path)
    assert record["step_ms"] < 100


def test_broken_files_are_named_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.data.broken["a.jpg"] = "truncated"
    run(3)
    assert run.messages().count("skipped a broken file: a.jpg (truncated)") == 1
    assert [r["broken_files"] for r in read_log(tmp_path)] == [1, 1, 1]
    again = Run(tmp_path)  # continued: what earlier parts met stays known
    again.data.broken.update({"a.jpg": "truncated", "b.jpg": "empty"})
    again(1)
    assert again.messages().count("a.jpg") == again.messages().count("b.jpg") == 2  # in words and by name
    assert read_log(tmp_path)[0]["broken_files"] == 2


def test_one_visible_function() -> None:
    assert len(inspect.getsource(run_loop).splitlines()) <= 200
    imported = [
        line
        for line in inspect.getsource(loop_module).splitlines()
        if line.startswith(("from openeva", "import openeva"))
    ]
    assert imported
    assert all("openeva.engine" in line for line in imported)  # no model, no task, no data


# --------------------------------------------------------------------------------------- what is not a finite number


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_changes_nothing_and_is_counted(value: float, tmp_path: Path) -> None:
    run = Run(tmp_path, lambda number: value if number == 2 else 1.0)
    snapshots = []
    advance = RunLog.advance
    RunLog.advance = lambda self, step: (advance(self, step), snapshots.append(run.tensors()))[0]
    try:
        run(4)
    finally:
        RunLog.advance = advance
    changed = [{name for name in one if not torch.equal(one[name], other[name])} for one, other in pairwise(snapshots)]
    assert changed[1] == set()  # weights, moments, step counts and averages
    assert changed[0] == changed[2] == set(snapshots[0])
    records = read_log(tmp_path)
    assert [r["skipped_steps"] for r in records] == [0, 0, 1, 1]
    assert [r["loss"] is None for r in records] == [False, False, True, False]


def test_the_data_of_a_bad_step_are_not_seen_again_and_the_schedule_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, lambda number: float("nan") if number in {1, 3} else 1.0)
    run(6)
    assert run.data.given == [0, 1, 2, 3, 4, 5]
    assert [r["lr"] for r in read_log(tmp_path)] == [Schedule(0.1, 0.0, 6).at(step) for step in range(6)]


def test_many_bad_steps_in_a_row_return_to_the_checkpoint_and_go_on_with_later_data(tmp_path: Path) -> None:
    run = Run(tmp_path, lambda number: float("nan") if 6 <= number < 9 else 1.0)
    run.checkpoints.keep_last = 100
    assert run(12, max_bad_in_a_row=3, save_every=4) == "finished"
    assert run.data.given == [*range(9), *range(9, 17)]  # back to step 4, on with batch 9
    assert run.state.progress == Progress(step=12, samples_seen=17 * 4, rewinds=1)
    assert run.state.precision.bad_steps.item() == 3  # what was skipped stays counted
    assert "back to step 4, on with the data after sample 36" in run.messages()
    assert "lower optim.lr" in run.messages()
    # from step 4 on it is the run that never saw those batches
    clean = Run(tmp_path / "clean")
    clean.data.batches = lambda start: (
        [{"image": torch.randn(4, 3, generator=torch.Generator().manual_seed(n)), "factor": torch.tensor(1.0)}]
        for n in [*range(4), *range(9, 20)]
    )
    clean(12)
    assert all(torch.equal(value, clean.tensors()[name]) for name, value in run.tensors().items())


@pytest.mark.parametrize("log_every", [0, 100])
def test_bad_steps_are_noticed_however_rarely_the_log_is_written(log_every: int, tmp_path: Path) -> None:
    run = Run(tmp_path, lambda number: float("nan") if 6 <= number < 12 else 1.0)
    assert run(12, max_bad_in_a_row=3, save_every=4, log_every=log_every) == "finished"
    assert run.data.given[:10] == [*range(9), 9]  # back to step 4 after batch 8; the next ones are bad, too
    assert run.state.progress.rewinds == 1
    assert "back to step 4" in run.messages()


def late(meter: Meter, wait: bool = False, ready: Any = Meter.ready) -> Iterator[dict[str, Any]]:
    """Numbers arrive one interval after they were asked for, as they may from a device that is behind."""
    newest = [] if wait else meter.pending[-1:]
    meter.pending = meter.pending[: len(meter.pending) - len(newest)]
    yield from ready(meter, wait)
    meter.pending += newest


@pytest.mark.parametrize(("end", "rewinds"), [(6, 0), (9, 1)])
def test_a_streak_that_has_ended_meanwhile_is_no_reason_to_go_back(
    end: int, rewinds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter, "ready", late)
    run = Run(tmp_path, lambda number: float("nan") if 3 <= number < end else 1.0)
    assert run(15, max_bad_in_a_row=3, save_every=2, log_every=5) == "finished"
    assert run.state.progress.rewinds == rewinds


def test_a_rewind_lowers_the_loss_scale(tmp_path: Path) -> None:
    run = Run(tmp_path, lambda number: float("nan") if 4 <= number < 7 else 1e-3, precision="fp16")
    run(10, max_bad_in_a_row=3, save_every=2)
    scales = [r["loss_scale"] for r in read_log(tmp_path)]
    assert scales[:4] == [2**16] * 4
    assert scales[4:] == [2**14] * 6  # of the second, good time


def test_no_checkpoint_within_a_streak(tmp_path: Path) -> None:
    run = Run(tmp_path, lambda number: float("nan") if 3 <= number < 6 else 1.0)
    run.checkpoints.keep_last = 100
    run(8, save_every=4, max_bad_in_a_row=100)
    assert run.checkpoints.steps() == [7, 8]  # due at 4, but 4, 5 and 6 were bad


def test_gives_up_with_advice(tmp_path: Path) -> None:
    run = Run(tmp_path, lambda number: float("nan") if number >= 2 else 1.0)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row up to step 4 .*3 rewinds so far.*lower optim\.lr"):
        run(20, max_bad_in_a_row=2, save_every=2, max_rewinds=3)
    assert run.data.given == list(range(2 + 4 * 2))


def test_gives_up_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, lambda number: float("nan"))
    with pytest.raises(NonFiniteError, match=r"run\.precision=fp32"):
        run(20, max_bad_in_a_row=5)
    assert len(run.data.given) == 5


# ------------------------------------------------------------------------------------------------------------ stopping


def stop_in_step(number: int, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = RunLog.advance

    def kill(self: RunLog, step: int) -> None:
        advance(self, step)
        if step == number:
            os.kill(os.getpid(), which)

    monkeypatch.setattr(RunLog, "advance", kill)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    whole = Run(tmp_path / "whole")
    whole(8)
    parts = Run(tmp_path / "parts")
    with monkeypatch.context() as patch:
        stop_in_step(3, which, patch)
        assert parts(8, log_every=100) == "stopped"
    assert parts.checkpoints.steps() == [3]
    assert "the same command continues the run" in parts.messages()
    again = Run(tmp_path / "parts")
    assert again.checkpoints.load(again.state)
    assert again(8) == "finished"
    assert again.data.given == [3, 4, 5, 6, 7]
    assert all(torch.equal(value, whole.tensors()[name]) for name, value in again.tensors().items())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_the_second_ctrl_c_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_signals_are_left_to_the_caller(tmp_path: Path) -> None:
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(Run(tmp_path)(2)))
    thread.start()
    thread.join()
    assert outcome == ["finished"]


# ---------------------------------------------------------------------------------------------------------- on a device


@pytest.mark.gpu
def test_no_wait_for_the_device_between_log_lines(tmp_path: Path) -> None:
    run = Run(tmp_path, device="cuda", precision="fp16")
    steps = []
    advance = RunLog.advance

    def strict(self: RunLog, step: int) -> None:
        advance(self, step)
        steps.append(step)
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < 19 else "default")

    unpinned = run.data.batches

    def batches(start: int) -> Iterator[list[dict[str, Any]]]:
        for batch in unpinned(start):
            yield [{key: value.pin_memory() for key, value in part.items()} for part in batch]

    run.data.batches = batches
    RunLog.advance = strict
    try:
        assert run(20, log_every=5) == "finished"
    finally:
        RunLog.advance = advance
        torch.cuda.set_sync_debug_mode("default")
    assert [r["step"] for r in read_log(tmp_path)] == [5, 10, 15, 20]
