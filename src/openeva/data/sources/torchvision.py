"""A classification data set of torchvision, as it lies on disk: CIFAR, Food-101, pets, flowers and so on.

torchvision's own class, without transforms -> image and class number -> `Sample`

Source: torchvision's reading; class names are its `classes` as they stand, which is what CLIP_benchmark does for CIFAR
(clip_and_eva02 section 3.1). For other sets it has names of its own: source `clip_benchmark`.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field
from torchvision import datasets

from openeva.config import ConfigError
from openeva.data.sources.base import Sample, SourceConfig
from openeva.registry import did_you_mean

_BENCHMARK_NAMES = {
    "oxfordiiitpet": "pets", "flowers102": "flowers", "fgvcaircraft": "fgvc_aircraft", "stanfordcars": "cars",
}  # fmt: skip


def benchmark_name(dataset: str) -> str:
    """What CLIP_benchmark calls a data set of torchvision: its templates and published accuracies go by that name."""
    return _BENCHMARK_NAMES.get(dataset.lower(), dataset.lower())


class Config(SourceConfig):
    """A data set of torchvision."""

    name: Literal["torchvision"] = "torchvision"
    dataset: str = Field(description="torchvision's name of it, such as CIFAR10 or Food101")
    root: Path = Field(description="folder that holds it, as torchvision lays it out")
    split: str = Field("test", description="train or test; others where the data set has them")
    download: bool = Field(False, description="fetch it where it is missing")

    def build(self) -> "TorchvisionData":
        """Open it.

        Raises:
            ConfigError: Not there, or no such data set or split.
        """
        known = [name for name in datasets.__all__ if _is_known(name)]
        if self.dataset not in known:
            raise ConfigError(
                [f"torchvision: no data set {self.dataset!r}{did_you_mean(self.dataset, known)} ({', '.join(known)})"]
            )
        options: dict[str, Any] = {"split": self.split} if _takes(self.dataset, "split") else {}
        if _takes(self.dataset, "train"):
            if self.split not in {"train", "test"}:
                raise ConfigError([f"torchvision: {self.dataset} has the splits train and test, not {self.split!r}"])
            options = {"train": self.split == "train"}
        root = self.root.expanduser()
        try:
            found = getattr(datasets, self.dataset)(root, download=self.download, **options)
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).split(". You can use download", 1)[0]
            hint = "" if self.download else "; unpack its archive there, or set download: true"
            raise ConfigError([f"torchvision: {self.dataset} in {root}: {reason}{hint}"]) from None
        if not getattr(found, "classes", None):
            raise ConfigError([f"torchvision: {self.dataset} names no classes; use another source"])
        return TorchvisionData(found, f"{self.dataset} {self.split}")


def _arguments(dataset: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(datasets, dataset)).parameters


def _takes(dataset: str, argument: str) -> bool:
    return argument in _arguments(dataset)


def _is_known(dataset: str) -> bool:
    """Whether it can be opened with a folder and a split alone."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {key for key, one in _arguments(dataset).items() if one.default is one.empty and one.kind not in kinds}
    return needed <= {"root", "split"} and _takes(dataset, "root") and _takes(dataset, "download")


class TorchvisionData:
    """Images with a class, as a `Source`.

    Attributes:
        class_names: By label.
        templates: Name of the texts that its classes are put into.
        identity: Data set and split.
    """

    def __init__(self, data: Any, name: str) -> None:
        self._data, self._name = data, name
        self.templates = benchmark_name(name.split(maxsplit=1)[0])
        self.class_names = [str(one) for one in data.classes]
        self.num_classes = len(self.class_names)
        self.identity = f"torchvision {name}"

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> Sample:
        """An image with its class.

        Raises:
            OSError: It cannot be read.
        """
        image, label = self._data[index]
        assert isinstance(image, Image.Image)
        return Sample(image, self.name_of(index), int(label))

    def name_of(self, index: int) -> str:
        """Data set and number."""
        return f"{self._name} {index}"

    def labels(self) -> npt.NDArray[np.int64]:
        """Class of every image; read one by one where torchvision keeps no list."""
        for name in ("targets", "labels", "_labels"):
            if hasattr(self._data, name):
                return np.array(getattr(self._data, name), np.int64)
        return np.array([self._data[index][1] for index in range(len(self))], np.int64)
