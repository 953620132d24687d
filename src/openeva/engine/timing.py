"""Where the time of a step goes, without waiting for the device.

`with section("teacher"): ...` anywhere below the loop adds to that name. On CUDA, pairs of events are recorded and read
only once the device has passed them; on CPUs the clock is read.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Times:
    """Seconds per section since the last `take()`."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def add(self, name: str, seconds: float) -> None:
        """Add time to a section."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds by section so far, and start again; sections the device has not finished count next time."""
        waiting = []
        for name, begin, end in self.pending:
            if end.query():
                self.add(name, begin.elapsed_time(end) / 1000)
            else:
                waiting.append((name, begin, end))
        self.pending = waiting
        taken, self.seconds = self.seconds, {}
        return taken


_current: Times | None = None


def start(device: torch.device) -> Times:
    """Measure from now on, in this process."""
    global _current  # noqa: PLW0603  one training loop per process; passing it through every task would be noise
    _current = Times(device)
    return _current


@contextmanager
def section(name: str, on_host: bool = False) -> Iterator[None]:
    """Add the time of the block to a section; does nothing outside a training loop.

    Args:
        name: Section, such as "teacher".
        on_host: Measure the host's time (waiting for data) even on CUDA.
    """
    times = _current
    if times is None:
        yield
    elif times.device.type == "cuda" and not on_host:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        times.pending.append((name, begin, end))
    else:
        begun = time.perf_counter()
        yield
        times.add(name, time.perf_counter() - begun)
