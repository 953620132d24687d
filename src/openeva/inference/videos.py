"""Actions with times: a video is divided into windows of some seconds, and each is answered as one clip.

videos -> `find_videos` -> windows of equal length -> frames in the middle of T segments of each (threads, one per
video) -> the model's own evaluation view -> a batch of windows, over videos -> a `Segment` per window -> a
`VideoPrediction` per video, in which adjacent windows of one class are one action

A window is as long as the clips of Kinetics (10 s), which models of actions have learnt from: frames of a longer one
would lie further apart than any they saw. Windows are next to each other and cover the whole video, so that their
number is the rounded quotient and their length at least three quarters of what was asked for; what is shorter than one
and a half windows is one window, and then the model sees just what it sees in an evaluation. Of a video only the frames
of one window are in memory, and the window after it is read while the model is busy.

A model of images answers for frames of videos, with the same windows and the mean of its answers over their frames.

Source: spec section 3.3 of video (frames), 3.5 (views, of which probabilities are averaged) and 6 (a CLIP on frames).
"""

import random
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import groupby, islice, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from openeva.data.clips import ClipSpec
from openeva.data.transform import Transform
from openeva.data.video import Frames, Video, decoder_problem
from openeva.heads.classifier import mean_of_views
from openeva.inference.inputs import Input, find_videos, reason_of
from openeva.inference.predictor import Embedding, HeatMap, Prediction, Predictor, Wanted, embeddings_of
from openeva.inference.texts import TextClassifier

WINDOW_SECONDS = 10.0
MAX_READERS = 8
"""Videos that are read at the same time, each with the frames of a window in memory; no more than `num_readers`."""
MOST_VIEWS = 8
"""Windows of a video whose frames are kept where a map is asked for: those that the model is most certain of."""
SHORT_SECONDS = 5.0
"""Times of what is shorter are told with tenths of a second."""
_INSTANT = 1e-6
"""Seconds; times are not exact in binary."""


def why_videos(predictor: Predictor) -> str:
    """Why images will not do, where a predictor answers for videos."""
    if predictor.num_frames is None:
        return "frames of videos are asked for; leave out --frames (num_frames in Python)"
    return (
        f"these weights see videos (clips of {predictor.num_frames} frames); give videos, or weights of an image model"
    )


@dataclass(frozen=True)
class Windows:
    """How videos are divided, and in how many views each window is seen; the answer is the mean of theirs.

    Attributes:
        seconds: About how long a window is.
        num_clips: Clips that take other frames of the window.
        num_crops: 1 = the centre; 3 = left, middle and right of the whole shorter side (top to bottom of a portrait
            video).
        num_frames: For a model of images: so many evenly spaced frames of each window. Video models know theirs.

    Raises:
        ValueError: A value is out of range.
    """

    seconds: float = WINDOW_SECONDS
    num_clips: int = 1
    num_crops: int = 1
    num_frames: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"a window of {self.seconds:g} seconds: give a number above 0, such as {WINDOW_SECONDS:g}")
        if self.num_clips < 1 or (self.num_frames is not None and self.num_frames < 1):
            raise ValueError(f"{self.num_clips} clips of {self.num_frames} frames: at least 1 of each is needed")
        if self.num_crops not in {1, 3}:
            raise ValueError(f"{self.num_crops} crops: 1 is the centre, 3 are left, middle and right")

    @classmethod
    def asked(cls, **values: Any) -> "Windows | None":
        """With the values that are not None; None where all are.

        Raises:
            ValueError: As the constructor.
        """
        given = {key: value for key, value in values.items() if value is not None}
        return cls(**given) if given else None

    def edges(self, duration: float) -> list[tuple[float, float]]:
        """First and last second of each window of a video: of equal length, next to each other."""
        number = max(1, int(duration / self.seconds + 0.5))
        edges = [duration * i / number for i in range(number + 1)]
        return list(pairwise(edges))


@dataclass(frozen=True)
class Segment(Prediction):
    """What a model says about a part of a video: a window, or several of one action.

    Attributes:
        start: Seconds from the first frame.
        end: The same.
        times: When each frame of `view` is shown, in seconds.
        view: Where a map was asked for, frames that the model saw, uint8 `[S, Y, X, 3]`, one for each time slot of the
            map; of several clips those of the middle one. Only of the `MOST_VIEWS` windows that the model is most
            certain of, so that a film needs no more memory than a clip.
        heat: Their map, `[S, y, x]`.
    """

    start: float = 0.0
    end: float = 0.0
    times: tuple[float, ...] = ()

    @property
    def span(self) -> str:
        """Its times for people, such as "0:10-0:20"; of short ones with tenths of a second."""
        tenths = self.end - self.start < SHORT_SECONDS
        return f"{clock(self.start, tenths=tenths)}-{clock(self.end, tenths=tenths)}"


@dataclass(frozen=True)
class VideoPrediction(Prediction):
    """What a model says about one video.

    Attributes:
        top: Of the whole video, the mean over its windows.
        embedding: The mean over its windows.
        duration: Seconds.
        segments: Its windows, in order.
        actions: The same with adjacent windows of one class joined, their probabilities averaged; none without a
            classifier.
    """

    duration: float = 0.0
    segments: tuple[Segment, ...] = field(default=(), repr=False)
    actions: tuple[Segment, ...] = ()


def answers(
    predictor: Predictor, videos: Input | Iterable[Input], wanted: Wanted, windows: Windows
) -> Generator[VideoPrediction, None, None]:
    """Answer for videos in their order; a broken one gets an `error`.

    Args:
        predictor: Of videos, or of images where `windows.num_frames` is given.
        videos: See `find_videos`.
        wanted: What to find out beside the classes; checked by the predictor.
        windows: How to divide and look.

    Raises:
        ValueError: The windows do not fit the model, or an address leads to no video.
        ImportError: PyAV is missing.
    """
    look = _Look.of(predictor, windows)
    if wanted.patches:
        raise ValueError("a video has too many patches to write; leave out --patches (patches=True in Python)")
    if problem := decoder_problem("pyav"):
        raise ImportError(problem)
    return _answers(predictor, find_videos(videos, why_videos(predictor)), wanted, look)


@dataclass(frozen=True)
class _Look:
    """What of a window the model sees.

    Attributes:
        windows: How videos are divided.
        clips: Frames of a window.
        of_images: The model sees one frame at a time.
        transform: Crop and size.
    """

    windows: Windows
    clips: ClipSpec
    of_images: bool
    transform: Transform

    @classmethod
    def of(cls, predictor: Predictor, windows: Windows) -> "_Look":
        num_frames, of_images = predictor.num_frames, predictor.num_frames is None
        if num_frames is None:
            if windows.num_frames is None:
                raise ValueError(
                    "windows are of videos, but these weights see images; say how many frames of each window to look "
                    "at: --frames 8 (Windows(num_frames=8) in Python)"
                )
            if windows.num_clips != 1:
                raise ValueError("clips are for video models; for these weights, which see images, give more --frames")
            num_frames = windows.num_frames
        elif windows.num_frames not in {None, num_frames}:
            raise ValueError(f"these weights see clips of {num_frames} frames; --frames is for models of images")
        clips = ClipSpec(num_frames, num_clips=windows.num_clips, num_crops=3 if windows.num_crops == 3 else 1)
        return cls(windows, clips, of_images, predictor.transform)

    @property
    def middle(self) -> int:
        """The clip whose frames are shown."""
        return self.clips.num_clips // 2

    @property
    def shown(self) -> list[int]:
        """Views that are shown: the clip in the middle, or all frames, in the middle crop."""
        num_crops, num_clips = self.clips.num_crops, self.clips.num_clips
        if self.of_images:
            return list(range((num_crops - 1) * self.clips.num_frames, num_crops * self.clips.num_frames))
        return [(num_crops - 1) * num_clips + self.middle]

    def views(self, frames_TYXC: Frames) -> UInt8[Tensor, "W *T 3 Y X"]:
        """All views of a window's frames, crop by crop, then clip by clip (for a model of images frame by frame)."""
        crop, size = self.transform.crop, self.transform.image_size
        if self.clips.num_crops > 1:
            view_TCYX = crop.three_cuts(frames_TYXC, size).flatten(0, 1)
        else:
            rows, columns = frames_TYXC.shape[1:3]
            view_TCYX = crop.cut(frames_TYXC, crop.draw(rows, columns, random.Random(0), size), size)
        return view_TCYX if self.of_images else view_TCYX.unflatten(0, (self.clips.num_views, self.clips.num_frames))


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class _Window:
    """A window that was read.

    Attributes:
        start: Seconds.
        end: Seconds.
        times: Of the frames that would be shown.
        views: `[W, *T, 3, Y, X]`.
    """

    start: float
    end: float
    times: Sequence[float]
    views: UInt8[Tensor, "W *T 3 Y X"]


def _windows_of(video: Video, book: "_Book", look: _Look) -> Iterator[_Window]:
    """Windows with the frames that are on screen in them, at least one each."""
    with video.opened() as opened:
        book.duration = opened.duration
        edges = look.windows.edges(opened.duration)
        for number, (start, end) in enumerate(edges, start=1):
            is_last, first = number == len(edges), opened.at(start)
            stop = opened.num_frames if is_last else int(np.searchsorted(opened.times, end - _INSTANT))
            index_CT = first + look.clips.indices(max(1, stop - first), random.Random(0))
            views = look.views(opened.frames(index_CT.flatten()))
            yield _Window(start, end, opened.times[index_CT[look.middle]].tolist(), views)


def _next(windows: Iterator[_Window]) -> _Window | str | None:
    """The next window, why there is none, or None after the last."""
    try:
        return next(windows, None)
    except (OSError, ValueError) as error:  # frames that change their size cannot be stacked
        return reason_of(error)


def _read(
    videos: Iterable[Video], look: _Look, num_readers: int
) -> Generator[tuple["_Book", _Window | str | None], None, None]:
    """Windows of all videos in order, each video with what `_next` says at its end; one window each is read ahead."""
    waiting: deque[tuple[_Book, Iterator[_Window], Future[_Window | str | None]]] = deque()
    left = iter(videos)
    with ThreadPoolExecutor(num_readers, thread_name_prefix="openeva-read") as pool:
        try:
            while True:
                for video in islice(left, num_readers - len(waiting)):
                    book = _Book(video.name)
                    windows = _windows_of(video, book, look)
                    waiting.append((book, windows, pool.submit(_next, windows)))
                if not waiting:
                    return
                book, windows, future = waiting[0]
                window = future.result()
                if isinstance(window, _Window):
                    waiting[0] = book, windows, pool.submit(_next, windows)
                else:
                    waiting.popleft()
                yield book, window
        finally:  # the caller stopped early: nothing more is read for nobody
            pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------- answering


@dataclass
class _Book:
    """What is known of a video while it is answered.

    Attributes:
        source: Its name.
        duration: Seconds.
        segments: Windows that are answered, with their logits.
        num_read: Windows that were read.
        is_read: No more come.
        error: Why.
    """

    source: str
    duration: float = 0.0
    segments: list[tuple[Segment, Tensor | None]] = field(default_factory=list)
    num_read: int = 0
    is_read: bool = False
    error: str | None = None

    @property
    def is_complete(self) -> bool:
        return self.error is not None or (self.is_read and self.num_read == len(self.segments))

    def take(self, segment: Segment, logits_V: Tensor | None) -> None:
        """Keep an answer; of many, only some with their frames."""
        self.segments.append((segment, logits_V))
        seen = [i for i, (one, _) in enumerate(self.segments) if one.view is not None]
        if len(seen) > MOST_VIEWS:
            least = min(seen, key=lambda i: self.segments[i][0].top[0].probability)
            self.segments[least] = replace(self.segments[least][0], view=None, heat=None), self.segments[least][1]

    def prediction(self, predictor: Predictor) -> VideoPrediction:
        """The answer for the whole."""
        if self.error is not None:
            return VideoPrediction(self.source, error=self.error)
        segments = [segment for segment, _ in self.segments]
        embeddings = [segment.embedding for segment in segments if segment.embedding is not None]
        known = [(segment, logits_V) for segment, logits_V in self.segments if logits_V is not None]
        return VideoPrediction(
            self.source,
            _guesses(predictor, [logits_V for _, logits_V in known]) if known else (),
            embedding=_mean_embedding(embeddings) if embeddings else None,
            duration=self.duration,
            segments=tuple(segments),
            actions=tuple(self._actions(predictor, known)),
        )

    def _actions(self, predictor: Predictor, known: Sequence[tuple[Segment, Tensor]]) -> Iterator[Segment]:
        for _, group in groupby(known, key=lambda one: one[0].top[0].index):
            parts = list(group)
            start, end = parts[0][0].start, parts[-1][0].end
            top = _guesses(predictor, [logits_V for _, logits_V in parts])
            yield Segment(_name(self.source, start, end), top, start=start, end=end)


def _answers(
    predictor: Predictor, videos: Iterable[Video], wanted: Wanted, look: _Look
) -> Generator[VideoPrediction, None, None]:
    size = max(1, predictor.batch_size // (1 if look.of_images else look.clips.num_frames))
    books: deque[_Book] = deque()
    batch: list[tuple[_Book, _Window]] = []
    with closing(_read(videos, look, min(MAX_READERS, predictor.num_readers))) as windows:
        for book, window in windows:
            if not books or books[-1] is not book:
                books.append(book)
            if isinstance(window, _Window):
                book.num_read += 1
                batch.append((book, window))
            else:
                book.is_read, book.error = True, window
            if len(batch) == size:
                _answer(predictor, batch, wanted, look)
                batch = []
            while books and books[0].is_complete:
                yield books.popleft().prediction(predictor)
    if batch := [(book, window) for book, window in batch if book.error is None]:
        _answer(predictor, batch, wanted, look)
    yield from (book.prediction(predictor) for book in books)


def _answer(predictor: Predictor, batch: Sequence[tuple[_Book, _Window]], wanted: Wanted, look: _Look) -> None:
    """One forward pass per view of the windows of a batch."""
    view_WB = torch.stack([window.views for _, window in batch], dim=1)
    logits: list[Tensor] = []
    embeddings: list[list[Embedding]] = []
    for view in view_WB:
        pooled_BD, logits_BV, features = predictor.see(view, wanted.layers)
        if logits_BV is not None:
            logits.append(logits_BV)
        if wanted.embedding:
            embeddings.append(list(embeddings_of(pooled_BD, features, wanted)))
    mean_BV = _mean(predictor, torch.stack(logits)) if logits else None
    top = [()] * len(batch) if mean_BV is None else predictor.guesses(mean_BV)
    heats: list[list[HeatMap]] = []
    if wanted.map and mean_BV is not None:
        heats = [predictor.explain(view_WB[i], mean_BV.argmax(dim=1), wanted.map) for i in look.shown]
    for row, (book, window) in enumerate(batch):
        name = _name(book.source, window.start, window.end)
        segment = Segment(name, top[row], start=window.start, end=window.end)
        if embeddings:
            segment = replace(segment, embedding=_mean_embedding([view[row] for view in embeddings]))
        if heats:
            segment = _with_map(segment, window, [heat[row] for heat in heats], look)
        book.take(segment, None if mean_BV is None else mean_BV[row].cpu())


def _with_map(segment: Segment, window: _Window, heats: Sequence[HeatMap], look: _Look) -> Segment:
    """A segment with one frame for each time slot of its map."""
    shown = window.views[look.shown]
    frame_TCYX = shown if look.of_images else shown[0]
    values = np.stack([heat.values for heat in heats]) if look.of_images else heats[0].values
    tubelet = len(frame_TCYX) // len(values)
    chosen = slice((tubelet - 1) // 2, None, tubelet)
    return replace(
        segment,
        view=frame_TCYX[chosen].permute(0, 2, 3, 1).numpy(),
        heat=HeatMap(values, heats[0].meaning),
        times=tuple(window.times[chosen]),
    )


def _mean(predictor: Predictor, logits: Float[Tensor, "W *B V"]) -> Float[Tensor, "*B V"]:
    """Logits of several views or windows together: probabilities are averaged; of texts cosines, as in evaluations."""
    if isinstance(predictor.model, TextClassifier):
        return logits.mean(dim=0)
    return mean_of_views(logits)


def _guesses(predictor: Predictor, logits: Sequence[Float[Tensor, "V"]]) -> Any:
    return predictor.guesses(_mean(predictor, torch.stack(list(logits)))[None])[0]


def _mean_embedding(embeddings: Sequence[Embedding]) -> Embedding:
    """The mean over views or windows, without patches."""

    def mean(values: Iterable[Any]) -> Any:
        return np.mean(list(values), axis=0, dtype=np.float32)

    layers = {layer: mean(one.layers[layer] for one in embeddings) for layer in embeddings[0].layers}
    return Embedding(mean(one.pooled for one in embeddings), None, layers, embeddings[0].grid)


def clock(seconds: float, *, tenths: bool = False) -> str:
    """A time as players show it: "1:05", "1:02:03", "0:01.5"."""
    units = round(seconds * 10) if tenths else round(seconds)
    whole, tenth = divmod(units, 10) if tenths else (units, 0)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    start = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{start}:{rest:02}" + (f".{tenth}" if tenths else "")


def _name(source: str, start: float, end: float) -> str:
    return f"{source} {start:.1f}-{end:.1f}"
