"""A picture of one prediction: what the model saw, where it looked, and its best guesses.

`Prediction` with `view` and `heat` -> image | heat over the pale image | bars -> PNG or JPEG
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from openeva.checkpoints.files import write_atomically
from openeva.inference.predictor import Prediction

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
PIXELS_PER_INCH = 150
COLOUR_MAP = "inferno"
INK, PALE_INK, BAR, PALE_BAR = "#1d2129", "#6b7280", "#3b5bdb", "#c5cfe8"
LONGEST_NAME = 34
STRONGEST_SHARE = 0.995
"""The map's brightest colour stands for this quantile, so that one outlying patch does not leave the rest dark."""


def draw(prediction: Prediction, path: Path) -> None:
    """Draw a prediction.

    Args:
        prediction: With `view` and `heat`.
        path: File to write, ending in one of `PICTURE_SUFFIXES`.

    Raises:
        ValueError: The prediction was made without a map.
    """
    if prediction.view is None or prediction.heat is None:
        raise ValueError(f"{prediction.source}: no map was asked for, so there is nothing to draw")
    aspect = prediction.view.shape[1] / prediction.view.shape[0]
    side = 3.4
    figure = Figure(figsize=(2 * side * min(aspect, 2) + 5.0, side + 0.8), dpi=PIXELS_PER_INCH, facecolor="white")
    grid = figure.add_gridspec(
        1, 3, width_ratios=[min(aspect, 2), min(aspect, 2), 1.25], wspace=0.06,
        left=0.015, right=0.985, top=0.9, bottom=0.09,
    )  # fmt: skip
    image, heat, bars = (figure.add_subplot(grid[0, column]) for column in range(3))
    _show(image, prediction.view, _short(Path(prediction.source).name or prediction.source, 44), "")
    _show(heat, overlay(prediction.view, prediction.heat.values), _heading(prediction), prediction.heat.meaning)
    _bars(bars, prediction)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.lower().lstrip(".")))


def overlay(view_YXC: NDArray[np.uint8], heat_yx: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """The map's colours over a grey copy of the image, the more opaque the stronger."""
    height, width = view_YXC.shape[:2]
    low, strongest = float(heat_yx.min()), float(np.quantile(heat_yx, STRONGEST_SHARE))
    scaled = np.clip((heat_yx - low) / (strongest - low), 0, 1) if strongest > low else np.zeros_like(heat_yx)
    smooth = Image.fromarray(scaled.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    strength_YX = np.clip(np.asarray(smooth), 0, 1)
    colour = matplotlib.colormaps[COLOUR_MAP](0.3 + 0.65 * strength_YX)[..., :3]
    grey = np.repeat((view_YXC @ np.array([0.299, 0.587, 0.114]) / 255)[..., None], 3, axis=2)
    opacity = (0.7 * strength_YX**0.6)[..., None]
    return np.rint(255 * ((1 - opacity) * (0.15 + 0.75 * grey) + opacity * colour)).astype(np.uint8)


def is_picture_file(path: Path) -> bool:
    """Whether a path names a picture and not a folder for pictures.

    Raises:
        ValueError: Its ending is that of a file of another kind.
    """
    if path.suffix[1:].isalpha() and path.suffix.lower() not in PICTURE_SUFFIXES and not path.is_dir():
        raise ValueError(
            f"pictures are written as {', '.join(PICTURE_SUFFIXES)}, not {path}; a new folder has no ending"
        )
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.is_dir()


def free_name(folder: Path, source: str, taken: set[str]) -> Path:
    """A file name in a folder for the picture of an image; images of one name get numbers."""
    stem = Path(source.partition("?")[0]).stem.replace("/", "_") or "image"
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return folder / f"{name}.png"


def _heading(prediction: Prediction) -> str:
    about_class = prediction.heat is not None and prediction.heat.meaning.startswith("evidence")
    return f"what speaks for “{_short(prediction.top[0].name, 26)}”" if about_class else "where the model looks"


def _show(axes: Axes, pixels: NDArray[np.uint8], title: str, caption: str) -> None:
    axes.imshow(pixels, interpolation="lanczos")
    axes.set_axis_off()
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=7)
    axes.text(0, -0.035, caption, transform=axes.transAxes, fontsize=6.6, color=PALE_INK, va="top", ha="left")


def _bars(axes: Axes, prediction: Prediction) -> None:
    guesses = prediction.top
    places = np.arange(len(guesses), 0, -1)
    colours = [BAR, *[PALE_BAR] * (len(guesses) - 1)]
    axes.barh(places - 0.18, [guess.probability for guess in guesses], height=0.3, color=colours)
    for place, guess in zip(places, guesses, strict=True):
        weight = "bold" if place == len(guesses) else "normal"
        axes.text(0, place + 0.06, _short(guess.name, LONGEST_NAME), fontsize=9, color=INK, weight=weight, va="bottom")
        axes.text(
            1, place + 0.06, f"{guess.probability:.1%}", fontsize=9, color=INK, weight=weight, va="bottom", ha="right"
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(min(0.5, len(guesses) - 4.5), len(guesses) + 0.55)
    axes.set_axis_off()
    axes.set_title(f"top {len(guesses)}", fontsize=10, color=INK, loc="left", pad=7)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
