"""Lists of millions of files as one memory-mapped file on disk, shared by all workers through the page cache.

folders -> `scan` -> `FileIndexWriter` (names streamed to disk) -> `FileIndex` (mmap: number -> path, folder group).

A Python list of 30 million paths takes about 4 GB in every process. Here a folder's path is stored once, its file names
stand one after another in a blob (NUL-terminated, in blocks of 32 with one offset per block), and a process only
maps the file: about 15 bytes per image, once per machine. `ArrayFile` below is the container; the webdataset source
keeps its shard offsets in it too. An index appears whole (rename) or not at all, and its last bytes are a mark, so that
a file cut short by a full disk is not taken for an index.

Indexes of folders lie in `cache_dir()`, never beside the images: image trees are often read-only, and a file written
there would change the very modification time that tells a changed folder.
"""

import fcntl
import hashlib
import json
import logging
import mmap
import os
import secrets
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp")
"""What the official reader takes for an image."""

BLOCK = 32
"""Strings per offset: a look-up reads one block (about 0.5 kB) and splits it."""
AUTO_REINDEX_SECONDS = 60.0
"""A changed folder whose scan took less than this is scanned again without asking."""
MAX_STALENESS_CHECKS = 1000
"""Folders whose modification time is looked at when an index is opened, spread evenly over the index."""

_MARK = b"openeva1"
_TAIL = struct.Struct("<Q8s")
_ALIGN = 64

Progress = Callable[[int, str], None]
"""Called after every scanned folder with the number of files so far and the folder."""


def cache_dir() -> Path:
    """Where indexes are kept: `$OPENEVA_CACHE`, else `$XDG_CACHE_HOME/openeva`, else `~/.cache/openeva`."""
    if own := os.environ.get("OPENEVA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "openeva"


# ------------------------------------------------------------------------------------------------- container


class ArrayFileWriter:
    """Writes named arrays one after another; the file appears under its name only on `commit`.

    A context manager: leaving it without a commit removes what was written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        self._file = self._partial.open("xb", buffering=1 << 20)
        self._arrays: dict[str, dict[str, Any]] = {}
        self._last = ""
        self._hash = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> "ArrayFileWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def append(self, name: str, data: bytes | npt.NDArray[Any], *, counts: bool = True) -> None:
        """Add to the end of an array. Arrays follow each other in the file: only the latest one can grow.

        Args:
            name: Of the array.
            data: What to add.
            counts: False leaves it out of `ArrayFile.content`.
        """
        dtype = data.dtype.str if isinstance(data, np.ndarray) else "|u1"
        if name != self._last:
            assert name not in self._arrays, f"array {name} is already complete"
            self._file.write(b"\0" * (-self._file.tell() % _ALIGN))
            self._arrays[name] = {"dtype": dtype, "offset": self._file.tell(), "bytes": 0}
            self._last = name
        raw = data if isinstance(data, bytes) else data.tobytes()
        self._file.write(raw)
        if counts:
            self._hash.update(raw)
        self._arrays[name]["bytes"] += len(raw)

    def commit(self, meta: dict[str, Any]) -> None:
        """Write the table of contents with `meta` (anything JSON can hold) and put the file in its place."""
        contents = {"arrays": self._arrays, "meta": meta, "content": self._hash.hexdigest()}
        footer = json.dumps(contents).encode()
        self._file.write(footer + _TAIL.pack(len(footer), _MARK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._partial.replace(self.path)


class ArrayFile:
    """Named arrays of one file, mapped read-only. Opening touches only the last page.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is not (or not completely) a file of `ArrayFileWriter`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _TAIL.size:
                raise ValueError(f"{path} is not an index, or only a part of one; delete it and it is built again")
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length, mark = _TAIL.unpack(self.map[-_TAIL.size :])
        if mark != _MARK or length > size - _TAIL.size:
            raise ValueError(f"{path} is not an index, or only a part of one; delete it and it is built again")
        contents = json.loads(self.map[-_TAIL.size - length : -_TAIL.size])
        self._arrays: dict[str, dict[str, Any]] = contents["arrays"]
        self.meta: dict[str, Any] = contents["meta"]
        self.content: str = contents["content"]

    def array(self, name: str) -> npt.NDArray[Any]:
        """A view of an array; an array that was never appended to is empty."""
        if name not in self._arrays:
            return np.empty(0, np.int64)
        entry = self._arrays[name]
        dtype = np.dtype(entry["dtype"])
        return np.frombuffer(self.map, dtype, entry["bytes"] // dtype.itemsize, entry["offset"])

    def offset(self, name: str) -> int:
        """Where an array begins in the file."""
        return int(self._arrays[name]["offset"]) if name in self._arrays else 0


class StringTableWriter:
    """Packs byte strings without NUL into the arrays `<name>.blob` and `<name>.starts` of an `ArrayFileWriter`."""

    def __init__(self, file: ArrayFileWriter, name: str) -> None:
        self._file, self._name = file, name
        self._count = self._size = 0
        self._starts: list[npt.NDArray[np.int64]] = []

    def extend(self, strings: Sequence[bytes]) -> None:
        """Add strings at the end."""
        if not strings:
            return
        lengths = np.fromiter(map(len, strings), np.int64, len(strings)) + 1
        ends = self._size + np.cumsum(lengths)
        self._starts.append((ends - lengths)[-self._count % BLOCK :: BLOCK])
        self._file.append(f"{self._name}.blob", b"\0".join(strings) + b"\0")
        self._count += len(strings)
        self._size = int(ends[-1])

    def finish(self) -> None:
        """Write the offsets, after the last string."""
        starts = np.concatenate([*self._starts, np.array([self._size], np.int64)])
        self._file.append(f"{self._name}.starts", starts)


class StringTable:
    """Number -> byte string, over the arrays of `StringTableWriter`."""

    def __init__(self, file: ArrayFile, name: str) -> None:
        self._map = file.map
        self._starts = file.array(f"{name}.starts") + 0  # a copy in memory: 8 bytes per 32 strings
        self._starts += file.offset(f"{name}.blob")

    def __getitem__(self, index: int) -> bytes:
        block, position = divmod(index, BLOCK)
        return self._map[self._starts[block] : self._starts[block + 1]].split(b"\0")[position]


# ------------------------------------------------------------------------------------------------- scanning


@dataclass(frozen=True)
class Folder:
    """One scanned folder, with or without images in it.

    Attributes:
        path: Its absolute path.
        names: File names in it, sorted.
        group: Name of the first-level folder it is or lies in; empty for a root itself.
        mtime_ns: Its modification time before it was read.
    """

    path: bytes
    names: list[bytes]
    group: bytes = b""
    mtime_ns: int = 0


def scan(root: Path, extensions: Sequence[str]) -> Iterator[Folder]:
    """Walk a root: files of a folder first, then its sub-folders, each sorted by bytes.

    Links are followed; a link back to a folder that contains it is cut there (told by device and inode), while two
    links to one folder give its files twice, as two names. Hidden entries are skipped. A link that points nowhere is
    listed, so that reading it fails with its name.

    Raises:
        OSError: The root itself cannot be read. A sub-folder that cannot is skipped with a warning.
    """
    wanted = frozenset(f".{e}".lower().encode() for e in extensions)
    path = os.fsencode(root)
    stack: list[tuple[bytes, bytes, frozenset[tuple[int, int]]]] = [(path, b"", frozenset())]
    while stack:
        folder, group, above = stack.pop()
        try:
            status = Path(os.fsdecode(folder)).stat()
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                log.warning("%s links back to a folder it lies in; not followed", printable(folder))
                continue
            names, subfolders = _list_folder(folder, wanted)
        except OSError as error:
            if folder == path:
                raise
            log.warning("skipped folder %s: %s", printable(folder), error.strerror)
            continue
        yield Folder(folder, names, group, status.st_mtime_ns)
        inside = above | {identity}
        # the last one pushed is visited first
        stack += [(os.path.join(folder, s), group or s, inside) for s in reversed(subfolders)]  # noqa: PTH118 (bytes)


def _list_folder(folder: bytes, wanted: frozenset[bytes]) -> tuple[list[bytes], list[bytes]]:
    names, subfolders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(b"."):
                continue
            if entry.is_dir():
                subfolders.append(name)
            elif name[name.rfind(b".") :].lower() in wanted and (entry.is_file() or entry.is_symlink()):
                names.append(name)
    return sorted(names), sorted(subfolders)


def printable(path: bytes) -> str:
    """A path for messages: file names need not be valid UTF-8."""
    return path.decode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------------- index of files


class FileIndexWriter:
    """Writes the index of folders that arrive one by one; memory grows with folders, not with files."""

    def __init__(self, path: Path) -> None:
        self._file = ArrayFileWriter(path)
        self._names = StringTableWriter(self._file, "names")
        self._paths: list[bytes] = []
        self._first: list[int] = []
        self._mtime: list[int] = []
        self._group: list[int] = []
        self._groups: dict[bytes, int] = {b"": -1}
        self.num_files = 0

    def __enter__(self) -> "FileIndexWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.__exit__(kind, error, tb)

    def add(self, folder: Folder) -> None:
        """Add a folder with its files."""
        self._paths.append(folder.path)
        self._first.append(self.num_files)
        self._mtime.append(folder.mtime_ns)
        self._group.append(self._groups.setdefault(folder.group, len(self._groups) - 1))
        self._names.extend(folder.names)
        self.num_files += len(folder.names)

    def commit(self, **meta: Any) -> None:
        """Finish the index; `meta` is kept with it."""
        self._names.finish()
        folders = StringTableWriter(self._file, "folders")
        folders.extend(self._paths)
        folders.finish()
        self._file.append("first", np.array(self._first, np.int64))
        # other files than images change a folder too
        self._file.append("mtime", np.array(self._mtime, np.int64), counts=False)
        self._file.append("group", np.array(self._group, np.int32))
        groups = [os.fsdecode(g) for g in list(self._groups)[1:]]
        self._file.commit({**meta, "num_files": self.num_files, "groups": groups, "created": time.time()})


class FileIndex:
    """Number -> path, over a file of `FileIndexWriter`. Pickles as its path: a worker maps the same file.

    Attributes:
        num_files: How many files.
        groups: Names of the first-level folders, in the order of the scan.
        identity: Two indexes of the same identity list the same files in the same order.
    """

    def __init__(self, path: Path, identity: str | None = None) -> None:
        self._file = ArrayFile(path)
        self.path, self.meta, self.identity = path, self._file.meta, self._file.content
        if identity not in {None, self.identity}:
            raise RuntimeError(f"the index {path} was rebuilt while a run was using it; start the run again")
        self.num_files: int = self.meta["num_files"]
        self.groups: list[str] = self.meta["groups"]
        self._names, self._folders = StringTable(self._file, "names"), StringTable(self._file, "folders")
        self._first, self._group = self._file.array("first"), self._file.array("group")

    def __reduce__(self) -> tuple[type["FileIndex"], tuple[Path, str]]:
        return FileIndex, (self.path, self.identity)

    def __len__(self) -> int:
        return self.num_files

    def _folder(self, index: int) -> int:
        if not 0 <= index < self.num_files:
            raise IndexError(f"file {index} of an index of {self.num_files}")
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def path_of(self, index: int) -> bytes:
        """Path of a file, as bytes: file names need not be valid UTF-8."""
        return self._folders[self._folder(index)] + b"/" + self._names[index]

    def group_of(self, index: int) -> int:
        """Number in `groups` of the first-level folder that a file lies in, -1 for a file right in a root."""
        return int(self._group[self._folder(index)])

    def groups_of_all(self) -> npt.NDArray[np.int32]:
        """`group_of` for every file."""
        return np.repeat(self._group, np.diff(self._first, append=self.num_files))

    def first_ungrouped(self) -> int | None:
        """Number of the first file that lies right in a root, None if there is none."""
        counts = np.diff(self._first, append=self.num_files)
        rows = np.flatnonzero((counts > 0) & (self._group == -1))
        return int(self._first[rows[0]]) if len(rows) else None

    def changed_folder(self) -> str | None:
        """A folder that has changed since the scan, None if none of those looked at has.

        Up to `MAX_STALENESS_CHECKS` folders are looked at; with more folders than that, the check is a sample.
        A file that changed in place, or that vanished from a folder not looked at, shows when it is read.
        """
        mtime_ns = self._file.array("mtime")
        count = len(mtime_ns)
        for row in np.unique(np.linspace(0, count - 1, min(count, MAX_STALENESS_CHECKS)).astype(int)).tolist():
            folder = self._folders[row]
            try:
                status = Path(os.fsdecode(folder)).stat()
            except OSError:
                return printable(folder)
            if status.st_mtime_ns != mtime_ns[row] or not stat.S_ISDIR(status.st_mode):
                return printable(folder)
        return None


# ------------------------------------------------------------------------------------------------- open or build


def index_path(roots: Sequence[Path], extensions: Sequence[str]) -> Path:
    """Where the index of these roots (absolute paths, order counts) and extensions lies."""
    key = json.dumps([[os.fsencode(r).hex() for r in roots], sorted({e.lower() for e in extensions})])
    digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    return cache_dir() / "file_index" / f"{roots[0].name or 'root'}-{digest}.idx"


def open_or_build(
    roots: Sequence[Path],
    extensions: Sequence[str],
    *,
    reindex: bool | Literal["auto"] = "auto",
    progress: Progress | None = None,
) -> FileIndex:
    """Index of all files below `roots`, from the cache where possible.

    Of several processes on a machine, one scans and the others wait for it.

    Args:
        roots: Absolute paths of folders.
        extensions: Without dot, case does not count.
        reindex: True scans again; "auto" does so where a folder has changed and the last scan took less than a minute;
            False never does. An index that is older than its folders and is used nevertheless is warned about.
        progress: Told about the scan.

    Raises:
        OSError: A root cannot be read or the cache cannot be written.
    """
    path = index_path(roots, extensions)
    asked = time.time()
    index = None if reindex is True else _usable(path, reindex)
    if index is not None:
        return index
    with locked(path):
        # another process may have built it meanwhile
        with suppress(OSError, ValueError):
            index = FileIndex(path)
            if index.meta["created"] >= asked:
                return index
        started = time.perf_counter()
        with FileIndexWriter(path) as writer:
            for root in roots:
                for folder in scan(root, extensions):
                    writer.add(folder)
                    if progress is not None:
                        progress(writer.num_files, printable(folder.path))
            writer.commit(seconds=time.perf_counter() - started)
        index = FileIndex(path)
        log.info("indexed %d files in %.1f s: %s", index.num_files, index.meta["seconds"], path)
        return index


def _usable(path: Path, reindex: bool | Literal["auto"]) -> FileIndex | None:
    try:
        index = FileIndex(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        log.warning("cannot use the index %s (%s); scanning again", path, error)
        return None
    changed = index.changed_folder()
    if changed is None:
        return index
    if reindex == "auto" and index.meta["seconds"] < AUTO_REINDEX_SECONDS:
        log.warning("%s has changed since it was indexed; scanning again", changed)
        return None
    log.warning(
        "%s has changed since it was indexed on %s: new files are not seen and vanished ones count as broken; "
        "set `reindex: true` for one run to scan again (the last scan took %.0f s)",
        changed,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(index.meta["created"])),
        index.meta["seconds"],
    )
    return index


@contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[None]:
    """Of several processes on a machine, only one at a time is inside for this path.

    Args:
        path: What is locked; a file `.lock` appears beside it.
        waiting: What to tell where another process is inside.

    Raises:
        OSError: Nothing can be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("wb") as file:
        with suppress(OSError):  # file systems without locks: every process scans, the last rename wins, all are equal
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    log.warning("%s", waiting)
                fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:  # said, because a child forked meanwhile holds the file open too
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
