"""Tables of results: built once, shown in the report and on the console.

measurements -> `Value`s -> `Table` -> `results.json` in the run's folder -> `print_tables`, `write_report`
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import Field, ValidationError, model_validator
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from openeva.checkpoints.files import write_atomically
from openeva.config import Config

RESULTS_FILE = "results.json"
NOTHING = "–"


class Value(Config):
    """One measured number.

    Attributes:
        mean: The number, or the mean over repetitions.
        std: Standard deviation over repetitions; None where it was measured once.
        n: Repetitions (seeds, draws of labels).
        best: True = set in bold. Which rows compete in a column is for the maker of the table to say.
    """

    mean: float
    std: float | None = Field(None, ge=0)
    n: int = Field(1, ge=1)
    best: bool = False

    def text(self, digits: int) -> str:
        """As it is printed: `0.812 ± 0.004`."""
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


class Row(Config):
    """A line of a table; None where nothing was measured."""

    name: str
    values: list[Value | float | None]

    def cells(self, digits: int) -> list[tuple[str, bool]]:
        """`(text, bold)` of each value."""
        return [_cell(value, digits) for value in self.values]


class Table(Config):
    """Named rows of numbers.

    Attributes:
        title: What is compared.
        columns: Names of the values, without the rows' names.
        rows: In the order in which they are shown.
        note: How it was measured, in a sentence or two.
        digits: Digits after the point.
    """

    title: str
    columns: list[str]
    rows: list[Row]
    note: str = ""
    digits: int = Field(3, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "Table":
        for row in self.rows:
            if len(row.values) != len(self.columns):
                raise ValueError(
                    f"row {row.name!r} has {len(row.values)} values for {len(self.columns)} columns; give None where"
                    " nothing was measured"
                )
        return self


def _cell(value: Value | float | None, digits: int) -> tuple[str, bool]:
    if value is None:
        return NOTHING, False
    if not isinstance(value, Value):
        value = Value(mean=value)
    return value.text(digits), value.best


def write_results(run: Path, tables: Sequence[Table]) -> Path:
    """Keep tables in the run's folder, where the report finds them; returns the file."""
    text = json.dumps({"tables": [table.model_dump(mode="json") for table in tables]}, indent=1)
    file = run / RESULTS_FILE
    write_atomically(file, lambda path: _write_text(path, text + "\n"))
    return file


def read_results(run: Path) -> list[Table]:
    """Tables of a run's folder; none where nothing was measured yet.

    Raises:
        ValueError: The file is damaged.
    """
    file = run / RESULTS_FILE
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return [Table.model_validate(table) for table in content["tables"]]
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a file of results ({error}); delete it and measure again") from None


def print_tables(tables: Iterable[Table], console: Console) -> None:
    """Show tables on a console."""
    for table in tables:
        shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        shown.add_column("")
        for column in table.columns:
            shown.add_column(column, justify="right")
        for row in table.rows:
            cells = [Text(text, style="bold" if best else "") for text, best in row.cells(table.digits)]
            shown.add_row(Text(row.name), *cells)
        console.print(
            Text(table.title, style="bold"), shown, Text(f"{table.note}\n" if table.note else "", style="dim")
        )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
