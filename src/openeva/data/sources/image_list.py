"""A table of paths and labels: CSV, TSV or semicolons, with or without a header.

file -> rows, checked all at once -> paths (one blob of bytes) and labels (int32) in arrays -> `read(i)`: the bytes of
file i

A million rows take some 70 megabytes, once for a process and its workers: they share arrays, where they would copy
Python objects. What a run held out (`held_out.csv`) is such a table too.
"""

import array
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from openeva.config import ConfigError
from openeva.data.file_index import Progress, printable
from openeva.data.sources.base import Sample, SourceConfig
from openeva.data.table import SHOWN, Columns, Problems, delimited_rows, first_line, is_image
from openeva.registry import did_you_mean

LABEL_NAMES = ("label", "class", "class_name", "target", "category")

_MOST_NUMBERED_CLASSES = 100_000


class Config(SourceConfig):
    """Images that a table lists.

    Attributes:
        file: The table: UTF-8, one image per row; columns end at a comma, a tab or a semicolon.
        root: Folder that relative paths start from; default: the file's own.
        header: Whether the first row names the columns; "auto" = it does where no cell of it is an image's name.
        delimiter: Default: what the first row has.
        path_column: Name, or number from 0, of the column of paths; default: one called path, file, image, ... or the
            one whose cells end like images.
        label_column: The same for labels; default: one called label, class, ... or the only other column.
        labels: False = no labels, whatever columns there are.
        classes: Names of the classes in the order of their numbers. Default: whole numbers are class numbers, words are
            classes in sorted order.
        split: Take only rows with this value in `split_column`.
        split_column: Name or number of that column.
        check_files: Look whether every file exists. Without, missing ones count as broken when they are read.
    """

    name: Literal["image_list"] = "image_list"
    file: Path
    root: Path | None = None
    header: bool | Literal["auto"] = "auto"
    delimiter: Literal[",", "\t", ";"] | None = None
    path_column: str | int | None = None
    label_column: str | int | None = None
    labels: bool = True
    classes: list[str] | None = Field(None, min_length=1)
    split: str | None = None
    split_column: str | int = "split"
    check_files: bool = True

    def build(self, progress: Progress | None = None) -> "ImageList":
        """Read and check the table.

        Args:
            progress: Told how many rows were read and how many files were looked for.

        Raises:
            ConfigError: With everything that is wrong with the table.
        """
        file = self.file.expanduser().absolute()
        root = (self.root or file.parent).expanduser().absolute()
        if not file.is_file():
            what = "is a folder (image_folder reads class folders)" if file.is_dir() else "does not exist"
            raise ConfigError(
                [f"image_list: {file} {what}; give a table of paths and labels, as in `file: labels.csv`"]
            )
        if self.classes and len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ConfigError([f"image_list: `classes` has {twice!r} twice; a class has one number"])
        table = _Table(self, file, progress or (lambda *_: None))
        table.read()
        class_names = table.number_classes()
        ends, labels = np.asarray(table.ends), np.asarray(table.labels)
        images = ImageList(table.blob, ends, labels, root, class_names, classes_found=self.classes is None)
        if self.check_files and not table.problems:
            table.look_for(images)
        if table.problems:
            raise ConfigError(list(table.problems))
        return images


class ImageList:
    """The images of a table, as a `Source`.

    Attributes:
        class_names: By label, empty without labels.
        classes_found: True = the classes are what was found in the table, so that an empty one is likely a mistake.
        identity: Two sources of the same identity have the same rows in the same order.
    """

    def __init__(
        self, blob: bytearray, ends: npt.NDArray[np.int64], labels: npt.NDArray[np.int32], root: Path,
        class_names: list[str], *, classes_found: bool,
    ) -> None:  # fmt: skip
        self.class_names, self.num_classes, self.classes_found = class_names, len(class_names), classes_found
        self._blob = np.frombuffer(blob, np.uint8)
        self._starts = np.concatenate([np.zeros(1, np.int64), ends])
        self._labels = labels
        self._root = os.fsencode(root)
        digest = hashlib.blake2b(blob, digest_size=16)
        digest.update(labels.tobytes())
        self.identity = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def path_of(self, index: int) -> bytes:
        """Path of a file, as bytes: file names need not be valid UTF-8."""
        path = self._blob[self._starts[index] : self._starts[index + 1]].tobytes()
        return os.path.join(self._root, path)  # noqa: PTH118 (bytes)

    def read(self, index: int) -> Sample:
        """The bytes of a file, with its path as name.

        Raises:
            OSError: It cannot be read.
        """
        path = self.path_of(index)
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (names need not be valid UTF-8)
            image = file.read()
        return Sample(image, printable(path), int(self._labels[index]))

    def name_of(self, index: int) -> str:
        """Path of a file."""
        return printable(self.path_of(index))

    def labels(self) -> npt.NDArray[np.int64]:
        """Class of every row."""
        return self._labels.astype(np.int64)


# --------------------------------------------------------------------------------------------- reading and checking


class _Table:
    """Rows on their way into arrays, and everything that is wrong with them.

    Attributes:
        problems: What is wrong.
    """

    def __init__(self, config: Config, file: Path, progress: Progress) -> None:
        self.config, self.file, self.progress = config, file, progress
        self.blob, self.ends, self.labels = bytearray(), array.array("q"), array.array("i")
        self.problems = Problems(file)
        self._lines = array.array("q")
        self._number: dict[str, int] = {}

    def read(self) -> None:
        """Read all rows.

        Raises:
            ConfigError: The columns cannot be told.
        """
        first = first_line(self.file)
        delimiter: str = self.config.delimiter or next((d for d in "\t;," if d in first), ",")
        self._read(delimited_rows(self.file, delimiter, self.problems))

    def _read(self, lines: Iterator[tuple[int, list[str]]]) -> None:
        line, first = next(lines, (1, []))
        if not first and self.problems:
            return
        if not first:
            raise ConfigError([f"image_list: {self.file} is empty; it must have one row per image: path, label"])
        header = self.config.header
        if header == "auto":
            header = not any(map(is_image, first))
        names = first if header else []
        second = next(lines, None) if header else (line, first)
        path, label, split = _choose_columns(self.config, self.file, Columns(names, (second or (0, first))[1]))
        needed = max(column for column in (path, label, split) if column is not None)
        splits: set[str] = set()
        while second is not None:
            line, row = second
            second = next(lines, None)
            if row == names:
                self.problems.note(
                    "header", "the header once more; tables that were put together keep one header", line
                )
            elif len(row) <= needed:
                self.problems.note("short", f"{len(row)} columns where {needed + 1} are needed; complete the row", line)
            elif split is not None and row[split] != self.config.split:
                splits.add(row[split])
            else:
                self._add(line, row[path], None if label is None else row[label])
        if not self.labels and not self.problems:
            found = f" with {self.config.split!r} as split, only {', '.join(sorted(splits)[:SHOWN])}" if splits else ""
            self.problems.note("empty", f"no rows{found}; it must have one row per image")

    def _add(self, line: int, path: str, label: str | None) -> None:
        if not path:
            self.problems.note("path", "no path in this row; give it or delete the row", line)
        elif label == "":
            self.problems.note("label", f"{path} has no label; give one, delete the row, or set `labels: false`", line)
        else:
            self.blob += path.encode("utf-8", "surrogateescape")
            self.ends.append(len(self.blob))
            self.labels.append(-1 if label is None else self._number.setdefault(label, len(self._number)))
            self._lines.append(line)
            if len(self.labels) % 100_000 == 0:
                self.progress(len(self.labels), str(self.file))

    def number_classes(self) -> list[str]:
        """Class names by number; labels, numbered as they came, become those numbers."""
        found = list(self._number)
        whole = all(re.fullmatch(r"-?\d+", name) for name in found)
        classes = self.config.classes
        if classes is not None:
            number = {name: label for label, name in enumerate(classes)}
            if whole and not any(name in number for name in found):  # numbers of classes that have names
                number = {str(label): label for label in range(len(classes))}
        elif whole and found:
            largest = max(map(int, found))
            if largest >= max(_MOST_NUMBERED_CLASSES, 2 * len(found)):
                text = f"the whole numbers that are labels are class numbers from 0, but the largest is {largest}"
                self.problems.note("number", f"{text}; number the classes, or list the labels in use as `classes`")
                return []
            classes = [str(label) for label in range(largest + 1)]
            number = {name: int(name) for name in found if int(name) >= 0}
        else:
            classes = sorted(found)
            number = {name: label for label, name in enumerate(classes)}
        new = np.array([number.get(name, -1) for name in found] + [-1], np.int32)
        unknown = {self._number[name] for name in found if name not in number}
        if unknown:
            self._name_unknown(found, unknown, classes)
        self.labels = array.array("i", new[np.asarray(self.labels, np.int64)].tobytes())
        return classes

    def _name_unknown(self, found: list[str], unknown: set[int], classes: list[str]) -> None:
        for line, label in zip(self._lines, self.labels, strict=True):
            if label not in unknown:
                continue
            name = found[label]
            if self.config.classes is None:
                text = f"label {name} is negative; class numbers begin at 0, and rows without a label must be left out"
            else:
                shown = self.problems.count("unknown") < SHOWN
                hint = did_you_mean(name, classes) if shown else ""
                text = f"label {name!r} is not in `classes`{hint}; correct it, or add it there"
            self.problems.note("unknown", text, line)

    def look_for(self, images: ImageList) -> None:
        """Note the files that do not exist."""
        for index in range(len(images)):
            path = images.path_of(index)
            if not os.path.isfile(path):  # noqa: PTH113 (bytes)
                self.problems.note("missing", f"{printable(path)} does not exist", self._lines[index])
            if index % 10_000 == 9999:
                self.progress(index + 1, f"looking for the files of {self.file}")
        if missing := self.problems.count("missing"):
            base = printable(images._root)
            text = f"{missing} of {len(images)} files are missing; relative paths start from {base} (key `root`)"
            self.problems.sum_up("missing", f"{text}; `check_files: false` goes on without them")


def _choose_columns(config: Config, file: Path, columns: Columns) -> tuple[int, int | None, int | None]:
    """Numbers of the columns of paths, labels (None without) and splits (None where all rows are taken).

    Raises:
        ConfigError: Not all of them can be told.
    """
    split = None if config.split is None else columns.find("split_column", config.split_column)
    given = config.path_column
    path = columns.path("path_column") if given is None else columns.find("path_column", given)
    label = None
    if config.labels:
        given = config.label_column
        label = _label_column(columns, path, split) if given is None else columns.find("label_column", given)
    if columns.problems:
        raise ConfigError([f"image_list: {file}:1: {problem}" for problem in columns.problems])
    assert path is not None
    return path, label, split


def _label_column(columns: Columns, path: int | None, split: int | None) -> int | None:
    named = columns.called(LABEL_NAMES)
    others = [number for number in range(len(columns.row)) if number not in {path, split}]
    if len(named) == 1:
        return named[0]
    if len(others) > 1:
        known = ", ".join(columns.names) or f"0 to {len(columns.row) - 1}"
        columns.problems.append(f"which column holds the labels? Set label_column (of {known}), or labels=false")
    return others[0] if len(others) == 1 else None
