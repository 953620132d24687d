"""THE training loop, for every task.

micro-batches -> lr and weight decay from the schedule -> task.forward_backward under autocast -> finite check -> clip
-> step -> EMA -> log -> evaluate -> save -> stop. It imports no model, task or data set, and never waits for the device
only to log.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from openeva.engine import timing
from openeva.engine.distributed import World, any_process, merge_over_processes
from openeva.engine.hardware import memory_gib
from openeva.engine.log import Meter, Record, RunLog
from openeva.engine.schedule import Schedule
from openeva.engine.state import Checkpoints, TrainState

HOST_KEYS = frozenset({"index", "flip"})
"""What the host looks things up by; from the device it could be read only by waiting for it."""
STOP_CHECK_STEPS = 10
"""Several processes agree on stopping every so many steps; a single one looks after each."""


class NonFiniteError(Exception):
    """Training cannot get past non-finite losses; the message says what to try."""


@runtime_checkable
class LoopTask(Protocol):
    """What the loop asks of a task (see `tasks/base.py`)."""

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation behaviour."""

    def forward_backward(
        self, micro_batches: Sequence[dict[str, Any]], backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Accumulate gradients; returns loss and scalars, detached."""
        ...

    def after_step(self) -> None:
        """Bring parameters back to where they may be."""


@runtime_checkable
class LoopData(Protocol):
    """What the loop asks of a loader (see `data/loader.py`)."""

    broken: dict[str, str]

    def batches(self, start_sample: int) -> Iterator[list[dict[str, Any]]]:
        """The micro-batches of each optimizer step, endlessly, from a position in the data stream."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """Lengths in optimizer steps and what the log needs to know; 0 switches a cadence off."""

    total_steps: int
    lr: Schedule
    weight_decay: Schedule
    samples_per_step: int
    clip_grad: float | None = None
    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 0
    flops_per_sample: float = 0.0
    peak_flops: float = 1.0
    max_bad_in_a_row: int = 20
    max_rewinds: int = 3


class StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a request to save and stop; a second Ctrl-C interrupts at once.

    Attributes:
        received: Number of the signal that this process got, if any.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: the caller handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number


def run_loop(  # noqa: PLR0915  the one visible loop
    task: LoopTask,
    data: LoopData,
    state: TrainState,
    config: LoopConfig,
    *,
    world: World,
    checkpoints: Checkpoints,
    log: RunLog,
    evaluate: Callable[[int], Record] | None = None,
    stop_signal: StopSignal | None = None,
) -> Literal["finished", "stopped"]:
    """Train from `state.progress` to `config.total_steps`; "stopped" means that a signal asked for it and all is saved.

    Give `stop_signal` to see afterwards which signal that was.

    Raises:
        NonFiniteError: `max_rewinds` returns to a checkpoint did not get past non-finite losses.
    """
    progress, precision, optimizer = state.progress, state.precision, state.optimizer
    times, meter, streak = timing.start(world.device), Meter(world.device), Meter(world.device)
    batches = data.batches(progress.samples_seen)
    interval_begun, interval_step = time.perf_counter(), progress.step
    bad_in_a_row, save_is_due = 0.0, False
    look_every = min(config.log_every or config.max_bad_in_a_row, config.max_bad_in_a_row)
    task.train()

    with stop_signal or StopSignal() as stop:
        while progress.step < config.total_steps:
            # ---- fetch: the host's wait for the loader counts as data time, the copy runs in the background
            with timing.section("data", on_host=True):
                micro_batches = [to_device(batch, world.device) for batch in next(batches)]

            # ---- one optimizer step
            lr = set_schedules(optimizer, config, progress.step)
            with precision.autocast():
                loss, scalars = task.forward_backward(micro_batches, precision.backward)
            with timing.section("optimiser"):
                grad_norm = precision.finish(state.module, loss, config.clip_grad)
                step_unless_skipped(optimizer, precision.found_inf)
                task.after_step()
                optimizer.zero_grad(set_to_none=True)
                precision.update()
                if state.ema is not None:
                    state.ema.update(skipped=precision.found_inf)
            progress.step += 1
            progress.samples_seen += config.samples_per_step
            meter.add({"loss": loss, "grad_norm": grad_norm, **scalars}, skipped=precision.found_inf)

            # ---- log
            if _due(progress.step, config.log_every, config.total_steps):
                seconds = time.perf_counter() - interval_begun
                record = speed_record(config, times.take(), seconds, progress.step - interval_step, world)
                record = {"step": progress.step, "samples": progress.samples_seen, "lr": lr, **record}
                record["broken_files"] = report_broken(data.broken, log)
                meter.flush(record, {"skipped_steps": precision.bad_steps, "loss_scale": precision.scale})
                interval_begun, interval_step = time.perf_counter(), progress.step
            log.write_all(meter.ready(wait=progress.step == config.total_steps))
            log.advance(progress.step)

            # ---- return to a checkpoint after too many bad steps; waits for the device only where that is likely
            looking = progress.step % look_every == 0
            if looking:
                streak.flush({}, {"bad_in_a_row": precision.bad_in_a_row})
            for record in streak.ready():
                bad_in_a_row = record["bad_in_a_row"]
            suspicious = looking and any_process(bad_in_a_row >= config.max_bad_in_a_row)
            if suspicious and precision.bad_streak() >= config.max_bad_in_a_row:  # it may have ended meanwhile
                log.write_all(meter.ready(wait=True))
                rewind(state, config, checkpoints, log)
                batches, bad_in_a_row = data.batches(progress.samples_seen), 0.0
                interval_begun, interval_step = time.perf_counter(), progress.step
                continue

            # ---- evaluate, save, stop
            if evaluate is not None and _due(progress.step, config.evaluate_every, config.total_steps):
                log.write({"step": progress.step, **evaluate(progress.step)})
                task.train()
                times = timing.start(world.device)
                interval_begun, interval_step = time.perf_counter(), progress.step
            stopping = stop.received is not None
            if world.size > 1:  # agree, so that all save the same step
                stopping = any_process(stopping) if progress.step % STOP_CHECK_STEPS == 0 else False
            save_is_due |= _due(progress.step, config.save_every, config.total_steps)
            # a rewind wants weights from before the steps that failed: the checkpoint waits for a good step
            if stopping or (save_is_due and precision.bad_streak() == 0):
                begun = time.perf_counter()
                checkpoints.save(state)
                save_is_due, interval_begun = False, interval_begun + time.perf_counter() - begun
            if stopping:
                log.write_all(meter.ready(wait=True))
                report_broken(data.broken, log)
                log.say(f"stopped by a signal after step {progress.step}; saved, the same command continues the run")
                return "stopped"
    checkpoints.save(state)
    report_broken(data.broken, log)  # the last evaluation may have met some
    return "finished"


def set_schedules(optimizer: torch.optim.Optimizer, config: LoopConfig, step: int) -> float:
    """Write this step's learning rate and weight decay into the optimizer's groups; returns the unscaled rate."""
    lr, weight_decay = config.lr.at(step), config.weight_decay.at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decays"]:
            group["weight_decay"] = weight_decay * group.get("decay_scale", 1.0)
    return lr


def step_unless_skipped(optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """Optimizer step that changes nothing where `found_inf` is 1: the fused kernels read the flag on the device."""
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # the attribute that torch's GradScaler uses
    optimizer.step()


def rewind(state: TrainState, config: LoopConfig, checkpoints: Checkpoints, log: RunLog) -> None:
    """Return to the last checkpoint, go on with later data, and lower the loss scale.

    Raises:
        NonFiniteError: There is none, or it has been tried too often.
    """
    rewinds, samples_seen, bad_step = state.progress.rewinds + 1, state.progress.samples_seen, state.progress.step
    bad_steps = state.precision.bad_steps.clone()
    advice = "try a lower optim.lr, a longer optim.warmup, a smaller optim.clip_grad, or run.precision=fp32"
    if rewinds > config.max_rewinds or not checkpoints.load(state):
        raise NonFiniteError(
            f"{config.max_bad_in_a_row} steps in a row up to step {bad_step} had non-finite gradients"
            f" ({rewinds - 1} rewinds so far); {advice}"
        )
    state.progress.rewinds, state.progress.samples_seen = rewinds, samples_seen
    state.precision.rewound(bad_steps, rewinds)
    log.say(
        f"{config.max_bad_in_a_row} steps in a row up to step {bad_step} had non-finite gradients: back to step"
        f" {state.progress.step}, on with the data after sample {samples_seen}; if it comes again, {advice}"
    )


def speed_record(
    config: LoopConfig, seconds_by_section: dict[str, float], seconds: float, steps: int, world: World
) -> Record:
    """Throughput, utilisation, time shares and memory of a log interval; "student" is what the other sections leave."""
    samples_per_s = steps * config.samples_per_step / seconds
    flops_per_s = samples_per_s * config.flops_per_sample
    shares = {name: seconds_by_section.get(name, 0.0) / seconds for name in ("data", "teacher", "optimiser")}
    return {
        "samples_per_s": samples_per_s,
        "tflops_per_s": flops_per_s / 1e12,
        "mfu": flops_per_s / (config.peak_flops * world.size),
        "step_ms": 1000 * seconds / max(steps, 1),
        **{f"share_{name}": share for name, share in shares.items()},
        "share_student": max(0.0, 1.0 - sum(shares.values())),
        "memory_gib": memory_gib(world.device),
    }


def report_broken(broken: dict[str, str], log: RunLog) -> int:
    """Name files that could not be read on any process and were not named yet; returns how many there are in all."""
    new = {name: reason for name, reason in list(broken.items()) if name not in log.broken}
    for name, reason in merge_over_processes(new).items():
        log.name_broken(name, reason)
    return len(log.broken)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy a batch's tensors to the device in the background; the rest stays, and so do `HOST_KEYS`."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) and key not in HOST_KEYS else value
        for key, value in batch.items()
    }


def _due(step: int, every: int, total: int) -> bool:
    return bool(every) and (step % every == 0 or step == total)
