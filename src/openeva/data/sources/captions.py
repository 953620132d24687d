"""Images with captions, from a table, JSON lines, COCO's or Karpathy's JSON, or text files beside the images.

file -> rows (`data/caption_rows.py`) -> pairs, in an index in the cache (`data/caption_index.py`) -> `read(i)`: the
bytes of image i and its captions
folder -> images (`data/file_index.py`) -> `read(i)`: the bytes of image i and what stands in the `.txt` beside it

Several rows of one image are several captions of it. A file is read once: a run that finds its index, and the file
unchanged, starts at once.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, model_validator

from openeva.config import ConfigError
from openeva.data.caption_index import CaptionedImages, CaptionIndex, CaptionRows
from openeva.data.caption_rows import RowReader, Wanted
from openeva.data.file_index import (
    IMAGE_EXTENSIONS,
    FileIndex,
    Progress,
    cache_dir,
    locked,
    open_or_build,
    printable,
)
from openeva.data.sources.base import Sample, SourceConfig

log = logging.getLogger(__name__)

_VERSION = 1
_LOOKED_AT = 100
"""So many images of a folder are looked at for a text beside them."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) else value


class Config(SourceConfig):
    """Images and their captions.

    Attributes:
        file: CSV, TSV, JSON lines, a JSON list of objects, COCO's `captions_*.json`, or Karpathy's `dataset_coco.json`
            or `dataset_flickr30k.json`. None = the images below `root`, each with a `.txt` beside it.
        root: Folder that relative paths start from; default: the file's own.
        path_column: Name, or number from 0, of the column or field of paths; default: one called image, path,
            file_name, filepath, ..., or the one whose first cell ends like an image.
        caption_column: The same for captions, one or a list; default: caption, captions, text, title, ...
        split: Take only rows with this value, or one of these, in `split_column`; as in Karpathy's train, restval, val
            and test.
        split_column: Name or number of that column.
        group: Rows of the same image are captions of one sample; False = every row is a sample of its own, and a
            `holdout` may hold out one of them and train on the others.
        lines: Each line of a `.txt` is a caption of its own.
        header: Whether the first row of a table names the columns; "auto" = it does where no cell of it is an image's
            name.
        delimiter: Of a table; default: what the first row has.
        check_files: Look whether every file exists when the table is read for the first time: missing ones are an
            error, or, with "skip", left out. Without, they count as broken when they are read.
    """

    name: Literal["captions"] = "captions"
    file: Path | None = None
    root: Path | None = None
    path_column: str | int | None = None
    caption_column: Annotated[list[str | int] | None, BeforeValidator(_as_list)] = None
    split: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    split_column: str | int = "split"
    group: bool = True
    lines: bool = False
    header: bool | Literal["auto"] = "auto"
    delimiter: Literal[",", "\t", ";", "|"] | None = None
    check_files: bool | Literal["skip"] = True

    @model_validator(mode="after")
    def _something_is_given(self) -> "Config":
        if self.file is None and self.root is None:
            raise ValueError("give `file` (a table or JSON of images and captions) or `root` (a folder of images with a"
                             " .txt beside each)")  # fmt: skip
        return self

    def build(self, progress: Progress | None = None) -> "CaptionedFiles | CaptionedFolder":
        """Open the source, from its index if there is one.

        Args:
            progress: Told how many rows were read, or files looked for.

        Raises:
            ConfigError: With everything that is wrong with the file.
        """
        root = None if self.root is None else self.root.expanduser().absolute()
        if root is not None and not root.is_dir():
            raise ConfigError([f"captions: root {root} is no folder; it must be the one that paths start from"])
        if self.file is None:
            assert root is not None
            return _open_folder(root, self.lines, progress)
        file = self.file.expanduser().absolute()
        if not file.is_file():
            what = "is a folder: give it as `root`, without `file`" if file.is_dir() else "does not exist"
            raise ConfigError([f"captions: {file} {what}; `file` is a table or a JSON of images and captions"])
        base = root or file.parent
        return CaptionedFiles(self._index(file, base, progress or (lambda *_: None)), base)

    def _index(self, file: Path, root: Path, progress: Progress) -> CaptionIndex:
        keys = ("path_column", "caption_column", "split", "split_column", "group", "header", "delimiter", "check_files")
        key = json.dumps([os.fsencode(file).hex(), os.fsencode(root).hex(), self.model_dump(include=set(keys))])
        digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        path = cache_dir() / "captions" / f"{file.name}-{digest}.idx"
        status = file.stat()
        state = [_VERSION, status.st_size, status.st_mtime_ns]
        try:
            with locked(path):  # of several processes one reads the file, and the others find its index
                if (index := _valid(path, state)) is None:
                    self._write_index(path, state, _Reading(self, file, root, progress))
                    index = CaptionIndex(path)
        except OSError as error:
            text = f"captions: {error.strerror or error}: {error.filename}; {file} must be readable, and the cache of"
            raise ConfigError([f"{text} its index writable (OPENEVA_CACHE chooses another)"]) from None
        meta = index.meta
        if meta["without"]:
            log.warning("%s: %d images without a caption are left out, the first is %s", file, *meta["without"])
        if meta["missing"]:
            log.warning(
                "%s: %d missing images are left out, the first is %s (touch the file to look again)",
                file,
                *meta["missing"],
            )
        return index

    @staticmethod
    def _write_index(path: Path, state: list[int], reading: "_Reading") -> None:
        images = reading.images()
        has_captions = images.counts > 0
        exists = reading.existing(images)
        reading.check(images, has_captions & exists)
        without, missing = (_first_of(images, ~found) for found in (has_captions, exists))
        images.write(path, has_captions & exists, {"state": state, "without": without, "missing": missing})


def _valid(path: Path, state: list[int]) -> CaptionIndex | None:
    """The index, if it is of the file as it is now."""
    try:
        index = CaptionIndex(path)
    except (OSError, ValueError, KeyError):
        return None
    return index if index.meta.get("state") == state else None


def _first_of(images: CaptionedImages, left_out: npt.NDArray[np.bool_]) -> tuple[int, str] | None:
    """How many images are left out, and the first; None without any."""
    numbers = np.flatnonzero(left_out)
    return (len(numbers), printable(images.path_of(int(numbers[0])))) if len(numbers) else None


class _Reading:
    """A file on its way into an index, and what is wrong with it."""

    def __init__(self, config: Config, file: Path, root: Path, progress: Progress) -> None:
        self.config, self.file, self.root, self.progress = config, file, root, progress
        wanted = Wanted(
            config.path_column, config.caption_column, config.split, config.split_column, config.header,
            config.delimiter,
        )  # fmt: skip
        self.reader = RowReader(file, wanted)
        self.problems = self.reader.problems

    def images(self) -> CaptionedImages:
        """All images of the file."""
        rows = CaptionRows()
        for line, path, captions in self.reader.rows():
            if path.startswith(("http://", "https://")):
                text = "download the images first (img2dataset makes webdataset shards of such a table)"
                self.problems.note("url", f"{path[:60]} is an address and no file; {text}", line)
            elif not _is_path(path):
                self.problems.note("path", f"{path[:60]!r} is no path", line)
            else:
                rows.add(path, captions, line)
            if len(rows) % 100_000 == 0:
                self.progress(len(rows), str(self.file))
        return rows.images(group=self.config.group)

    def existing(self, images: CaptionedImages) -> npt.NDArray[np.bool_]:
        """Which images exist; all, where nobody wants to know."""
        found = np.ones(len(images), bool)
        if not self.config.check_files or self.problems:
            return found
        base = os.fsencode(self.root)
        for image in range(len(images)):
            path = os.path.join(base, images.path_of(image))  # noqa: PTH118 (bytes)
            found[image] = os.path.isfile(path)  # noqa: PTH113 (bytes)
            if not found[image] and self.config.check_files != "skip":
                self.problems.note("missing", f"{printable(path)} does not exist", images.line_of(image))
            if image % 10_000 == 9999:
                self.progress(image + 1, f"looking for the images of {self.file}")
        if missing := self.problems.count("missing"):
            text = f"{missing} of {len(images)} images are missing; relative paths start from {self.root} (key `root`)"
            self.problems.sum_up("missing", f"{text}; `check_files: skip` leaves them out")
        return found

    def check(self, images: CaptionedImages, usable: npt.NDArray[np.bool_]) -> None:
        """Stop here if anything is wrong.

        Raises:
            ConfigError: With all problems.
        """
        if not self.problems and not usable.any():
            splits = ", ".join(sorted(self.reader.other_splits))
            if splits:
                text = f"no rows of split {', '.join(self.config.split or [])}, only of {splits}"
            elif len(images) and not images.counts.any():
                text = f"none of its {len(images)} images has a caption; caption_column names where captions stand"
            elif len(images):
                text = f"none of its images exists; relative paths start from {self.root} (key `root`)"
            else:
                text = "no rows; it must have one row per image and caption"
            self.problems.note("empty", text)
        if self.problems:
            raise ConfigError([f"captions: {problem}" for problem in self.problems])


def _is_path(path: str) -> bool:
    """Whether the system can have a file of this name."""
    try:
        return bool(path) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


class CaptionedFiles:
    """The images that a file lists, as a `Source`.

    Attributes:
        identity: Two sources of the same identity have the same pairs in the same order.
    """

    num_classes = 0
    has_captions = True

    def __init__(self, index: CaptionIndex, root: Path) -> None:
        self._index, self._root = index, os.fsencode(root)
        self.identity = index.identity

    def __len__(self) -> int:
        return len(self._index)

    def path_of(self, index: int) -> bytes:
        """Path of an image, as bytes: file names need not be valid UTF-8."""
        return os.path.join(self._root, self._index.path_of(index))  # noqa: PTH118 (bytes)

    def read(self, index: int) -> Sample:
        """The bytes of an image and its captions, with its path as name.

        Raises:
            OSError: It cannot be read.
        """
        path = self.path_of(index)
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (names need not be valid UTF-8)
            image = file.read()
        return Sample(image, printable(path), extra={"captions": self._index.captions_of(index)})

    def name_of(self, index: int) -> str:
        """Path of an image."""
        return printable(self.path_of(index))


# ------------------------------------------------------------------------------------------ texts beside images


def _open_folder(root: Path, lines: bool, progress: Progress | None) -> "CaptionedFolder":
    try:
        index = open_or_build([root], IMAGE_EXTENSIONS, progress=progress)
    except OSError as error:
        text = f"captions: {error.strerror or error}: {error.filename}; the images must be readable, and the cache of"
        raise ConfigError([f"{text} their index writable (OPENEVA_CACHE chooses another)"]) from None
    if not len(index):
        raise ConfigError([f"captions: no images below {root}; give a folder of images with a .txt beside each"])
    some = np.linspace(0, len(index) - 1, min(len(index), _LOOKED_AT)).astype(int).tolist()
    if not any(os.path.isfile(_text_beside(index.path_of(number))) for number in some):  # noqa: PTH113 (bytes)
        first = printable(_text_beside(index.path_of(0)))
        raise ConfigError([f"captions: no .txt beside any of {len(some)} images below {root}: {first} does not exist;"
                           " write one beside each image, or give the captions as a table in `file`"])  # fmt: skip
    return CaptionedFolder(index, lines)


def _text_beside(path: bytes) -> bytes:
    return os.path.splitext(path)[0] + b".txt"  # noqa: PTH122 (bytes)


class CaptionedFolder:
    """The images below a folder, each with the text beside it, as a `Source`.

    Attributes:
        identity: Two sources of the same identity have the same images in the same order.
    """

    num_classes = 0
    has_captions = True

    def __init__(self, index: FileIndex, lines: bool) -> None:
        self._index, self._lines = index, lines
        self.identity = index.identity

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> Sample:
        """The bytes of an image and its captions, none where there is no text; its name is its path.

        Raises:
            OSError: The image has vanished or cannot be read.
        """
        path = self._index.path_of(index)
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (names need not be valid UTF-8)
            image = file.read()
        try:
            with open(_text_beside(path), encoding="utf-8-sig", errors="replace") as file:  # noqa: PTH123
                text = file.read().strip()
        except FileNotFoundError:
            text = ""
        captions = [line.strip() for line in text.splitlines() if line.strip()] if self._lines else [text]
        return Sample(image, printable(path), extra={"captions": captions if text else []})

    def name_of(self, index: int) -> str:
        """Path of an image."""
        return printable(self._index.path_of(index))
