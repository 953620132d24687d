"""The index of a folder of images on disk: names, sizes, times and features, one memory-mapped file.

files and features -> `write` -> file (appears whole or not at all) -> `read` -> `Stored`, whose names and features stay
on disk until they are looked at; `Stored`s and the files of today -> `compare` -> what is still true

While a folder is being indexed, rows go to small files beside it (`Parts`), so that what was done before an
interruption is not done again; at the end all become one file. Features have length 1 and are float16: cosines are then
right to about 0.0002.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openeva.data.file_index import BLOCK, ArrayFile, ArrayFileWriter, StringTable, StringTableWriter

log = logging.getLogger(__name__)

FORMAT = "openeva-search/1"
COPIED_ROWS = 65_536
"""Rows that are in memory at a time while files are put together."""
MAX_PARTS = 64
"""Parts that become one when there are more: each holds a file open while it is read."""


@dataclass(frozen=True, slots=True)
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
        status = os.stat(path)  # noqa: PTH116 (bytes, and a million of them)
        return cls(status.st_size, status.st_mtime_ns)


class Names:
    """Names in a file of an index: one is read alone, all are read at once."""

    def __init__(self, file: ArrayFile, count: int) -> None:
        self._blob, self._table, self._count = file.array("names.blob"), StringTable(file, "names"), count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> bytes:
        return self._table[row]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._blob.tobytes().split(b"\0")[:-1])


@dataclass(frozen=True)
class Files:
    """Files of a folder.

    Attributes:
        names: Paths below the folder, as bytes: names need not be valid UTF-8.
        size: `[N]`, in bytes.
        mtime_ns: `[N]`, time of the last change.
    """

    names: Sequence[bytes] | Names
    size: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]

    @classmethod
    def of(cls, stamps: Mapping[bytes, Stamp]) -> "Files":
        """From name -> stamp."""
        pairs = np.array([(stamp.size, stamp.mtime_ns) for stamp in stamps.values()], np.int64).reshape(-1, 2)
        return cls(list(stamps), pairs[:, 0], pairs[:, 1])

    def __len__(self) -> int:
        return len(self.names)

    def stamp(self, row: int) -> Stamp:
        """That of one file."""
        return Stamp(int(self.size[row]), int(self.mtime_ns[row]))

    def take(self, rows: NDArray[np.int64]) -> "Files":
        """Some of them."""
        return Files([self.names[row] for row in rows.tolist()], self.size[rows], self.mtime_ns[rows])


Broken = Mapping[bytes, tuple[Stamp, str]]
"""Images that could not be read: name -> (stamp, why)."""


@dataclass(frozen=True)
class Stored:
    """What a file of an index holds.

    Attributes:
        meta: Folder and weights that it belongs to.
        files: Images whose features are known.
        features: `[N, E]`, of length 1.
        broken: Images without features.
    """

    meta: Mapping[str, Any]
    files: Files
    features: NDArray[np.float16]
    broken: Broken = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)


# ------------------------------------------------------------------------------------------------- one file


def read(path: Path) -> Stored | None:
    """The index in a file; None where there is none.

    Raises:
        ValueError: The file is something else, or damaged.
        OSError: It cannot be read.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; give the file of an index, which need not exist yet (--index)") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged, or not an index of images; delete it and it is made anew, or give another file"
            " (--index)"
        ) from error


def _read(path: Path) -> Stored:
    file = ArrayFile(path)
    if file.meta["format"] != FORMAT:
        raise ValueError(f"the format is {file.meta['format']}, not {FORMAT}")
    size, mtime_ns, starts = file.array("size"), file.array("mtime_ns"), file.array("names.starts")
    num_blocks = -(-len(size) // BLOCK)
    if len(mtime_ns) != len(size) or len(starts) != num_blocks + 1 or starts[-1] != file.array("names.blob").nbytes:
        raise ValueError("lengths do not fit")
    features = file.array("features").reshape(len(size), -1) if len(size) else np.empty((0, 0), np.float16)
    if features.dtype != np.float16:
        raise ValueError(f"features are {features.dtype}")
    broken = {
        os.fsencode(name): (Stamp(size, mtime_ns), str(why))
        for name, (size, mtime_ns, why) in file.meta["broken"].items()
    }
    return Stored(file.meta, Files(Names(file, len(size)), size, mtime_ns), features, broken)


def write(
    path: Path, files: Files, features: Iterable[NDArray[np.float16]], broken: Broken, meta: Mapping[str, Any]
) -> None:
    """Write an index, which appears whole or not at all.

    Args:
        path: Of the file.
        files: Images whose features are known.
        features: Theirs, in pieces `[*, E]`; rows of length 1.
        broken: Images without features.
        meta: Folder and weights.

    Raises:
        OSError: It cannot be written; the message names it.
    """
    try:
        with ArrayFileWriter(path) as file:
            names = StringTableWriter(file, "names")
            names.extend(list(files.names))
            names.finish()
            file.append("size", files.size, counts=False)
            file.append("mtime_ns", files.mtime_ns, counts=False)
            for piece in features:
                file.append("features", piece, counts=False)
            told = {os.fsdecode(name): (stamp.size, stamp.mtime_ns, why) for name, (stamp, why) in broken.items()}
            file.commit({**meta, "format": FORMAT, "broken": told})
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say where


# ------------------------------------------------------------------------------------------------- several


@dataclass(frozen=True)
class Kept:
    """What `Stored`s know about files, where a file is still as it was.

    Attributes:
        stored: Those.
        files: The files.
        source: `[N]`, number in `stored` of the one that has a file's features, -1 = none.
        row: `[N]`, row in that one.
        known: `[N]`, a file of that name was there before, whatever it was like.
        broken: Files that cannot be read: position -> why.
        gone: Names that are not among the files.
    """

    stored: Sequence[Stored]
    files: Files
    source: NDArray[np.int64]
    row: NDArray[np.int64]
    known: NDArray[np.bool_]
    broken: dict[int, str]
    gone: set[bytes]

    def unknown(self) -> NDArray[np.int64]:
        """Positions of files that nothing is known about, or that have changed."""
        unknown = self.source < 0
        unknown[list(self.broken)] = False
        return np.flatnonzero(unknown)

    def write(self, path: Path, meta: Mapping[str, Any]) -> None:
        """Put all that is still true into one file."""
        rows = np.flatnonzero(self.source >= 0)
        broken = {
            self.files.names[position]: (self.files.stamp(position), why) for position, why in self.broken.items()
        }
        write(path, self.files.take(rows), self._features(rows), broken, meta)

    def _features(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.float16]]:
        for begin in range(0, len(rows), COPIED_ROWS):
            here = rows[begin : begin + COPIED_ROWS]
            piece = np.empty((len(here), self.stored[self.source[here[0]]].features.shape[1]), np.float16)
            for number in np.unique(self.source[here]).tolist():
                these = self.source[here] == number
                piece[these] = self.stored[number].features[self.row[here[these]]]
            yield piece


def compare(stored: Sequence[Stored], files: Files) -> Kept:
    """What is known about files. Where two know something, the later one counts."""
    kept = Kept(
        stored,
        files,
        np.full(len(files), -1),
        np.zeros(len(files), np.int64),
        np.zeros(len(files), np.bool_),
        {},
        set(),
    )
    position_of = {name: position for position, name in enumerate(files.names)}
    for number, one in enumerate(stored):
        at = np.fromiter((position_of.get(name, -1) for name in one.files.names), np.int64, len(one))
        rows = np.flatnonzero(at >= 0)
        if len(rows) < len(at):
            kept.gone.update(name for name in one.files.names if name not in position_of)
        at = at[rows]
        kept.known[at] = True
        same = (files.size[at] == one.files.size[rows]) & (files.mtime_ns[at] == one.files.mtime_ns[rows])
        kept.source[at[same]], kept.row[at[same]] = number, rows[same]
        for position in at[same].tolist() if kept.broken else ():
            kept.broken.pop(position, None)
        for name, (stamp, why) in one.broken.items():
            position = position_of.get(name)
            if position is None:
                kept.gone.add(name)
                continue
            kept.known[position] = True
            if files.stamp(position) == stamp and kept.source[position] < 0:
                kept.broken[position] = why
    return kept


class Parts:
    """Small files beside an index, with what was done since it was written; only who holds the lock changes them."""

    def __init__(self, index: Path) -> None:
        self.index = index

    def _numbered(self) -> list[tuple[int, Path]]:
        """Number and file of those that are there, in the order of their writing."""
        found = ((re.fullmatch(re.escape(self.index.name) + r"\.part-(\d+)", name), name) for name in self._beside())
        return sorted((int(match[1]), self.index.with_name(name)) for match, name in found if match)

    def _beside(self) -> list[str]:
        with suppress(FileNotFoundError):
            return os.listdir(self.index.parent)  # noqa: PTH208 (names are enough)
        return []

    def read(self) -> list[Stored]:
        """Their content, without damaged ones."""
        found = []
        for _, path in self._numbered():
            with suppress(ValueError):
                found.append(read(path))
        return [part for part in found if part is not None]

    def add(self, files: Files, features: NDArray[np.float16], broken: Broken, meta: Mapping[str, Any]) -> None:
        """Write one more; many become one."""
        before = self._numbered()
        number = before[-1][0] + 1 if before else 1
        write(self._path(number), files, [features] if len(files) else [], broken, meta)
        if len(before) >= MAX_PARTS:
            parts = self.read()
            stamps: dict[bytes, Stamp] = {}
            for part in parts:
                stamps |= {name: part.files.stamp(row) for row, name in enumerate(part.files.names)}
                stamps |= {name: stamp for name, (stamp, _) in part.broken.items()}
            compare(parts, Files.of(stamps)).write(self._path(number + 1), meta)
            self._remove(path for _, path in [*before, (number, self._path(number))])

    def _path(self, number: int) -> Path:
        return self.index.with_name(f"{self.index.name}.part-{number:06d}")

    def tidy(self) -> None:
        """Take away what is of no use: what a process that was killed has left, and damaged ones."""
        unfinished = re.compile(re.escape(self.index.name) + r"(\.part-\d+)?\.\d+\.[0-9a-f]{8}\.tmp")
        self._remove(self.index.with_name(name) for name in self._beside() if unfinished.fullmatch(name))
        for _, path in self._numbered():
            try:
                read(path)
            except ValueError:
                log.warning("%s is damaged; its images are encoded again", path)
                self._remove([path])

    def remove(self) -> None:
        """Take all of them away."""
        self._remove(path for _, path in self._numbered())

    @staticmethod
    def _remove(paths: Iterable[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
