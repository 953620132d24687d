"""Videos on disk: RGB frames, or frames of another video with their times, as small h264 files.

uint8 `[Y, X, 3]` frames -> `write_video` -> `VideoWriter` (PyAV, yuv420p, hidden name) -> an .mp4, whole or not there

Sides must be even for yuv420p: an odd height gets its last row once more at the bottom, an odd width its last column at
the right. Where PyAV was built without libx264, files are MPEG-4 part 2: larger, and read by the same readers.
"""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

RGB = npt.NDArray[np.uint8]

MISSING_AV = "writing videos needs PyAV: pip install 'openeva[video]'"
_NARROW = 128
"""Pixels. In narrower videos x264's macroblock tree (with AVX-512) is not repeatable: files differ now and then."""
_LARGEST_MPEG4_CLOCK = 65535
"""Ticks per second that MPEG-4 part 2 can count."""
_MPEG4_BITS_PER_PIXEL = 0.25


def require_av() -> None:
    """Whether videos can be written.

    Raises:
        ImportError: PyAV is missing; the message says how to get it.
    """
    try:
        import av  # noqa: F401
    except ImportError:
        raise ImportError(MISSING_AV) from None


class VideoWriter:
    """One video that is written frame by frame; a context manager.

    The file has its name only after the last frame: leaving the block by an error removes what was written.

    Args:
        path: Where; the folder is made if it is missing, and a file of that name is replaced.
        size: (rows, columns), both even.
        time_base: Length in seconds of one tick of the frames' times.
        rate: Frames per second, about; it gives the last frame its duration.
        crf: Quality of h264, 0 (lossless) to 51; 6 more is about half the size.
        keyframe_every: At least every how many frames one is stored that needs no other: seeking decodes from there.
        preset: How long x264 searches, "ultrafast" to "veryslow".
        num_threads: Of the encoder. With one, equal frames give equal bytes.
        like: A codec context whose description of colours is kept.

    Raises:
        ImportError: PyAV is missing.
        ValueError: A side is odd, or `crf` or `keyframe_every` is out of range.
        OSError: The place cannot be written.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        time_base: Fraction,
        rate: Fraction,
        *,
        crf: int = 23,
        keyframe_every: int = 12,
        preset: str = "veryfast",
        num_threads: int = 1,
        like: Any = None,
    ) -> None:
        rows, columns = size
        if rows % 2 or columns % 2 or min(size) < 2:
            raise ValueError(f"size {columns}x{rows} of a video: both sides must be even; pad or resize the frames")
        check_quality(crf, keyframe_every)
        try:
            import av
        except ImportError:
            raise ImportError(MISSING_AV) from None
        self.path = Path(path)
        self.num_frames = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        with _writing(self.path):
            self._container: Any = av.open(
                str(self._partial), "w", format="mp4", container_options={"movflags": "+faststart"}
            )
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        options = {"crf": str(crf), "preset": preset} if codec == "libx264" else {}
        if codec == "libx264" and columns < _NARROW:
            options["x264-params"] = "mbtree=0"
        self._stream: Any = self._container.add_stream(codec, rate=rate, options=options)
        context: Any = self._stream.codec_context
        context.width, context.height, context.pix_fmt = columns, rows, "yuv420p"
        context.gop_size, context.thread_count = keyframe_every, num_threads
        if codec == "mpeg4":
            context.bit_rate = int(_MPEG4_BITS_PER_PIXEL * rate * rows * columns)
            time_base = max(time_base, Fraction(1, _LARGEST_MPEG4_CLOCK))
        context.time_base = time_base
        if like is not None:
            for name in ("colorspace", "color_primaries", "color_trc"):
                setattr(context, name, getattr(like, name))

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, frame: Any) -> None:
        """Add an `av.VideoFrame`; its `pts` counts in its own `time_base`, and later frames have later times.

        Raises:
            OSError: The disk is full.
        """
        with _writing(self.path):
            self._container.mux(self._stream.encode(frame))
        self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_whole = kind is None and self.num_frames > 0
        try:
            with _writing(self.path):
                if is_whole:
                    self._container.mux(self._stream.encode(None))
                self._container.close()
            if is_whole:
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)
        if kind is None and not is_whole:
            raise ValueError(f"{self.path}: a video needs at least one frame")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """FFmpeg's errors as those of Python, with the name of the file."""
    from av import FFmpegError

    try:
        yield
    except FFmpegError as error:
        raise OSError(error.errno or 0, f"cannot be written: {error.strerror}", str(path)) from None


def write_video(
    path: Path, frames: Iterable[RGB], *, fps: float | Fraction = 16, crf: int = 23, keyframe_every: int = 12
) -> int:
    """Write RGB frames as an h264 video (.mp4), under its name only when it is whole.

    Args:
        path: The file; its folder is made if it is missing.
        frames: uint8 `[Y, X, 3]`, all of one size, taken one after the other. Odd sides are padded: see above.
        fps: Frames per second.
        crf: Quality, 0 (lossless) to 51; 6 more is about half the size.
        keyframe_every: At least every how many frames one is stored that needs no other.

    Returns:
        How many frames were written.

    Raises:
        ImportError: PyAV is missing.
        ValueError: There is no frame, or one is not uint8 `[Y, X, 3]` or of another size than the first.
        OSError: The disk is full, or the place cannot be written.
    """
    rate = Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise ValueError(f"fps {fps}: choose a number above 0")
    source = iter(frames)
    first = next(source, None)
    if first is None:
        raise ValueError(f"{path}: a video needs at least one frame")
    rows, columns = _checked(first, first.shape).shape[:2]
    even = (rows + rows % 2, columns + columns % 2)
    with VideoWriter(path, even, 1 / rate, rate, crf=crf, keyframe_every=keyframe_every) as writer:
        from av import VideoFrame

        frame_YXC: RGB | None = first
        while frame_YXC is not None:
            frame = VideoFrame.from_ndarray(_padded(_checked(frame_YXC, first.shape)), format="rgb24")
            frame.pts, frame.time_base = writer.num_frames, 1 / rate
            writer.write(frame)
            frame_YXC = next(source, None)
    return writer.num_frames


def check_quality(crf: int, keyframe_every: int) -> None:
    """Raise ValueError for values that no encoder takes."""
    if not 0 <= crf <= 51:
        raise ValueError(f"crf {crf}: choose from 0 (lossless) to 51 (worst); 23 is usual")
    if keyframe_every < 1:
        raise ValueError(f"keyframe_every {keyframe_every}: choose 1 (every frame) or more")


def _checked(frame_YXC: npt.NDArray[Any], shape: tuple[int, ...]) -> RGB:
    if frame_YXC.dtype != np.uint8 or frame_YXC.ndim != 3 or frame_YXC.shape[2] != 3 or 0 in frame_YXC.shape:
        raise ValueError(
            f"a frame is {frame_YXC.dtype} {list(frame_YXC.shape)}; frames must be uint8 [rows, columns, 3]"
        )
    if frame_YXC.shape != shape:
        raise ValueError(f"a frame is {list(frame_YXC.shape)}, the first was {list(shape)}; all must have one size")
    return frame_YXC


def _padded(frame_YXC: RGB) -> RGB:
    """Contiguous, with even sides."""
    rows, columns = frame_YXC.shape[:2]
    if rows % 2 or columns % 2:
        frame_YXC = np.pad(frame_YXC, ((0, rows % 2), (0, columns % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(frame_YXC)
