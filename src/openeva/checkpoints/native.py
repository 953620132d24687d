"""openeva's own format: a folder with `model.safetensors` (names `backbone.*`, `head.*`) and `config.json`.

state dict + config -> `save_native` -> folder -> `read_native` -> state dict + config
"""

import json
import platform
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openeva.checkpoints.files import StateDict, read_state_dict, write_atomically
from openeva.checkpoints.pretrained import MODEL_FILE, resolve
from openeva.checkpoints.resize import AnyGrid

FORMAT = "openeva/1"
WEIGHTS_FILE = MODEL_FILE
CONFIG_FILE = "config.json"

_SAVE_ID = "save_id"
"""The same in both files, so that halves of two saves are not taken for one model."""


def save_native(folder: Path, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a model so that it is found whole or not at all.

    Each file replaces an older one at once; should the machine stop between the two, `read_native` notices it.

    Args:
        folder: Made if needed; other files in it are left alone.
        state_dict: Weights with openeva's names, on any device.
        config: Resolved task config, target identity and width, step, ...; must be plain values that JSON can hold.
            `format` and `versions` are added.

    Raises:
        ValueError: `config` cannot be written as JSON.
    """
    save_id = uuid.uuid4().hex
    try:
        text = json.dumps(
            {"format": FORMAT, "versions": _versions(), **config, _SAVE_ID: save_id}, indent=2, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"the config for {folder / CONFIG_FILE} must hold plain finite JSON values: {error}") from None
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}
    metadata = {"format": "pt", "openeva_format": FORMAT, _SAVE_ID: save_id}
    write_atomically(folder / WEIGHTS_FILE, lambda file: save_file(tensors, file, metadata=metadata))
    write_atomically(folder / CONFIG_FILE, lambda file: _write_text(file, text + "\n"))


def read_native(folder: Path) -> tuple[StateDict, dict[str, Any]]:
    """Read a model that `save_native` wrote: (weights on the CPU, config).

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, of another format, or the two belong to different saves.
    """
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not an openeva model: it has no {name} (both {WEIGHTS_FILE} and {CONFIG_FILE})"
            )
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{config_path} is not valid JSON ({error}); restore it or convert the weights again"
        ) from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(
            f"{config_path} has format {found!r}, but this version reads {FORMAT!r}; use the version that wrote it"
        )
    state_dict = read_state_dict(weights_path)
    if config.pop(_SAVE_ID, None) != _metadata(weights_path).get(_SAVE_ID):
        raise ValueError(
            f"{WEIGHTS_FILE} and {CONFIG_FILE} in {folder} are from different saves (was one copied, or a save "
            "interrupted?); copy both from one folder, or save again"
        )
    return state_dict, config


def is_complete(folder: Path) -> bool:
    """True where a folder holds a whole model: both files, of one save (a save that was killed leaves less)."""
    try:
        saved = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get(_SAVE_ID)
        return bool(saved == _metadata(folder / WEIGHTS_FILE).get(_SAVE_ID))
    except (OSError, ValueError, AttributeError):
        return False


def model_path(weights: str) -> Path:
    """The file or model folder of an address: a path (a run's folder stands for the model in it) or an official name.

    Raises:
        WeightsError: Nothing there.
    """
    return resolve(weights)


def native_grid(config: Mapping[str, Any]) -> AnyGrid | None:
    """Patch grid of the backbone that a config describes, of clips with the time slots in front; None where unknown."""
    backbone = (config.get("task") or {}).get("backbone") or {}
    size, patch_size = backbone.get("image_size"), backbone.get("patch_size")
    if size is None or patch_size is None:
        return None
    rows, columns = (size, size) if isinstance(size, int) else size
    slots = () if backbone.get("num_frames") is None else (backbone["num_frames"] // backbone.get("tubelet", 1),)
    return (*slots, rows // patch_size, columns // patch_size)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _versions() -> dict[str, str]:
    try:
        own = version("openeva")
    except PackageNotFoundError:  # run from a source tree that is not installed
        own = "unknown"
    return {"openeva": own, "torch": torch.__version__, "python": platform.python_version()}
