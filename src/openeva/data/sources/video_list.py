"""Videos named by a list with a label each, as the official code reads them.

`k400/train/air drumming/abc.mp4 3`, or JSON -> `Video` -> `Sample`

Source: spec section 3.2 of video. Difference: a line is split once from the right, so that paths may hold any spaces
(quirk: two spaces in a path became one).
"""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from openeva.config import ConfigError
from openeva.data.sources.base import Sample, SourceConfig
from openeva.data.video import Decoder, Video, decoder_problem

MOST_PROBLEMS = 10


class Config(SourceConfig):
    """Videos in a list."""

    name: Literal["video_list"] = "video_list"
    file: Path = Field(description="list: `path label` per line, or JSON: [{filename: path, label: [number]}]")
    root: Path | None = Field(None, description="folder that the paths are relative to; that of the list if left out")
    labels: Path | None = Field(None, description="CSV of class names with the header id,name; numbers if left out")
    num_classes: int | None = Field(None, gt=0, description="if the list lacks some; those of `labels`, or as found")
    decoder: Decoder = Field("pyav", description="torchcodec needs FFmpeg's libraries")

    def build(self) -> "VideoList":
        """Read the list.

        Raises:
            ConfigError: A file is missing, or a line is not of the form; the first of them are named by their numbers.
        """
        problem = decoder_problem(self.decoder)
        problems = [] if problem is None else [f"video_list: {problem}"]
        for key in ("file", "labels", "root"):
            place = getattr(self, key)
            if place is not None and not place.expanduser().exists():
                problems.append(f"video_list: {key} {place} does not exist")
        if problems:
            raise ConfigError(problems)
        file = self.file.expanduser()
        try:
            rows = _rows_of_json(file) if file.suffix == ".json" else _rows_of_text(file)
            names = None if self.labels is None else read_class_names(self.labels.expanduser())
        except ValueError as error:
            raise ConfigError([f"video_list: {line}" for line in str(error).splitlines()]) from None
        if not rows:
            raise ConfigError([f"video_list: {file} names no videos"])
        largest = max(label for _, label in rows)
        num_classes = self.num_classes or (largest + 1 if names is None else len(names))
        if largest >= num_classes:
            text = f"video_list: {file} has the label {largest}, but there are {num_classes} classes"
            raise ConfigError([f"{text}; correct `labels` or num_classes"])
        root = (file.parent if self.root is None else self.root.expanduser()).absolute()
        return VideoList(root, rows, names or [str(number) for number in range(num_classes)], self.decoder)


def parse_line(line: str) -> tuple[str, int]:
    """Path and label of a line.

    Raises:
        ValueError: Not `path label`.
    """
    parts = line.rstrip().rsplit(None, 1)
    if len(parts) != 2 or not parts[1].isdecimal():
        raise ValueError(f"{line.strip()[:80]!r} is not `path label`, the label a number from 0")
    return parts[0], int(parts[1])


def _rows_of_text(file: Path) -> list[tuple[str, int]]:
    rows: list[tuple[str, int]] = []
    problems: list[str] = []
    with file.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(parse_line(line))
            except ValueError as error:
                problems.append(f"{file}:{number}: {error}")
                if len(problems) > MOST_PROBLEMS:
                    problems[-1] = f"{file}: ... and perhaps more; lines are `path label`"
                    break
    if problems:
        raise ValueError("\n".join(problems))
    return rows


def _rows_of_json(file: Path) -> list[tuple[str, int]]:
    try:
        entries: Any = json.loads(file.read_text(encoding="utf-8"))
        return [(_path_in(entry), _label_in(entry)) for entry in entries]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{file} is not a list of objects with filename (or frame_dir) and label: {type(error).__name__}: {error}"
        ) from None


def _path_in(entry: dict[str, Any]) -> str:
    path: str = entry["filename"] if "filename" in entry else entry["frame_dir"]
    return path


def _label_in(entry: dict[str, Any]) -> int:
    label = entry["label"]
    if isinstance(label, list):
        if len(label) != 1:
            raise ValueError(f"{len(label)} labels for {_path_in(entry)}: one is needed")
        label = label[0]
    if not isinstance(label, int) or label < 0:
        raise ValueError(f"label {label!r} of {_path_in(entry)} is not a number from 0")
    return label


def read_class_names(file: Path) -> list[str]:
    """Names of a CSV with the header `id,name`, by id.

    Raises:
        ValueError: It is not of that form, or the ids are not 0, 1, 2, ...
    """
    with file.open(encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    try:
        names = {int(row["id"]): row["name"] for row in rows}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file} is not a CSV with the header id,name and a number per line") from None
    if sorted(names) != list(range(len(rows))) or not rows:
        raise ValueError(f"{file}: the ids are not 0 to {max(len(rows) - 1, 0)}, each once")
    return [names[number] for number in range(len(rows))]


class VideoList:
    """Videos of a list, as a `Source`.

    Attributes:
        class_names: By label; numbers where the list has no names.
        identity: Number and place of the videos.
    """

    has_videos = True

    def __init__(self, root: Path, rows: list[tuple[str, int]], class_names: list[str], decoder: Decoder) -> None:
        self._root, self._decoder = root, decoder
        self._paths = [path for path, _ in rows]
        self._labels = np.array([label for _, label in rows], np.int64)
        self.class_names, self.num_classes = class_names, len(class_names)
        digest = hashlib.blake2b(repr(rows).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        self.identity = f"{len(rows)} videos in {root} ({digest})"

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Sample:
        """A video, which is opened by whoever wants its frames."""
        path = self._root / self._paths[index]
        return Sample(Video(path, decoder=self._decoder), str(path), int(self._labels[index]))

    def name_of(self, index: int) -> str:
        """Path of a video."""
        return str(self._root / self._paths[index])

    def labels(self) -> npt.NDArray[np.int64]:
        """Class of every video."""
        return self._labels
