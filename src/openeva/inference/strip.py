"""A picture of the actions in one video: frames of its windows, and under them where the model looked.

`VideoPrediction` whose windows have `view` and `heat` -> per window a title with its class, its place in the video, a
frame per time slot, the same frame with its heat, and when it is shown -> PNG or JPEG
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from openeva.checkpoints.files import write_atomically
from openeva.inference.picture import BAR, INK, PALE_BAR, PALE_INK, PIXELS_PER_INCH, overlay
from openeva.inference.videos import Segment, VideoPrediction, clock

MOST_FRAMES = 16
"""Of a row; of more time slots, evenly spaced ones are shown."""
SEAM = 2
"""Patches between the frames of a row while their heat is smoothed: as far as the smoothing reaches."""
LONGEST_NAME, LONGEST_OTHERS = 44, 90
# in inches
LEAST_WIDTH, MOST_WIDTH, LARGEST_FRAME, MARGIN, GAP = 7.5, 14.0, 2.0, 0.25, 0.04
HEAD, FOOT, TITLE, TIMES, BETWEEN = 0.5, 0.32, 0.38, 0.22, 0.2


def draw_strip(prediction: VideoPrediction, path: Path) -> None:
    """Draw the windows of a video that have their frames.

    Args:
        prediction: Whose windows have `view` and `heat`.
        path: File to write, ending in one of `PICTURE_SUFFIXES`.

    Raises:
        ValueError: The prediction was made without a map.
    """
    segments = [segment for segment in prediction.segments if segment.view is not None and segment.heat is not None]
    if not segments:
        raise ValueError(f"{prediction.source}: no map was asked for, so there is nothing to draw")
    view, meaning = segments[0].view, "" if segments[0].heat is None else segments[0].heat.meaning
    assert view is not None
    num_frames = min(MOST_FRAMES, len(view))
    side = min(LARGEST_FRAME, (MOST_WIDTH - 2 * MARGIN - (num_frames - 1) * GAP) / num_frames)
    high = side * view.shape[1] / view.shape[2]
    width = max(LEAST_WIDTH, num_frames * (side + GAP) - GAP + 2 * MARGIN)
    row = TITLE + 2 * high + GAP + TIMES + BETWEEN
    height = HEAD + len(segments) * row - BETWEEN + FOOT
    figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    _write(axes, MARGIN, HEAD - 0.17, _short(Path(prediction.source).name, 80), size=12, weight="bold")
    _write(axes, width - MARGIN, HEAD - 0.17, _told(prediction, len(segments)), colour=PALE_INK, align="right")
    for number, segment in enumerate(segments):
        top = HEAD + number * row
        _title(axes, segment, prediction.duration, top, width)
        _frames(axes, segment, top + TITLE, (side, high))
    _write(axes, MARGIN, height - 0.14, f"{meaning}; one scale per row", size=7, colour=PALE_INK)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.lower().lstrip(".")))


def heat_of(segment: Segment) -> list[NDArray[np.uint8]]:
    """The heat over each frame of a window, on one scale for all: time slots can be compared.

    The frames lie side by side while they are coloured, with the patches at their edges repeated in between.
    """
    assert segment.view is not None
    assert segment.heat is not None
    rows, columns = (
        pixels // patches
        for pixels, patches in zip(segment.view.shape[1:3], segment.heat.values.shape[1:], strict=True)
    )
    frames_SYXC = np.pad(segment.view, ((0, 0), (SEAM * rows,) * 2, (SEAM * columns,) * 2, (0, 0)), mode="edge")
    heat_Syx = np.pad(segment.heat.values, ((0, 0), (SEAM, SEAM), (SEAM, SEAM)), mode="edge")
    joined = overlay(np.concatenate(frames_SYXC, axis=1), np.concatenate(heat_Syx, axis=1))
    inner = slice(SEAM * rows, -SEAM * rows), slice(SEAM * columns, -SEAM * columns)
    return [frame[inner] for frame in np.split(joined, len(frames_SYXC), axis=1)]


def _title(axes: Axes, segment: Segment, duration: float, top: float, width: float) -> None:
    """The class of a window, what else it may be, and a line that says where in the video it is."""
    base, best = top + TITLE - 0.16, segment.top[0]
    _write(axes, MARGIN, base, segment.span, size=9.5, colour=PALE_INK)
    name = _short(best.name, LONGEST_NAME)
    _write(
        axes,
        MARGIN + 0.12 + 0.075 * len(segment.span),
        base,
        f"{name}   {best.probability:.1%}",
        size=10.5,
        weight="bold",
    )
    others = ",   ".join(f"{guess.name} {guess.probability:.1%}" for guess in segment.top[1:4])
    _write(axes, width - MARGIN, base, _short(others, LONGEST_OTHERS), size=8, colour=PALE_INK, align="right")
    if segment.end - segment.start >= duration:
        return
    inner, share = width - 2 * MARGIN, (segment.start / duration, segment.end / duration)
    for (begin, end), colour in (((0.0, 1.0), PALE_BAR), (share, BAR)):
        axes.fill_between(
            [MARGIN + inner * begin, MARGIN + inner * end], top + TITLE - 0.08, top + TITLE - 0.05, color=colour
        )


def _frames(axes: Axes, segment: Segment, top: float, size: tuple[float, float]) -> None:
    assert segment.view is not None
    side, high = size
    chosen = np.linspace(0, len(segment.view) - 1, min(MOST_FRAMES, len(segment.view))).round().astype(int)
    heat = heat_of(segment)
    for place, number in enumerate(chosen):
        left = MARGIN + place * (side + GAP)
        for line, pixels in enumerate((segment.view[number], heat[number])):
            above = top + line * (high + GAP)
            axes.imshow(pixels, extent=(left, left + side, above + high, above), interpolation="lanczos", aspect="auto")
        when = clock(segment.times[number], tenths=True)
        _write(axes, left + side / 2, top + 2 * high + GAP + 0.15, when, size=7.5, colour=PALE_INK, align="center")


def _told(prediction: VideoPrediction, num_shown: int) -> str:
    number = len(prediction.segments)
    windows = "" if number == 1 else f"  ·  {number} windows"
    if num_shown < number:
        windows += f", the {num_shown} most certain ones"
    return clock(prediction.duration, tenths=prediction.duration < 60) + windows


def _write(
    axes: Axes, x: float, y: float, text: str, *, size: float = 9, colour: str = INK, weight: str = "normal",
    align: str = "left",
) -> None:  # fmt: skip
    axes.text(x, y, text, fontsize=size, color=colour, weight=weight, ha=align, va="baseline")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
