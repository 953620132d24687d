"""Videos below a folder per class.

path -> `Video` -> `Sample`; what sees images gets the frame in the middle, what sees clips chooses its frames

Source: clip_and_eva02 section 3.2: zero-shot on UCF-101 and Kinetics takes one centre frame per video.
"""

import os
import re
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from openeva.config import ConfigError
from openeva.data.sources.base import Sample, SourceConfig
from openeva.data.video import VIDEO_EXTENSIONS, Decoder, Video, decoder_problem


class Config(SourceConfig):
    """Videos in class folders."""

    name: Literal["video_folder"] = "video_folder"
    root: Path = Field(description="folder with a folder of videos per class, at any depth in it")
    list_file: Path | None = Field(
        None, description="file with a line `class/video` for each to take (UCF-101's testlist01.txt); all if left out"
    )
    extensions: tuple[str, ...] = Field(VIDEO_EXTENSIONS, min_length=1)
    decoder: Decoder = Field("pyav", description="torchcodec needs FFmpeg's libraries")

    def build(self) -> "VideoFolder":
        """List the videos.

        Raises:
            ConfigError: PyAV, the folder or videos in it are missing, or the list names others.
        """
        problem = decoder_problem(self.decoder)
        problems = [] if problem is None else [f"video_folder: {problem}"]
        root = self.root.expanduser().absolute()
        if not root.is_dir():
            raise ConfigError([*problems, f"video_folder: root {root} does not exist; say where the videos are"])
        wanted = {extension.removeprefix(".").lower() for extension in self.extensions}
        folders = sorted(place for place in root.iterdir() if place.is_dir() and not place.name.startswith("."))
        files = {place.name: _files_below(place) for place in folders}
        found = {
            name: [file for file in inside if file.rpartition(".")[2].lower() in wanted]
            for name, inside in files.items()
        }
        # an empty folder is a class without videos; one that holds other things, such as lists of a split, is no class
        classes = [name for name, inside in files.items() if found[name] or not inside]
        videos = [f"{name}/{file}" for name in classes for file in found[name]]
        if not videos:
            text = f"video_folder: no videos in the class folders of {root}; they must end in"
            problems.append(f"{text} {', '.join(sorted(wanted))}, one folder per class")
        elif self.list_file is not None:
            listed = _listed(self.list_file)
            if missing := sorted(set(listed) - set(videos)):
                some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
                problems.append(
                    f"video_folder: {len(missing):,} videos of {self.list_file} are not below {root}: {some}"
                )
            videos = listed
        if problems:
            raise ConfigError(problems)
        return VideoFolder(root, classes, videos, self.decoder)


def _files_below(folder: Path) -> list[str]:
    """Names of all files at any depth, relative to the folder, sorted."""
    found = (Path(place).relative_to(folder) / name for place, _, names in os.walk(folder) for name in names)
    return sorted(path.as_posix() for path in found)


def _listed(file: Path) -> list[str]:
    """Videos of a list; a class number behind a name is left out."""
    if not file.expanduser().is_file():
        raise ConfigError([f"video_folder: there is no list {file}"])
    lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    return [re.sub(r"\s+\d+$", "", line.strip()) for line in lines if line.strip()]


class VideoFolder:
    """Videos, as a `Source`.

    Attributes:
        classes_found: The classes are those that there are folders of.
        class_names: Names of the folders, by label.
        identity: Number and place of the videos.
    """

    classes_found = has_videos = True

    def __init__(self, root: Path, classes: list[str], videos: list[str], decoder: Decoder = "pyav") -> None:
        self._root, self._videos, self._decoder = root, videos, decoder
        self.class_names, self.num_classes = classes, len(classes)
        self._label_of = {name: label for label, name in enumerate(classes)}
        self.identity = f"{len(videos)} videos in {root}"

    def __len__(self) -> int:
        return len(self._videos)

    def read(self, index: int) -> Sample:
        """A video, which is opened by whoever wants its frames."""
        path = self._root / self._videos[index]
        return Sample(Video(path, decoder=self._decoder), str(path), self._label(index))

    def _label(self, index: int) -> int:
        return self._label_of[self._videos[index].partition("/")[0]]

    def name_of(self, index: int) -> str:
        """Path of a video."""
        return str(self._root / self._videos[index])

    def labels(self) -> npt.NDArray[np.int64]:
        """Class of every video."""
        return np.array([self._label(index) for index in range(len(self))], np.int64)
