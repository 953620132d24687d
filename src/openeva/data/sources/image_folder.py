"""Folders of image files: any depth, links followed, no labels needed.

roots -> one index of all files on disk (`data/file_index.py`, built once) -> `read(i)`: the encoded bytes of file i.

The merged-30M layout of the paper is `roots: [merged30m]` with one link per data set in it. Order is that of a sorted
walk: files of a folder before its sub-folders. Several roots are concatenated; to see some of them more often than
others, list several sources of this kind, each with its `weight`.

Source: the official reader sorts, follows links and accepts the same extensions; it takes first-level folders as
classes always, here only where `labels` asks for it, and an empty class folder keeps its number.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field

from openeva.config import ConfigError
from openeva.data.file_index import IMAGE_EXTENSIONS, FileIndex, Progress, open_or_build, printable
from openeva.data.sources.base import Sample, SourceConfig


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


class Config(SourceConfig):
    """Images below one or many folders.

    Attributes:
        roots: One folder or a list.
        labels: True = the first-level folder is the class; "auto" = so where there are at least two of them and no
            image lies outside; False = no labels.
        classes: First-level folders in the order of their class numbers; default: those found, sorted.
        extensions: Of the files to take, any case.
        reindex: True = scan the folders now; False = never while there is an index; "auto" = scan where a folder has
            changed and the last scan took less than a minute. An outdated index that is used is warned about.
    """

    name: Literal["image_folder"] = "image_folder"
    roots: Annotated[list[Path], BeforeValidator(_as_list)] = Field(min_length=1)
    labels: bool | Literal["auto"] = False
    classes: list[str] | None = None
    extensions: list[str] = Field(list(IMAGE_EXTENSIONS), min_length=1)
    reindex: bool | Literal["auto"] = "auto"

    def build(self, progress: Progress | None = None) -> "ImageFolder":
        """Open the source, from its index if there is one.

        Args:
            progress: Told about a scan after every folder: files so far, folder.

        Raises:
            ConfigError: A root is missing, not a folder, unreadable or without images, or labels do not fit the
                folders.
        """
        roots = [root.expanduser().absolute() for root in self.roots]
        if problems := [problem for root in roots if (problem := _root_problem(root))]:
            raise ConfigError(problems)
        extensions = [e.removeprefix(".") for e in self.extensions]
        try:
            index = open_or_build(roots, extensions, reindex=self.reindex, progress=progress)
        except OSError as error:
            text = f"image_folder: {error.strerror or error}: {error.filename}; the images must be readable, and the"
            raise ConfigError([f"{text} cache of their index writable (OPENEVA_CACHE chooses another)"]) from None
        if len(index) == 0:
            text = f"image_folder: no images below {', '.join(map(str, roots))}; files must end in"
            kinds = ", ".join("." + e for e in extensions)
            raise ConfigError([f"{text} {kinds} (key `extensions`), and hidden ones are skipped"])
        return ImageFolder(index, _class_names(index, self.labels, self.classes), classes_found=self.classes is None)


def _root_problem(root: Path) -> str | None:
    if root.is_dir():
        return None
    if root.exists():
        return f"image_folder: root {root} is a file; give a folder of images"
    return (
        f"image_folder: root {root} does not exist; say where the images are, as in `data.train.0.roots=PATH`,"
        " and check that the disk is mounted"
    )


def _class_names(index: FileIndex, labels: bool | Literal["auto"], classes: list[str] | None) -> list[str]:
    """Class names in the order of their numbers, empty without labels."""
    loose = index.first_ungrouped()
    if labels == "auto":
        labels = loose is None and len(index.groups) > 1
    if not labels:
        return []
    problems = []
    if loose is not None:
        text = f"labels need one folder per class, but {printable(index.path_of(loose))} lies right in a root"
        problems.append(f"image_folder: {text}; move it, or set `labels: false`")
    if classes is not None and (unknown := sorted(set(index.groups) - set(classes))):
        text = ", ".join(unknown[:10]) + (" ..." if len(unknown) > 10 else "")
        problems.append(f"image_folder: folders that are not in `classes`: {text}; add or move them")
    if problems:
        raise ConfigError(problems)
    return sorted(index.groups) if classes is None else classes


class ImageFolder:
    """All images below some roots, as a `Source`.

    Attributes:
        class_names: By label, empty without labels.
        classes_found: True = the classes are what was found on disk, so that an empty one is likely a mistake.
        identity: Two sources of the same identity have the same files in the same order.
    """

    def __init__(self, index: FileIndex, class_names: list[str], *, classes_found: bool = True) -> None:
        self._index = index
        self.class_names, self.classes_found = class_names, classes_found
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
        return Sample(image, printable(path), int(self._label_of_group[self._index.group_of(index)]))

    def name_of(self, index: int) -> str:
        """Path of a file."""
        return printable(self._index.path_of(index))

    def labels(self) -> npt.NDArray[np.int64]:
        """Class of every file."""
        labels: npt.NDArray[np.int64] = self._label_of_group[self._index.groups_of_all()]
        return labels
