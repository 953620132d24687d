"""Two processes are one process with twice the accumulation, and read each other's checkpoints."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from e2e.toy import checkpoint, copy_until, join, recipe, start, train_here, train_in_processes
from openeva.engine import distributed, state
from openeva.engine.log import read_log
from openeva.engine.optim import OptimConfig, adamw
from openeva.engine.precision import Precision
from openeva.engine.state import Progress, TrainState
from openeva.tasks.pretrain import PretrainTask
from openeva.train import Recipe

ALIKE = ("loss", "grad_norm", "held_out_loss", "ema_held_out_loss", "skipped_steps")


def made(out: Path, *changes: str) -> Recipe:
    """Two micro-batches of 4; clipping at work; 17 held-out images: 3 batches for one process, 2 for the other."""
    return recipe(
        out, "run.micro_batch=4", "optim.clip_grad=0.3", "data.train.0.num_images=63", "data.holdout=0.27", *changes
    )


def numbers(out: Path) -> dict[tuple[int, str], float]:
    return {(record["step"], key): record[key] for record in read_log(out) for key in ALIKE if key in record}


def assert_same(actual: Path, expected: Path, after_step: int = 0) -> None:
    expected_numbers = {key: value for key, value in numbers(expected).items() if key[0] > after_step}
    assert len(expected_numbers) >= 3 * (10 - after_step)
    assert numbers(actual) == pytest.approx(expected_numbers, abs=1e-6, rel=1e-5)
    errors = {key: abs(numbers(actual)[key] - value) for key, value in expected_numbers.items() if "loss" in key[1]}
    assert max(errors.values()) < 1e-6


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = train_in_processes(made(tmp_path_factory.mktemp("alone")), 1)
    assert all(record["grad_norm"] > 0.3 for record in read_log(out) if "loss" in record)
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in_processes(made(tmp_path_factory.mktemp("sharded"), "run.strategy=fsdp"), 2)


def test_two_replicated_processes(alone: Path, tmp_path: Path) -> None:
    assert_same(train_in_processes(made(tmp_path, "run.strategy=ddp"), 2), alone)


def test_two_sharded_processes(alone: Path, sharded: Path) -> None:
    assert_same(sharded, alone)
    assert len(list((sharded / "checkpoints/step_00000010").glob("*.distcp"))) == 2
    one, two = checkpoint(alone, 10), checkpoint(sharded, 10)
    for key, value in one.items():
        if isinstance(value, torch.Tensor) and not key.startswith("rng"):
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def train_on_nodes_of_two(content: dict[str, Any]) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    train_here(content)


def test_two_nodes_of_two_processes_sharded_within_each(alone: Path, tmp_path: Path) -> None:
    made_of_four = made(tmp_path, "run.strategy=fsdp", "run.shard=node", "run.micro_batch=2")
    assert_same(train_in_processes(made_of_four, 4, train_on_nodes_of_two), alone)
    files = (tmp_path / "checkpoints/step_00000010").glob("*.distcp")
    assert sum(file.stat().st_size for file in files) < 1.5 * sum(
        file.stat().st_size for file in (alone / "checkpoints/step_00000010").glob("*.distcp")
    )  # each weight once, not once per node


@pytest.mark.parametrize("size", [1, 2])
def test_continued_on_another_number_of_processes(size: int, alone: Path, sharded: Path, tmp_path: Path) -> None:
    copy_until(sharded if size == 1 else alone, 5, tmp_path)
    assert_same(train_in_processes(made(tmp_path, "run.strategy=fsdp"), size), alone, after_step=5)


def train_with_a_bad_step(content: dict[str, Any]) -> None:
    """One process sees a loss that is not a number in two steps; in the first of them its gradient is fine."""
    forward, calls = PretrainTask.forward, [0]

    def bad_forward(self: PretrainTask, batch: dict[str, Any]) -> Any:
        loss, scalars = forward(self, batch)
        calls[0] += self.training
        accumulation = 2 // int(os.environ["WORLD_SIZE"])
        step = (calls[0] - 1) // accumulation if self.training and os.environ["RANK"] == "0" else None
        return {2: loss + float("nan"), 3: loss * float("nan")}.get(step, loss), scalars

    PretrainTask.forward = bad_forward  # type: ignore[method-assign]
    train_here(content)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_step_that_is_bad_in_one_process_is_skipped_in_both(strategy: str, tmp_path: Path) -> None:
    changes = ("run.evaluate_every=0 steps", "run.length=5 steps")
    one = train_in_processes(made(tmp_path / "one", *changes), 1, train_with_a_bad_step)
    two = train_in_processes(made(tmp_path / "two", *changes, f"run.strategy={strategy}"), 2, train_with_a_bad_step)
    skipped = [[record["skipped_steps"] for record in read_log(out)] for out in (one, two)]
    assert skipped == [[0, 0, 1, 2, 2]] * 2
    losses = [[record["loss"] for record in read_log(out) if record["loss"] is not None] for out in (one, two)]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert checkpoint(two, 5)["optimizer.state.backbone.cls_token.step"].item() == 3


def test_broken_files_of_all_processes_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(16):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / f"{number:02}.png")
    for number in (3, 8, 13):
        (tmp_path / f"{number:02}.png").write_bytes(b"no image")
    source = f"data.train=[{{name: image_folder, roots: [{tmp_path}]}}]"
    changes = ("run.length=8 steps", "data.max_broken=1", "data.holdout=0", "run.evaluate_every=0 steps")
    out = train_in_processes(recipe(tmp_path / "run", source, "run.batch_size=4", *changes), 2)
    names = {str(tmp_path / f"{number:02}.png") for number in (3, 8, 13)}
    assert set(json.loads((out / "summary.json").read_text())["broken"]) == names
    text = (out / "log.jsonl").read_text()
    assert [text.count(f"skipped a broken file: {name}") for name in names] == [1, 1, 1]
    assert read_log(out)[-1]["broken_files"] == 3


def save_fails(folder: str, rank: int) -> None:
    """A process that cannot write, among two: both say so instead of waiting for each other."""
    distributed.start("cpu")
    module = torch.nn.Linear(2, 2)
    optimizer = adamw(module, OptimConfig(), no_decay=set(), num_layers=0)
    training = TrainState(module, optimizer, Precision("fp32", torch.device("cpu")), Progress())
    if os.environ["RANK"] == str(rank):
        state._random_state = lambda: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(state.CheckpointError, match=r"cannot write .*No space left on device"):
        state.Checkpoints(Path(folder), {}).save(training)
    distributed.stop()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_cannot_save_does_not_leave_the_other_waiting(rank: int, tmp_path: Path) -> None:
    join(start(save_fails, str(tmp_path / "checkpoints"), rank, size=2, errors=tmp_path), tmp_path, timeout_s=30)


def train_until_stopped(content: dict[str, Any]) -> None:
    train_here(content, expect="stopped")


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path) -> None:
    endless = made(tmp_path, "run.length=100000 steps", "run.evaluate_every=0 steps", "run.save_every=0 steps")
    processes = start(train_until_stopped, endless.model_dump(mode="json"), size=2, errors=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log.jsonl").is_file() or not read_log(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    join(processes, tmp_path)
    (step,) = [int(path.name.removeprefix("step_")) for path in (tmp_path / "checkpoints").iterdir()]
    assert {path.name for path in (tmp_path / "checkpoints").glob("*/rng_*")} == {"rng_0.pt", "rng_1.pt"}
    assert read_log(tmp_path)[-1]["step"] == step
