"""Features of fixed crops on disk: computed once, looked up by sample number and flip.

features `[B, 2, N, V]` (axis 1: as it is, mirrored) -> `CacheWriter`, a part per process -> `finish` -> `FeatureCache`

A part is a plain fp16 `.npy` file, read through memory mapping, beside the `.npy` of its sample numbers. `cache.json`
is written last: without it the cache counts as absent and is made anew, so that nothing half-written is ever used.
"""

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

DTYPE = np.dtype("<f2")
MANIFEST = "cache.json"


def bytes_needed(num_images: int, num_patches: int, width: int) -> int:
    """Size on disk of a cache of this many images, both flips."""
    return num_images * 2 * num_patches * width * DTYPE.itemsize


def check_space(folder: Path, num_bytes: int) -> None:
    """Refuse a cache that does not fit.

    Raises:
        ValueError: The disk of `folder` has less space than `num_bytes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"the cache of teacher features needs {num_bytes / 1e9:.1f} GB and the disk of {folder} has "
            f"{free / 1e9:.1f} GB free; choose another run.out, a coarser grid or a narrower layer, or set cache: false"
        )


def is_complete(folder: Path, key: dict[str, Any]) -> bool:
    """Whether `folder` holds a finished cache of this key.

    Args:
        folder: Where the cache is or will be.
        key: What the features depend on (JSON values).

    Raises:
        ValueError: There is a finished cache of something else; it is never overwritten.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    found = json.loads(manifest.read_text(encoding="utf-8"))["key"]
    differing = [name for name in sorted({*found, *key}) if found.get(name) != key.get(name)]
    if differing:
        changes = "; ".join(f"{name}: cached {found.get(name)!r}, now {key.get(name)!r}" for name in differing)
        raise ValueError(
            f"{folder} holds cached teacher features of something else ({changes}); delete it or choose another run.out"
        )
    return True


def finish(folder: Path, key: dict[str, Any], num_parts: int) -> None:
    """Declare the cache complete, once all parts are written."""
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.write_text(json.dumps({"key": key, "num_parts": num_parts}, indent=1), encoding="utf-8")
    temporary.replace(folder / MANIFEST)


def _part_files(folder: Path, part: int, num_parts: int) -> tuple[Path, Path]:
    return folder / f"features-{part}-of-{num_parts}.npy", folder / f"samples-{part}-of-{num_parts}.npy"


class CacheWriter:
    """Writes one part, batch by batch, under a temporary name.

    Leaving the `with` block without an error puts the part in its place; with one, removes it.
    """

    def __init__(self, folder: Path, part: int, num_parts: int, num_patches: int, width: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._features, self._samples = _part_files(folder, part, num_parts)
        self._temporary = self._features.with_name(f".{self._features.name}.tmp")
        self._row_shape = (2, num_patches, width)
        self._numbers: list[NDArray[np.int64]] = []

    def __enter__(self) -> "CacheWriter":
        self._file = self._temporary.open("wb")
        self._write_header(0)
        return self

    def _write_header(self, num_rows: int) -> None:
        """The header; numpy pads it so that it has the same length for any number of rows."""
        header = {"descr": npy.dtype_to_descr(DTYPE), "fortran_order": False, "shape": (num_rows, *self._row_shape)}
        npy.write_array_header_1_0(self._file, header)

    def append(self, index_B: NDArray[np.int64], features_B2NV: NDArray[np.floating[Any]]) -> None:
        """Add the features of some samples.

        Raises:
            ValueError: A value does not fit into fp16.
        """
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(features_B2NV, dtype=DTYPE)
        if not np.isfinite(rows).all():
            raise ValueError("a teacher feature is NaN or above 65504 (fp16); choose another layer or set cache: false")
        assert rows.shape[1:] == self._row_shape
        self._file.write(rows.data)
        self._numbers.append(np.asarray(index_B, dtype=np.int64))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                self._temporary.unlink()
                return
            numbers = np.concatenate(self._numbers) if self._numbers else np.empty(0, np.int64)
            self._file.seek(0)
            self._write_header(len(numbers))
            self._file.flush()
            os.fsync(self._file.fileno())
        np.save(self._samples, numbers)
        self._temporary.replace(self._features)


class FeatureCache:
    """A finished cache, memory-mapped.

    Attributes:
        samples: Numbers of the samples in it, ascending.
    """

    def __init__(self, folder: Path) -> None:
        num_parts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["num_parts"]
        files = [_part_files(folder, part, num_parts) for part in range(num_parts)]
        self._parts = [np.load(features, mmap_mode="r") for features, _ in files]
        numbers = [np.load(samples) for _, samples in files]
        self.samples: NDArray[np.int64] = np.sort(np.concatenate(numbers))
        self._part_of = np.full(self.samples[-1] + 1 if len(self.samples) else 0, -1, np.int32)
        self._row_of = np.zeros(len(self._part_of), np.int64)
        for part, of_part in enumerate(numbers):
            self._part_of[of_part], self._row_of[of_part] = part, np.arange(len(of_part))

    def lookup(
        self, index_B: NDArray[np.int64], flip_B: NDArray[np.bool_], out_BNV: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """Features `[B, N, V]` of these samples, mirrored where `flip_B`; written to `out_BNV` where that is given.

        Raises:
            ValueError: A sample is not in the cache.
        """
        inside = (index_B >= 0) & (index_B < len(self._part_of))
        part_B = np.where(inside, self._part_of[np.where(inside, index_B, 0)], -1)
        if (part_B < 0).any():
            missing = index_B[part_B < 0].tolist()
            raise ValueError(
                f"samples {missing[:5]} have no cached teacher features; use the images that the cache was made of"
            )
        found_BNV = np.empty((len(index_B), *self._parts[0].shape[2:]), DTYPE) if out_BNV is None else out_BNV
        for part, features in enumerate(self._parts):
            here_B = part_B == part
            found_BNV[here_B] = features[self._row_of[index_B[here_B]], flip_B[here_B].astype(np.int64)]
        return found_BNV
