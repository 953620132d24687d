"""Images and their captions as one memory-mapped file: 10 million pairs are no Python objects, in no process.

rows (path, captions) -> `CaptionRows` (byte blobs and arrays) -> grouped by image -> `write` -> `CaptionIndex` (mmap:
number -> path, captions).

While a table is read, its texts stand one after another in two blobs, with 40 bytes of offsets per row; a run and its
workers only map the finished file (`data/file_index.py`), which lies in the cache and is made once.
"""

import array
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openeva.data.file_index import ArrayFile, ArrayFileWriter, StringTable, StringTableWriter
from openeva.data.sampler import Indices

_CHUNK = 10_000


class CaptionRows:
    """Rows on their way into an index."""

    def __init__(self) -> None:
        self._paths, self._captions = bytearray(), bytearray()
        self._path_ends, self._caption_ends = array.array("q", [0]), array.array("q", [0])
        self._row_of_caption, self._lines = array.array("q"), array.array("q")
        self._digests = bytearray()

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, path: str, captions: Sequence[str], line: int | None) -> None:
        """Add a row of a file."""
        raw = os.fsencode(path)
        self._paths += raw
        self._path_ends.append(len(self._paths))
        self._digests += hashlib.blake2b(raw, digest_size=16).digest()
        for caption in captions:
            # halves of characters, and bytes that are no characters, must not reach a tokenizer
            text = caption.encode("utf-8", "surrogatepass").replace(b"\0", b" ")
            self._captions += text
            self._caption_ends.append(len(self._captions))
            self._row_of_caption.append(len(self._lines))
        self._lines.append(-1 if line is None else line)

    def images(self, *, group: bool) -> "CaptionedImages":
        """The images of all rows, in the order of their first row.

        Args:
            group: Rows of the same path are captions of one image; else every row is an image.
        """
        rows = np.arange(len(self))
        first, image_of_row = rows, rows
        if group and len(rows):
            first, image_of_row = _same(np.frombuffer(bytes(self._digests), "<u8").reshape(-1, 2))
        image_of_caption = image_of_row[np.asarray(self._row_of_caption, np.int64)]
        return CaptionedImages(
            _Strings(self._paths, self._path_ends), _Strings(self._captions, self._caption_ends),
            first, np.asarray(self._lines), np.argsort(image_of_caption, kind="stable"),
            np.bincount(image_of_caption, minlength=len(first)),
        )  # fmt: skip


def _same(keys: npt.NDArray[np.uint64]) -> tuple[Indices, Indices]:
    """First row of every different key, in their order, and the number of the key of every row."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in the order of their rows
    ordered = keys[order]
    new = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(1)])
    first = order[new]
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    numbers = np.empty(len(keys), np.int64)
    numbers[order] = rank[np.cumsum(new) - 1]
    return np.sort(first), numbers


class _Strings:
    """Number -> bytes, over a blob and the ends of its pieces."""

    def __init__(self, blob: bytearray, ends: "array.array[int]") -> None:
        self._blob, self._ends = blob, ends

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._blob[self._ends[index] : self._ends[index + 1]])


class CaptionedImages:
    """The images of some rows.

    Attributes:
        counts: Number of captions of each.
    """

    def __init__(
        self, paths: _Strings, captions: _Strings, first: Indices, lines: Indices, order: Indices, counts: Indices
    ) -> None:
        self._paths, self._captions, self._first, self._lines, self._order = paths, captions, first, lines, order
        self.counts = counts

    def __len__(self) -> int:
        return len(self._first)

    def path_of(self, image: int) -> bytes:
        """Path of an image as it stands in the file."""
        return self._paths[int(self._first[image])]

    def line_of(self, image: int) -> int | None:
        """Line of its first row, where it has one."""
        line = int(self._lines[self._first[image]])
        return None if line < 0 else line

    def write(self, file: Path, keep: npt.NDArray[np.bool_], meta: dict[str, Any]) -> None:
        """Write the index of the images to keep.

        Raises:
            OSError: It cannot be written.
        """
        kept = np.flatnonzero(keep)
        of_kept = self._order[np.repeat(keep, self.counts)]
        with ArrayFileWriter(file) as writer:
            _write_strings(writer, "paths", (self.path_of(image) for image in kept.tolist()))
            _write_strings(writer, "captions", (self._captions[number] for number in of_kept.tolist()))
            writer.append("first", np.concatenate([[0], np.cumsum(self.counts[kept])]).astype(np.int64))
            writer.commit({**meta, "images": len(kept), "captions": len(of_kept)})


def _write_strings(writer: ArrayFileWriter, name: str, strings: Iterable[bytes]) -> None:
    table = StringTableWriter(writer, name)
    for chunk in _chunks(strings):
        table.extend(chunk)
    table.finish()


def _chunks(strings: Iterable[bytes]) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    for string in strings:
        chunk.append(string)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    yield chunk


class CaptionIndex:
    """Number -> path and captions. Pickles as its path: a worker maps the same file.

    Attributes:
        meta: What was written with it, and the number of `images` and `captions`.
        identity: Two indexes of the same identity have the same pairs in the same order.
    """

    def __init__(self, path: Path, identity: str | None = None) -> None:
        self._file = ArrayFile(path)
        self.path, self.meta, self.identity = path, self._file.meta, self._file.content
        if identity not in {None, self.identity}:
            raise RuntimeError(f"the index {path} was rebuilt while a run was using it; start the run again")
        self._paths, self._captions = StringTable(self._file, "paths"), StringTable(self._file, "captions")
        self._first = self._file.array("first")

    def __reduce__(self) -> tuple[type["CaptionIndex"], tuple[Path, str]]:
        return CaptionIndex, (self.path, self.identity)

    def __len__(self) -> int:
        return int(self.meta["images"])

    def path_of(self, index: int) -> bytes:
        """Path of an image as it stands in the file that listed it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of an index of {len(self)}")
        return self._paths[index]

    def captions_of(self, index: int) -> list[str]:
        """Its captions."""
        numbers = range(int(self._first[index]), int(self._first[index + 1]))
        return [self._captions[number].decode("utf-8", "replace") for number in numbers]
