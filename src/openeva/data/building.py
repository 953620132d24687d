"""What commands that write many files have in common: folders that can be continued, and processes that may crash.

options -> `claim` (the folder is new, or the same command began it); jobs -> `run_jobs` (in processes) -> outcomes
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

from openeva.config import ConfigError

Record = dict[str, Any]
Job = TypeVar("Job")
Result = TypeVar("Result")

_PATIENCE_SECONDS = 5.0
"""How long a process that is told to stop may take to tidy up."""


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process may write the same
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def claim(out: Path, marker: str, options: Record, may_hold: tuple[str, ...] = ()) -> None:
    """Make a folder ours, or find that it is.

    Args:
        out: The folder, which is made if it is missing.
        marker: Name of the file in it that keeps the options.
        options: What decides about the content; JSON.
        may_hold: Endings of files that a new folder may hold already.

    Raises:
        ConfigError: The folder holds something else, or was begun with other options.
    """
    file = out / marker
    if not file.is_file():
        if out.exists() and (not out.is_dir() or any(path.suffix not in may_hold for path in out.iterdir())):
            raise ConfigError([f"{out} is not an empty folder, and no {marker} says that it is to be continued"])
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(options, indent=1) + "\n")
        return
    try:
        made = json.loads(file.read_bytes())
        same = {key: made[key] for key in options}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{file} cannot be read ({error!r}); delete the folder, or choose another"]) from None
    wanted = json.loads(json.dumps(options))
    if other := [f"{key} {value!r}" for key, value in same.items() if value != wanted[key]]:
        raise ConfigError([f"{out} was begun with {', '.join(other)}; ask for the same, or choose another folder"])


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Outcome(Generic[Job, Result]):
    """What became of a job.

    Attributes:
        job: Which.
        result: What the function returned, or None.
        problem: Why there is no result, or None.
    """

    job: Job
    result: Result | None
    problem: str | None


class BrokenInputError(ValueError):
    """Raised by a job whose input cannot be used; its text says why, and the other jobs go on."""


def run_jobs(
    function: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int
) -> Iterator[Outcome[Job, Result]]:
    """Do jobs in processes of their own; yields outcomes as they come.

    A process that dies takes only the job with it that it was at. Leaving the iteration early stops all processes.

    Args:
        function: Of a module's top level, so that a fresh process finds it. What it raises is raised here, but for
            `BrokenInputError`.
        jobs: What to do, each small and to be pickled.
        num_workers: Processes; 0 = do it in this one.

    Raises:
        RuntimeError: A process cannot even start.
    """
    if num_workers == 0:
        for job in jobs:
            yield _answered(job, _try(function, job))
        return
    waiting = iter(jobs)
    busy: dict[Connection, _Worker[Job, Result]] = {}
    try:
        for _ in range(num_workers):
            _start(function, waiting, busy)
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker = busy[pipe]
                answer = worker.receive()
                if answer is None:
                    del busy[pipe]
                    yield Outcome(worker.job, None, worker.cause_of_death())
                    _start(function, waiting, busy)
                    continue
                if answer[0] != "ready":
                    yield _answered(worker.job, answer)
                    if not worker.take(waiting):
                        del busy[pipe]
                        worker.stop()
    finally:
        for worker in busy.values():
            worker.process.terminate()
        for worker in busy.values():
            worker.stop()


class _Worker(Generic[Job, Result]):
    """One process, and the job that it is at."""

    def __init__(self, function: Callable[[Job], Result], job: Job) -> None:
        context = get_context("spawn")  # a forked process would inherit the locks of threads that it has not
        self.pipe, theirs = context.Pipe()
        self.job = job
        self.is_ready = False
        self.process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.send(job)

    def take(self, waiting: Iterator[Job]) -> bool:
        """Give it the next job, if there is one."""
        for job in waiting:
            self.job = job
            with suppress(OSError):  # it died just now: the next `receive` says so
                self.pipe.send(job)
            return True
        return False

    def receive(self) -> tuple[str, Any] | None:
        """Its answer; None = it is dead."""
        try:
            answer: tuple[str, Any] = self.pipe.recv()
        except (EOFError, OSError):
            return None
        self.is_ready = True
        return answer

    def cause_of_death(self) -> str:
        self.stop()
        code = self.process.exitcode or 0
        if not self.is_ready:
            raise RuntimeError(f"worker processes do not start (exit status {code}); try without them: --workers 0")
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"the process that worked on it crashed ({cause})"

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(_PATIENCE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _start(
    function: Callable[[Job], Result], waiting: Iterator[Job], busy: dict[Connection, _Worker[Job, Result]]
) -> None:
    """One more process, if there is something to do for it."""
    for job in waiting:
        worker = _Worker(function, job)
        busy[worker.pipe] = worker
        return


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """What a process does: jobs, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that gives the jobs decides
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that unfinished files are removed
    try:
        pipe.send(("ready", None))
        while True:
            pipe.send(_try(function, pipe.recv()))
    except (EOFError, OSError):
        return


def _try(function: Callable[[Job], Result], job: Job) -> tuple[str, Any]:
    try:
        return "done", function(job)
    except BrokenInputError as error:
        return "broken", str(error)
    except Exception as error:
        return "failed", error


def _answered(job: Job, answer: tuple[str, Any]) -> Outcome[Job, Result]:
    kind, content = answer
    if kind == "failed":
        raise content
    return Outcome(job, content if kind == "done" else None, content if kind == "broken" else None)
