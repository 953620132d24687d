"""Where every file of a tar shard lies, so that a sample can be read without those before it.

tar -> one scan -> small index beside the shard (or in the cache) -> `IndexedTar`: sample number -> files -> bytes.

The index holds every file of the shard, whatever a recipe wants of it: about 70 bytes per sample of three files. It is
valid for a shard of one size and modification time. A sample is what the webdataset library takes for one:
consecutive files that share the path up to the first dot of the file name; the rest, in lower case, is the suffix.
Scanning costs 20 microseconds per file with tarfile, which reads every kind of long name; for most shards the disk
is slower. Opening an indexed shard costs 60.

Source: webdataset 1.0, `tariterators.py` (`group_by_keys`, `tar_file_iterator`: which files are skipped).
"""

import errno
import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openeva.data.file_index import ArrayFile, ArrayFileWriter, StringTable, StringTableWriter, cache_dir

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_VERSION = 1

INDEX_SUFFIX = ".openeva.idx"
"""What the index beside a shard is called after it."""


def _index_paths(shard: Path) -> Iterator[Path]:
    """Where the index of a shard may lie: beside it, else (read-only folder) in the cache."""
    yield shard.with_name(shard.name + INDEX_SUFFIX)
    digest = hashlib.blake2b(os.fsencode(shard), digest_size=8).hexdigest()
    yield cache_dir() / "shards" / f"{shard.name}-{digest}.idx"


def find_index(shard: Path) -> ArrayFile | None:
    """The index of a shard, None if there is none or the shard is not the one that was scanned."""
    status = shard.stat()
    for path in _index_paths(shard):
        try:
            index = ArrayFile(path)
        except (OSError, ValueError):
            continue
        if index.meta["shard"] == [_VERSION, status.st_size, status.st_mtime_ns]:
            return index
    return None


def index_shard(shard: Path) -> ArrayFile:
    """Scan a shard and write its index.

    Raises:
        ValueError: It is not a plain tar file, or a file name comes twice.
        OSError: It cannot be read, or the index can be written nowhere.
    """
    status = shard.stat()
    scanned = _scan_shard(shard, status.st_size)
    beside, in_cache = _index_paths(shard)
    try:
        return _write_index(beside, scanned, [_VERSION, status.st_size, status.st_mtime_ns])
    except OSError:
        return _write_index(in_cache, scanned, [_VERSION, status.st_size, status.st_mtime_ns])


@dataclass
class _Scanned:
    """Samples of a shard, and its files sample by sample."""

    keys: list[bytes]
    first: list[int]
    offset: list[int]
    size: list[int]
    suffix: list[str]
    cut: str | None = None


def _scan_shard(shard: Path, end: int) -> _Scanned:
    from webdataset.tariterators import base_plus_ext

    _refuse_compressed(shard)
    scanned = _Scanned([], [], [], [], [])
    seen: set[str] = set()
    last_key = None
    try:
        tar = tarfile.open(shard, "r:", errors="surrogateescape")  # noqa: SIM115 (closed by the `with` below)
    except tarfile.ReadError as error:
        raise ValueError(f"{shard} is not a tar file ({error}); download it again or remove it") from None
    with tar:
        while (member := _next_member(tar)) is not None:
            key, suffix = base_plus_ext(member.name)
            if key is None or not member.isreg() or re.match(r"__[^/]*__($|/)", member.name):
                continue  # what the library skips
            if member.offset_data + member.size > end:
                if key == last_key:
                    _drop_last(scanned)
                break
            if key != last_key:
                scanned.keys.append(os.fsencode(key))
                scanned.first.append(len(scanned.offset))
                last_key = key
                seen.clear()
            if suffix.lower() in seen:
                raise ValueError(f"{shard} holds {member.name} twice in a row; files of a sample need "
                                 "different extensions")  # fmt: skip
            seen.add(suffix.lower())
            scanned.offset.append(member.offset_data)
            scanned.size.append(member.size)
            scanned.suffix.append(suffix.lower())
        scanned.cut = _why_cut(shard, tar.offset, end)
    scanned.first.append(len(scanned.offset))
    return scanned


def _refuse_compressed(shard: Path) -> None:
    with shard.open("rb") as file:
        head = file.read(8)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(f"{shard} is compressed ({kind}), which gives no random access; decompress it, "
                             "or set `stream: true` and samples_per_epoch")  # fmt: skip


def _next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next file; None at the end and where the archive is cut or damaged (`_why_cut` tells)."""
    try:
        member = tar.next()
    except tarfile.TarError:
        return None
    tar.members.clear()  # type: ignore[attr-defined]  # they would pile up
    return member


def _drop_last(scanned: _Scanned) -> None:
    first = scanned.first.pop()
    scanned.keys.pop()
    for files in (scanned.offset, scanned.size, scanned.suffix):
        del files[first:]


def _why_cut(shard: Path, offset: int, end: int) -> str | None:
    """What stands in the place of the archive's end mark, where tarfile stopped at `offset`."""
    if offset > end:
        return f"is cut at byte {end}, in the middle of a file"
    with shard.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if not block:
        return f"has no end mark: it may be cut at byte {end}"
    if block == bytes(tarfile.BLOCKSIZE):
        return None
    return f"is damaged or cut at byte {offset}"


def _write_index(path: Path, scanned: _Scanned, shard: list[int]) -> ArrayFile:
    suffixes, suffix, counts = np.unique(np.array(scanned.suffix, object), return_inverse=True, return_counts=True)
    with ArrayFileWriter(path) as file:
        keys = StringTableWriter(file, "keys")
        keys.extend(scanned.keys)
        keys.finish()
        file.append("first", np.array(scanned.first, np.int32))
        file.append("offset", np.array(scanned.offset, np.int64))
        file.append("size", np.array(scanned.size, np.int64))
        file.append("suffix", suffix.astype(np.int32))
        counted = dict(zip(suffixes.tolist(), counts.tolist(), strict=True))
        file.commit({"shard": shard, "samples": len(scanned.keys), "suffixes": counted, "cut": scanned.cut})
    return ArrayFile(path)


class IndexedTar:
    """An open shard; `pread` needs no position, so that threads and forked workers may share it.

    Raises:
        OSError: The shard is not (or no longer) of this size and modification time, or has no index.
    """

    def __init__(self, path: str, size: int, mtime_ns: int) -> None:
        self._fd = -1
        index = find_index(Path(path))
        if index is None or index.meta["shard"][1:] != [size, mtime_ns]:
            raise OSError(
                errno.ESTALE, "the shard or its index changed after the run had started; start it again", path
            )
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._keys = StringTable(index, "keys")
        self._suffixes = list(index.meta["suffixes"])
        self._first, self._suffix = index.array("first"), index.array("suffix")
        self._offset, self._size = index.array("offset"), index.array("size")
        self._path = path

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def key(self, number: int) -> str:
        """Key of a sample."""
        return self._keys[number].decode("utf-8", "backslashreplace")

    def files(self, number: int) -> dict[str, int]:
        """Files of a sample: suffix -> number of the file."""
        return {self._suffixes[self._suffix[m]]: m for m in range(self._first[number], self._first[number + 1])}

    def content(self, member: int) -> bytes:
        """The bytes of a file."""
        data = os.pread(self._fd, self._size[member], self._offset[member])
        if len(data) != self._size[member]:
            raise OSError(errno.EIO, "the shard has become shorter than its index says", self._path)
        return data
