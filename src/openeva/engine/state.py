"""Training state on disk: atomic, sharded where the run is sharded, loadable on another number of processes.

`step_00001000/` holds the tensors (torch distributed checkpoint), `rng_<rank>.pt` and `trainer.json`. It is written
under a temporary name and renamed when every byte is on the disk, so a folder with the right name is always complete.
"""

import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from openeva.engine.distributed import merge_over_processes
from openeva.engine.ema import Ema
from openeva.engine.precision import Precision

SCHEDULED = {"lr", "weight_decay"}
"""Settings of the optimizer that the loop writes at every step."""
STEP_FOLDER = re.compile(r"step_(\d{8,})$")


class CheckpointError(Exception):
    """A checkpoint does not fit the run; the message says what differs and what to do."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: Optimizer steps done.
        samples_seen: Position in the data stream; ahead of `step` after a rewind, which skips the data that failed.
        rewinds: Returns to an earlier checkpoint after too many non-finite steps.
    """

    step: int = 0
    samples_seen: int = 0
    rewinds: int = 0


@dataclass
class TrainState:
    """Everything that changes during training and must survive.

    Attributes:
        names: Of the module's tensors that are saved; the others are what they were when training began. None for all.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    progress: Progress
    ema: Ema | None = None
    names: frozenset[str] | None = None

    def tensors(self) -> dict[str, Any]:
        """Nested tensors by name; loading fills them in place."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        if self.names is not None:
            model = {name: value for name, value in model.items() if name in self.names}
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "precision": self.precision.state_dict()}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def set_tensors(self, state: dict[str, Any]) -> list[str]:
        """Take over what `tensors()` gave, after loading, but for the optimizer's settings: those are the run's own.

        Returns:
            The settings that differed, less those that follow a schedule.
        """
        groups = self.optimizer.param_groups
        own = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        model = state["model"] if self.names is None else get_model_state_dict(self.module) | state["model"]
        set_state_dict(self.module, self.optimizer, model_state_dict=model, optim_state_dict=state["optimizer"])
        different: dict[str, None] = {}
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            for key, value in settings.items():
                if key not in SCHEDULED and key in group and group[key] != value:
                    different[f"{key}: {group[key]}, now {value}"] = None
            group.update(settings)
        self.precision.load_state_dict(state["precision"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        return list(different)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Holds the step folders.
        identity: What a checkpoint must agree on with the run that continues it, by name (for example the teacher).
        keep_last: Number of newest checkpoints to keep.
        keep_every: Also keep the first checkpoint at or after each multiple of so many steps; 0 for none.
        notes: What a checkpoint may differ in, by name, as JSON would give it back (for example the data).

    Attributes:
        changed: Names of the notes in which the checkpoint that was loaded differs from this run.
        changed_settings: Settings of the optimizer in which it differed, as "name: its value, now this run's".
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.identity = folder, identity
        self.keep_last, self.keep_every = keep_last, keep_every
        self.notes = notes or {}
        self.changed: list[str] = []
        self.changed_settings: list[str] = []

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self.folder.iterdir() if (m := STEP_FOLDER.match(p.name)))

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / f"step_{step:08d}"

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint (collective: all processes call it) and remove those that need not be kept.

        Raises:
            CheckpointError: It cannot be written (disk full), on whichever process; those before it are untouched.
        """
        final = self.path(state.progress.step)
        if final.is_dir():
            return final
        temporary = self.folder / f".{final.name}.partial"
        rank = dist.get_rank() if dist.is_initialized() else 0
        with _together(temporary):
            if rank == 0:
                self._clean_up()
                temporary.mkdir(parents=True)
        with _together(temporary), _alone_is_fine():
            save_tensors(state.tensors(), checkpoint_id=temporary, no_dist=not dist.is_initialized())  # flushes
        with _together(temporary):
            own = [temporary / f"rng_{rank}.pt"]
            torch.save(_random_state(), own[0])
            if rank == 0:
                own.append(temporary / "trainer.json")
                own[1].write_text(json.dumps(self._meta(state), indent=1), encoding="utf-8")
            _flush(own)
        with _together(temporary):
            if rank == 0:
                _flush_folder(temporary)
                temporary.rename(final)
                _flush_folder(self.folder)
                self._remove_old()
        return final

    def _meta(self, state: TrainState) -> dict[str, Any]:
        return {
            "format": 1,
            "progress": asdict(state.progress),
            "identity": self.identity,
            "notes": self.notes,
            "ema": state.ema is not None,
        }

    def load(self, state: TrainState, step: int | None = None) -> bool:
        """Continue from a step's checkpoint (collective); by default the latest.

        Returns:
            False where there is no checkpoint.

        Raises:
            CheckpointError: It was made with another identity, has other tensors than this run, or is damaged.
        """
        steps = self.steps()
        if not steps:
            return False
        path = self.path(steps[-1] if step is None else step)
        with _damage_of(path):
            meta = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
            found = FileSystemReader(path).read_metadata()
        self._check_identity(meta["identity"], path)
        noted = meta.get("notes", {})
        self.changed = [name for name, value in self.notes.items() if name in noted and noted[name] != value]
        if state.ema is not None and not meta["ema"]:
            raise CheckpointError(f"{path} has no averaged weights; set optim.ema=null, or start a new run folder")
        tensors = state.tensors()
        _check_tensors(tensors, found, path)
        rank = dist.get_rank() if dist.is_initialized() else 0
        own, random_state = path / f"rng_{rank}.pt", None
        with _damage_of(path), _alone_is_fine():
            load_tensors(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
            if own.is_file():  # absent where the run now has more processes: those keep their fresh state
                random_state = torch.load(own, weights_only=True)
        self.changed_settings = state.set_tensors(tensors)
        for key, value in meta["progress"].items():
            setattr(state.progress, key, value)
        if random_state is not None:
            _set_random_state(random_state)
        return True

    def _check_identity(self, found: dict[str, Any], path: Path) -> None:
        different = [key for key in self.identity if found.get(key) != self.identity[key]]
        if different:
            lines = [f"  {key}: checkpoint {found.get(key)!r}, this run {self.identity[key]!r}" for key in different]
            raise CheckpointError(
                "\n".join([f"{path} was made with something else than this run uses:", *lines])
                + "\nUse the same again, or start fresh with another run.out (task.backbone.weights keeps weights)."
            )

    def _clean_up(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _remove_old(self) -> None:
        steps = self.steps()
        for previous, step in pairwise([0, *steps[: -self.keep_last]]):
            # the cadence of saving need not divide that of keeping, and a save may have come late
            if not (self.keep_every and step // self.keep_every > previous // self.keep_every):
                doomed = self.folder / f".step_{step:08d}.old"  # renamed first: never half a folder under a valid name
                self.path(step).rename(doomed)
                shutil.rmtree(doomed)


def seed_everything(seed: int) -> None:
    """Seed the generators of torch, Python and NumPy of this process."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    version, internal, gauss = random.getstate()
    state["python"] = [version, list(internal), gauss]
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = numpy_state
    state["numpy"] = [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached]
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def _flush(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Without torch's warning that a checkpoint of a single process is read or written by a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


@contextmanager
def _together(path: Path) -> Iterator[None]:
    """A part of saving after which all processes wait for each other; what fails on one of them fails on all."""
    failure: Exception | CheckpointException | None = None
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        failure = error
    rank = dist.get_rank() if dist.is_initialized() else 0
    causes = merge_over_processes({} if failure is None else {str(rank): _cause(failure)})
    if causes:
        first = next(iter(causes.values()))
        raise CheckpointError(f"cannot write {path} ({first}); the checkpoints before it stay") from failure


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Whatever fails while a checkpoint's files are read means that they are not what was written."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise CheckpointError(
            f"{path} is damaged ({_cause(error)})\nRemove this folder to continue from the checkpoint before it."
        ) from error


def _cause(error: BaseException) -> str:
    """Type and first line of what went wrong, on whichever process."""
    first = (
        next((pair[0] for pair in error.failures.values()), error) if isinstance(error, CheckpointException) else error
    )
    return f"{type(first).__name__}: {(str(first).splitlines() or [''])[0]}"


def _check_tensors(wanted: dict[str, Any], found: Metadata, path: Path) -> None:
    planner = DefaultLoadPlanner()
    planner.set_up_planner(wanted, found, is_coordinator=True)
    ours, theirs = planner.state_dict, found.state_dict_metadata
    differences = [f"only this run has {name}" for name in ours if name not in theirs]
    # averaged weights that the run does not want any more are left alone
    differences += [
        f"only the checkpoint has {n}"
        for n in theirs
        if n not in ours and ("ema" in wanted or not n.startswith("ema."))
    ]
    for name, value in ours.items():
        stored = theirs.get(name)
        if isinstance(value, Tensor) and isinstance(stored, TensorStorageMetadata) and value.shape != stored.size:
            differences.append(f"{name} is {list(stored.size)} in the checkpoint and {list(value.shape)} in this run")
    if differences:
        more = f"\n  and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(
            "\n  ".join([f"{path} does not fit this run's model or optimiser:", *differences[:5]]) + more
            + "\nContinue with the recipe it was made with (config.yaml in the run's folder) or choose another run.out."
        )  # fmt: skip


def parameter_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Full, unsharded weights on the CPU (collective), for export; on a CPU they are the module's own, not copies."""
    tensors = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
