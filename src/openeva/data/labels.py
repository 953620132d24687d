"""What is known without reading an image: names of classes, the class of every sample, counts per class, captions.

source -> `class_names_of`, `labels_of` (int64 `[N]`, -1 = none) -> `class_counts` (int64 `[V]`), `by_class`

A source tells them by the optional members `class_names` (by label), `labels()` (class of every sample) and
`name_of(i)` (the name that `read(i)` would give); without them classes are named by their numbers, and what needs the
others says so. One whose samples have captions says it by `has_captions`, one whose samples are videos by `has_videos`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from openeva.data.sampler import Indices, permute


def class_names_of(source: Any) -> list[str]:
    """Names by label, their numbers where the source has no names; empty without labels."""
    return list(getattr(source, "class_names", None) or map(str, range(source.num_classes)))


def has_captions(source: Any) -> bool:
    """Whether the samples of a source have captions, as far as it says so."""
    return bool(getattr(source, "has_captions", False))


def has_videos(source: Any) -> bool:
    """Whether the samples of a source are videos, as far as it says so."""
    return bool(getattr(source, "has_videos", False))


def labels_of(source: Any) -> Indices:
    """Class of every sample, -1 where there is none.

    Raises:
        ValueError: The source cannot tell without reading its images.
    """
    if not source.num_classes:
        return np.full(len(source), -1)
    if not hasattr(source, "labels"):
        raise ValueError(
            f"the labels of {type(source).__name__} are only known when its images are read: class counts, balance,"
            " shots and label_fraction need class folders (image_folder) or a list of labels (image_list)"
        )
    labels: Indices = source.labels()
    return labels


def class_counts(source: Any) -> Indices:
    """Number of samples of each class.

    Raises:
        ValueError: The source cannot tell without reading its images.
    """
    labels = labels_of(source)
    return np.bincount(labels[labels >= 0], minlength=source.num_classes)


def by_class(labels: Indices, num_classes: int, key: int | None = None) -> list[Indices]:
    """Samples of each class, in their order or, with a 64-bit key, in the pseudo-random order that it names."""
    order = np.arange(len(labels))
    if key is not None:
        order = permute(order, len(labels), np.full(len(labels), key, np.uint64))
    order = order[np.argsort(labels[order], kind="stable")]
    ends = np.cumsum(np.bincount(labels + 1, minlength=num_classes + 1))
    return np.split(order, ends[:-1])[1:]  # the first are those without a label


def name_of(source: Any, index: int) -> str:
    """Name of a sample, without reading it where the source can tell.

    Raises:
        OSError: It had to be read and cannot be.
    """
    name: str = source.name_of(index) if hasattr(source, "name_of") else source.read(index).name
    return name


def balanced_weights(labels: Indices, seen: npt.NDArray[Any], num_classes: int) -> list[float]:
    """Weight per class: 1 on average over the samples, with the same sum for every class that has any.

    Args:
        labels: Class of every sample.
        seen: How often each sample is seen per epoch.
        num_classes: Number of weights; a class without samples gets 1.
    """
    counts = np.bincount(labels, weights=seen, minlength=num_classes)
    present = counts > 0
    weights = np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1e-9)), 1.0)
    return [float(weight) for weight in weights.round(6)]


def classes_in_short(names: Sequence[str]) -> str:
    """All names where they are few, else their number, the first and a digest of all."""
    if len(names) <= 10:
        return ", ".join(names)
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{len(names)}: {', '.join(names[:3])}, ... ({digest})"
