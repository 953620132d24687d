"""What all commands print with: text, tables, exit statuses."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
NUMBERS = {
    "parameters", "pixels", "top-1", "probability", "top-1 %", "top-5 %", "right", "published", "cosine", "score",
    "mean per class %", "images", "difference", "R@1 %", "R@5 %", "R@10 %", "mean rank", "median rank",
}  # fmt: skip
"""Columns of numbers, which stand to the right."""
PIPE_COLUMNS = 200
"""Width of tables that go to a pipe or a file, where there is no terminal to fit."""


def stdout() -> Console:
    """Console for results; as wide as the terminal, or wide enough for tables where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_COLUMNS)


def say(text: str, *, error: bool = False, style: str | None = None) -> None:
    """Print text as it is: no markup, no wrapping, so that paths can be copied and output can be piped.

    Args:
        text: What to say.
        error: To the standard error, in red where no style is given.
        style: Of the text, in rich's words.
    """
    console = Console(stderr=error)
    console.print(text, markup=False, highlight=False, soft_wrap=True, style=style or ("bold red" if error else None))


def table(title: str, columns: list[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """A table without lines; columns of numbers are set to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        number = column in NUMBERS
        fixed = number or column in {"weights", "recipe"}
        made.add_column(column, style=None, header_style="dim", justify="right" if number else "left", no_wrap=fixed)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
