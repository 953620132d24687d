"""Weights out of a TorchScript archive (OpenAI's CLIP files are such) without running anything that it holds.

zip archive -> its pickled object tree, rebuilt with inert objects -> parameters and buffers under their dotted names

`torch.jit.load` compiles and may run the program inside the file. Here only `data.pkl` and the raw tensors are read:
every class of the program becomes an object without behaviour, and any other name that the pickle asks for is refused.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript program (and not a plain weight file)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive, in the file's own dtypes.

    Raises:
        ValueError: The archive asks for more than modules, tensors and plain values.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        with archive.open(f"{root}data.pkl") as pickled:
            try:
                program = _Unpickler(pickled, archive, root).load()
            except pickle.UnpicklingError as error:
                raise ValueError(f"{path} is refused: {error}") from error
    tensors: dict[str, Tensor] = {}
    _collect(program, "", tensors)
    return tensors


class _Inert:
    """Stands for an object of a class that the archive defines: holds its attributes, does nothing."""

    def __init__(self, *args: Any) -> None:
        """Whatever the class would be made with is left out."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _Unpickler(pickle.Unpickler):
    """Knows modules, tensors and lists, and nothing else."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Inert
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle":  # typed lists and type tags: (value, ...) -> value
            return _first
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither a module nor a tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, num_elements = pid
        if num_elements == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(self._archive.read(f"{self._root}data/{key}")), dtype=dtype)


def _first(value: Any, *rest: Any) -> Any:
    return value


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _collect(module: _Inert, prefix: str, tensors: dict[str, Tensor]) -> None:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        elif isinstance(value, _Inert):
            _collect(value, f"{prefix}{name}.", tensors)
