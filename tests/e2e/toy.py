"""A whole run in seconds: a small recipe, fresh processes for it, and its checkpoint as plain tensors."""

import contextlib
import multiprocessing
import os
import shutil
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from openeva.config import apply_overrides
from openeva.train import Recipe, RunResult, train

PROCESSES = multiprocessing.get_context("forkserver")
"""A process from here starts with everything imported and nothing run."""
PROCESSES.set_forkserver_preload(
    [
        *("openeva.train", "openeva.tasks.pretrain", "openeva.targets.features", "openeva.tasks.clip"),
        *("openeva.data.sources.scenes", "torch.utils.tensorboard.writer", "torch.distributed.checkpoint.format_utils"),
    ]
)

STUDENT = {
    "name": "vit", "image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 64,
}  # fmt: skip
TEACHER = {**STUDENT, "width": 16, "depth": 1, "mlp_hidden": 32}
CHANCE = ["task.backbone.dropout=0.1", "task.backbone.attention_dropout=0.1", "task.backbone.drop_path=0.3"]
"""Everything in the model that is random."""
BASE: dict[str, Any] = {
    "task": {
        "name": "pretrain",
        "backbone": STUDENT,
        "target": {"name": "features", "teacher": TEACHER},
        "masking": {"name": "block", "num_masked": 6, "min_block": 2},
    },
    "data": {"train": [{"name": "scenes", "num_images": 64, "size": 32}], "holdout": 0.25, "num_workers": 0},
    "optim": {"lr": 0.002, "warmup": "2 steps", "ema": 0.9},
    "run": {
        "length": "10 steps", "batch_size": 8, "log_every": "1 steps", "save_every": "5 steps", "keep_last": 100,
        "evaluate_every": "5 steps", "device": "cpu", "precision": "fp32",
    },
}  # fmt: skip


def recipe(out: Path, *overrides: str) -> Recipe:
    """The toy recipe with changes as on the command line; 48 images, 6 steps per epoch."""
    return Recipe.model_validate(apply_overrides(BASE, [*overrides, f"run.out={out}"]))


def checkpoint(out: Path, step: int) -> dict[str, Any]:
    """Everything in a checkpoint, whatever processes wrote it: plain tensors and numbers by dotted name."""
    folder, file = out / "checkpoints" / f"step_{step:08d}", out / f"flat_{step}.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp_to_torch_save(folder, file)
    content = _flat(torch.load(file, weights_only=True))
    for rank in range(len(list(folder.glob("rng_*.pt")))):
        content |= _flat(torch.load(folder / f"rng_{rank}.pt", weights_only=True), f"rng_{rank}.")
    return content


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if pairs is None:
        return {name.removesuffix("."): value}
    return {key: leaf for k, v in pairs for key, leaf in _flat(v, f"{name}{k}.").items()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names at which two checkpoints are not bitwise the same."""
    return [
        key
        for key in {**one, **other}
        if key not in one or key not in other or not (
            torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        )
    ]  # fmt: skip


def copy_until(out: Path, step: int, new: Path) -> Path:
    """A run's folder as it was after the checkpoint of a step."""
    shutil.copytree(out / "checkpoints" / f"step_{step:08d}", new / "checkpoints" / f"step_{step:08d}")
    return new


def train_here(content: dict[str, Any], expect: str = "finished") -> None:
    """Run a recipe in this process."""
    result: RunResult = train(Recipe.model_validate(content))
    assert result.status == expect, result


def start(
    target: Callable[..., None], *args: Any, size: int = 1, errors: Path | None = None
) -> list[ForkServerProcess]:
    """Call `target(*args)` in `size` fresh processes that see each other as under `torchrun`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [PROCESSES.Process(target=_call, args=(rank, size, port, errors, target, args)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def _call(
    rank: int, size: int, port: int, errors: Path | None, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    try:
        target(*args)
    except BaseException:
        if errors is not None:
            errors.mkdir(parents=True, exist_ok=True)
            (errors / f"error_{rank}.txt").write_text(traceback.format_exc())
        raise


def join(processes: list[ForkServerProcess], errors: Path, timeout_s: float = 120) -> None:
    """Wait for processes, and fail with what they said."""
    for process in processes:
        process.join(timeout_s)
    failed = [number for number, process in enumerate(processes) if process.exitcode != 0]
    for process in processes:
        with contextlib.suppress(ValueError):
            process.kill()
    said = "\n".join(path.read_text() for path in sorted(errors.glob("error_*.txt")))
    assert not failed, f"processes {failed} failed or did not end\n{said}"


def train_in_processes(made: Recipe, size: int, target: Callable[..., None] = train_here) -> Path:
    """Run a recipe in `size` processes; returns its folder."""
    join(start(target, made.model_dump(mode="json"), size=size, errors=made.run.out), made.run.out)
    return made.run.out
