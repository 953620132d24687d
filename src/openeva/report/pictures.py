"""The picture sections of a report: numbers to small images inside the page.

`Look` -> tiles (JPEG or PNG as data URLs) -> HTML grids with captions
"""

import html
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from openeva.inference.contact_sheet import embedded
from openeva.report.look import Colours, Look, Pixels, Shown, Worst
from openeva.report.pairs import Pairs

SIDE = 224
"""Pixels of a tile's longer side; larger images are reduced to it."""
HIDDEN = (138, 143, 152)
COLOUR_MAP = "viridis"


def predictions(look: Look) -> str:
    """One row of tiles per image: input, what the student saw, cosines, target, prediction, features."""
    names = ["image", "student sees", "cosine", "teacher features", "prediction", "student features"]
    rows = []
    for shown in look.shown:
        tiles = [
            photo(shown.image, "image"),
            photo(masked(shown.image, shown.mask), "image with hidden patches"),
            photo(heat_map(shown), "cosine at hidden patches"),
            patches(shown.target, "main components of the teacher's features"),
            patches(shown.prediction, "main components of the prediction at hidden patches", shown.mask),
            patches(shown.features, "main components of the student's features"),
        ]
        figures = "".join(tile(image, name) for image, name in zip(tiles, names, strict=True))
        mean = shown.cosine[shown.mask].mean()
        rows.append(
            f'<div class="row"><div class="grid six">{figures}</div><p class="caption">{html.escape(short(shown.name))}'
            f" · mean cosine <b>{mean:.2f}</b> over {int(shown.mask.sum())} hidden patches</p></div>"
        )
    return "".join(rows)


def neighbours(look: Look) -> str:
    """One row per image: the image, then those most similar to it."""
    rows = []
    for shown in look.shown:
        tiles = tile(photo(shown.image, "query"), "query", "query")
        for number, found in enumerate(shown.neighbours, start=1):
            mark = {None: "", True: " ✓", False: " ✗"}[found.same_label]
            tiles += tile(photo(found.image, f"neighbour {number}"), f"{found.cosine:.3f}{mark}")
        rows.append(f'<div class="row"><div class="grid six">{tiles}</div></div>')
    return "".join(rows)


def texts_found(pairs: Pairs) -> str:
    """One row per image: the image with its caption, then the texts nearest to it."""
    rows = ""
    for shown in pairs.images:
        items = "".join(
            f"<li{' class=own' if found.own else ''}><b>{found.cosine:.3f}</b> {html.escape(found.text)}"
            f"{' ✓' if found.own else ''}</li>"
            for found in shown.found
        )
        place = "" if shown.rank <= len(shown.found) else f'<p class="note">its own comes at place {shown.rank:,}</p>'
        picture = tile(photo(shown.image, shown.caption), shown.caption, "query")
        rows += f'<div class="pair">{picture}<div><ol>{items}</ol>{place}</div></div>'
    return rows


def images_found(pairs: Pairs) -> str:
    """One row per text: the images nearest to it."""
    rows = []
    for query in pairs.queries:
        tiles = "".join(
            tile(photo(image, query.text), f"{cosine:.3f}{' ✓' if own else ''}", "query" if own else "")
            for image, cosine, own in query.found
        )
        text = f'<p class="caption">{html.escape(query.text)}</p>'
        rows.append(f'<div class="row">{text}<div class="grid six">{tiles}</div></div>')
    return "".join(rows)


def worst_patches(look: Look) -> str:
    """Tiles of the patches predicted worst, each outlined in its surroundings."""
    tiles = "".join(
        tile(photo(surroundings(worst), f"worst patch of {short(worst.name)}"), f"{worst.cosine:.2f}")
        for worst in look.worst
    )
    return f'<div class="grid six">{tiles}</div>'


def colour_scale() -> str:
    """Legend of the heat map: CSS gradient with ticks."""
    stops = ", ".join(f"rgb({r},{g},{b})" for r, g, b in _heat(np.linspace(0, 1, 9)).tolist())
    ticks = "".join(f"<span>{text}</span>" for text in ("≤ 0", ".25", ".5", ".75", "1"))
    return (
        '<div class="scale"><span class="label">cosine</span><div>'
        f'<div class="ramp" style="background:linear-gradient(90deg,{stops})"></div><div class="ticks">{ticks}</div>'
        "</div></div>"
    )


# ------------------------------------------------------------------------------------------------ pixels


def masked(image: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """The image with its hidden patches in one grey."""
    out = image.copy()
    out[_enlarged(mask, image)] = HIDDEN
    return out


def heat_map(shown: Shown) -> Pixels:
    """Hidden patches coloured by their cosine, over a pale grey copy of the image."""
    grey = shown.image.mean(axis=2, keepdims=True)
    pale = np.repeat(128 + (grey - 128) * 0.35, 3, axis=2).astype(np.uint8)
    hidden = _enlarged(shown.mask, shown.image)
    pale[hidden] = _enlarged(_heat(shown.cosine), shown.image)[hidden]
    return pale


def surroundings(worst: Worst) -> Pixels:
    """The patch with its neighbours (two to each side in fine grids, one in coarse ones), outlined."""
    rows, columns = worst.mask.shape
    height, width = worst.image.shape[0] // rows, worst.image.shape[1] // columns
    reach = 2 if min(rows, columns) > 10 else 1
    span = min(2 * reach + 1, rows, columns)
    top = min(max(worst.place[0] - reach, 0), rows - span)
    left = min(max(worst.place[1] - reach, 0), columns - span)
    box = (left * width, top * height, (left + span) * width, (top + span) * height)
    crop = Image.fromarray(worst.image).crop(box).resize((SIDE, SIDE * height // width), Image.Resampling.BICUBIC)
    x, y = (worst.place[1] - left) * crop.width / span, (worst.place[0] - top) * crop.height / span
    outline = ImageDraw.Draw(crop)
    for inset, colour in ((0, "black"), (3, "white")):
        corners = (x + inset, y + inset, x + crop.width / span - inset, y + crop.height / span - inset)
        outline.rectangle(corners, outline=colour, width=3)
    return np.asarray(crop)


def _heat(values: NDArray[np.floating[Any]]) -> Pixels:
    return matplotlib.colormaps[COLOUR_MAP](np.clip(values, 0, 1), bytes=True)[..., :3]


def _enlarged(grid: NDArray[np.generic], image: Pixels) -> NDArray[np.generic]:
    """Values of a patch grid at every pixel of an image."""
    rows = np.arange(image.shape[0]) * grid.shape[0] // image.shape[0]
    columns = np.arange(image.shape[1]) * grid.shape[1] // image.shape[1]
    return grid[rows[:, None], columns]


# ------------------------------------------------------------------------------------------------ HTML


def tile(image: str, text: str, style: str = "") -> str:
    """An image with a word below."""
    return f'<figure class="tile {style}">{image}<figcaption>{html.escape(text)}</figcaption></figure>'


def photo(image: Pixels, text: str) -> str:
    """An `<img>` of pixels, as JPEG."""
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return embedded(picture, "jpeg", text)


def patches(colours: Colours, text: str, opaque: NDArray[np.bool_] | None = None) -> str:
    """An `<img>` with a pixel per patch, which the browser enlarges; transparent where `opaque` is false."""
    pixels = (colours * 255).round().astype(np.uint8)
    if opaque is not None:
        pixels = np.concatenate([pixels, opaque[..., None].astype(np.uint8) * 255], axis=2)
    return embedded(Image.fromarray(pixels), "png", text, "patches")


def short(name: str, length: int = 40) -> str:
    """The end of a long name."""
    return name if len(name) <= length else "…" + name[-length + 1 :]


def share_of_same_labels(shown: Sequence[Shown]) -> tuple[int, int] | None:
    """How many of the neighbours have their query's label, of how many; None without labels."""
    marks = [found.same_label for one in shown for found in one.neighbours if found.same_label is not None]
    return (sum(marks), len(marks)) if marks else None
