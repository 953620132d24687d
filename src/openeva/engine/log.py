"""What a run prints and records: JSON lines and TensorBoard always, W&B on request, a progress bar on a terminal.

device scalars -> `Meter` (summed on the device, copied in the background) -> records -> `RunLog`.
"""

import json
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from openeva.engine.distributed import mean_over_processes

Record = dict[str, Any]


class Meter:
    """Means of device scalars between two log lines, read without waiting for the device.

    `add` every step, `flush` at a log step; `ready` yields finished records, on CUDA usually one step later.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.count = torch.zeros((), device=device)
        self.pending: list[tuple[Record, list[str], Tensor, torch.cuda.Event | None]] = []

    @torch.no_grad()
    def add(self, scalars: dict[str, Tensor], skipped: Tensor) -> None:
        """Add one step's scalars; those of skipped steps (`skipped` is 1.0) do not count."""
        good = 1.0 - skipped
        self.count = self.count + good
        for key, value in scalars.items():
            counted = torch.nan_to_num(value.detach().float(), nan=0.0, posinf=0.0, neginf=0.0) * good
            self.sums[key] = self.sums.get(key, torch.zeros_like(good)) + counted

    @torch.no_grad()
    def flush(self, record: Record, extra: dict[str, Tensor]) -> None:
        """Close the interval: means over its steps and all processes, and `extra` device scalars as they are."""
        keys = sorted(self.sums)
        means = [mean_over_processes(torch.stack([self.sums[key] for key in keys]) / self.count)] if keys else []
        values = torch.cat([*means, *(value.float().reshape(1) for value in extra.values())])
        keys += list(extra)
        event = None
        if self.device.type == "cuda":
            host = torch.empty(values.shape, pin_memory=True)
            host.copy_(values, non_blocking=True)
            values, event = host, torch.cuda.Event()
            event.record()
        self.pending.append((record, keys, values, event))
        self.sums, self.count = {}, torch.zeros_like(self.count)

    def ready(self, wait: bool = False) -> Iterator[Record]:
        """Records whose numbers have arrived; with `wait`, all of them."""
        while self.pending:
            record, keys, values, event = self.pending[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self.pending.pop(0)
            yield {**record, **dict(zip(keys, values.tolist(), strict=True))}


class RunLog:
    """Writes records to the run's folder; on processes other than the main one it does nothing.

    Args:
        folder: The run's folder.
        active: True on the main process.
        total_steps: Length of the progress bar.
        console: Where to show progress; None for nowhere.
        wandb_project: Also log to this W&B project (extra `wandb`).
        config: Resolved config for W&B.
        unit: What samples are called beside their rate.

    Attributes:
        broken: Name -> reason of the files that could not be read, in earlier parts of the run too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        total_steps: int,
        console: Console | None = None,
        wandb_project: str | None = None,
        config: Record | None = None,
        unit: str = "img",
    ) -> None:
        self.folder, self.active, self.unit = folder, active, unit
        self.bar: Progress | None = None
        self.broken: dict[str, str] = {}
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.wandb = _start_wandb(wandb_project, folder, config) if wandb_project else None
        _drop_unfinished_line(folder / "log.jsonl")
        self.broken.update(_read_broken(folder / "log.jsonl"))
        self.file = (folder / "log.jsonl").open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"))
        if console is not None:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[line]}"), console=console,
                disable=not console.is_terminal,
            )  # fmt: skip
            self.bar_task = self.bar.add_task("training", total=total_steps, line="")
        self.console = console

    def __enter__(self) -> "RunLog":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.active:
            return
        if self.bar is not None:
            self.bar.stop()
        self.file.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()

    def advance(self, step: int) -> None:
        """Show how far the run is."""
        if self.bar is not None:
            self.bar.update(self.bar_task, completed=step)

    def write(self, record: Record) -> None:
        """Append one record (JSON has no NaN: such values become null)."""
        if not self.active:
            return
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in record.items()}
        self.file.write(json.dumps({**clean, "time": round(time.time(), 3)}) + "\n")
        self.file.flush()
        step = int(record.get("step", 0))
        for key, value in clean.items():
            if isinstance(value, int | float) and key != "step":
                self.board.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in clean.items() if v is not None})
        self._show(record)

    def write_all(self, records: Iterable[Record]) -> None:
        """Append several records."""
        for record in records:
            self.write(record)

    def name_broken(self, name: str, reason: str) -> None:
        """Tell the user about a file that could not be read, once."""
        if name not in self.broken:
            self.broken[name] = reason
            self.say(f"skipped a broken file: {name} ({reason})", {"broken_file": name, "reason": reason})

    def say(self, text: str, facts: Record | None = None) -> None:
        """Tell the user something that is not a number, and record it; `facts` go into the record only."""
        if not self.active:
            return
        self.file.write(json.dumps({"message": text, **(facts or {}), "time": round(time.time(), 3)}) + "\n")
        self.file.flush()
        if self.console is not None:
            self.console.print(text, highlight=False)

    def write_summary(self, summary: Record) -> None:
        """Write what is known at the end of the run to `summary.json`."""
        if self.active:
            (self.folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")

    def _show(self, record: Record) -> None:
        if self.console is None:
            return
        line = format_record(record, self.unit)
        if self.bar is not None and self.console.is_terminal and "loss" in record:
            self.bar.update(self.bar_task, line=line)
        else:
            self.console.print(f"step {record.get('step', 0)}: {line}", highlight=False, soft_wrap=True)


def format_record(record: Record, unit: str) -> str:
    """One readable line of the numbers that matter most."""
    parts = []
    if "loss" in record:
        parts += [f"loss {record['loss']:.4f}", f"lr {record['lr']:.1e}", f"|g| {record['grad_norm']:.3g}"]
        parts += [f"{record['samples_per_s']:.0f} {unit}/s", f"{record['mfu']:.0%} MFU"]
        shares = {key: record.get(f"share_{key}", 0.0) for key in ("data", "teacher", "optimiser")}
        parts += [f"{key} {share:.0%}" for key, share in shares.items() if share >= 0.005]
        if record.get("skipped_steps"):
            parts.append(f"[{record['skipped_steps']:.0f} skipped]")
    else:
        parts += [f"{key} {value:.4g}" for key, value in record.items() if isinstance(value, float)]
    return "  ".join(parts)


@contextmanager
def counting(console: Console | None, text: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A progress bar for work that counts: yields a function to call with the number done (None without a terminal)."""
    if console is None or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def stages(console: Console | None) -> Iterator[Callable[[str, int, int | None], None] | None]:
    """Progress bars for work in stages: yields a function to call with the stage, the number done and of how many."""
    if console is None or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                for earlier in tasks.values():
                    bar.remove_task(earlier)
                tasks.clear()
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield show


@contextmanager
def scanning(console: Console | None) -> Iterator[Callable[[int, str], None] | None]:
    """A line for data that must be scanned first: yields a function to call with the images found and the place."""
    if console is None or not console.is_terminal:
        yield None
        return
    with console.status("opening the data") as status:
        yield lambda found, place: status.update(f"scanning: {found:,} images; now in {escape(place)}")


def read_log(folder: Path) -> list[Record]:
    """All records of a run, one per (step, keys), the later ones winning where a resumed run repeated steps."""
    path = folder / "log.jsonl"
    records: dict[tuple[int, bool], Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed run
        if "step" in record:
            records[record["step"], "loss" in record] = record
    return [records[key] for key in sorted(records)]


def _read_broken(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = (json.loads(line) for line in lines if '"broken_file": ' in line)
    return {line["broken_file"]: line["reason"] for line in found if "reason" in line}


def _drop_unfinished_line(path: Path) -> None:
    """Cut off what a killed run wrote of its last line: it would spoil the first line of the run that continues."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        size = file.seek(0, 2)
        begin = max(0, size - 2**20)
        file.seek(begin)
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(begin + tail.rfind(b"\n") + 1)


def _start_wandb(project: str, folder: Path, config: Record | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise ImportError("run.wandb is set, but wandb is not installed: pip install 'openeva[wandb]'") from None
    file = folder / "wandb_id.txt"  # a continued run goes on with the same curves
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    own_id = file.read_text(encoding="utf-8")
    run = wandb.init(project=project, dir=str(folder), config=config, id=own_id, resume="allow")
    run.define_metric("*", step_metric="step")  # W&B's own count never goes back, a run that rewinds does
    return run
