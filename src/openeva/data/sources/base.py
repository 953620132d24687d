"""The source contract: numbered samples, read one at a time by any worker.

A file in this folder holds one format: `class Config(SourceConfig)` whose `build()` returns a `Source`. A source is
opened once per process, must survive pickling (workers), and never reads anything in `__init__` that grows with the
data set beyond an index.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from PIL import Image
from pydantic import Field, model_validator

from openeva.config import ComponentConfig
from openeva.data.video import Video


@dataclass
class Sample:
    """One image or video as it lies in the source.

    Attributes:
        image: Encoded bytes (JPEG, PNG, ...), an already decoded RGB image, or a video that is not yet opened.
        name: Where it came from, for messages (a path, or `shard.tar:key`).
        label: Class index, or -1 where there is none.
        extra: More of it by name: `captions`, a list of one or more texts.
    """

    image: bytes | Image.Image | Video
    name: str
    label: int = -1
    extra: dict[str, Any] | None = None


class SourceConfig(ComponentConfig):
    """Keys that every source has."""

    weight: float = Field(1.0, gt=0, description="how often a sample is seen per epoch, on average; 0.5 = half of them")
    samples_per_epoch: int | None = Field(
        None,
        gt=0,
        description="so many samples per epoch instead of all (times weight); the next epoch goes on with the others."
        " Pipes and URLs, which cannot be counted, need it",
    )
    limit: int | None = Field(None, gt=0, description="use so many samples only, a seeded choice; for trials")
    shots: int | None = Field(None, gt=0, description="use so many images of each class, a seeded choice")
    label_fraction: float | None = Field(None, gt=0, le=1, description="use this share of the images of each class")
    shots_seed: int = Field(0, description="another seed, other images for shots and label_fraction")

    @model_validator(mode="after")
    def _few_labels_in_one_way(self) -> "SourceConfig":
        if self.shots is not None and self.label_fraction is not None:
            raise ValueError("give either shots (images per class) or label_fraction (share of each class), not both")
        return self


@runtime_checkable
class Source(Protocol):
    """Random access to samples.

    A source may also tell `class_names`, `labels()` and `name_of(index)` without reading images, and `has_captions`:
    `data/labels.py`.
    """

    num_classes: int
    """Number of label values, 0 without labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """The sample of this index.

        Raises:
            OSError: It cannot be read (the loader counts it as broken and takes another).
        """
        ...


@runtime_checkable
class StreamSource(Protocol):
    """Sequential access only (pipes, URLs): order and resume are what the stream allows, not exact."""

    num_classes: int
    samples_per_epoch: int

    def stream(self, *, epoch: int, seed: int, part: int, num_parts: int) -> Iterator[Sample]:
        """Samples of one epoch for one of `num_parts` readers (ranks x workers)."""
        ...
