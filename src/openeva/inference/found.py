"""A search of the command line, and its answers for people and programs.

texts, images -> `Query.answers` -> table, JSON or CSV (the page of pictures is in `contact_sheet.py`)
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from openeva.data.file_index import printable
from openeva.inference.inputs import find_images
from openeva.inference.output import Format, csv_row, put
from openeva.inference.search import TOP, Hit, Index
from openeva.inference.texts import checked_texts

CSV_COLUMNS = ("query", "rank", "image", "score")


@dataclass(frozen=True)
class Answer:
    """What one search found.

    Attributes:
        query: What was looked for, in words.
        hits: Best first.
    """

    query: str
    hits: Sequence[Hit]

    def rows(self) -> list[tuple[str, str, str]]:
        """Rows (rank, score, image) of a table."""
        return [(str(rank), f"{hit.score:.3f}", name_of(hit)) for rank, hit in enumerate(self.hits, start=1)]


@dataclass(frozen=True)
class Query:
    """What to look for.

    Attributes:
        texts: In words.
        images: Addresses of images that are like what is looked for.
        each: Every text by itself (with the images, if any) and not all together.
        top: Most images of an answer.
        threshold: Least cosine.

    Raises:
        ValueError: An empty text, an address without an image, or values that do not fit together.
    """

    texts: Sequence[str] = ()
    images: Sequence[str] = ()
    each: bool = False
    top: int = TOP
    threshold: float | None = None

    def __post_init__(self) -> None:
        checked_texts(self.texts)
        find_images(list(self.images))
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold:g} is a cosine, from -1 to 1; most are between 0.1 and 0.4")
        if self.each and not self.texts:
            raise ValueError("--each looks for each query by itself; give queries")

    def __bool__(self) -> bool:
        return bool(self.texts or self.images)

    def answers(self, index: Index) -> list[Answer]:
        """What an index has to say.

        Raises:
            ImageError: An image cannot be read.
            ValueError: There is no index yet, or one of other weights.
        """
        together = [[text] for text in checked_texts(self.texts)] if self.each else [list(self.texts)]
        return [
            Answer(self._words(texts), index.search(texts, list(self.images), top=self.top, threshold=self.threshold))
            for texts in together
        ]

    def _words(self, texts: Sequence[str]) -> str:
        like = [f"like {printable(os.fsencode(Path(image).name or image))}" for image in self.images]
        return " + ".join([*checked_texts(texts), *like])


def name_of(hit: Hit) -> str:
    """Path of a found image for people."""
    return printable(bytes(hit.path))


def write(format_: Format, answers: Sequence[Answer], place: Path | TextIO) -> None:
    """Write answers to a file, which appears whole, or to a stream."""
    put(_as_json(answers) if format_ == "json" else _as_csv(answers), place)


def _as_json(answers: Sequence[Answer]) -> Iterator[str]:
    """A list of `{"query": ..., "found": [{"rank", "image", "score"}]}`."""
    records = [
        {
            "query": answer.query,
            "found": [
                {"rank": rank, "image": name_of(hit), "score": round(hit.score, 6)}
                for rank, hit in enumerate(answer.hits, start=1)
            ],
        }
        for answer in answers
    ]
    yield json.dumps(records, ensure_ascii=False, indent=1) + "\n"


def _as_csv(answers: Sequence[Answer]) -> Iterator[str]:
    yield csv_row(CSV_COLUMNS)
    for answer in answers:
        for rank, hit in enumerate(answer.hits, start=1):
            yield csv_row((answer.query, rank, name_of(hit), f"{hit.score:.6g}"))
