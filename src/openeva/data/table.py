"""Tables on disk: their rows, the columns that are wanted of them, and everything that is wrong with them.

file -> `delimited_rows` (line number, cells) -> `Columns` (which cell is what) ; `Problems` (messages, the first of a
kind)

Shared by the sources that read tables: `image_list`, `captions`.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from openeva.data.file_index import IMAGE_EXTENSIONS
from openeva.registry import did_you_mean

PATH_NAMES = (
    "path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_name", "img",
)  # fmt: skip
"""What a column of paths may be called."""
SHOWN = 10
"""So many problems of a kind are told."""


class Problems:
    """What is wrong with a file: of each kind the first ten are told and the others counted."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._told: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def note(self, kind: str, text: str, line: int | None = None) -> None:
        """Note a problem."""
        where = str(self.file) if line is None else f"{self.file}:{line}"
        told, self._counts[kind] = self._told.setdefault(kind, []), self.count(kind) + 1
        if self.count(kind) <= SHOWN:
            told.append(f"{where}: {text}")
        else:
            told[SHOWN:] = [f"{self.file}: ... and {self.count(kind) - SHOWN} more of the same"]

    def sum_up(self, kind: str, text: str) -> None:
        """Say something about all problems of a kind, before the first of them."""
        self._told[kind].insert(0, f"{self.file}: {text}")

    def count(self, kind: str) -> int:
        """How many of a kind there are."""
        return self._counts.get(kind, 0)

    def __bool__(self) -> bool:
        return bool(self._told)

    def __iter__(self) -> Iterator[str]:
        return (problem for told in self._told.values() for problem in told)


def delimited_rows(file: Path, delimiter: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped cells of every row that is not blank; ends with a problem where it is no table."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter)
        try:
            for row in rows:
                if any(cells := [cell.strip() for cell in row]):
                    yield rows.line_num, cells
        except csv.Error as error:
            problems.note("csv", f"not readable as a table ({error}); check quotes and line ends", rows.line_num)


def first_line(file: Path) -> str:
    """The first line of a text."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        return text.readline()


def is_image(cell: str) -> bool:
    """Whether a cell ends like the name of an image."""
    return cell.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in cell


class Columns:
    """Finds the columns of a table.

    Attributes:
        names: Names of the columns, empty where they have none.
        row: The first row of values.
        problems: Why some could not be found.
    """

    def __init__(self, names: list[str], row: list[str]) -> None:
        self.names, self.row = names, row
        self.problems: list[str] = []
        twice = sorted({name for name in names if name and names.count(name) > 1})
        if twice:
            self.problems.append(f"the header has {', '.join(map(repr, twice))} twice; each column needs its own name")

    @property
    def listed(self) -> str:
        """Names of all columns, for messages."""
        return ", ".join(self.names) if self.names else f"0 to {len(self.row) - 1}, without names"

    def find(self, key: str, wanted: str | int) -> int | None:
        """Number of the column that a key of the config names; None, with a problem, if there is none."""
        if isinstance(wanted, int):
            if 0 <= wanted < len(self.row):
                return wanted
            self.problems.append(f"{key} is {wanted}, but the columns are {self.listed}")
        elif wanted in self.names:
            return self.names.index(wanted)
        else:
            known = f"{did_you_mean(wanted, self.names)}; the columns are {self.listed}"
            self.problems.append(f"there is no column {wanted!r} ({key}){known}")
        return None

    def called(self, names: tuple[str, ...]) -> list[int]:
        """Numbers of the columns of these names, in any case."""
        return [number for number, name in enumerate(self.names) if name.lower() in names]

    def path(self, key: str) -> int | None:
        """Number of the column of paths, by its name or by what its first cell looks like."""
        named, images = self.called(PATH_NAMES), [n for n, cell in enumerate(self.row) if is_image(cell)]
        found = named if len(named) == 1 else images or ([] if self.names else [0])
        if not found:
            self.problems.append(
                f"which column holds the paths? None is called {', '.join(PATH_NAMES[:3])} or ends like an image; set"
                f" {key} (the columns are {', '.join(self.names)}), or `header: false` if they have no names"
            )
        return found[0] if found else None
