"""Files that list images with captions -> rows: where an image lies and what it shows.

file -> `RowReader` -> (line, path, captions) of every row, one row after the other, in the order of the file

Known are CSV and TSV (with or without names of columns), JSON lines, a JSON list of such objects, the `captions_*.json`
of COCO, and the `dataset_*.json` with Karpathy's splits of COCO and Flickr30k.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openeva.config import ConfigError
from openeva.data.table import SHOWN, Columns, Problems, delimited_rows, first_line, is_image

_EXAMPLE = '{"image": "a.jpg", "caption": "a red ball"}'

CAPTION_NAMES = (
    "caption",
    "captions",
    "text",
    "texts",
    "title",
    "sentences",
    "sentence",
    "raw",
    "description",
    "alt_text",
)
"""What a column or field of captions may be called, the likeliest first."""

Row = tuple[int | None, str, list[str]]
"""Line (None where a file has no lines to speak of), path as it stands there, captions."""

_DELIMITERS = ("\t", ",", ";", "|")


@dataclass(frozen=True)
class Wanted:
    """Which rows and columns of a file are wanted; None = to be found.

    Attributes:
        path_column: Name or number of the column of paths.
        caption_columns: The same of one or more columns of captions.
        splits: Take only rows with one of these values in `split_column`.
        split_column: Its name or number.
        header: Whether the first row of a table names its columns.
        delimiter: What ends a column of a table.
    """

    path_column: str | int | None = None
    caption_columns: Sequence[str | int] | None = None
    splits: Sequence[str] | None = None
    split_column: str | int = "split"
    header: bool | Literal["auto"] = "auto"
    delimiter: str | None = None


def captions_in(value: Any) -> list[str]:
    """The captions that a value holds: a text, or a list of texts or of objects with a text in them."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, Mapping):
        return captions_in(next((value[name] for name in CAPTION_NAMES if value.get(name)), None))
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [caption for item in value for caption in captions_in(item)]
    return []


class RowReader:
    """Reads one file.

    Attributes:
        problems: Rows that make no sense, which are left out.
        other_splits: Splits that were met and are not wanted.
    """

    def __init__(self, file: Path, wanted: Wanted) -> None:
        self.file, self.wanted, self.problems = file, wanted, Problems(file)
        self.other_splits: set[str] = set()

    def rows(self) -> Iterator[Row]:
        """All wanted rows.

        Raises:
            ConfigError: The columns cannot be told, or the file is empty.
        """
        kind = self.file.suffix.lower()
        if self.file.stat().st_size == 0:
            raise self._empty()
        if kind in {".jsonl", ".ndjson", ".jl"} or _has_json_lines(self.file):
            return self._of_records(self._json_lines())
        return self._of_json() if kind == ".json" else self._of_table()

    def _empty(self) -> ConfigError:
        return ConfigError([f"captions: {self.file} is empty; it must have one row per image and caption"])

    def _takes(self, split: Any) -> bool:
        """Whether rows of a split are wanted."""
        if self.wanted.splits is None or str(split) in self.wanted.splits:
            return True
        self.other_splits.add(str(split))
        return False

    # ------------------------------------------------------------------------------------------------- JSON

    def _json_lines(self) -> Iterator[tuple[int | None, Any]]:
        with self.file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip():
                        yield number, json.loads(line)
                except ValueError as error:
                    self.problems.note("json", f"not JSON ({error}); every line must be one object", number)

    def _of_json(self) -> Iterator[Row]:
        """Rows of a file that is one JSON value."""
        try:
            content = json.loads(self.file.read_bytes())
        except ValueError as error:
            raise ConfigError([f"captions: {self.file} is not JSON ({error})"]) from None
        images = content.get("images") if isinstance(content, dict) else None
        if not (isinstance(images, list) and all(isinstance(image, dict) for image in images)):
            images = None
        if isinstance(content, list):
            return self._of_records((None, record) for record in content)
        if images and "sentences" in images[0]:
            return self._of_karpathy(images)
        if images and content.get("annotations") and "caption" in content["annotations"][0]:
            return self._of_coco(images, content["annotations"])
        what = (
            f"an object with the keys {', '.join(list(content)[:SHOWN])}" if isinstance(content, dict) else "no object"
        )
        raise ConfigError(
            [f"captions: {self.file} is {what}; known are a list of objects as in {_EXAMPLE}, COCO's captions_*.json"
             " (images, annotations with caption) and Karpathy's dataset_*.json (images with sentences)"]
        )  # fmt: skip

    def _of_karpathy(self, images: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
        for image in images:
            if self._takes(image.get("split")):
                # COCO's files lie in one folder per year, whose name is beside theirs
                path = "/".join(filter(None, [image.get("filepath"), image.get("filename")]))
                yield None, path, captions_in(image.get("sentences"))

    def _of_coco(self, images: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
        if self.wanted.splits is not None:
            raise ConfigError([f"captions: {self.file} has no splits (each is a file of its own): leave out `split`"])
        captions: dict[Any, list[str]] = {image.get("id"): [] for image in images}
        for number, annotation in enumerate(annotations):
            image = annotation.get("image_id")
            if image in captions:
                captions[image] += captions_in(annotation.get("caption"))
            else:
                self.problems.note("image", f"annotation {number} is of image {image}, which is not listed")
        for number, image in enumerate(images):
            if image.get("file_name"):
                yield None, image["file_name"], captions[image.get("id")]
            else:
                self.problems.note("path", f"image {number} has no 'file_name'")

    def _of_records(self, records: Iterator[tuple[int | None, Any]]) -> Iterator[Row]:
        """Rows of objects: the keys of the first one are the columns."""
        names: list[str] = []
        path, captions, split = "", [""], None
        for number, (line, record) in enumerate(records):
            entry = "" if line is not None else f"entry {number}: "
            if not isinstance(record, dict):
                self.problems.note("json", f"{entry}{str(record)[:30]!r} is no object as in {_EXAMPLE}", line)
                continue
            if not names:
                names = list(record)
                cells = [value if isinstance(value, str) else "" for value in record.values()]
                of_path, of_captions, of_split = self._choose(Columns(names, cells))
                path, captions = names[of_path], [names[column] for column in of_captions]
                split = None if of_split is None else names[of_split]
            if split is not None and not self._takes(record.get(split)):
                continue
            where = record.get(path)
            if isinstance(where, str) and where.strip():
                yield line, where.strip(), [text for name in captions for text in captions_in(record.get(name))]
            else:
                self.problems.note("path", f"{entry}no {path!r}; give it, or delete the entry", line)
        if not names and not self.problems:
            raise self._empty()

    # ------------------------------------------------------------------------------------------------- tables

    def _of_table(self) -> Iterator[Row]:
        delimiter = self.wanted.delimiter or _delimiter_of(first_line(self.file))
        lines = delimited_rows(self.file, delimiter, self.problems)
        line, first = next(lines, (1, []))
        if not first:
            if not self.problems:
                raise self._empty()
            return
        header = not any(map(is_image, first)) if self.wanted.header == "auto" else self.wanted.header
        names = first if header else []
        row: list[str] | None = first
        if header:
            line, row = next(lines, (line, None))
        path, captions, split = self._choose(Columns(names, row or first))
        needed = max(path, split or 0, *captions)
        while row is not None:
            if row == names:
                text = "the header once more; tables that were put together keep one header"
                self.problems.note("header", text, line)
            elif len(row) <= needed:
                text = f"{len(row)} columns where {needed + 1} are needed; complete the row, or quote texts that hold"
                self.problems.note("short", f"{text} {delimiter!r}", line)
            elif not row[path]:
                self.problems.note("path", "no path in this row; give it or delete the row", line)
            elif split is None or self._takes(row[split]):
                yield line, row[path], [text for column in captions for text in _captions_in_cell(row[column])]
            line, row = next(lines, (line, None))

    # ------------------------------------------------------------------------------------------------- columns

    def _choose(self, columns: Columns) -> tuple[int, list[int], int | None]:
        """Numbers of the columns of paths, captions and splits.

        Raises:
            ConfigError: Not all of them can be told.
        """
        wanted = self.wanted
        split = None if wanted.splits is None else columns.find("split_column", wanted.split_column)
        given = wanted.path_column
        path = columns.path("path_column") if given is None else columns.find("path_column", given)
        if wanted.caption_columns is None:
            found = [_caption_column(columns, path, split)]
        else:
            found = [columns.find("caption_column", name) for name in wanted.caption_columns]
        if columns.problems or path is None:
            raise ConfigError([f"captions: {self.file}: {problem}" for problem in columns.problems])
        return path, [column for column in found if column is not None], split


def _has_json_lines(file: Path) -> bool:
    """Whether a file of any name has one object per line: its first line is a whole object, and not the only line."""
    with file.open("rb") as lines:
        first, second = next(lines, b""), next(lines, b"")
    try:
        return bool(second.strip()) and isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _delimiter_of(line: str) -> str:
    """What the columns of a first row end with: captions may hold any of the others."""

    def has_column(delimiter: str) -> bool:
        cells = [cell.strip().strip('"') for cell in line.split(delimiter)]
        return len(cells) > 1 and any(is_image(cell) or cell.lower() in CAPTION_NAMES for cell in cells)

    return next(filter(has_column, _DELIMITERS), ",")


def _captions_in_cell(cell: str) -> list[str]:
    """A cell is a caption, or a JSON list of captions."""
    if cell.startswith('["'):
        try:
            return captions_in(json.loads(cell))
        except ValueError:
            pass
    return captions_in(cell)


def _caption_column(columns: Columns, path: int | None, split: int | None) -> int | None:
    lower = [name.lower() for name in columns.names]
    if named := [lower.index(name) for name in CAPTION_NAMES if name in lower]:
        return named[0]
    others = [number for number in range(len(columns.row)) if number not in {path, split}]
    if len(others) == 1 and not columns.names:
        return others[0]
    columns.problems.append(
        f"which column holds the captions? None is called {', '.join(CAPTION_NAMES[:5])}; set caption_column (the"
        f" columns are {columns.listed})"
    )
    return None
