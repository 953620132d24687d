"""Some of a source's samples: a seeded share, held-out samples, a few labelled ones per class.

source -> `Part` (a stretch of a fixed permutation, no memory) or `Subset` (a list of samples) -> read like any source

What is held out is the same for every run, whatever its seed: with labels, each class gives its share; and it is chosen
before labels are made few, so that runs with fewer labels are measured on the same images.
"""

import csv
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openeva.data.labels import by_class, class_names_of, has_captions, has_videos, labels_of, name_of
from openeva.data.sampler import Indices, permute, seed_of
from openeva.data.sources.base import Sample, Source, SourceConfig

log = logging.getLogger(__name__)

_HOLDOUT_KEY = 0x0E7A
"""The cut must not depend on the seed of a run: what one run holds out, no other may train on."""


def identity_of(source: Source) -> str:
    """What tells a source from another: its number of samples, and its own identity where it has one."""
    identity = getattr(source, "identity", "")
    own = identity if isinstance(identity, str) else "; ".join(identity)
    return " ".join([f"{len(source)} samples", *filter(None, [own])])


class _Chosen:
    """Samples of another source, with all that it knows about them."""

    def __init__(self, source: Source, identity: str) -> None:
        self.num_classes, self.class_names = source.num_classes, class_names_of(source)
        self.classes_found = getattr(source, "classes_found", False)
        self.has_captions, self.has_videos = has_captions(source), has_videos(source)
        self.identity = identity
        self._source = source

    def __len__(self) -> int:
        raise NotImplementedError

    def _inside(self, index: Any) -> Any:
        """Index in the source, of one sample or of many."""
        raise NotImplementedError

    def read(self, index: int) -> Sample:
        """The sample of this index."""
        return self._source.read(int(self._inside(index)))

    def name_of(self, index: int) -> str:
        """Its name."""
        return name_of(self._source, int(self._inside(index)))

    def labels(self) -> Indices:
        """Class of every sample."""
        return labels_of(self._source)[self._inside(np.arange(len(self)))]


class Part(_Chosen):
    """A seeded share of a source: the samples at positions `start` to `stop` of a fixed permutation."""

    def __init__(self, source: Source, start: int, stop: int) -> None:
        super().__init__(source, f"{start} to {stop} of {identity_of(source)}")
        self.classes_found = False  # a class may well be missing in some samples
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def _inside(self, index: Any) -> Any:
        positions = np.atleast_1d(index) + self._start
        inside = permute(positions, len(self._source), np.full(len(positions), _HOLDOUT_KEY, np.uint64))
        return inside if isinstance(index, np.ndarray) else inside[0]


class Subset(_Chosen):
    """The listed samples of a source."""

    def __init__(self, source: Source, indices: Indices) -> None:
        digest = hashlib.blake2b(indices.astype("<i8").tobytes(), digest_size=8).hexdigest()
        super().__init__(source, f"chosen {digest} of {identity_of(source)}")
        self._indices = indices.astype(np.uint32) if len(source) < 2**32 else indices

    def __len__(self) -> int:
        return len(self._indices)

    def _inside(self, index: Any) -> Any:
        return self._indices[index]


def hold_out(source: Source, share: float) -> tuple[Source, Source]:
    """Cut a source into a training and a held-out part (at least one sample each), the same for every run.

    With labels that are known beforehand, each class gives its share; none gives all its images.

    Raises:
        ValueError: The source has less than two samples, or classes of one image only.
    """
    if len(source) < 2:
        raise ValueError(f"cannot hold out a share of {len(source)} sample(s); give a val source or set holdout to 0")
    if not (source.num_classes and hasattr(source, "labels")):
        cut = len(source) - min(max(1, round(share * len(source))), len(source) - 1)
        return Part(source, 0, cut), Part(source, cut, len(source))
    classes = by_class(labels_of(source), source.num_classes, _HOLDOUT_KEY)
    # rounding the running total keeps the share of the whole, also where every class is too small for its own
    totals = np.rint(share * np.cumsum([len(members) for members in classes])).astype(int)
    counts = [min(int(n), max(0, len(m) - 1)) for n, m in zip(np.diff(totals, prepend=0), classes, strict=True)]
    if not any(counts):
        largest = max(range(len(classes)), key=lambda label: len(classes[label]))
        counts[largest] = 1
        if len(classes[largest]) < 2:
            raise ValueError("cannot hold out images of classes of one image each: give a val source or set holdout=0")
    chosen = np.zeros(len(source), bool)
    for members, count in zip(classes, counts, strict=True):
        chosen[members[:count]] = True
    return _split(source, chosen)


def hold_out_listed(sources: Sequence[Source], file: Path) -> list[tuple[Source, Source | None]]:
    """Hold out the samples that a `held_out.csv` of an earlier run names; None where a source has none of them.

    Raises:
        ValueError: There is no such file, it has no column `path`, or it names nothing that is there or all samples of
            a source.
        OSError: The file cannot be read.
    """
    if not file.is_file():
        raise ValueError(f"data.holdout: {file} does not exist; give a share below 1, or the held_out.csv of a run")
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        rows = csv.DictReader(lines)
        if "path" not in (rows.fieldnames or []):
            raise ValueError(f"data.holdout: {file} has no column `path`: it must be a held_out.csv of an earlier run")
        names = {row["path"] for row in rows}
    parts: list[tuple[Source, Source | None]] = []
    found: set[str] = set()
    for source in sources:
        of_all = [name_of(source, index) for index in range(len(source))]
        chosen = np.fromiter((name in names for name in of_all), bool, len(of_all))
        found.update(name for name in of_all if name in names)
        if chosen.all():
            raise ValueError(f"data.holdout: {file} lists all {len(source)} images of data.train.{len(parts)}")
        parts.append(_split(source, chosen) if chosen.any() else (source, None))
    if missing := sorted(names - found):
        some = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        text = f"{len(missing)} of the {len(names)} images that {file} lists are not among data.train ({some})"
        if not found:
            raise ValueError(f"data.holdout: {text}; give the sources of the run that wrote it, or a share instead")
        log.warning("held out: %s", text)
    return parts


def _split(source: Source, chosen: npt.NDArray[np.bool_]) -> tuple[Source, Source]:
    return Subset(source, np.flatnonzero(~chosen)), Subset(source, np.flatnonzero(chosen))


def few_labels(source: Source, config: SourceConfig, where: str) -> Source:
    """The source with as many images per class as `shots` or `label_fraction` say, all of it without them.

    Fewer are always among more: the images of `shots: 5` are five of those of `shots: 10`.

    Raises:
        ValueError: There are no labels, or a class has fewer images than `shots`.
    """
    if config.shots is None and config.label_fraction is None:
        return source
    if not source.num_classes:
        key = "shots" if config.shots is not None else "label_fraction"
        raise ValueError(f"{where}.{key} takes images of each class, but this source has no labels")
    classes = by_class(labels_of(source), source.num_classes, seed_of(config.shots_seed))
    names = class_names_of(source)
    few = [f"{name} has {len(m)}" for name, m in zip(names, classes, strict=True) if len(m) < (config.shots or 0)]
    if few:
        raise ValueError(
            f"{where}.shots is {config.shots}, but {len(few)} of {len(classes)} classes have fewer training images:"
            f" {', '.join(few[:10])}{', ...' if len(few) > 10 else ''}; lower shots, or leave these classes out"
        )
    counts = [config.shots or max(1, round((config.label_fraction or 1) * len(members))) for members in classes]
    chosen = np.sort(np.concatenate([members[:n] for members, n in zip(classes, counts, strict=True)]))
    return Subset(source, chosen)
