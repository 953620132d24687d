"""Videos below a folder per class, each as one image: the frame on screen in its middle.

path -> PyAV -> seek to the middle -> RGB frame -> `Sample`

Source: clip_and_eva02 section 3.2: zero-shot on UCF-101 and Kinetics takes one centre frame per video. The frame is
found by time, so that only the part between a key frame and the middle is decoded.
"""

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from openeva.config import ConfigError
from openeva.data.sources.base import Sample, SourceConfig

VIDEO_EXTENSIONS = ("mp4", "avi", "mkv", "webm", "mov", "m4v", "mpg", "mpeg")


class Config(SourceConfig):
    """Videos in class folders."""

    name: Literal["video_folder"] = "video_folder"
    root: Path = Field(description="folder with a folder of videos per class")
    list_file: Path | None = Field(
        None, description="file with a line `class/video` for each to take (UCF-101's testlist01.txt); all if left out"
    )
    extensions: tuple[str, ...] = Field(VIDEO_EXTENSIONS, min_length=1)

    def build(self) -> "VideoFolder":
        """List the videos.

        Raises:
            ConfigError: PyAV, the folder or videos in it are missing, or the list names others.
        """
        problems = [] if _has_av() else ["video_folder: reading videos needs PyAV: pip install 'openeva[video]'"]
        root = self.root.expanduser().absolute()
        if not root.is_dir():
            raise ConfigError([*problems, f"video_folder: root {root} does not exist; say where the videos are"])
        wanted = {extension.removeprefix(".").lower() for extension in self.extensions}
        folders = sorted(place for place in root.iterdir() if place.is_dir() and not place.name.startswith("."))
        files = {place.name: sorted(file.name for file in place.iterdir()) for place in folders}
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
        return VideoFolder(root, classes, videos)


def _listed(file: Path) -> list[str]:
    """Videos of a list; a class number behind a name is left out."""
    if not file.expanduser().is_file():
        raise ConfigError([f"video_folder: there is no list {file}"])
    lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    return [re.sub(r"\s+\d+$", "", line.strip()) for line in lines if line.strip()]


def _has_av() -> bool:
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


class VideoFolder:
    """The middle frames of videos, as a `Source`.

    Attributes:
        class_names: Names of the folders, by label.
        identity: Number and place of the videos.
    """

    def __init__(self, root: Path, classes: list[str], videos: list[str]) -> None:
        self._root, self._videos = root, videos
        self.class_names, self.num_classes = classes, len(classes)
        self._label_of = {name: label for label, name in enumerate(classes)}
        self.identity = f"{len(videos)} videos in {root}"

    def __len__(self) -> int:
        return len(self._videos)

    def read(self, index: int) -> Sample:
        """The frame in the middle of a video.

        Raises:
            OSError: It cannot be decoded.
        """
        return Sample(centre_frame(self._root / self._videos[index]), self.name_of(index), self._label(index))

    def _label(self, index: int) -> int:
        return self._label_of[self._videos[index].partition("/")[0]]

    def name_of(self, index: int) -> str:
        """Path of a video."""
        return str(self._root / self._videos[index])

    def labels(self) -> npt.NDArray[np.int64]:
        """Class of every video."""
        return np.array([self._label(index) for index in range(len(self))], np.int64)


def centre_frame(path: Path) -> Image.Image:
    """The frame that is on screen in the middle of a video.

    Raises:
        OSError: Not a video, or a broken one.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise OSError(f"{path} has no pictures")
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"  # frames in several threads would be decoded ahead for nothing
            middle = _middle(stream, container)
            if middle is not None and middle > (stream.start_time or 0):
                container.seek(middle, stream=stream)
            frame = _frame_at(container, stream, middle)
            if frame is None and middle is not None:  # seeking missed: from the beginning
                container.seek(stream.start_time or 0, stream=stream)
                frame = _frame_at(container, stream, middle)
            if frame is None:
                raise OSError(f"{path} has no frame in its middle")
            image: Image.Image = frame.to_image()
            return image
    except av.FFmpegError as error:
        raise OSError(error.errno or 0, f"not a video, or a broken one: {error.strerror}", str(path)) from None


def _middle(stream: Any, container: Any) -> int | None:
    """Time of the middle in the stream's units."""
    if stream.duration is not None:
        return int((stream.start_time or 0) + stream.duration / 2)
    if container.duration is not None:
        return int((stream.start_time or 0) + container.duration / 1_000_000 / 2 / stream.time_base)
    return None


def _frame_at(container: Any, stream: Any, time: int | None) -> Any:
    """The last frame that begins at or before a time; of a stream without times, the middle one of all."""
    if time is None:
        frames = list(container.decode(stream))
        return frames[len(frames) // 2] if frames else None
    shown = None
    for frame in container.decode(stream):
        if frame.pts is not None and frame.pts > time:
            break
        shown = frame
    return shown
