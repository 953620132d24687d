"""An HTML document without scripts or outside files, and the pieces that every page of ours has.

strings of HTML -> `section`, `table_html` -> `document`
"""

import html
from collections.abc import Iterable
from importlib import resources

from openeva.report.tables import Table


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page from its head and sections, empty ones left out."""
    style = resources.files("openeva.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{html.escape(title)} · openeva</title>'
        f"<style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main></body></html>\n"
    )


def section(title: str, body: str, name: str = "") -> str:
    """A part of the page with a heading; `name` is what links can point to."""
    return f"<section{f' id={name}' if name else ''}><h2>{html.escape(title)}</h2>{body}</section>"


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{html.escape(text)}</p>"


def table_html(table: Table) -> str:
    """A table of results with its title and note."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = ""
    for row in table.rows:
        cells = "".join(
            f"<td{' class=best' if best else ''}>{html.escape(text)}</td>" for text, best in row.cells(table.digits)
        )
        rows += f'<tr><th scope="row">{html.escape(row.name)}</th>{cells}</tr>'
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<h3>{html.escape(table.title)}</h3><div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )
