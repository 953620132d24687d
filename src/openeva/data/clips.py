"""Which frames of a video a model sees.

number of frames L -> one frame per segment, T segments: `random_indices` (training), `central_indices` (one view),
`clip_indices` (several clips for a test) -> int64 `[T]` or `[C, T]`

A clip always spans the whole video; there is no stride.

Source: spec section 3.3 of video. Difference: the clips of a test take other places of the segments each, always the
same; the official ones are drawn at random without a seed, because a flag is lost (quirk 5): `official_random`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from openeva.config import Config

Indices = npt.NDArray[np.int64]
Sampling = Literal["random", "central", "official_random"]


class ViewsConfig(Config):
    """In how many views a video is seen when it is measured; the answer is the mean of theirs.

    Attributes:
        num_clips: Clips that take other frames of the video.
        num_crops: 1 = the centre; 3 = left, right and middle of the whole shorter side (top, bottom and middle of a
            portrait video).
        sampling: Frames of a clip: "central" = in the middle of each segment, several clips evenly around it;
            "official_random" = one of each segment by chance, as the tests of the paper had it.
        seed: Another one, other draws.
        shuffled: Frames in random order: what a model still knows then, it does not know from time.
    """

    num_clips: int = Field(1, gt=0)
    num_crops: Literal[1, 3] = 1
    sampling: Literal["central", "official_random"] = "central"
    seed: int = Field(0, ge=0)
    shuffled: bool = False

    def spec(self, num_frames: int) -> "ClipSpec":
        """For a model of clips of so many frames."""
        return ClipSpec(num_frames, self.sampling, self.num_clips, self.num_crops, self.shuffled, self.seed)


@dataclass(frozen=True)
class ClipSpec:
    """What a task wants to see of each video.

    Attributes:
        num_frames: T, frames per clip.
        sampling: "random" = a frame of each segment by chance (training); "central" = those in the middle of the
            segments, several clips evenly around it; "official_random" = as "random", for the tests of the paper.
        num_clips: C, clips per video.
        num_crops: 1, or 3 = left, right and middle of a landscape video (top, bottom and middle of a portrait one).
        shuffled: Frames of a clip in random order: what a model still knows then, it does not know from time.
        seed: Of what is drawn, beside that of the sample.
    """

    num_frames: int
    sampling: Sampling = "central"
    num_clips: int = 1
    num_crops: Literal[1, 3] = 1
    shuffled: bool = False
    seed: int = 0

    @property
    def num_views(self) -> int:
        """Crops times clips."""
        return self.num_clips * self.num_crops

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes of a sample before its channels: (views, frames), or (frames) for one view."""
        return (self.num_frames,) if self.num_views == 1 else (self.num_views, self.num_frames)

    def indices(self, length: int, rng: random.Random) -> Indices:
        """Frames `[C, T]` of a video of `length` frames."""
        if self.sampling == "central":
            indices = clip_indices(length, self.num_frames, self.num_clips)
        else:
            indices = np.stack([random_indices(length, self.num_frames, rng) for _ in range(self.num_clips)])
        if self.shuffled:
            for clip in indices:
                order = list(range(self.num_frames))
                rng.shuffle(order)
                clip[:] = clip[order]
        return indices


def random_indices(length: int, num_frames: int, rng: random.Random) -> Indices:
    """One frame of each of `num_frames` segments, by chance; the last `length % num_frames` frames are never taken."""
    segment = length // num_frames
    return segment_indices(length, num_frames, [rng.randrange(segment) if segment else 0 for _ in range(num_frames)])


def segment_indices(length: int, num_frames: int, draws: Sequence[int] | Indices) -> Indices:
    """As `random_indices`, with the place within each segment given.

    A video of fewer frames than wanted is stretched, without chance.
    """
    numbers, segment = np.arange(num_frames), length // num_frames
    if segment:
        return numbers * segment + np.asarray(draws, np.int64)
    # PARITY: what is rounded up to the length wraps to the first frame
    return np.round(numbers * length / num_frames).astype(np.int64) % length


def central_indices(length: int, num_frames: int) -> Indices:
    """The middle frames of `num_frames` segments."""
    return clip_indices(length, num_frames, 1)[0]


def clip_indices(length: int, num_frames: int, num_clips: int) -> Indices:
    """`num_clips` clips `[C, T]`: clip c takes the frame after a share of `(c + 1/2) / C` of each segment."""
    segment = length / num_frames
    offsets = (np.arange(num_clips) + 0.5) / num_clips * segment
    places = np.arange(num_frames)[None, :] * segment + offsets[:, None]
    return places.astype(np.int64) % length
