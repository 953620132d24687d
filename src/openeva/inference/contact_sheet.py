"""What a search found as one HTML file that stands alone: small pictures with their scores, each a link to its image.

`Hit`s -> thumbnails (JPEG inside the page) -> HTML, readable on a phone, in light and dark, without a network
"""

import base64
import html
import io
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from openeva.data.file_index import printable
from openeva.inference.found import Answer, name_of
from openeva.inference.inputs import ImageError, ImageInput, find_images
from openeva.inference.output import put
from openeva.inference.search import Hit

SIDE = 256
"""Pixels of a thumbnail's longer side."""
MOST_OF_A_QUERY = 12
"""Pictures that are shown of a folder or pattern that was looked for."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --pale: #6b7280; --ground: #fff; --card: #f4f5f7; --mark: #3b5bdb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --pale: #9aa0aa; --ground: #15171b; --card: #22252b; --mark: #8da2fb; }
}
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); }
main { max-width: 1280px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.5rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 32px 0 0; overflow-wrap: anywhere; }
p { margin: 0 0 8px; color: var(--pale); overflow-wrap: anywhere; }
.query { display: flex; gap: 8px; flex-wrap: wrap; margin: 8px 0; }
.query img { height: 96px; width: auto; border-radius: 6px; outline: 2px solid var(--mark); }
ol { list-style: none; margin: 16px 0 0; padding: 0; display: grid; gap: 12px;
     grid-template-columns: repeat(auto-fill, minmax(min(170px, 44vw), 1fr)); }
li { background: var(--card); border-radius: 8px; overflow: hidden; }
a { display: block; color: inherit; text-decoration: none; }
a:focus-visible, a:hover { outline: 2px solid var(--mark); outline-offset: -2px; border-radius: 8px; }
.frame { aspect-ratio: 1; display: flex; align-items: center; justify-content: center; }
.frame img { width: 100%; height: 100%; object-fit: contain; }
.about { padding: 6px 10px 8px; font-size: 13px; }
.about b { font-variant-numeric: tabular-nums; }
.about span { color: var(--pale); overflow: hidden; overflow-wrap: anywhere; display: -webkit-box;
              -webkit-box-orient: vertical; -webkit-line-clamp: 2; }
.bar { height: 3px; background: var(--mark); border-radius: 2px; margin: 3px 0; }
"""


def write_contact_sheet(
    file: Path, folder: Path, answers: Sequence[Answer], *, like: Sequence[ImageInput] = (), note: str = ""
) -> None:
    """Write the page, which appears whole or not at all.

    Args:
        file: Output.
        folder: Where the images are.
        answers: What was found.
        like: Images that were looked for.
        note: A line about the index.
    """
    several = len(answers) > 1
    title = f"{len(answers)} searches" if several else answers[0].query
    sections = "".join(_section(folder, answer, heading=several) for answer in answers)
    queries = "".join(_thumbnail(image) for image in like)
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)} · openeva search</title><style>{STYLE}</style></head>\n<body><main>"
        f"<h1>{html.escape(title)}</h1>"
        + (f'<div class="query">{queries}</div>' if queries else "")
        + f"<p>{html.escape(printable(bytes(folder)))}{html.escape(' · ' + note if note else '')}</p>"
        + f"{sections}\n</main></body></html>\n"
    )
    put([text], file)


def embedded(picture: Image.Image, kind: str, text: str, style: str = "") -> str:
    """An `<img>` that holds its picture.

    Args:
        picture: As large as it is shown.
        kind: "jpeg" or "png".
        text: What it shows, for those who cannot see it.
        style: Class of the element.
    """
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 88, "subsampling": 0} if kind == "jpeg" else {"optimize": True}))
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img class="{style}" src="data:image/{kind};base64,{data}" width="{picture.width}" height="{picture.height}"'
        f' alt="{html.escape(text)}">'
    )


def _section(folder: Path, answer: Answer, *, heading: bool) -> str:
    # bars tell the images of one search apart: cosines of a CLIP lie close together
    scores = [hit.score for hit in answer.hits]
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    tiles = "".join(
        _tile(folder, number, hit, 0.15 + 0.85 * (hit.score - low) / (high - low) if high > low else 1.0)
        for number, hit in enumerate(answer.hits, start=1)
    )
    head = f"<h2>{html.escape(answer.query)}</h2>" if heading else ""
    return f"\n<section>{head}{f'<ol>{tiles}</ol>' if tiles else '<p>Nothing was found.</p>'}</section>"


def _tile(folder: Path, number: int, hit: Hit, share: float) -> str:
    name = printable(bytes(hit.path.relative_to(folder)))
    address = Path(os.path.abspath(hit.path)).as_uri()  # noqa: PTH100 (links stay as they are)
    return (
        f'\n<li><a href="{html.escape(address)}" title="{html.escape(name_of(hit))}">'
        f'<div class="frame">{_thumbnail(hit.path)}</div><div class="about"><b>{number}</b> · {hit.score:.3f}'
        f'<div class="bar" style="width:{share:.0%}"></div><span>{html.escape(name)}</span></div></a></li>'
    )


def _thumbnail(image: ImageInput) -> str:
    """The (first) pictures of an address, or a word where one is gone or broken."""
    try:
        pictures = []
        for found in islice(find_images(image), MOST_OF_A_QUERY):
            picture = Image.fromarray(found.read())
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            pictures.append(embedded(picture, "jpeg", found.source))
    except (ImageError, ValueError):
        return "<p>cannot be read any more</p>"
    return "".join(pictures)
