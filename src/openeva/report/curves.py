"""Curves as inline SVG that follows the page's colours, so that they are readable in light and dark.

log records -> `Series` -> `line_chart` (an HTML figure: legend with the last values, SVG)
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from openeva.engine.log import Record

WIDTH, HEIGHT = 360, 190
"""Units of the drawing; about the pixels of a phone, so that text keeps its size there."""
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 22
NUM_COLOURS = 6
"""Lines of one drawing that `style.css` can tell apart."""
MAX_POINTS = 400
"""Longer series are drawn as means of as many equal parts."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: What it is; an empty name has no legend.
        points: `(step, value)` in order.
        dots: True marks each point, for rare measurements.
        band: `(step, least, greatest)` around the line, such as those of several seeds.
    """

    name: str
    points: list[Point]
    dots: bool = False
    band: Sequence[tuple[float, float, float]] = ()


def series(records: Sequence[Record], key: str, name: str, *, dots: bool = False) -> Series:
    """The values of a key over the steps of a log; records without it, or without a finite value, are left out."""
    points = [(float(r["step"]), float(r[key])) for r in records if _is_number(r.get(key))]
    return Series(name, points, dots)


def line_chart(
    title: str, lines: Sequence[Series], *, log_scale: bool = False, note: str = "", unit: str = "step"
) -> str:
    """A figure of one or more lines over the steps; nothing where none has a point.

    Args:
        title: What is drawn.
        lines: At most `NUM_COLOURS`, told apart by colour.
        log_scale: Logarithmic vertical axis, where all values are positive.
        note: A sentence below.
        unit: What the horizontal axis counts.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return ""
    values = [y for line in drawn for _, y in line.points]
    values += [y for line in drawn for _, *ends in line.band for y in ends]
    log_scale = log_scale and min(values) > 0 and max(values) > 10 * min(values)
    steps = [x for line in drawn for x, _ in line.points]
    x_axis = _Axis(0.0, max(*steps, 1.0), LEFT, WIDTH - RIGHT)
    y_axis = _vertical_axis(values, log_scale)
    body = _grid(x_axis, y_axis, unit)
    for number, line in enumerate(drawn):
        there = [(x_axis.at(x), y_axis.at(y)) for x, _, y in line.band]
        back = [(x_axis.at(x), y_axis.at(y)) for x, y, _ in reversed(line.band)]
        body += f'<polygon class="band c{number}" points="{_path([*there, *back])}"/>' if line.band else ""
    for number, line in enumerate(drawn):
        points = [(x_axis.at(x), y_axis.at(y)) for x, y in _thinned(line.points)]
        body += _line(points, number, dots=line.dots or len(points) == 1)
    legend = "".join(
        legend_key(number, line.name, number_text(line.points[-1][1])) for number, line in enumerate(drawn) if line.name
    )
    caption = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart"><figcaption><h3>{html.escape(title)}</h3>'
        f'<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)} over the {unit}s">'
        f"{body}</svg>"
        f"{caption}</figure>"
    )


def legend_key(number: int, name: str, value: str) -> str:
    """A colour with its name and value."""
    return f'<span class="key"><i class="swatch c{number}"></i>{html.escape(name)} <b>{html.escape(value)}</b></span>'


def number_text(value: float) -> str:
    """A number in about five characters: 12.3k, 0.653, 3.4e−5."""
    size = abs(value)
    if size >= 1e4:
        power, letter = next((p, s) for p, s in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= p)
        text = f"{value / power:.3g}{letter}"
    elif size >= 1e-2 or size == 0:
        text = f"{value:.4g}" if size >= 1000 else f"{value:.3g}"
    else:
        digits, power_of_ten = f"{value:.1e}".split("e")
        text = f"{float(digits):g}e{int(power_of_ten)}"
    return text.replace("-", "−")


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Numbers along an axis, with the same digits after the point where that is how they are written."""
    texts = [number_text(tick) for tick in ticks]
    if any(not text.strip("−").replace(".", "").isdecimal() for text in texts):
        return texts
    digits = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [f"{tick:.{digits}f}".replace("-", "−") for tick in ticks]


@dataclass(frozen=True)
class _Axis:
    """Linear map of `low..high` (of exponents, where logarithmic) to `start..end`."""

    low: float
    high: float
    start: float
    end: float
    log_scale: bool = False

    def at(self, value: float) -> float:
        value = _exponent(value) if self.log_scale else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, number: int) -> list[float]:
        if self.log_scale:
            found = LogLocator(numticks=number + 2).tick_values(10**self.low, 10**self.high)
            found = [v for v in found if 10**self.low <= v <= 10**self.high * 1.0001]
            if len(found) >= 2:
                return found
            found = LogLocator(subs=(1.0, 2.0, 5.0), numticks=number + 2).tick_values(10**self.low, 10**self.high)
            return [v for v in found if 10**self.low <= v <= 10**self.high * 1.0001]
        candidates: Any = MaxNLocator(number, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        slack = 1e-6 * (self.high - self.low)
        return [v for v in candidates if self.low - slack <= v <= self.high + slack]


def _exponent(value: float) -> float:
    """Exponent of ten, within what an axis with margins can still show as numbers."""
    return min(max(math.log10(value), -250.0), 250.0)


def _vertical_axis(values: list[float], log_scale: bool) -> _Axis:
    scaled = [_exponent(v) for v in values] if log_scale else values
    low, high = min(scaled), max(scaled)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low = 0.0 if not log_scale and 0 <= low < 0.5 * high else low - margin
    return _Axis(low, high + margin, HEIGHT - BOTTOM, TOP, log_scale)


def _grid(x_axis: _Axis, y_axis: _Axis, unit: str) -> str:
    parts = []
    y_ticks = y_axis.ticks(6)
    for tick, text in zip(y_ticks, tick_texts(y_ticks), strict=True):
        y = y_axis.at(tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    ticks = x_axis.ticks(5)
    for tick in ticks:
        anchor = "start" if tick == 0 else "end" if tick == x_axis.high else "middle"
        text = f"{unit} 0" if tick == 0 else number_text(tick)
        parts.append(f'<text x="{x_axis.at(tick):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{text}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    return "".join(parts)


def _line(points: list[Point], number: int, *, dots: bool) -> str:
    marks = (
        "".join(f'<circle class="dot c{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points) if dots else ""
    )
    return f'<polyline class="line c{number}" points="{_path(points)}"/>{marks}'


def _path(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _thinned(points: list[Point]) -> list[Point]:
    if len(points) <= MAX_POINTS:
        return points
    return [
        (part[:, 0].mean().item(), part[:, 1].mean().item()) for part in np.array_split(np.array(points), MAX_POINTS)
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
