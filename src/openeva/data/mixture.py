"""Several sources read as one: concatenation with weights and common labels.

source configs -> `open_sources` -> `Mixture` (index -> sample) or `Streams` -> `balanced` by class.
"""

import csv
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from openeva.config import ComponentConfig
from openeva.data.file_index import Progress
from openeva.data.labels import by_class, class_counts, class_names_of, has_captions, has_videos, labels_of, name_of
from openeva.data.sampler import Indices
from openeva.data.sources.base import Sample, Source, StreamSource
from openeva.data.subset import Part, Subset, identity_of

HELD_OUT = "held_out.csv"
"""In a run's folder: what it held out of its training samples."""


class Mixture:
    """Sources one after the other, each sample with an index of its own.

    Labels follow the names of the classes: a class of the same name in two sources is one class.

    Attributes:
        sources: Numbered sources.
        weights: How often a sample of each source is seen per epoch, on average.
        class_names: By label, empty without labels.
        num_classes: Number of label values, 0 without labels.
        has_captions: Whether all sources have captions.
        has_videos: Whether all sources have videos.
        identity: Of each source in words; two mixtures of the same identity have the same samples in the same order, as
            far as the sources can tell.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        class_names: Sequence[str] | None = None,
        identity: Sequence[str] | None = None,
    ) -> None:
        """Put sources together; the class names are all of theirs and the identity is made of theirs if left out."""
        empty = [str(number) for number, source in enumerate(sources) if len(source) == 0]
        if not sources or empty:
            raise ValueError(f"no samples in source {', '.join(empty)}" if sources else "no source of samples is given")
        self.sources = list(sources)
        self.weights = list(weights)
        names = [class_names_of(source) for source in sources]
        self.class_names = _merged(names) if class_names is None else list(class_names)
        self.num_classes = len(self.class_names)
        self.has_captions, self.has_videos = all(map(has_captions, sources)), all(map(has_videos, sources))
        self._label_maps = [_label_map(own, self.class_names) for own in names]
        self.identity = list(identity or (f"{w:g} x {identity_of(s)}" for w, s in zip(weights, sources, strict=True)))
        self._ends = np.cumsum([len(source) for source in sources])

    @property
    def lengths(self) -> list[int]:
        """Number of samples of each source."""
        return [len(source) for source in self.sources]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Sample:
        """The sample of this index.

        Raises:
            OSError: It cannot be read.
            IndexError: Not an index of this mixture.
        """
        number, inside = self._locate(index)
        sample, label_map = self.sources[number].read(inside), self._label_maps[number]
        return sample if label_map is None else replace(sample, label=int(label_map[sample.label]))

    def _locate(self, index: int) -> tuple[int, int]:
        """Number of the source that a sample is in, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a mixture of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    def name_of(self, index: int) -> str:
        """Name of a sample, without reading it where its source can tell."""
        number, inside = self._locate(index)
        return name_of(self.sources[number], inside)

    def labels(self) -> Indices:
        """Class of every sample, -1 where there is none.

        Raises:
            ValueError: A source cannot tell without reading its images.
        """
        found = zip(map(labels_of, self.sources), self._label_maps, strict=True)
        return np.concatenate([labels if label_map is None else label_map[labels] for labels, label_map in found])

    def aligned(self, class_names: Sequence[str]) -> "Mixture":
        """The same samples with labels that count in these names, of which it must have no other."""
        return Mixture(self.sources, self.weights, class_names, self.identity)


def _merged(lists: Sequence[list[str]]) -> list[str]:
    """All names, those of the first list first."""
    return list(dict.fromkeys(name for names in lists for name in names))


def _label_map(names: list[str], wanted: list[str]) -> Indices | None:
    """Label -> label of the same name; None where nothing changes. The last entry answers for -1: no label."""
    if names == wanted[: len(names)]:
        return None
    number = {name: label for label, name in enumerate(wanted)}
    return np.array([number[name] for name in names] + [-1])


def balanced(data: Mixture, balance: float) -> Mixture:
    """The same samples, drawn so that a class of n images gets a share of an epoch like `n ** (1 - balance)`.

    An epoch stays as long as it was. Within a class, no image comes a second time before all others came once.

    Raises:
        ValueError: There are no labels that are known beforehand, or the sources have weights of their own.
    """
    if not balance:
        return data
    if any(weight != data.weights[0] for weight in data.weights):
        raise ValueError("data.balance decides how often an image is seen: leave out the `weight` of its sources")
    if unlabelled := [str(n) for n, source in enumerate(data.sources) if not source.num_classes]:
        raise ValueError(f"data.balance needs labels, but data.train.{unlabelled[0]} has none")
    classes = [members for members in by_class(data.labels(), data.num_classes) if len(members)]
    sizes = np.array([len(members) for members in classes], float)
    weights = data.weights[0] * sizes**-balance * sizes.sum() / (sizes ** (1 - balance)).sum()
    parts = [Subset(data, members) for members in classes]
    return Mixture(parts, weights.tolist(), data.class_names, [*data.identity, f"balance {balance:g}"])


def write_held_out(data: Mixture, file: Path) -> None:
    """List the samples as `path,label` (the class's name), where names are known without reading images.

    The list is a source (`image_list`), and `data.holdout` takes it to hold out the same samples again.
    """
    if not all(hasattr(source, "name_of") for source in data.sources):
        return
    labels = data.labels() if all(hasattr(s, "labels") or not s.num_classes for s in data.sources) else None
    partial = file.with_name(f".{file.name}.tmp")
    with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as text:
        rows = csv.writer(text)
        rows.writerow(["path", "label"])
        for index in range(len(data)):
            label = -1 if labels is None else int(labels[index])
            rows.writerow([data.name_of(index), data.class_names[label] if label >= 0 else ""])
    partial.replace(file)


@dataclass(frozen=True)
class Streams:
    """Sources that can only be read in sequence, mixed at random.

    Attributes:
        sources: The streams.
        weights: How often a sample of each stream is seen per epoch, on average.
    """

    sources: list[StreamSource]
    weights: list[float]

    @property
    def num_classes(self) -> int:
        """Number of label values, 0 without labels."""
        return len(self.class_names)

    @property
    def class_names(self) -> list[str]:
        """By label, empty without labels. Labels of streams are numbers that mean the same in all of them."""
        return max(map(class_names_of, self.sources), key=len)

    @property
    def has_captions(self) -> bool:
        """Whether all streams have captions."""
        return all(map(has_captions, self.sources))

    @property
    def counts(self) -> list[int]:
        """Samples of each stream in an epoch, on average."""
        return [max(1, round(w * s.samples_per_epoch)) for w, s in zip(self.weights, self.sources, strict=True)]


def _limited(source: Source | StreamSource, limit: int | None) -> Source | StreamSource:
    if limit is None or (isinstance(source, Source) and limit >= len(source)):
        return source
    if isinstance(source, StreamSource):
        raise ValueError("streams (pipes, URLs) have no limit; set samples_per_epoch")
    return Part(source, 0, limit)


def _weight(config: ComponentConfig, source: Source | StreamSource) -> float:
    """How often a sample is seen per epoch; the share that `samples_per_epoch` asks for, where all can be counted."""
    weight: float = getattr(config, "weight", 1.0)
    wanted = getattr(config, "samples_per_epoch", None)
    if wanted is None or isinstance(source, StreamSource) or not len(source):
        return weight
    return weight * wanted / len(source)


def _build(config: ComponentConfig, progress: Progress | None) -> Any:
    scans = "progress" in inspect.signature(config.build).parameters
    return config.build(progress=progress) if scans else config.build()


def open_sources(configs: Sequence[ComponentConfig], progress: Progress | None = None) -> Mixture | Streams:
    """Build sources of one kind: numbered ones as a `Mixture`, or streams.

    Args:
        configs: Of the sources.
        progress: Told about the scan of those that must be scanned first.

    Raises:
        ValueError: None is given, one is empty, or numbered sources are mixed with streams.
    """
    built = [_limited(_build(config, progress), getattr(config, "limit", None)) for config in configs]
    streams = [source for source in built if isinstance(source, StreamSource)]
    weights = [_weight(config, source) for config, source in zip(configs, built, strict=True)]
    if not streams:
        return Mixture([source for source in built if not isinstance(source, StreamSource)], weights)
    if len(streams) < len(built):
        raise ValueError(
            "streams (pipes, URLs) cannot be mixed with local sources; download them, or use streams alone"
        )
    if any(getattr(config, key, None) for config in configs for key in ("shots", "label_fraction")):
        raise ValueError("the images of a stream cannot be chosen by class: leave out shots and label_fraction")
    return Streams(streams, weights)


def label_problems(train: Mixture | Streams, val: Mixture | None) -> list[str]:
    """Why training on these labels cannot work, in words for the user; nothing where it can."""
    problems = [*_unlabelled("data.train", train), *(_unlabelled("data.val", val) if val else [])]
    if problems:
        return problems
    if train.num_classes < 2:
        problems.append(
            f"data.train has images of one class only ({train.class_names[0]}): a classifier needs two or more; with"
            " image_folder, `roots` is the folder that holds one folder per class"
        )
    for number, source in enumerate(train.sources):
        names = class_names_of(source)
        found = getattr(source, "classes_found", False)
        empty = np.flatnonzero(class_counts(source) == 0).tolist() if found else []
        if empty:
            problems.append(
                f"data.train.{number}: {len(empty)} of its {len(names)} classes have no images"
                f" ({some_of([names[label] for label in empty])}); add images, remove the class, or, if it is meant so,"
                " list all classes as `classes` of this source"
            )
    unknown = [name for name in (val.class_names if val else []) if name not in set(train.class_names)]
    if unknown:
        problems.append(
            f"data.val has {len(unknown)} classes that data.train does not have: {some_of(unknown)} (those of"
            f" data.train: {some_of(train.class_names)}); classes are told by their names, so rename or leave out the"
            " others"
        )
    return problems


def _unlabelled(where: str, data: Mixture | Streams) -> list[str]:
    how = "(image_folder: `labels: true`, one folder per class; image_list: a column of labels)"
    sources: Sequence[Source | StreamSource] = data.sources
    return [f"{where}.{n} has no labels {how}" for n, source in enumerate(sources) if not source.num_classes]


def some_of(names: Sequence[str]) -> str:
    """The first of some names, for messages."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
