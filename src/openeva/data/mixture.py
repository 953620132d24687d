"""Several sources read as one: concatenation with weights, and the seeded cut into training and held-out samples.

source configs -> `open_sources` -> `Mixture` (index -> sample) or `Streams`.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openeva.config import ComponentConfig
from openeva.data.file_index import Progress
from openeva.data.sampler import permute
from openeva.data.sources.base import Sample, Source, StreamSource

_HOLDOUT_KEY = 0x0E7A
"""The cut must not depend on the seed of a run: what one run holds out, no other may train on."""


class Mixture:
    """Sources one after the other, each sample with an index of its own.

    Attributes:
        sources: Numbered sources.
        weights: How often a sample of each source is seen per epoch, on average.
        num_classes: Number of label values, 0 without labels.
        identity: Of each source in words; two mixtures of the same identity have the same samples in the same order, as
            far as the sources can tell.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        empty = [str(number) for number, source in enumerate(sources) if len(source) == 0]
        if not sources or empty:
            raise ValueError(f"no samples in source {', '.join(empty)}" if sources else "no source of samples is given")
        self.sources = list(sources)
        self.weights = list(weights)
        self.num_classes = max(source.num_classes for source in sources)
        self.identity = [f"{w:g} x {_identity(source)}" for w, source in zip(weights, sources, strict=True)]
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
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a mixture of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        return self.sources[number].read(index - start)


def _identity(source: Source) -> str:
    """What tells a source from another: its number of samples, and its own identity where it has one."""
    return " ".join([f"{len(source)} samples", *filter(None, [getattr(source, "identity", "")])])


class Part:
    """A seeded share of a source: the samples at positions `start` to `stop` of a fixed permutation."""

    def __init__(self, source: Source, start: int, stop: int) -> None:
        self.num_classes = source.num_classes
        self.identity = f"{start} to {stop} of {_identity(source)}"
        self._source, self._start, self._stop = source, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self, index: int) -> Sample:
        """The sample of this index."""
        position = np.array([self._start + index])
        return self._source.read(int(permute(position, len(self._source), np.array([_HOLDOUT_KEY], np.uint64))[0]))


def hold_out(source: Source, share: float) -> tuple[Part, Part]:
    """Cut a source into a training and a held-out part (at least one sample each), the same for every run.

    Raises:
        ValueError: The source has less than two samples.
    """
    if len(source) < 2:
        raise ValueError(f"cannot hold out a share of {len(source)} sample(s); give a val source or set holdout to 0")
    cut = len(source) - min(max(1, round(share * len(source))), len(source) - 1)
    return Part(source, 0, cut), Part(source, cut, len(source))


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
        return max(source.num_classes for source in self.sources)

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
    weights = [getattr(config, "weight", 1.0) for config in configs]
    if not streams:
        return Mixture([source for source in built if not isinstance(source, StreamSource)], weights)
    if len(streams) < len(built):
        raise ValueError(
            "streams (pipes, URLs) cannot be mixed with local sources; download them, or use streams alone"
        )
    return Streams(streams, weights)
