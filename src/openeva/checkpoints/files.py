"""Weight files on disk: a `.pt` / `.pth` / `.safetensors` file <-> plain tensors by name.

file -> kind by its first bytes -> checked and read without running code -> wrapper taken off -> state dict, and what
stood around it (`WeightFile`)

Source: spec section 1.8, wrapping. Pickles are only read with `weights_only=True`; `argparse.Namespace` (which the
official linear-probe files carry) is allowed beside tensors because restoring one only sets attributes.
"""

import argparse
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

StateDict = dict[str, Tensor]
Wrapper = Literal["model", "module", "model_ema", "bare"]

WRAPPERS = ("model", "module", "state_dict")
"""Top-level keys that hold the weights, in the order in which they are looked for."""

EMA_WRAPPER = "model_ema"


@dataclass(frozen=True)
class WeightFile:
    """A file as it lies on disk.

    Attributes:
        state_dict: The weights, without `prefix`.
        content: All that the file holds; for safetensors the tensors by name.
        keys: Top-level keys that lead to the weights, such as `("model",)`.
        prefix: What stands in front of every name in the file ("module." of DistributedDataParallel).
        metadata: Of a safetensors file; None for a PyTorch file.
    """

    state_dict: StateDict
    content: Any
    keys: tuple[str, ...]
    prefix: str
    metadata: dict[str, str] | None


def read_state_dict(path: Path, *, ema: bool | None = False) -> StateDict:
    """Read the weights of a PyTorch or safetensors file, on the CPU, in the file's own dtypes.

    Args:
        path: A file; its kind is told by its content, not by its name.
        ema: Take the averaged weights (`model_ema`) of a training checkpoint; None = where there are any.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not a weight file, damaged, without weights, or it needs more than tensors to be read.
    """
    return read_weight_file(path, ema=ema).state_dict


def read_weight_file(path: Path, *, ema: bool | None = False) -> WeightFile:
    """Read the weights and all that stands around them; see `read_state_dict`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    if _kind(path) == "safetensors":
        content, metadata = _read_safetensors(path)
        return _unwrap(content, path, ema=ema, metadata=metadata)
    return _unwrap(read_torch(path), path, ema=ema, metadata=None)


def write_state_dict(path: Path, state_dict: Mapping[str, Tensor], wrapper: Wrapper = "model") -> None:
    """Write weights atomically: safetensors where the name ends so, else a PyTorch file.

    Args:
        path: Output file; an existing one is replaced at once or not at all.
        state_dict: Weights.
        wrapper: Top-level key of the PyTorch file, as official loaders look for it; "bare" for none. A safetensors file
            has no wrapper.
    """
    tensors = {key: tensor.detach().contiguous() for key, tensor in state_dict.items()}
    in_torch = path.suffix != ".safetensors"
    write_content(
        path, {wrapper: tensors} if in_torch and wrapper != "bare" else tensors, None if in_torch else {"format": "pt"}
    )


def write_content(path: Path, content: Any, metadata: dict[str, str] | None) -> None:
    """Write all that a file should hold, atomically: tensors with `metadata` as safetensors, else by PyTorch."""
    if metadata is not None:
        write_atomically(path, lambda file: save_file(content, file, metadata=metadata or None))
    else:
        write_atomically(path, lambda file: torch.save(content, file))


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file of the same name in a folder beside `path`, flush it to disk, then put it in its place.

    PyTorch writes a file's name into it: with the same name, the same content gives the same bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir(exist_ok=True)
    temporary = folder / path.name
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        folder.rmdir()


def _kind(path: Path) -> Literal["zip", "pickle", "safetensors"]:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start[4:9] == b"\0\0\0\0{":  # first, since the length of the header (8 bytes) may begin as a pickle does
        return "safetensors"
    if start.startswith(b"\x80"):
        return "pickle"
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its repository")
    what = "is empty" if not start else f"starts with {start[:16]!r}"
    raise ValueError(
        f"{path} is not a weight file: it {what}, but PyTorch (zip or pickle) or safetensors content is needed; "
        "was a web page saved instead of the file?"
    )


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def read_torch(path: Path) -> Any:
    """All that a PyTorch file holds: tensors, plain values and `argparse.Namespace`.

    Raises:
        ValueError: Not such a file, damaged, or it needs more to be read.
    """
    _check_zip(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = _needed_globals(path)
        if needed is None:
            raise _damaged(path, "its pickle holds more than tensors, or is incomplete") from error
        raise ValueError(
            f"{path} is refused: to read it, Python would have to run {', '.join(needed)}, and a weight file "
            "may only hold tensors and plain values. If you trust its origin, save the weights alone: "
            "torch.save({'model': torch.load(FILE, weights_only=False)['model']}, NEW_FILE)"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise _damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _check_zip(path: Path) -> None:
    """Refuse truncated archives, wrong checksums (`torch.load` does not look at them) and archives with programs."""
    if _kind(path) != "zip":
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names, broken = archive.namelist(), archive.testzip()
    except zipfile.BadZipFile as error:
        raise _damaged(path, str(error)) from error
    if broken is not None:
        raise _damaged(path, f"the checksum of {broken} inside it is wrong")
    if any(name.endswith("constants.pkl") for name in names):
        raise ValueError(
            f"{path} is a TorchScript program, not a weight file; save its weights alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise ValueError(f"{path} is a zip archive but not a PyTorch file (no data.pkl inside); unpack it first")


def _needed_globals(path: Path) -> list[str] | None:
    """Names beyond tensors that reading a zip file would import; None where there are none or they cannot be told."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # files of PyTorch < 1.6
        return None
    return [name for name in names if name != "argparse.Namespace"] or None


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged or incomplete ({reason}); download or copy it again and compare its size")


def _unwrap(content: Any, path: Path, *, ema: bool | None, metadata: dict[str, str] | None) -> WeightFile:
    inner, top = content, list(content) if isinstance(content, Mapping) else []
    keys: list[str] = []
    if ema and EMA_WRAPPER not in top:
        raise ValueError(f"{path} holds no averaged weights ({EMA_WRAPPER}), only {_some(top)}; read it without ema")
    if ema or (ema is None and isinstance(content, Mapping) and isinstance(content.get(EMA_WRAPPER), Mapping)):
        keys, inner = [EMA_WRAPPER], content[EMA_WRAPPER]
    while isinstance(inner, Mapping):
        wrapper = next((key for key in WRAPPERS if isinstance(inner.get(key), Mapping)), None)
        if wrapper is None:
            break
        keys, inner = [*keys, wrapper], inner[wrapper]
    if not isinstance(inner, Mapping) or not inner or not all(isinstance(v, Tensor) for v in inner.values()):
        held = _some(top) if top else f"a {type(content).__name__}"
        hint = "; read it with ema to take the averaged weights" if EMA_WRAPPER in top else ""
        raise ValueError(
            f"{path} holds no weights: expected tensors by name, at the top level or under {', '.join(WRAPPERS)}, "
            f"but found {held}{hint}"
        )
    # names that were saved from inside DistributedDataParallel
    prefix = "module." if all(key.startswith("module.") for key in inner) else ""
    state_dict = {key.removeprefix(prefix): tensor for key, tensor in inner.items()}
    return WeightFile(state_dict, content, tuple(keys), prefix, metadata)


def _some(keys: list[Any], limit: int = 5) -> str:
    shown = ", ".join(str(key) for key in keys[:limit])
    return shown + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
