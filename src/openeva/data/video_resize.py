"""A folder of videos again, in small: cheap to read, in the sizes that training looks at.

`SRC/a/b.mkv` -> frames, one at a time -> turned upright, resized, thinned out (`fps`) -> h264 with many key frames ->
`OUT/a/b.mp4`, `OUT/broken.txt`, `OUT/videos.json` (the options)

- Times of frames are kept, from 0 on; the frame rate may vary. With `fps`, frames are left out and never doubled: at
  each tick of the new clock the frame that is on screen then, once.
- Sides are even, as yuv420p needs; a video is never enlarged unless that is asked for.
- Sound, subtitles and covers are dropped. Colours are not converted; full range becomes the usual one.
- A file has its name only once it is whole, and what has its name is not made again.

Source: the official transform resizes the shorter side to 256 first; done once on disk, it is not done every epoch.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from openeva.config import ConfigError
from openeva.data.building import BrokenInputError, claim, num_cores, run_jobs, write_text
from openeva.data.video import MISSING_SHARE, VIDEO_EXTENSIONS
from openeva.data.video_writer import VideoWriter, check_quality, require_av

MARKER, BROKEN = "videos.json", "broken.txt"

_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""Errors of writing that the next file would meet as well."""
_USUAL_RATE = 25
"""Frames per second of a video that does not say."""
_EARLY = Fraction(1, 20)
"""Ticks by which a frame may come late and still be on screen at one."""


@dataclass(frozen=True)
class Options:
    """How videos become small.

    Attributes:
        resize: "256" = the shorter side in pixels, ratio kept; "340x256" = just this width and height, exchanged for
            portrait videos.
        fps: At most so many frames per second; None = all frames.
        keyframe_every: At least every how many frames one is stored that needs no other.
        crf: Quality of h264, 0 (lossless) to 51.
        upscale: Whether small videos are enlarged. False = they keep their size ("256"), or become as large a picture
            of the ratio 340:256 as they fill.
    """

    resize: str = "256"
    fps: float | None = None
    keyframe_every: int = 12
    crf: int = 23
    upscale: bool = False


@dataclass(frozen=True)
class Job:
    """One video: its path below SRC, and below OUT."""

    source: str
    target: str


@dataclass
class Resized:
    """What became of a folder.

    Attributes:
        total: Videos that there are.
        made: Those that were re-encoded now.
        skipped: Those that were there already.
        bytes_before: Size of the files that were re-encoded now.
        bytes_after: Size of what they became.
        broken: Path below SRC -> why there is no small video of it.
    """

    total: int = 0
    made: int = 0
    skipped: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    broken: dict[str, str] = field(default_factory=dict)


def resize_folder(
    source: Path, out: Path, options: Options, *, num_workers: int = 0, watch: Callable[[int], None] | None = None
) -> Resized:
    """Re-encode every video below a folder, or those that are still missing.

    Args:
        source: Folder of videos, in folders of any depth; links are followed.
        out: Folder for the small ones; it may hold what an earlier call with the same options left.
        options: How.
        num_workers: Processes; 0 = this one.
        watch: Told how many are done, with those that were there already.

    Raises:
        ConfigError: An option makes no sense, there are no videos, or `out` holds something else.
        ImportError: PyAV is missing.
        OSError: The disk is full, or `out` cannot be written.
    """
    check(options)
    source, out = source.expanduser(), out.expanduser()
    _check_places(source, out)
    found = find_videos(source)
    if not found:
        raise ConfigError([f"SRC: no videos below {source}; they must end in {', '.join(VIDEO_EXTENSIONS)}"])
    claim(out, MARKER, asdict(options), may_hold=(".txt", ".csv", ".json", ".md"))
    jobs, resized = _plan(found, out)
    if watch:
        watch(resized.skipped + len(resized.broken))
    # each file keeps one process busy; what is left of the cores helps to decode it
    threads = max(1, num_cores() // max(1, min(num_workers, len(jobs))))
    work = partial(resize_video, source, out, options, threads)
    try:
        for number, outcome in enumerate(run_jobs(work, jobs, min(num_workers, len(jobs))), start=1):
            if outcome.result is None:
                resized.broken[outcome.job.source] = outcome.problem or ""
            else:
                resized.made += 1
                resized.bytes_before += outcome.result[0]
                resized.bytes_after += outcome.result[1]
            if watch:
                watch(resized.total - len(jobs) + number)
    finally:
        _list_broken(out / BROKEN, resized.broken)
    return resized


def check(options: Options) -> None:
    """Raise ConfigError for what makes no sense, ImportError where PyAV is missing."""
    require_av()
    problems = []
    try:
        _parse(options.resize)
    except ValueError as error:
        problems.append(f"--resize: {error}")
    try:
        check_quality(options.crf, options.keyframe_every)
    except ValueError as error:
        problems.append(f"--{error}")
    if options.fps is not None and options.fps <= 0:
        problems.append(f"--fps: {options.fps}; choose a number above 0")
    if problems:
        raise ConfigError(problems)


def _check_places(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise ConfigError([f"SRC: there is no folder {source}"])
    here, there = source.resolve(), out.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise ConfigError([f"OUT: {out} and {source} lie in each other; choose a folder beside it"])


def find_videos(folder: Path) -> list[str]:
    """Paths of all videos below a folder, relative to it, sorted; hidden ones are left out."""
    endings = tuple(f".{ending}" for ending in VIDEO_EXTENSIONS)
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to where we come from
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(place).relative_to(folder)
        found += [str(below / name) for name in files if name.lower().endswith(endings) and not name.startswith(".")]
    return sorted(found)


def _plan(found: list[str], out: Path) -> tuple[list[Job], Resized]:
    """What is to be done, and what is known of the rest."""
    resized = Resized(total=len(found))
    jobs, taken = [], dict[str, str]()
    for path in found:
        target = str(Path(path).with_suffix(".mp4"))
        if target in taken:
            resized.broken[path] = f"it would become {target}, as {taken[target]} does; rename one of them"
            continue
        taken[target] = path
        if (out / target).is_file():
            resized.skipped += 1
        else:
            jobs.append(Job(path, target))
    return jobs, resized


def _list_broken(file: Path, broken: dict[str, str]) -> None:
    if broken:
        write_text(file, "".join(f"{path}\t{' '.join(why.split())}\n" for path, why in sorted(broken.items())))
    else:
        file.unlink(missing_ok=True)


def summary_of(resized: Resized) -> str:
    """What became of a folder, in one line."""
    text = f"{resized.made:,} of {resized.total:,} videos re-encoded"
    if resized.bytes_after:
        factor = resized.bytes_before / resized.bytes_after
        sizes = [f"{size / 1e6:,.1f} MB" for size in (resized.bytes_before, resized.bytes_after)]
        text += f", {sizes[0]} -> {sizes[1]} ({factor:.1f} times smaller)" if factor >= 1 else f", {' -> '.join(sizes)}"
    text += f"; {resized.skipped:,} were there already" if resized.skipped else ""
    return text + (f"; {len(resized.broken):,} are broken" if resized.broken else "")


# ----------------------------------------------------------------------------------------------------------- sizes


def target_size(size: tuple[int, int], options: Options) -> tuple[int, int]:
    """Rows and columns of the small video, both even, from those of a video that is upright.

    Raises:
        ValueError: `resize` is neither a number nor two.
    """
    rows, columns = size
    wanted = _parse(options.resize)
    if isinstance(wanted, int):
        scale = wanted / min(rows, columns)
        return _even(rows * scale, rows, options.upscale), _even(columns * scale, columns, options.upscale)
    width, height = wanted if columns >= rows else wanted[::-1]
    scale = 1.0 if options.upscale else min(1.0, columns / width, rows / height)
    return _even(height * scale, rows, options.upscale), _even(width * scale, columns, options.upscale)


def _even(side: float, most: int, upscale: bool) -> int:
    nearest = 2 * round(side / 2)
    return max(2, nearest if upscale else min(nearest, most - most % 2))


def _parse(resize: str) -> int | tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", resize)
    sides = [int(side) for side in match.groups() if side] if match else []
    if not sides or any(side < 2 or side % 2 for side in sides):
        raise ValueError(f"{resize!r}; say 256 (shorter side) or 340x256 (width x height), even numbers of pixels")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


# ----------------------------------------------------------------------------------------------------------- one video


def resize_video(source: Path, out: Path, options: Options, threads: int, job: Job) -> tuple[int, int]:
    """Re-encode one video.

    Args:
        source: Folder that its path is relative to.
        out: Folder for the result.
        options: How.
        threads: Of decoding and encoding, each.
        job: Which.

    Returns:
        Bytes before and after.

    Raises:
        BrokenInputError: It is no video, or a broken one; nothing was written.
        OSError: Nothing can be written there.
    """
    from av import FFmpegError

    path, target = source / job.source, out / job.target
    try:
        with path.open("rb") as file:  # FFmpeg's messages do not tell whether it is missing, locked or empty
            before = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BrokenInputError(error.strerror or str(error)) from None
    if not before:
        raise BrokenInputError("the file is empty")
    try:
        _convert(path, target, options, threads)
    except FFmpegError as error:
        raise BrokenInputError(f"not a video, or a broken one: {error.strerror}") from None
    except OSError as error:
        if error.errno in _HOPELESS:
            raise
        raise BrokenInputError(str(error)) from None
    return before, target.stat().st_size


def _convert(path: Path, target: Path, options: Options, threads: int) -> None:
    import av
    from av.video.reformatter import VideoReformatter

    with av.open(str(path), metadata_errors="ignore") as container:
        cover = av.stream.Disposition.attached_pic
        stream: Any = next((one for one in container.streams.video if not one.disposition & cover), None)
        if stream is None:
            raise BrokenInputError("it has no moving pictures")
        if stream.codec_context is None:
            raise BrokenInputError("its codec is not known to this FFmpeg")
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        reformatter = VideoReformatter()
        frames = _timed(_decoded(container, stream), stream)
        first = next(frames, None)
        if first is None:
            raise BrokenInputError("it has no frames")
        turns = round(first.rotation / 90) % 4
        upright = (first.height, first.width) if turns % 2 == 0 else (first.width, first.height)
        size = target_size(upright, options)
        clock = None if options.fps is None else 1 / Fraction(options.fps).limit_denominator(1001)
        rate = 1 / clock if clock else Fraction(stream.average_rate or _USUAL_RATE)
        with VideoWriter(
            target, size, clock or first.time_base, rate, crf=options.crf, keyframe_every=options.keyframe_every,
            num_threads=threads, like=stream.codec_context,
        ) as writer:  # fmt: skip
            for frame in _thinned(_from_start(first, frames), clock):
                writer.write(_resized(frame, size, turns, reformatter))


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """All frames in the order in which they are shown.

    Raises:
        BrokenInputError: The file ends too early. Decoding in several threads says nothing of that.
    """
    num_packets = num_frames = 0
    for packet in container.demux(stream):
        num_packets += bool(packet.size) and not packet.is_corrupt
        for frame in packet.decode():
            num_frames += 1
            yield frame
    declared = stream.frames
    if num_packets < declared - max(2, MISSING_SHARE * declared):
        raise BrokenInputError(f"it is cut off: {num_packets:,} of {declared:,} frames are there")


def _timed(frames: Iterator[Any], stream: Any) -> Iterator[Any]:
    """Frames whose times rise; what has no time follows at the stream's rate, what comes too late is left out."""
    step = max(1, round(1 / (stream.average_rate or _USUAL_RATE) / stream.time_base))
    last: int | None = None
    for frame in frames:
        if frame.time_base is None:
            frame.time_base = stream.time_base
        if frame.pts is None:
            frame.pts = 0 if last is None else last + step
        if last is not None and frame.pts <= last:
            continue
        last = frame.pts
        yield frame


def _from_start(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    """The frames with times that begin at 0."""
    start = first.pts
    first.pts = 0
    yield first
    for frame in rest:
        frame.pts -= start
        yield frame


def _thinned(frames: Iterator[Any], clock: Fraction | None) -> Iterator[Any]:
    """At each tick of a clock the frame that is on screen, once; all frames where there is no clock."""
    if clock is None:
        yield from frames
        return
    waiting, end = None, Fraction(0)
    for frame in frames:
        # the first tick at which it is on screen; times are rounded to the file's clock, hence the little less
        tick = -int((_EARLY - frame.pts * frame.time_base / clock) // 1)
        end = (frame.pts + frame.duration) * frame.time_base / clock
        if waiting is not None and tick > waiting.pts:
            yield waiting
        frame.pts, frame.time_base, frame.duration = tick, clock, 1
        waiting = frame
    # the last frame may be gone at the next tick
    if waiting is not None and (waiting.pts == 0 or waiting.pts < end - _EARLY):
        yield waiting


def _resized(frame: Any, size: tuple[int, int], turns: int, reformatter: Any) -> Any:
    """The frame upright, in its new size, yuv420p."""
    import numpy as np
    from av import VideoFrame

    rows, columns = size if turns % 2 == 0 else size[::-1]
    small = reformatter.reformat(frame, columns, rows, "yuv420p" if not turns else "rgb24", interpolation="BICUBIC")
    if turns:
        turned = np.ascontiguousarray(np.rot90(small.to_ndarray(), turns))
        small = VideoFrame.from_ndarray(turned, format="rgb24")
    small.pts, small.time_base, small.duration = frame.pts, frame.time_base, frame.duration
    return small
