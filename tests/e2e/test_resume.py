"""A run that was stopped and continued is, bit by bit, the run that was not."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from e2e.toy import CHANCE, checkpoint, differences, recipe
from openeva.data.masking import BlockMaskGenerator
from openeva.engine import precision
from openeva.engine.log import RunLog, read_log
from openeva.train import Recipe, train

EXACT = (
    "step",
    "samples",
    "lr",
    "loss",
    "grad_norm",
    "skipped_steps",
    "loss_scale",
    "held_out_loss",
    "ema_held_out_loss",
)


def exact(out: Path) -> list[dict]:
    """What the log says, less times."""
    return [{key: record[key] for key in EXACT if key in record} for record in read_log(out)]


def stop_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Send this process a SIGTERM while it is in a certain step."""
    advance = RunLog.advance

    def kill(log: RunLog, step: int) -> None:
        advance(log, step)
        if step == number:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "advance", kill)


def in_one_go_and_in_two(
    make: Callable[[Path], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> int:
    whole = train(make(tmp_path / "whole"))
    assert whole.status == "finished"
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        first = train(make(tmp_path / "parts"))
    assert (first.status, first.step) == ("stopped", stop)
    torch.manual_seed(99)  # another process would have another state, too
    torch.randn(3)
    second = train(make(tmp_path / "parts"))
    assert second.status == "finished"
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")
    one, other = (checkpoint(tmp_path / name, whole.step) for name in ("whole", "parts"))
    # the run-time checks of shapes, on in tests only, draw from Python's generator
    assert [key for key in differences(one, other) if not key.startswith("rng_0.python")] == []
    for name in ("model", "model_ema"):
        weights = [load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "parts")]
        assert differences(*weights) == []
    return whole.step


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_in_the_middle_of_an_epoch(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(out: Path) -> Recipe:
        changes = [
            *CHANCE,
            f"data.num_workers={workers}",
            "run.length=14 steps",
            "run.micro_batch=4",
            "data.crop.kind=random",
        ]
        return recipe(out, *changes)

    in_one_go_and_in_two(make, tmp_path, monkeypatch, stop=8)  # the second epoch begins after step 6
    content = checkpoint(tmp_path / "whole", 10)
    parts = ("model.", "optimizer.state.", "ema.", "precision.", "rng_0.")
    assert all(any(key.startswith(part) for key in content) for part in parts)
    assert content["optimizer.state.backbone.cls_token.step"].item() == 10


def test_loss_scale_and_its_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "GROWTH_INTERVAL_STEPS", 3)
    steps = in_one_go_and_in_two(
        lambda out: recipe(out, *CHANCE, "run.precision=fp16", "run.evaluate_every=0 steps"),
        tmp_path,
        monkeypatch,
        stop=5,
    )
    scales = [record["loss_scale"] for record in read_log(tmp_path / "parts")]
    assert len(scales) == steps
    assert scales[3] == scales[4]  # stopped in the middle of an interval
    assert len(set(scales)) >= 3


def test_the_test_above_sees_another_position_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is worth nothing if masks and order did not matter to it."""
    train(recipe(tmp_path / "one", "run.length=2 steps"))
    monkeypatch.setattr(BlockMaskGenerator, "__call__", lambda self, rng: np.eye(4, dtype=bool))
    train(recipe(tmp_path / "other", "run.length=2 steps"))
    assert exact(tmp_path / "one") != exact(tmp_path / "other")
    assert differences(checkpoint(tmp_path / "one", 2), checkpoint(tmp_path / "other", 2))


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    train(recipe(tmp_path, "run.length=2 steps"))
    before = (tmp_path / "checkpoints/step_00000002/.metadata").stat().st_mtime_ns
    again = train(recipe(tmp_path, "run.length=2 steps"))
    assert (again.status, again.step) == ("finished", 2)
    assert (tmp_path / "checkpoints/step_00000002/.metadata").stat().st_mtime_ns == before
    assert [record["step"] for record in read_log(tmp_path) if "loss" in record] == [1, 2]
