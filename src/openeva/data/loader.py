"""Batches from sources: seeded, sharded over ranks and workers, resumed at the same sample.

`DataConfig` -> sources -> `TrainLoader` (endless, the micro-batches of one optimizer step at a time) and `EvalLoader`
(each sample once). A worker makes whole micro-batches (`batches.py`, which says what is in one), in the order of
`sampler.py`.
"""

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch.utils.data import DataLoader, Dataset

from openeva.config import Config, Source
from openeva.data.batches import Batch, BatchMaker, EvalBatches, StreamBatches, TrainBatches
from openeva.data.file_index import Progress
from openeva.data.labels import has_captions
from openeva.data.mixture import Mixture, Streams, balanced, open_sources
from openeva.data.sampler import Order, permute, seed_of, seeds_of
from openeva.data.subset import few_labels, hold_out, hold_out_listed
from openeva.data.views import CropConfig, ViewSpec
from openeva.data.workers import resolve_workers

log = logging.getLogger(__name__)

MOST_NAMED = 10_000
"""So many broken files are named; a set of billions of pairs has millions of them, which no memory should hold."""

LATER_CROP_KEYS = {"antialias": True, "jitter_prob": 1.0, "grey_prob": 0.0}
"""Keys of a crop that came later, with what they were before."""

_FEWEST_READS = 1000
"""The share of broken files is judged only after this many reads, or one epoch where that is less."""


class TooManyBrokenError(RuntimeError):
    """More files than allowed could not be read; the message names some of them."""


class DataConfig(Config):
    """Where the images come from and how they become batches.

    Attributes:
        train: Sources of training samples.
        val: Sources of held-out samples.
        holdout: Share of the training samples that is held out instead when `val` is empty, of each class where there
            are labels; the same ones for every seed. Or the `held_out.csv` of an earlier run: the samples listed there.
        balance: How evenly classes are drawn: 0 = as often as they have images, 1 = all alike, 0.5 = like the square
            root of their number of images.
        crop: The training crop.
        val_crop: The crop of held-out samples.
        num_workers: Processes that make batches; 0 = the training process itself, "auto" = by the number of cores.
        prefetch: Batches that each worker keeps ready.
        max_broken: Share of files that may be unreadable before the run stops.
    """

    train: list[Source] = Field(min_length=1)
    val: list[Source] = Field(default_factory=list)
    holdout: Annotated[float, Field(ge=0, lt=1)] | Path = 0.0
    balance: float = Field(0.0, ge=0, le=1)
    crop: CropConfig = CropConfig()
    val_crop: CropConfig = CropConfig(kind="center", hflip=0.0)
    num_workers: int | Literal["auto"] = "auto"
    prefetch: int = Field(2, ge=1)
    max_broken: float = Field(0.01, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.val and self.holdout:
            raise ValueError("give either val sources or a holdout share, not both; with val sources, set holdout=0")
        if isinstance(self.num_workers, int) and self.num_workers < 0:
            raise ValueError("num_workers is 0 or more, or 'auto'")
        return self

    def open(
        self, progress: Progress | None = None, kept: Path | None = None
    ) -> tuple[Mixture | Streams, Mixture | None]:
        """Training and held-out samples; the latter None where neither `val` nor `holdout` is given.

        Args:
            progress: Told about the scan of sources that must be scanned first.
            kept: List of the labelled samples that were held out when the run began, where there is one: they stay so
                when images are added.

        Raises:
            ValueError: A source is empty, or its kind does not allow what is asked.
            OSError: A source is missing.
        """
        train = open_sources(self.train, progress)
        val = open_sources(self.val, progress) if self.val else None
        if isinstance(val, Streams):
            raise ValueError("val sources must be local files, not pipes or URLs: held-out samples are read by number")
        if isinstance(train, Streams):
            self._check_streams()
            return train, self._aligned(val, train)
        sources: list[Any] = train.sources
        if self.holdout:
            sources, val = self._hold_out(train, kept)
        elif val is not None:
            val = Mixture(_few(val.sources, self.val, "data.val"), val.weights)
        train = Mixture(_few(sources, self.train, "data.train"), train.weights)
        return balanced(train, self.balance), self._aligned(val, train)

    def _check_streams(self) -> None:
        if self.holdout:
            raise ValueError("a share of pipes or URLs cannot be held out: set holdout to 0 and give val sources")
        if self.balance:
            raise ValueError("data.balance needs samples that are files: the classes of a stream are not known before")

    def _hold_out(self, train: Mixture, kept: Path | None) -> tuple[list[Any], Mixture]:
        """Training sources without what is held out, and that."""
        by_class = all(source.num_classes and hasattr(source, "labels") for source in train.sources)
        if isinstance(self.holdout, Path):
            parts = hold_out_listed(train.sources, self.holdout)
        elif kept is not None and by_class and kept.is_file():
            parts = hold_out_listed(train.sources, kept)
        else:
            parts = [hold_out(source, self.holdout) for source in train.sources]
        held = [(part, weight) for (_, part), weight in zip(parts, train.weights, strict=True) if part is not None]
        return [part for part, _ in parts], Mixture([part for part, _ in held], [weight for _, weight in held])

    @staticmethod
    def _aligned(val: Mixture | None, train: Mixture | Streams) -> Mixture | None:
        """Labels of the held-out samples count as those of the training samples, where these have all the classes."""
        if val is None or not set(val.class_names) <= set(train.class_names):
            return val
        return val.aligned(train.class_names)

    @property
    def workers(self) -> int:
        """Number of worker processes of this rank."""
        return resolve_workers(self.num_workers)


def _few(sources: list[Any], configs: list[Any], where: str) -> list[Any]:
    """The sources with as many labels as their configs say."""
    return [few_labels(s, c, f"{where}.{n}") for n, (s, c) in enumerate(zip(sources, configs, strict=True))]


# ------------------------------------------------------------------------------------------------------ loaders


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and batch systems signal every process; workers that died of it would fail the run before it can save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_run_says, daemon=True).start()


def _end_when_the_run_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class _Loader:
    """What both loaders share: workers, and the count of broken files.

    Attributes:
        broken: Name -> reason of the files that could not be read so far, of the first `MOST_NAMED` of them.
        num_broken: How often a file could not be read so far.
        num_read: Number of files read so far, broken ones included.
    """

    def __init__(self, num_workers: int, prefetch: int, max_broken: float, fewest_reads: int) -> None:
        self.broken: dict[str, str] = {}
        self.num_read = self.num_broken = 0
        self._num_workers, self._prefetch = num_workers, prefetch
        self._max_broken, self._fewest_reads = max_broken, fewest_reads

    def _load(self, dataset: Dataset[Batch], requests: Iterable[Any] | None) -> Iterator[Batch]:
        """Batches of a data set, one per request, made by the workers and counted here."""
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=requests,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch if self._num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # else it draws from the global one, and a resumed run would see other dropout
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            batches = iter(loader)
        for batch in batches:
            yield self._count(batch)

    def _count(self, batch: Batch) -> Batch:
        reasons: list[tuple[str, str]] = batch["broken"]
        if len(self.broken) < MOST_NAMED:
            self.broken.update(reasons)
        self.num_read += len(batch["index"]) + len(reasons)
        self.num_broken += len(reasons)
        too_many = self.num_read >= self._fewest_reads and self.num_broken > self._max_broken * self.num_read
        if reasons and (too_many or batch.get("unreadable")):
            some = "\n".join(f"  {name}: {reason}" for name, reason in list(self.broken.items())[-20:])
            raise TooManyBrokenError(
                f"{self.num_broken} of {self.num_read} reads failed, more than max_broken={self._max_broken:g} "
                f"allows; remove these files or raise max_broken. {len(self.broken)} files, the last of them:\n{some}"
            )
        batch["broken"] = [name for name, _ in reasons]
        return batch


def _batch_maker(
    source: Mixture | Streams, spec: ViewSpec, crop: CropConfig, *, all_captions: bool = False
) -> BatchMaker:
    """What fills the batches of a loader.

    Raises:
        ValueError: The task reads text, but a source has no captions.
    """
    if spec.tokenizer is not None and not source.has_captions:
        without = [f"{n} ({type(s).__name__})" for n, s in enumerate(source.sources) if not has_captions(s)]
        raise ValueError(
            f"this task reads text, but there are no captions in source {', '.join(without)}; give sources of images"
            " with captions (webdataset, captions, huggingface, scenes with `captions: true`), or leave these out"
        )
    return BatchMaker(spec, crop, all_captions=all_captions)


class TrainLoader(_Loader):
    """Endless training batches, the same whatever the number of workers and however ranks and accumulation share them.

    A global batch is `batch_size * accumulation * world_size` samples long; micro-batch a of rank r is its chunk
    `a * world_size + r`. Two processes thus see the very micro-batches that one process with twice the accumulation
    sees.

    Attributes:
        steps_per_epoch: Optimizer steps per epoch; samples that do not fill a last global batch are dropped.
        samples_per_epoch: Samples used per epoch.
        exact_resume: True = `batches(start_sample)` goes on at the very sample. False for streams (pipes, URLs): they
            start again at the beginning of the epoch, in another order.
    """

    def __init__(
        self,
        source: Mixture | Streams,
        spec: ViewSpec,
        crop: CropConfig,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
        max_broken: float = 0.01,
    ) -> None:
        """Prepare the order; no file is read yet.

        Args:
            source: Where samples come from (`DataConfig.open`).
            spec: What the task wants to see.
            crop: How views are cut.
            batch_size: Samples per micro-batch.
            seed: Seed of order, crops and masks.
            rank: Number of this process.
            world_size: Number of processes.
            accumulation: Micro-batches per process and optimizer step.
            num_workers: Worker processes; 0 = none.
            prefetch: Batches that each worker keeps ready.
            max_broken: Share of unreadable files above which `TooManyBrokenError` is raised.

        Raises:
            ValueError: There are fewer samples than a global batch takes, or no captions where the task reads text.
        """
        self._maker = _batch_maker(source, spec, crop)
        if spec.tokenizer is not None and crop.hflip and not rank:
            log.warning(
                "data.crop.hflip %g mirrors images, whose captions may say left and right or speak of what is written"
                " there; CLIPs are trained with data.crop.hflip=0",
                crop.hflip,
            )
        self._source, self._batch_size, self._accumulation, self._seed = source, batch_size, accumulation, seed
        self._rank, self._world_size = rank, world_size
        self._global_batch = batch_size * accumulation * world_size
        available = (
            sum(source.counts) if isinstance(source, Streams) else len(Order(source.lengths, source.weights, seed))
        )
        self.steps_per_epoch = available // self._global_batch
        self.samples_per_epoch = self.steps_per_epoch * self._global_batch
        self.exact_resume = isinstance(source, Mixture)
        if not self.steps_per_epoch:
            raise ValueError(
                f"{available} samples per epoch do not fill one global batch of {self._global_batch} = {batch_size} x "
                f"{accumulation} micro-batches x {world_size} processes; lower run.batch_size"
                " (and run.micro_batch, where given), or add images"
            )
        super().__init__(num_workers, prefetch, max_broken, min(_FEWEST_READS, available))

    def batches(self, start_sample: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of this rank, one optimizer step at a time, for ever.

        Args:
            start_sample: Samples that all ranks together have consumed before.

        Raises:
            TooManyBrokenError: See `max_broken`.
        """
        requests = self._first_samples(start_sample) if self.exact_resume else None
        step: list[Batch] = []
        for batch in self._load(self._dataset(start_sample), requests):
            step.append(batch)
            if len(step) == self._accumulation:
                yield step
                step = []
        raise ValueError(
            "a stream gives no samples to any reader: check its URLs, or lower num_workers to the number of shards"
        )

    def _dataset(self, start_sample: int) -> Dataset[Batch]:
        if isinstance(self._source, Mixture):
            order = Order(self._source.lengths, self._source.weights, self._seed, self.samples_per_epoch)
            return TrainBatches(self._source, order, self._maker, self._batch_size)
        epoch = start_sample // self.samples_per_epoch
        seed = seed_of(self._seed, start_sample)
        return StreamBatches(self._source, self._maker, self._batch_size, seed, epoch, self._rank, self._world_size)

    def _first_samples(self, start_sample: int) -> Iterator[int]:
        """Number of the first sample of each micro-batch of this rank, for ever."""
        while True:
            for number in range(self._accumulation):
                yield start_sample + (number * self._world_size + self._rank) * self._batch_size
            start_sample += self._global_batch


class EvalLoader(_Loader):
    """Every sample exactly once over all ranks, the same order and masks at each iteration.

    The ranks' shares differ by at most one sample and nothing is padded; so the number of batches may differ too, and
    the last one be smaller. Files that cannot be read are left out and counted.
    """

    def __init__(
        self,
        source: Mixture,
        spec: ViewSpec,
        crop: CropConfig,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        max_broken: float = 0.01,
    ) -> None:
        """See `TrainLoader`; `limit` takes that many samples, chosen at random but always the same."""
        self._source, self._maker = source, _batch_maker(source, spec, crop, all_captions=True)
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.num_samples = len(source) if limit is None else min(limit, len(source))
        """Samples of all ranks together."""
        super().__init__(num_workers, prefetch, max_broken, min(_FEWEST_READS, self.num_samples))

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(range(self._rank, self.num_samples, self._world_size * self._batch_size))

    @property
    def has_videos(self) -> bool:
        """Whether the samples are videos."""
        return self._source.has_videos

    @property
    def class_names(self) -> list[str]:
        """Names of the images' classes by label; empty without labels."""
        return self._source.class_names

    @property
    def identity(self) -> dict[str, Any]:
        """What the pixels depend on, as JSON values: samples (as far as the sources can tell), crop and sizes."""
        # what is off is left out, so that caches of versions that did not have it stay valid
        spec, crop = self._maker.spec, self._maker.crop.model_dump(mode="json", exclude_none=True)
        crop = {key: value for key, value in crop.items() if LATER_CROP_KEYS.get(key) != value}
        sizes = [[*spec.image_size], [*(spec.target_size or ())]]
        clip = {} if spec.clip is None else {"clip": asdict(spec.clip)}
        return {"data": self._source.identity, "crop": crop, "sizes": sizes, **clip}

    def seen_as(self, spec: ViewSpec) -> "EvalLoader":
        """The same samples of this process in another view."""
        return EvalLoader(
            self._source, spec, self._maker.crop, batch_size=self._batch_size, rank=self._rank,
            world_size=self._world_size, limit=self.num_samples, num_workers=self._num_workers,
            prefetch=self._prefetch, max_broken=self._max_broken,
        )  # fmt: skip

    def part(self, *, limit: int | None = None, rank: int = 0, world_size: int = 1) -> "EvalLoader":
        """The same views of some of the samples: of `limit` ones (a seeded choice), the share of one process."""
        return EvalLoader(
            self._source, self._maker.spec, self._maker.crop, batch_size=self._batch_size, rank=rank,
            world_size=world_size, limit=min(limit or self.num_samples, self.num_samples),
            num_workers=self._num_workers, prefetch=self._prefetch, max_broken=self._max_broken,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._load(EvalBatches(self._source, self._maker), self._requests()):
            if len(batch["index"]):
                yield batch

    def _requests(self) -> Iterator[list[int]]:
        """Samples of each batch, one batch at a time: a list of all would take gigabytes for 30 million samples."""
        for first in range(self._rank, self.num_samples, step := self._world_size * self._batch_size):
            mine = np.arange(first, min(first + step, self.num_samples), self._world_size)
            if self.num_samples < len(self._source):
                mine = permute(mine, len(self._source), seeds_of(0, np.zeros_like(mine)))
            yield mine.tolist()
