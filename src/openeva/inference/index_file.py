"""The index of a folder of images on disk: names, sizes, times and features, one memory-mapped file.

rows -> `write` -> file (appears whole or not at all) -> `read` -> `Stored`, whose features stay on disk until they are
looked at

While a folder is being indexed, rows go to small files beside it (parts), so that what was done before an interruption
is not done again; at the end all become one file. Features have length 1 and are float16: cosines are then right to
about 0.0002.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openeva.data.file_index import ArrayFile, ArrayFileWriter, StringTableWriter

FORMAT = "openeva-search/1"
COPIED_ROWS = 65_536
"""Rows that are in memory at a time while files are put together."""


@dataclass(frozen=True)
class Stamp:
    """What tells that a file is still the same."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: bytes | Path) -> "Stamp":
        """That of a file on disk.

        Raises:
            OSError: It is not there.
        """
        status = Path(os.fsdecode(path)).stat()
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Stored:
    """What a file of an index holds.

    Attributes:
        meta: Folder and weights that it belongs to.
        names: Paths of images below the folder, as bytes: names need not be valid UTF-8.
        size: Of each file, in bytes.
        mtime_ns: Of each file.
        features: `[rows, E]`, length 1.
        broken: Images that could not be read: name -> (stamp, why).
    """

    meta: Mapping[str, Any]
    names: Sequence[bytes]
    size: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]
    features: NDArray[np.float16]
    broken: Mapping[bytes, tuple[Stamp, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


def read(path: Path) -> Stored | None:
    """The index in a file; None where there is none.

    Raises:
        ValueError: The file is something else, or damaged.
    """
    try:
        file = ArrayFile(path)
    except FileNotFoundError:
        return None
    if file.meta.get("format") != FORMAT:
        raise ValueError(f"{path} is not an index of images in the format {FORMAT!r}; give another --index")
    names = file.array("names.blob").tobytes().split(b"\0")[:-1]
    features = file.array("features").reshape(len(names), -1) if names else np.empty((0, 0), np.float16)
    broken = {
        os.fsencode(name): (Stamp(size, mtime_ns), reason)
        for name, (size, mtime_ns, reason) in file.meta["broken"].items()
    }
    return Stored(file.meta, names, file.array("size"), file.array("mtime_ns"), features, broken)


Row = tuple[bytes, Stamp, Stored, int]
"""Name, stamp, and where the features are."""


def write(path: Path, rows: Sequence[Row], broken: Mapping[bytes, tuple[Stamp, str]], meta: Mapping[str, Any]) -> None:
    """Put rows of other files, or of memory, into one file, which appears whole or not at all."""
    with ArrayFileWriter(path) as file:
        names = StringTableWriter(file, "names")
        names.extend([name for name, *_ in rows])
        names.finish()
        file.append("size", np.array([stamp.size for _, stamp, *_ in rows], np.int64), counts=False)
        file.append("mtime_ns", np.array([stamp.mtime_ns for _, stamp, *_ in rows], np.int64), counts=False)
        for piece in _features(rows):
            file.append("features", piece, counts=False)
        told = {os.fsdecode(name): (stamp.size, stamp.mtime_ns, reason) for name, (stamp, reason) in broken.items()}
        file.commit({**meta, "format": FORMAT, "broken": told})


def _features(rows: Sequence[Row]) -> Iterable[NDArray[np.float16]]:
    begin = 0
    while begin < len(rows):
        source, end = rows[begin][2], begin + 1
        while end < len(rows) and rows[end][2] is source and end - begin < COPIED_ROWS:
            end += 1
        yield source.features[[row for *_, row in rows[begin:end]]]
        begin = end


class Parts:
    """Small files beside an index, with what was done since it was written."""

    def __init__(self, index: Path) -> None:
        self.index = index

    def paths(self) -> list[Path]:
        """Those that are there, in the order of their writing."""
        names = (
            path for path in self.index.parent.glob(f"{_escaped(self.index.name)}.part-*") if path.suffix != ".tmp"
        )
        return sorted(names, key=lambda path: int(path.name.rpartition("-")[2]))

    def read(self) -> list[Stored]:
        """Their content; one that is damaged is left out, its images are encoded again."""
        found = []
        for path in self.paths():
            with suppress(ValueError, OSError):
                part = read(path)
                if part is not None:
                    found.append(part)
        return found

    def add(
        self,
        rows: Sequence[tuple[bytes, Stamp]],
        features: NDArray[np.float16],
        broken: Mapping[bytes, tuple[Stamp, str]],
        meta: Mapping[str, Any],
    ) -> None:
        """Write one more."""
        last = self.paths()
        number = int(last[-1].name.rpartition("-")[2]) + 1 if last else 1
        empty = np.empty(0, np.int64)
        held = Stored(meta, [], empty, empty, features)
        listed = [(name, stamp, held, row) for row, (name, stamp) in enumerate(rows)]
        write(self.index.with_name(f"{self.index.name}.part-{number:06d}"), listed, broken, meta)

    def remove_unfinished(self) -> None:
        """Take away what a process that was killed has left; only for who holds the lock."""
        for path in self.index.parent.glob(f"{_escaped(self.index.name)}*.tmp"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Take them away."""
        for path in self.paths():
            path.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
