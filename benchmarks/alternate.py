"""Timing that a noisy machine does not spoil: the contenders take turns, and what counts is the ratio within a turn."""

import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openeva.engine.hardware import memory_gib
from openeva.engine.precision import Precision
from openeva.tasks.base import Task


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def our_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, loss: Callable[[], Tensor],
    clip_grad: float | None,
) -> Callable[[], Tensor]:  # fmt: skip
    """An optimizer step as our loop does it; `loss` is called under autocast."""

    def step() -> Tensor:
        with precision.autocast():
            value = loss()
            precision.backward(value)
        precision.finish(module, value.detach(), clip_grad)
        optimizer.found_inf = precision.found_inf
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        precision.update()
        return value.detach()

    return step


def task_step(
    task: Task, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, precision: Precision,
    clip_grad: float | None,
) -> Callable[[], Tensor]:  # fmt: skip
    """A step of a whole task as our loop does it."""

    def step() -> Tensor:
        with precision.autocast():
            loss, _ = task.forward_backward([batch], precision.backward)
        precision.finish(task.trainable, loss, clip_grad)
        optimizer.found_inf = precision.found_inf
        optimizer.step()
        task.after_step()
        optimizer.zero_grad(set_to_none=True)
        precision.update()
        return loss

    return step


def time_steps(step: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """Median seconds of a step after two warm-ups."""
    for _ in range(2):
        step()
    times = []
    for _ in range(repeats):
        synchronise(device)
        begun = time.perf_counter()
        step()
        synchronise(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def free(device: torch.device, *, compiled: bool = True) -> None:
    """Give back what nobody uses any more, compiled code too, and count the peak of memory anew."""
    gc.collect()
    if compiled:
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def alternate(
    steps: Mapping[str, Callable[[], Any]], device: torch.device, *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; warm-up (and compilation) before the first one does not count."""
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    for step in steps.values():
        for _ in range(warmup):
            step()
    for _ in range(rounds):
        for label, step in steps.items():
            synchronise(device)
            begun = time.perf_counter()
            step()
            synchronise(device)
            seconds[label].append(time.perf_counter() - begun)
    return seconds


def speedup(seconds: Mapping[str, list[float]], label: str, peer: str) -> float:
    """Median over the rounds of how many times as fast a contender is as its peer."""
    return statistics.median(slow / fast for slow, fast in zip(seconds[peer], seconds[label], strict=True))


def summary(seconds: Mapping[str, list[float]], peers: Mapping[str, str], images: int) -> list[dict[str, Any]]:
    """One row per contender, printed as well: median, extremes, images/s and the speed-up over its peers.

    Args:
        seconds: From `alternate`.
        peers: Contender that others are compared with -> name of the ratio, as in `{"timm fp32": "over_timm_fp32"}`.
        images: Images of one step.
    """
    rows = []
    for label, times in seconds.items():
        median = statistics.median(times)
        ratios = {name: speedup(seconds, label, peer) for peer, name in peers.items()}
        rows.append(
            {"step": label, "median_s": median, "min_s": min(times), "max_s": max(times),
             "images_per_s": images / median, **ratios}
        )  # fmt: skip
        shown = "  ".join(f"{name} {value:.2f}x" for name, value in ratios.items())
        print(f"{label:34s} {median:8.4f} s  {images / median:8.1f} images/s  {shown}")
    return rows


# ------------------------------------------------------------------------------------------------------------ memory


def peak_of(command: list[str]) -> float:
    """GiB that a process prints by `print_peak`."""
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def print_peak(build: Callable[[], Callable[[], Any]], device: torch.device) -> None:
    """GiB that two steps take, beyond what this process had before they were built."""
    before = 0.0 if device.type == "cuda" else resident_gib()
    step = build()
    for _ in range(2):
        step()
    print(memory_gib(device) if device.type == "cuda" else resident_gib() - before)


def resident_gib() -> float:
    """Most memory that this process has had so far; unlike `getrusage`, without that of the process that started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20
