"""The report of a run: one HTML file that stands alone, readable on a phone, in light and dark.

run folder -> `page.read_facts` (recipe, environment, log, tables) and `look.look` (its model on some images)
-> `pictures`, `curves`, `tables` -> `page.page` -> `report.html`
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from openeva.checkpoints.files import write_atomically
from openeva.config import ConfigError
from openeva.data.loader import TooManyBrokenError
from openeva.report.look import Look, Progress, look
from openeva.report.page import Facts, page, read_facts
from openeva.report.tables import Row, Table, Value, print_tables, read_results, write_results

__all__ = ["Row", "Table", "Value", "looking", "print_tables", "read_results", "write_report", "write_results"]

REPORT_FILE = "report.html"
NUM_WORST = 12


@contextmanager
def looking(console: Console) -> Iterator[Progress]:
    """A line while a report is written, where the console is a terminal: yields what `write_report` takes."""
    with console.status("writing the report") as status:
        yield lambda done, total: status.update(f"writing the report: looked at {done} of {total} images")


def write_report(run: Path, *, num_images: int = 6, progress: Progress | None = None) -> Path:
    """Write `report.html` into a run's folder, whether the run has finished or not.

    What the folder says is always shown; pictures need weights, data and teacher, and where one of them is out of
    reach the report says which and why.

    Args:
        run: The run's folder.
        num_images: Images shown in full, at least 1.
        progress: Called with the number of images looked at so far and in all.

    Returns:
        The file.

    Raises:
        ConfigError: Not a run folder, or one of an incompatible version.
        ValueError: A file in it is damaged, or `num_images` is less than 1.
    """
    if num_images < 1:
        raise ValueError(f"num_images is the number of images shown, at least 1, not {num_images}")
    facts = read_facts(run)
    found, reason = _look_or_reason(facts, num_images, progress)
    text = page(facts, found, reason)
    file = run / REPORT_FILE
    write_atomically(file, lambda path: _write_text(path, text))
    return file


def _look_or_reason(facts: Facts, num_images: int, progress: Progress | None) -> tuple[Look | None, str]:
    try:
        return look(facts.run, facts.recipe, num_images=num_images, num_worst=NUM_WORST, progress=progress), ""
    except (ConfigError, ValueError, OSError, ImportError, TooManyBrokenError) as error:
        return None, str(error)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
