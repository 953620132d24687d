"""Folders of image files: any depth, links followed, no labels needed.

roots -> one index of all files on disk (`data/file_index.py`, built once) -> `read(i)`: the encoded bytes of file i.

The merged-30M layout of the paper is `roots: [merged30m]` with one link per data set in it. Order is that of a sorted walk:
files of a folder before its sub-folders. Several roots are concatenated; to see some of them more often than others, list
several sources of this kind, each with its `weight`.

Source: the official reader sorts, follows links and accepts the same extensions; it takes first-level folders as
    classes always, here only where `labels` asks for it, and an empty class folder keeps its number.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from openeva.config import ConfigError
from openeva.data.file_index import FileIndex, Progress, open_or_build
from openeva.data.sources.base import Sample, SourceConfig

EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


class Config(SourceConfig):
    """Keys of an `image_folder` source."""

    roots: Annotated[list[Path], BeforeValidator(_as_list)] = Field(min_length=1, description="one folder or a list")
    labels: bool | Literal["auto"] = Field(
        False,
        description="class = first-level folder; auto: where there are at least two and no image lies outside them",
    )
    classes: list[str] | None = Field(
        None, description="class folders in the order of their numbers (default: those found, sorted)"
    )
    extensions: list[str] = Field(list(EXTENSIONS), min_length=1, description="of files to take, any case")
    reindex: bool | Literal["auto"] = Field(
        "auto",
        description="scan again: true now, false never, auto where a folder changed and the scan takes < 1 minute",
    )

    def build(self, progress: Progress | None = None) -> "ImageFolder":
        """Open the source, from its index if there is one.

        Args:
            progress: Told about a scan after every folder: files so far, folder.

        Raises:
            ConfigError: A root is missing, not a folder, unreadable or without images; or labels do not fit the folders.
        """
        roots = [root.expanduser().absolute() for root in self.roots]
        problems = [
            f"image_folder: root {root} is not a folder; give the path of a folder of images"
            if root.exists()
            # a dangling link does not exist either
            else f"image_folder: root {root} does not exist; check the path, or that its disk is mounted"
            for root in roots
            if not root.is_dir()
        ]
        if problems:
            raise ConfigError(problems)
        extensions = [e.removeprefix(".") for e in self.extensions]
        try:
            index = open_or_build(roots, extensions, reindex=self.reindex, progress=progress)
        except OSError as error:
            raise ConfigError(
                [f"image_folder: {error.strerror or error}: {error.filename}; images must be readable, and the cache for "
                 "their index (set OPENEVA_CACHE to choose it) writable"]
            ) from None  # fmt: skip
        if len(index) == 0:
            raise ConfigError(
                [f"image_folder: no images below {', '.join(map(str, roots))}; files must end in "
                 f"{', '.join('.' + e for e in extensions)} (key `extensions`), and hidden ones are skipped"]
            )  # fmt: skip
        return ImageFolder(index, _class_names(index, self.labels, self.classes))


def _class_names(index: FileIndex, labels: bool | Literal["auto"], classes: list[str] | None) -> list[str]:
    """Class names in the order of their numbers, empty without labels."""
    loose = index.first_ungrouped()
    if labels == "auto":
        labels = loose is None and len(index.groups) > 1
    if not labels:
        return []
    problems = []
    if loose is not None:
        name = index.path_of(loose).decode("utf-8", "backslashreplace")
        problems.append(f"image_folder: labels need one folder per class, but {name} lies right in a root; move it, "
                        "or set `labels: false`")  # fmt: skip
    if classes is not None and (unknown := sorted(set(index.groups) - set(classes))):
        problems.append(f"image_folder: folders that are not in `classes`: {', '.join(unknown[:10])}"
                        f"{' ...' if len(unknown) > 10 else ''}; add or move them")  # fmt: skip
    if problems:
        raise ConfigError(problems)
    return sorted(index.groups) if classes is None else classes


class ImageFolder:
    """All images below some roots, as a `Source`.

    Attributes:
        class_names: By label, empty without labels.
        identity: Changes exactly when the list of files does, so that a resumed run can tell.
    """

    def __init__(self, index: FileIndex, class_names: list[str]) -> None:
        self._index = index
        self.class_names = class_names
        self.num_classes = len(class_names)
        self.identity = index.identity
        number = {name: label for label, name in enumerate(class_names)}
        # the last entry answers for group -1: no folder, no label
        self._label_of_group = np.array([number.get(group, -1) for group in index.groups] + [-1], np.int64)

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> Sample:
        """The bytes of a file, with its path as name.

        Raises:
            OSError: It has vanished or cannot be read.
        """
        path = self._index.path_of(index)
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (names need not be valid UTF-8)
            image = file.read()
        name = path.decode("utf-8", "backslashreplace")
        return Sample(image, name, int(self._label_of_group[self._index.group_of(index)]))
