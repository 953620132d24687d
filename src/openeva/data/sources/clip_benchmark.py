"""A classification data set of `clip_benchmark`, with its class names and templates.

`clip_benchmark.datasets.builder.build_dataset`, without transforms -> image and class number -> `Sample`

Source: the published zero-shot numbers of EVA-CLIP come from that package (clip_and_eva02 section 3.1). Difference:
nothing is fetched unless `download` says so.
"""

import warnings
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from openeva.config import ConfigError
from openeva.data.sources.base import Sample, SourceConfig


class Config(SourceConfig):
    """A data set of clip_benchmark."""

    name: Literal["clip_benchmark"] = "clip_benchmark"
    dataset: str = Field(description="its name there, such as food101, flowers, eurosat or pets")
    root: Path = Field(description="folder that holds it, as that package lays it out")
    split: str = "test"
    download: bool = Field(False, description="let the package fetch it where it is missing")

    def build(self) -> "BenchmarkData":
        """Open it.

        Raises:
            ConfigError: The package or the data are missing, or it is no set of images with classes.
        """
        try:
            from clip_benchmark.datasets.builder import build_dataset, get_dataset_default_task
        except ImportError as error:
            text = "pip install clip-benchmark, and what its data sets need"
            raise ConfigError([f"clip_benchmark: no package {error.name}: {text}"]) from None

        root = self.root.expanduser()
        if not root.is_dir() and not self.download:
            text = f"root {root} does not exist; say where it is, or set download: true"
            raise ConfigError([f"clip_benchmark: {self.dataset}: {text}"])
        if get_dataset_default_task(self.dataset) != "zeroshot_classification":
            text = "has captions or sentences, not classes; use the source captions and the evaluation retrieval"
            raise ConfigError([f"clip_benchmark: {self.dataset} {text}"])
        options: dict[str, Any] = {"transform": None, "split": self.split, "download": self.download}
        try:
            with warnings.catch_warnings():  # that a split is ignored, where a set has none
                warnings.simplefilter("ignore")
                data = build_dataset(self.dataset, root=str(root), **options)
        except (RuntimeError, ValueError, OSError, AssertionError, ImportError) as error:
            raise ConfigError([f"clip_benchmark: {self.dataset} in {root}: {error or type(error).__name__}"]) from None
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            text = "is a stream there, which cannot be read by number; use one of its other sets"
            raise ConfigError([f"clip_benchmark: {self.dataset} {text}"])
        return BenchmarkData(data, f"{self.dataset} {self.split}")


class BenchmarkData:
    """Images with a class, as a `Source`.

    Attributes:
        class_names: By label.
        templates: Texts that its classes are put into.
        identity: Data set and split.
    """

    def __init__(self, data: Any, name: str) -> None:
        self._data, self._name = data, name
        self.class_names = [str(one) for one in data.classes]
        self.num_classes = len(self.class_names)
        self.templates = [str(one) for one in data.templates]
        self.identity = f"clip_benchmark {name}"

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> Sample:
        """An image with its class.

        Raises:
            OSError: It cannot be read.
        """
        image, label = self._data[index]
        return Sample(image, self.name_of(index), int(label))

    def name_of(self, index: int) -> str:
        """Data set and number."""
        return f"{self._name} {index}"
