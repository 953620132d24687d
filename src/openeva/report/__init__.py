"""The report of a run, or of several: one HTML file that stands alone, readable on a phone, in light and dark.

run folder -> `page.read_facts` (recipe, environment, log, tables) and `look.look` (its model on some images; of a CLIP
`pairs.look_at_pairs`)
-> `pictures`, `curves`, `tables` -> `page.page` -> `report.html`
run folders -> `compare.group_runs` -> `compare.comparison_page` -> `comparison.html`
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from openeva.checkpoints.files import write_atomically
from openeva.config import ConfigError
from openeva.data.loader import TooManyBrokenError
from openeva.report.compare import Group, check_groups, comparison_page, group_runs, tables
from openeva.report.look import Look, Progress, look
from openeva.report.page import Facts, page, read_facts
from openeva.report.pairs import Pairs, look_at_pairs
from openeva.report.tables import Row, Table, Value, print_tables, read_results, write_results

__all__ = [
    "Group", "Row", "Table", "Value", "group_runs", "looking", "print_tables", "read_results", "write_comparison",
    "write_report", "write_results",
]  # fmt: skip

REPORT_FILE = "report.html"
NUM_WORST = 12


@contextmanager
def looking(console: Console) -> Iterator[Progress]:
    """A line while a report is written, where the console is a terminal: yields what `write_report` takes."""
    with console.status("writing the report") as status:
        yield lambda done, total: status.update(f"writing the report: looked at {done} of {total} images")


def write_report(run: Path, *, out: Path | None = None, num_images: int = 6, progress: Progress | None = None) -> Path:
    """Write the report of a run, whether it has finished or not.

    What the folder says is always shown; pictures need weights, data and teacher, and where one of them is out of
    reach the report says which and why.

    Args:
        run: The run's folder.
        out: The file; default: `report.html` in that folder.
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
    file = out or run / REPORT_FILE
    _write(file, text)
    return file


def write_comparison(
    groups: Sequence[Group],
    file: Path,
    *,
    title: str = "",
    intro: str = "",
    main: Sequence[str] = (),
    more: Sequence[Table] = (),
) -> list[Table]:
    """Write a page that compares runs by their held-out metrics, against the samples seen.

    Args:
        groups: From `group_runs`, or with names of your own; the others are measured by the first.
        file: HTML file.
        title: Heading.
        intro: A paragraph for someone who has not seen the recipes.
        main: Metrics that are drawn first.
        more: Further tables, below those of the runs.

    Returns:
        The tables of the runs.

    Raises:
        ConfigError: No metric is common to all, or there are more groups than a drawing can tell apart.
    """
    check_groups(groups)
    _write(file, comparison_page(groups, title=title, intro=intro, main=main, more=more))
    return tables(groups)


def _look_or_reason(facts: Facts, num_images: int, progress: Progress | None) -> tuple[Look | Pairs | None, str]:
    try:
        if facts.recipe.task.name == "clip":
            return look_at_pairs(facts.run, facts.recipe, num_images=num_images, progress=progress), ""
        return look(facts.run, facts.recipe, num_images=num_images, num_worst=NUM_WORST, progress=progress), ""
    except (ConfigError, ValueError, OSError, ImportError, TooManyBrokenError) as error:
        return None, str(error)


def _write(file: Path, text: str) -> None:
    def put(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    write_atomically(file, put)
