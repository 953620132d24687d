"""Samples to batches, inside the workers: read -> decode -> cut (`views`) -> augment -> mask -> one row.

numbers of samples -> `sources` -> `TrainBatches`, `EvalBatches` or `StreamBatches` -> a batch, a dict:
    image: uint8 `[B, 3, Y, X]`, not normalised; of clips `[B, T, 3, Y, X]`, and `[B, V, T, 3, Y, X]` where a video is
        seen in several views (crops times clips, crop by crop).
    target_image: uint8 `[B, 3, Y', X']`, the same crop at the target's size; only where the sizes differ.
    mask: bool `[B, N]`, true = masked (this and the next two only with masking).
    masked_index: int64 `[B * max_masked]`, positions of the masked patches among all `B * N`, sample by sample in
        raster order, then zeros: the shape does not depend on the masks, so that no device has to be asked for it.
    masked_weight: float32 of the same length, 1 for masked patches and 0 for the padding.
    index: int64 `[B]`, number of the sample in the concatenated sources (-1 for streams).
    flip: bool `[B]`, true = mirrored.   label: int64 `[B]`, -1 where there is none.
    text: int64 `[B, L]`, token ids of one caption per sample, L as short as they allow (this and the next only with a
        tokenizer): drawn anew for each time the sample is seen, for evaluation always its first.
    captions: all captions of each sample, a list of lists; only in batches for evaluation.
    name: names of the samples, such as paths; only in batches for evaluation.
    broken: names of the files that could not be read, and of pairs without a caption, while this batch was made.

Source: as in the official reader, a broken file is replaced by a random other sample with that sample's own label, and
an image without a caption counts as broken where captions are read (spec of EVA-CLIP, section 2.6).
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from openeva.data.clips import ClipSpec
from openeva.data.decode import RGB, decode, to_rgb
from openeva.data.mixture import Mixture, Streams
from openeva.data.sampler import Order, seed_of, seeds_of
from openeva.data.sources.base import Sample
from openeva.data.video import Video, VideoError
from openeva.data.views import Crop, CropConfig, ViewSpec

Batch = dict[str, Any]

_REPLACEMENTS = 32
"""So many broken files in a row for one place in a batch mean that nothing can be read."""

_BROKEN_IN_STREAM = 1000
"""The same for a stream, whose samples come as they lie: a whole shard may be without captions."""

_CAPTION_KEY = 0x7E87
"""Which caption is drawn must not change the crop, and the other way round."""


class NoCaptionError(OSError):
    """A sample has no caption but the task reads text: a broken pair, counted like a broken file."""


class BatchMaker:
    """Fills batches row by row; lives in the workers.

    Args:
        spec: What the task wants to see.
        crop: How views are cut.
        all_captions: True = batches hold all captions, and the text is the first; False = the text is one of them,
            drawn.
    """

    def __init__(self, spec: ViewSpec, crop: CropConfig, *, all_captions: bool = False) -> None:
        if spec.second_size and crop.randaugment:
            raise ValueError(
                "crop.randaugment would change what the model sees but not what its target sees: remove it"
            )
        if spec.clip and crop.randaugment:
            raise ValueError("crop.randaugment is for images, not for clips; use color_jitter and grey_prob")
        self.spec, self.crop, self._all_captions = spec, crop, all_captions
        if spec.tokenizer is not None:
            spec.tokenizer([""])  # reads its vocabulary now, once for all workers that are forked later

    def empty(self, size: int) -> Batch:
        """Arrays for `size` samples."""
        frames = () if self.spec.clip is None else self.spec.clip.shape
        batch: Batch = {"image": torch.empty(size, *frames, 3, *self.spec.image_size, dtype=torch.uint8)}
        if second_size := self.spec.second_size:
            batch["target_image"] = torch.empty(size, 3, *second_size, dtype=torch.uint8)
        if self.spec.masking is not None:
            batch["mask"] = torch.zeros(size, *self.spec.masking.grid, dtype=torch.bool)
        batch["index"] = torch.full((size,), -1)
        batch["flip"] = torch.zeros(size, dtype=torch.bool)
        batch["label"] = torch.full((size,), -1)
        if self.spec.tokenizer is not None:
            batch["text"] = [""] * size
            if self._all_captions:
                batch["captions"] = [[]] * size
        batch["broken"] = []
        return batch

    def put(self, batch: Batch, row: int, sample: Sample, index: int, seed: int) -> None:
        """Decode, cut and mask one sample; all chance comes from `seed`.

        Raises:
            OSError: The image cannot be decoded, or has no caption where one is read.
        """
        captions = [] if self.spec.tokenizer is None else _captions_of(sample)
        rng = random.Random(seed)
        if self.spec.clip is not None:
            rng = random.Random(seed_of(seed, clip_seed)) if (clip_seed := self.spec.clip.seed) else rng
            batch["image"][row] = self._clip(sample, self.spec.clip, rng)
            crop = None
        else:
            crop = self._put_image(batch, row, sample, rng)
        if self.spec.masking is not None:
            batch["mask"][row] = torch.from_numpy(self.spec.masking(rng))
        batch["index"][row] = index
        batch["flip"][row] = crop is not None and crop.flip
        batch["label"][row] = sample.label
        if self._all_captions and captions:
            batch["captions"][row], batch["text"][row] = captions, captions[0]
        elif captions:
            batch["text"][row] = captions[seed_of(seed, _CAPTION_KEY) % len(captions) if len(captions) > 1 else 0]

    def _put_image(self, batch: Batch, row: int, sample: Sample, rng: random.Random) -> Crop:
        image_YXC = pixels_of_sample(sample)
        crop = self.crop.draw(image_YXC.shape[0], image_YXC.shape[1], rng, self.spec.image_size)
        image_YXC = self.crop.jitter(image_YXC, rng)
        view_CYX = self.crop.cut(image_YXC, crop, self.spec.image_size)
        batch["image"][row] = self.crop.augment(view_CYX, self.spec.mean, rng)
        if second_size := self.spec.second_size:
            batch["target_image"][row] = self.crop.cut(image_YXC, crop, second_size)
        return crop

    def _clip(self, sample: Sample, clip: ClipSpec, rng: random.Random) -> UInt8[Tensor, "*V T 3 Y X"]:
        """All views of a video: the frames that they need are decoded once."""
        if not isinstance(sample.image, Video):
            raise VideoError("an image, but this task sees videos", sample.name)
        with sample.image.opened() as video:
            indices = clip.indices(video.num_frames, rng)
            frames_TYXC = video.frames(indices.flatten())
        if clip.num_crops > 1:  # crop by crop, then clip by clip
            view_VTCYX = self.crop.three_cuts(frames_TYXC, self.spec.image_size).flatten(0, 1)
            return view_VTCYX.unflatten(0, clip.shape)
        height, width = frames_TYXC.shape[1:3]
        crop = self.crop.draw(height, width, rng, self.spec.image_size)
        view_TCYX = self.crop.cut(frames_TYXC, crop, self.spec.image_size)
        if self.crop.color_jitter or self.crop.grey_prob:
            jittered = self.crop.jitter(view_TCYX.movedim(-3, -1).numpy(), rng)
            view_TCYX = torch.from_numpy(jittered).movedim(-1, -3)
        return view_TCYX.unflatten(0, clip.shape)

    def finish(self, batch: Batch, num_rows: int) -> Batch:
        """Cut a batch to the rows that were filled, tokenise its texts and list the masked patches."""
        rows = {"text", "captions"}
        batch = {k: v[:num_rows] if k in rows or isinstance(v, Tensor) else v for k, v in batch.items()}
        if self.spec.tokenizer is not None:
            batch["text"] = self.spec.tokenizer(batch["text"])
        if self.spec.masking is None:
            return batch
        batch["mask"] = batch["mask"].flatten(1)
        masked = batch["mask"].flatten().nonzero()[:, 0]
        length = num_rows * self.spec.masking.max_masked
        batch["masked_index"] = torch.zeros(length, dtype=torch.int64)
        batch["masked_index"][: len(masked)] = masked
        batch["masked_weight"] = (torch.arange(length) < len(masked)).float()
        return batch


def pixels_of_sample(sample: Sample) -> RGB:
    """RGB pixels of a sample; of a video, the frame in its middle.

    Raises:
        OSError: It cannot be decoded.
    """
    if isinstance(sample.image, Video):
        return np.array(sample.image.middle())
    return decode(sample.image) if isinstance(sample.image, bytes) else to_rgb(sample.image)


def _captions_of(sample: Sample) -> list[str]:
    """Captions of a sample, without those that say nothing.

    Raises:
        NoCaptionError: None is left.
    """
    captions = [caption for caption in (sample.extra or {}).get("captions", ()) if caption.strip()]
    if not captions:
        raise NoCaptionError("no caption for this image, or an empty one")
    return captions


def _broken(error: OSError, fallback: str) -> tuple[str, str]:
    """Name and reason of a file that cannot be read."""
    return str(error.filename or fallback), error.strerror or str(error)


class TrainBatches(Dataset[Batch]):
    """Micro-batches by the number of their first sample in the run."""

    def __init__(self, mixture: Mixture, order: Order, maker: BatchMaker, batch_size: int) -> None:
        self._mixture, self._order, self._maker, self._size = mixture, order, maker, batch_size

    def __getitem__(self, first: int) -> Batch:
        epochs, positions, indices = self._order.locate(np.arange(first, first + self._size))
        seeds = seeds_of(seed_of(self._order.seed, -1), epochs, positions)
        batch = self._maker.empty(self._size)
        for row, (index, seed) in enumerate(zip(indices.tolist(), seeds.tolist(), strict=True)):
            self._put_or_replace(batch, row, index, seed)
        return self._maker.finish(batch, self._size)

    def _put_or_replace(self, batch: Batch, row: int, index: int, seed: int) -> None:
        for attempt in range(_REPLACEMENTS):
            name = f"sample {index}"
            try:
                sample = self._mixture.read(index)
                name = sample.name
                self._maker.put(batch, row, sample, index, seed)
                return
            except OSError as error:
                batch["broken"].append(_broken(error, name))
            index = seed_of(seed, attempt) % len(self._mixture)
        batch["image"][row] = 0  # never trained on: the loader stops at `unreadable`
        batch["unreadable"] = True


class EvalBatches(Dataset[Batch]):
    """Batches by the list of their samples; what cannot be read is left out."""

    def __init__(self, mixture: Mixture, maker: BatchMaker) -> None:
        self._mixture, self._maker = mixture, maker

    def __getitem__(self, indices: list[int]) -> Batch:
        batch: Batch = {**self._maker.empty(len(indices)), "name": []}
        row = 0
        for index in indices:
            name = f"sample {index}"
            try:
                sample = self._mixture.read(index)
                name = sample.name
                self._maker.put(batch, row, sample, index, seed_of(index))
                batch["name"].append(name)
                row += 1
            except OSError as error:
                batch["broken"].append(_broken(error, name))
        return self._maker.finish(batch, row)


class StreamBatches(IterableDataset[Batch]):
    """Micro-batches of one reader (rank x worker) of streams, endless."""

    def __init__(
        self, streams: Streams, maker: BatchMaker, batch_size: int, seed: int, epoch: int, rank: int, world_size: int
    ) -> None:
        self._streams, self._maker, self._size = streams, maker, batch_size
        self._seed, self._epoch, self._rank, self._world_size = seed, epoch, rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        num_workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        part, num_parts = self._rank * num_workers + number, self._world_size * num_workers
        samples = [self._endless(number, part, num_parts) for number in range(len(self._streams.sources))]
        rng = random.Random(seed_of(self._seed, part))
        batch, row, in_a_row = self._maker.empty(self._size), 0, 0
        while True:
            sample = next(rng.choices(samples, self._streams.counts)[0], None)
            if sample is None:
                return
            try:
                self._maker.put(batch, row, sample, -1, rng.getrandbits(64))
                row, in_a_row = row + 1, 0
            except OSError as error:
                batch["broken"].append(_broken(error, sample.name))
                in_a_row += 1
            if in_a_row == _BROKEN_IN_STREAM:
                batch["unreadable"] = True  # the loader stops here, instead of looking for a sample for ever
            if row == self._size or "unreadable" in batch:
                yield self._maker.finish(batch, row)
                batch, row = self._maker.empty(self._size), 0

    def _endless(self, number: int, part: int, num_parts: int) -> Iterator[Sample]:
        """Epoch after epoch of one stream; ends where an epoch has nothing for this reader."""
        epoch, some = self._epoch, True
        while some:
            some = False
            stream = self._streams.sources[number].stream
            for sample in stream(epoch=epoch, seed=seed_of(self._seed, number), part=part, num_parts=num_parts):
                some = True
                yield sample
            epoch += 1
