"""Weights of which a file holds only what was trained: where the others are, by address and digest.

folder with a `delta` entry in its config.json -> bases, each checked -> their tensors, fitted as when training began ->
overwritten by the folder's own -> adapters merged -> weights of the plain model
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openeva.checkpoints.adapters import Adapter, merge
from openeva.checkpoints.files import StateDict
from openeva.checkpoints.native import CONFIG_FILE, WEIGHTS_FILE, model_path
from openeva.checkpoints.resize import AnyGrid
from openeva.checkpoints.weights import WeightsError, digest_of_file

DELTA = "delta"
"""Key of config.json."""


@dataclass(frozen=True)
class Base:
    """A file or model folder that training started from.

    Attributes:
        address: As the recipe has it.
        path: Where that was, for a later look from another folder.
        digest: Of the file with the weights.
        shapes: Name of every tensor that is to be read from it -> shape in the trained model.
    """

    address: str
    path: str
    digest: str
    shapes: dict[str, list[int]]


@dataclass(frozen=True)
class Delta:
    """What is not in the file.

    Attributes:
        bases: Where the tensors are that the file lacks.
        grid: Patch grid (rows, columns) of the model.
        adapter: Adapters that must be merged to have a plain model.
    """

    bases: list[Base]
    grid: AnyGrid | None = None
    adapter: Adapter | None = None

    def as_json(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Delta":
        """Back from config.json."""
        adapter, grid = content.get("adapter"), content.get("grid")
        return cls(
            [Base(**base) for base in content["bases"]],
            None if grid is None else (grid[0], grid[1]),
            None if adapter is None else Adapter(adapter["peft_type"], tuple(adapter["targets"]), adapter["options"]),
        )


@dataclass(frozen=True)
class TrainedPart:
    """Of a model of which only a part is trained: what its files hold.

    Attributes:
        names: Of the tensors that checkpoints hold: all that the bases do not have or training changes.
        delta: Where the others are.
        merge: Whether an exported model shall stand alone: nothing left out, adapters merged.
    """

    names: frozenset[str]
    delta: Delta
    merge: bool = False

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that continues it."""
        return {"base": [base.digest for base in self.delta.bases]}

    def export(self, tensors: StateDict) -> tuple[StateDict, dict[str, Any]]:
        """Tensors for the file of an exported model, out of all, and what its config must say about the others."""
        if self.merge:
            return (tensors if self.delta.adapter is None else merge(tensors, self.delta.adapter)), {}
        if not self.delta.bases and self.delta.adapter is None:
            return tensors, {}
        return {name: value for name, value in tensors.items() if name in self.names}, {DELTA: self.delta.as_json()}


def digest_of_model(path: Path) -> str:
    """Digest of the weights at a path that `model_path` gave."""
    return digest_of_file(path / WEIGHTS_FILE if path.is_dir() else path)


def complete(
    folder: Path, own: StateDict, delta: Delta, read: Callable[[Base, Path, AnyGrid | None], StateDict]
) -> StateDict:
    """All weights of the plain model.

    Args:
        folder: Of the model, for messages.
        own: What its file holds.
        delta: What it does not.
        read: Reads the tensors of a base from a path, in the shapes that it names.

    Raises:
        WeightsError: A base is not there, or has other weights than those that training started from.
    """
    weights: StateDict = {}
    for number, base in enumerate(delta.bases):
        path = _locate(folder, number, base)
        weights |= {name: t.float() if t.is_floating_point() else t for name, t in read(base, path, delta.grid).items()}
    weights = {name: tensor for name, tensor in weights.items() if name not in own} | own
    return weights if delta.adapter is None else merge(weights, delta.adapter)


def _locate(folder: Path, number: int, base: Base) -> Path:
    """Where a base is now, checked."""
    head = f"{folder} holds only what was trained on top of {base.address!r}"
    fix = f"write where they are as {DELTA}.bases[{number}].address in {folder / CONFIG_FILE}"
    path: Path | None = None
    for address in (base.address, base.path):
        try:
            path = model_path(address)
        except WeightsError:
            continue
        if digest_of_model(path) == base.digest:
            return path
    if path is None:
        raise WeightsError(
            f"{head}, which is not there any more (nor at {base.path}); put these weights back, or {fix}"
        )
    raise WeightsError(
        f"{head}, but {path} has other weights now (digest {digest_of_model(path)}, not {base.digest}); put back those"
        f" that training started from, or {fix}"
    )
