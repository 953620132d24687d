"""Videos, read frame by frame: the times of all frames first, then only the frames that are asked for.

path or bytes -> `Video` (a name; nothing is read) -> `opened` -> times of its frames -> `frames([3, 40, 77])`: uint8
RGB `[T, Y, X, 3]`, upright

Frames are numbered in the order in which they are shown. The numbers come from the packets, which are read without
decoding, so that the frame rate may vary and headers may lie; decoding starts at the last key frame before each wanted
frame. Never more than the wanted frames are in memory.

Source: spec section 3 of video (frames by number, as decord counts them) and quirk 10 (one frame at a time through a
decoder that cannot skip).
"""

import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from openeva.data.decode import RGB

VIDEO_EXTENSIONS = ("mp4", "avi", "mkv", "webm", "mov", "m4v", "mpg", "mpeg", "wmv", "flv", "3gp")

Decoder = Literal["pyav", "torchcodec"]
Frames = npt.NDArray[np.uint8]
"""`[T, Y, X, 3]`."""

MISSING_SHARE = 0.02
"""So many frames of those that the header counts may be missing before a file counts as cut off."""
_INSTANT = 1e-6
"""Seconds by which a time may be early and still be that of a frame: they are not exact in binary."""
LOST_SHARE = 0.1
"""So many of the wanted frames may not be decodable; the frame before stands in for each."""


class VideoError(OSError):
    """A file that is no video, or a broken one; `filename` names it."""

    def __init__(self, reason: str, name: str) -> None:
        super().__init__(0, reason, name)


class OpenVideo(Protocol):
    """A video that is being read."""

    times: npt.NDArray[np.float64]
    """When each frame is shown, in seconds from the first."""
    duration: float
    """Seconds."""

    @property
    def num_frames(self) -> int:
        """L, number of frames."""
        ...

    def at(self, seconds: float) -> int:
        """Number of the frame that is on screen at a time."""
        ...

    def frames(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Frames:
        """Some frames by their numbers, in any order and as often as wanted.

        Raises:
            VideoError: They cannot be decoded.
        """
        ...


def decoder_problem(decoder: Decoder) -> str | None:
    """Why a decoder cannot be used here, and what to do about it; None where it can."""
    try:
        if decoder == "pyav":
            import av  # noqa: F401
        else:
            import torchcodec.decoders  # noqa: F401
    except ImportError:
        package = "PyAV: pip install 'openeva[video]'" if decoder == "pyav" else "torchcodec: pip install torchcodec"
        return f"reading videos needs {package}"
    except (RuntimeError, OSError):  # torchcodec is there, FFmpeg is not
        return "torchcodec needs FFmpeg's libraries (install FFmpeg 4 to 8); or set decoder: pyav, which brings its own"
    return None


@dataclass(frozen=True)
class Video:
    """A video as it lies on disk or in a shard: can be sent to workers, holds no open file.

    Attributes:
        data: Its path, or its encoded bytes.
        name: For messages; the path when left out.
        decoder: What reads it. PyAV needs nothing else; torchcodec needs FFmpeg's libraries.
        threads: Of decoding; workers take one each. 0 = one per core.
    """

    data: Path | bytes = field(repr=False)
    name: str = ""
    decoder: Decoder = "pyav"
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", str(self.data) if isinstance(self.data, Path) else "video")

    @contextmanager
    def opened(self) -> Iterator[OpenVideo]:
        """Read its times; frames can be had until the context ends.

        Raises:
            VideoError: Not a video, without pictures or frames, or cut off.
            OSError: No such file.
        """
        if isinstance(self.data, Path):
            with self.data.open("rb"):  # FFmpeg's own messages do not name the file
                pass
        elif not self.data:
            raise VideoError("the file is empty", self.name)
        if self.decoder == "torchcodec":
            yield _TorchCodecVideo(self)
            return
        import av

        try:
            place: Any = str(self.data) if isinstance(self.data, Path) else io.BytesIO(self.data)
            with av.open(place, metadata_errors="ignore") as container:  # titles need not be UTF-8
                yield _PyAvVideo(container, self)
        except av.FFmpegError as error:
            if isinstance(self.data, Path) and not self.data.stat().st_size:
                raise VideoError("the file is empty", self.name) from None
            raise VideoError(f"not a video, or a broken one: {error.strerror}", self.name) from None

    def middle(self) -> Image.Image:
        """The frame that is on screen in its middle.

        Raises:
            OSError: As `opened` and `frames`.
        """
        with self.opened() as video:
            return Image.fromarray(video.frames([video.at(video.duration / 2)])[0])


class _Timed:
    """What follows from the times of the frames."""

    times: npt.NDArray[np.float64]

    @property
    def num_frames(self) -> int:
        return len(self.times)

    def at(self, seconds: float) -> int:
        return max(0, int(np.searchsorted(self.times, seconds + _INSTANT, side="right")) - 1)


class _PyAvVideo(_Timed):
    """A video that PyAV reads; see `OpenVideo`."""

    def __init__(self, container: Any, video: Video) -> None:
        self._container, self._name = container, video.name
        streams = [s for s in container.streams.video if not _is_cover(s)]
        if not streams:
            sound = ", only sound" if container.streams.audio else ""
            raise VideoError(f"it has no moving pictures{sound}", self._name)
        self._stream = streams[0]
        if self._stream.codec_context is None:
            raise VideoError("its codec is not known to this FFmpeg", self._name)
        self._stream.codec_context.thread_count = video.threads
        self._one_by_one = video.threads == 1  # threads decode ahead of what can be said of each packet
        if not self._one_by_one:
            self._stream.codec_context.thread_type = "AUTO"
        self._num_packets = 0
        self._pts, self._keys, self._key_dts = self._table()
        if not len(self._pts):
            raise VideoError("it has no frames", self._name)
        base = float(self._stream.time_base or 0)
        self.times = (self._pts - self._pts[0]) * base
        last = float(np.median(np.diff(self.times))) if len(self.times) > 1 else 0.0
        self.duration = float(self.times[-1]) + last
        self._check_whole(base)

    def _check_whole(self, base: float) -> None:
        """Whether the file holds what its header says; the frames of some formats are slots, so their time counts.

        Raises:
            VideoError: It was cut off.
        """
        found, declared = self._num_packets, self._stream.frames
        if "mp4" in self._container.format.name:
            if found < declared - max(2, MISSING_SHARE * declared):
                raise VideoError(f"it is cut off: {found:,} of {declared:,} frames are there", self._name)
        elif found > 1 and self._stream.duration is not None and self.duration < 0.9 * self._stream.duration * base:
            whole = self._stream.duration * base
            raise VideoError(f"it is cut off: {self.duration:.1f} of {whole:.1f} seconds are there", self._name)

    def _table(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Times of all frames as shown, of the key frames, and where to seek for them, in the stream's unit."""
        pts, keys = [], []
        for packet in self._container.demux(self._stream):
            if not packet.size or packet.is_corrupt:
                continue
            self._num_packets += 1
            if packet.is_discard:  # left out by an edit list, as telephones trim
                continue
            if packet.pts is None:
                return self._table_by_decoding()
            pts.append(packet.pts)
            if packet.is_keyframe:
                keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        if len(set(pts)) < len(pts):  # several packets to a frame
            return self._table_by_decoding()
        keys = sorted(keys)
        self._rewind()
        array = np.array(keys, np.int64).reshape(-1, 2)
        return np.sort(np.array(pts, np.int64)), array[:, 0], array[:, 1]

    def _table_by_decoding(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The same for files whose packets do not tell: every frame is decoded once, none is kept."""
        self._rewind()
        pts: list[int] = []
        for frame in self._container.decode(self._stream):
            if frame.pts is None:
                raise VideoError("its frames have no times; convert it to mp4 (openeva data videos)", self._name)
            pts.append(frame.pts)
        self._rewind()
        none = np.zeros(0, np.int64)
        return np.unique(np.array(pts, np.int64)), none, none

    def _rewind(self) -> None:
        start = self._stream.start_time
        self._container.seek(min(0, start or 0), stream=self._stream)

    def frames(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Frames:
        wanted, place = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        if not len(wanted) or wanted[0] < 0 or wanted[-1] >= len(self._pts):
            raise ValueError(f"frames {list(indices)} of a video of {len(self._pts)}")
        found: Frames | None = None
        for number, pixels_YXC in enumerate(self._decoded(self._pts[wanted])):
            if found is None:
                found = np.empty((len(wanted), *pixels_YXC.shape), np.uint8)
            if found.shape[1:] != pixels_YXC.shape:
                raise VideoError("its frames change their size", self._name)
            found[number] = pixels_YXC
        assert found is not None
        return found if len(place) == len(wanted) and (np.diff(place) > 0).all() else found[place]

    def _decoded(self, wanted: npt.NDArray[np.int64]) -> Iterator[RGB]:
        """The frames that are on screen at some times, which rise."""
        from av.video.reformatter import VideoReformatter

        reformatter, lost = VideoReformatter(), 0
        for first, group in self._groups(wanted):
            waiting, shown = deque(group), None
            for frame in self._from_key_frame(first, set(group)):
                while waiting and frame.pts is not None and frame.pts >= waiting[0]:
                    exact = frame.pts == waiting.popleft()
                    lost += not exact  # it is damaged: what is on screen then, or else what comes next
                    yield _upright_rgb(frame if exact or shown is None else shown, reformatter)
                if not waiting:
                    break
                shown = frame
            if waiting and shown is None:
                raise VideoError("its frames cannot be decoded", self._name)
            for _ in waiting:  # the end is damaged
                lost += 1
                yield _upright_rgb(shown, reformatter)
        if lost > LOST_SHARE * len(wanted):
            raise VideoError(f"{lost} of {len(wanted)} frames cannot be decoded", self._name)

    def _groups(self, wanted: npt.NDArray[np.int64]) -> Iterable[tuple[int | None, list[int]]]:
        """Wanted times by the key frame that decoding starts from; times of one run of decoding stay together."""
        key_of = np.searchsorted(self._keys, wanted, side="right") - 1
        for key in np.unique(key_of):
            yield int(key) if key >= 0 else None, wanted[key_of == key].tolist()

    def _from_key_frame(self, key: int | None, wanted: set[int]) -> Iterator[Any]:
        """Frames from a key frame on; from the first where there is none, or where seeking does not find it."""
        # some formats find key frames by when they are shown, others by when they are decoded, which is earlier
        for time in (self._keys[key], self._key_dts[key]) if key else ():
            self._container.seek(int(time), stream=self._stream)
            frames = self._decode(wanted | {int(self._keys[key])})
            first = next(frames, None)
            if first is not None and first.pts is not None and first.pts <= self._keys[key]:
                yield first
                yield from frames
                return
        self._rewind()
        yield from self._decode(wanted)

    def _decode(self, wanted: set[int]) -> Iterator[Any]:
        """Frames from here on, without those that are neither wanted nor needed to decode others."""
        context = self._stream.codec_context
        for packet in self._container.demux(self._stream):
            if self._one_by_one:
                context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
            yield from packet.decode()


def _is_cover(stream: Any) -> bool:
    """Whether a stream is the picture on the cover of a song."""
    import av

    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _upright_rgb(frame: Any, reformatter: Any) -> RGB:
    """Pixels of a frame, turned as the camera says."""
    pixels_YXC: RGB = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels_YXC, turns)) if turns else pixels_YXC


class _TorchCodecVideo(_Timed):
    """A video that torchcodec reads; see `OpenVideo`."""

    def __init__(self, video: Video) -> None:
        from torchcodec.decoders import VideoDecoder

        self._name = video.name
        source = str(video.data) if isinstance(video.data, Path) else video.data
        try:
            self._decoder = VideoDecoder(
                source, dimension_order="NHWC", num_ffmpeg_threads=video.threads, seek_mode="exact"
            )
        except (RuntimeError, ValueError) as error:
            empty = isinstance(video.data, Path) and not video.data.stat().st_size
            reason = "the file is empty" if empty else "not a video, or a broken one"
            raise VideoError(reason, video.name) from error
        facts = self._decoder.metadata
        if not facts.num_frames:
            raise VideoError("it has no frames", video.name)
        found, whole = facts.duration_seconds or 0.0, facts.duration_seconds_from_header or 0.0
        if facts.num_frames > 1 and found < 0.9 * whole:
            raise VideoError(f"it is cut off: {found:.1f} of {whole:.1f} seconds are there", video.name)
        # it tells no times without decoding: they are taken to be even, which only matters to windows of time
        self.duration = float(facts.duration_seconds or facts.num_frames / (facts.average_fps or 1.0))
        self.times = np.arange(facts.num_frames) * (self.duration / facts.num_frames)

    def frames(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Frames:
        try:
            found: Frames = self._decoder.get_frames_at(list(map(int, indices))).data.numpy()
        except (RuntimeError, IndexError) as error:
            raise VideoError(f"its frames cannot be decoded: {str(error).splitlines()[0]}", self._name) from None
        return found
