"""Several runs on one page: held-out metrics against the samples seen; runs that differ by chance alone are one line.

run folders -> `Facts` -> `Group`s (same recipe, other seeds) -> curves with their spread, values at the end, samples
until the first group's final value -> `tables`, `comparison_page`
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from openeva.config import ConfigError
from openeva.engine.log import Record
from openeva.evals.base import less_is_better
from openeva.report.curves import NUM_COLOURS, Point, Series, line_chart, number_text, series
from openeva.report.document import document, paragraph, section, table_html
from openeva.report.page import Facts, duration, read_facts
from openeva.report.tables import Row, Table, Value

BY_CHANCE = ("run.seed", "run.out")
"""Keys in which runs of one group may differ."""


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with different seeds.

    Attributes:
        name: What tells it from the others.
        runs: At least one.
    """

    name: str
    runs: list[Facts]

    def metrics(self) -> set[str]:
        """What every run has measured on held-out images."""
        return set.intersection(*({key for record in run.evaluations for key in record} for run in self.runs)) - {
            "step",
            "time",
        }

    def curves(self, metric: str) -> list[list[Point]]:
        """`(samples, value)` of each run."""
        return [
            [(step * run.recipe.run.batch_size, value) for step, value in series(run.evaluations, metric, "").points]
            for run in self.runs
        ]

    def line(self, metric: str) -> Series:
        """The mean over the runs where all of them were measured, with the least and the greatest value."""
        values = [dict(points) for points in self.curves(metric)]
        common = sorted(set.intersection(*map(set, values)))
        mean = [(x, fmean(one[x] for one in values)) for x in common]
        band = [(x, min(one[x] for one in values), max(one[x] for one in values)) for x in common]
        return Series(self.name, mean, dots=True, band=band if len(values) > 1 else ())

    def final(self, metric: str) -> Value | None:
        """The last value of every run."""
        return _value([points[-1][1] for points in self.curves(metric) if points])

    def samples_until(self, metric: str, wanted: float) -> Value | None:
        """Samples after which the runs first reach a value, between two evaluations in proportion; None if not all."""
        found = [samples_until(points, wanted, less=less_is_better(metric)) for points in self.curves(metric)]
        return None if None in found else _value([samples for samples in found if samples is not None])


def samples_until(points: Sequence[Point], wanted: float, *, less: bool) -> float | None:
    """Where a line of `(samples, value)` first reaches a value, or None where it never does.

    Args:
        points: In order.
        wanted: To be reached or passed.
        less: True = from above.
    """
    sign = -1.0 if less else 1.0
    before: Point | None = None
    for samples, value in points:
        missing = sign * (wanted - value)
        if missing <= 0:
            if before is None:
                return samples
            step = sign * (value - before[1])
            return samples + (samples - before[0]) * missing / step
        before = (samples, value)
    return None


def _value(numbers: Sequence[float]) -> Value | None:
    if not numbers:
        return None
    return Value(mean=fmean(numbers), std=stdev(numbers) if len(numbers) > 1 else None, n=len(numbers))


def group_runs(runs: Sequence[Path]) -> list[Group]:
    """Read runs and put those together that differ in nothing but seed and folder, in the order given.

    Raises:
        ConfigError: One is not a run folder.
        ValueError: A file of a run is damaged.
    """
    alike: dict[str, list[Facts]] = {}
    settings: dict[str, dict[str, str]] = {}
    for run in runs:
        facts = read_facts(run)
        flat = _flat(facts.recipe.model_dump(mode="json"))
        for key in BY_CHANCE:
            flat.pop(key, None)
        alike.setdefault(repr(flat), []).append(facts)
        settings[repr(flat)] = flat
    every = [key for flat in settings.values() for key in flat]
    telling = [key for key in dict.fromkeys(every) if len({flat.get(key) for flat in settings.values()}) > 1]
    names = {
        key: ", ".join(f"{part}={flat[part]}" for part in telling if part in flat) or "all runs"
        for key, flat in settings.items()
    }
    return [Group(names[key], found) for key, found in alike.items()]


def check_groups(groups: Sequence[Group]) -> None:
    """Whether groups can be drawn together.

    Raises:
        ConfigError: They cannot.
    """
    if len(groups) > NUM_COLOURS:
        raise ConfigError([f"{len(groups)} different recipes are more than the {NUM_COLOURS} lines of a drawing"])
    if not _common(groups):
        folders = ", ".join(str(run.run) for group in groups for run in group.runs)
        raise ConfigError([f"no held-out metric is common to {folders}: they need evaluations of the same names"])


def _common(groups: Sequence[Group]) -> list[str]:
    """Metrics of all groups, the loss first."""
    found = set.intersection(*(group.metrics() for group in groups))
    return sorted(found, key=lambda metric: (metric != "held_out_loss", metric))


def _flat(content: Any, path: str = "") -> dict[str, str]:
    """Values of a resolved recipe by their dotted path, as text."""
    if isinstance(content, dict | list) and content:
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {key: text for name, value in items for key, text in _flat(value, f"{path}.{name}".strip(".")).items()}
    return {path: "null" if content is None else str(content)}


def tables(groups: Sequence[Group]) -> list[Table]:
    """Values at the end, and the samples until the first group's final value."""
    first, *others = groups
    metrics = _common(groups)
    ends = [_best(metric, [group.final(metric) for group in groups]) for metric in metrics]
    several = any(len(group.runs) > 1 for group in groups)
    spread = "Mean and standard deviation over runs that differ in their seed alone. " if several else ""
    found = [
        Table(
            title="At the end",
            columns=[group.name for group in groups],
            rows=[Row(name=metric, values=list(values)) for metric, values in zip(metrics, ends, strict=True)],
            note=f"{spread}The best of each line is bold." if others else spread.strip(),
        )
    ]
    goals = {metric: goal.mean for metric in metrics if (goal := first.final(metric)) is not None}
    if others and goals:
        rows = [
            Row(name=metric, values=[group.samples_until(metric, goal) for group in others])
            for metric, goal in goals.items()
        ]
        title = f"Samples after which the others are as good as {first.name} at its end"
        note = (
            f"That end is after {_samples(first):,} samples. The first time that the value is reached, between two"
            " evaluations in proportion; – where not every run reached it."
        )
        columns = [group.name for group in others]
        found.append(Table(title=title, columns=columns, rows=rows, note=note, digits=0))
    return found


def _best(metric: str, values: Sequence[Value | None]) -> list[Value | None]:
    """The same with the best one marked, where there are several."""
    means = [value.mean for value in values if value is not None]
    if len(means) < 2:
        return list(values)
    best = min(means) if less_is_better(metric) else max(means)
    return [value and value.model_copy(update={"best": value.mean == best}) for value in values]


def _samples(group: Group) -> float:
    """Samples that the longest run of a group has seen."""
    return max(
        (record["step"] * run.recipe.run.batch_size for run in group.runs for record in run.evaluations), default=0
    )


def comparison_page(
    groups: Sequence[Group], *, title: str = "", intro: str = "", more: Sequence[Table] = (), main: Sequence[str] = ()
) -> str:
    """The whole document.

    Args:
        groups: To compare; the first one is what the others are measured by.
        title: Heading; default: how many runs.
        intro: A paragraph for someone who has not seen the recipes.
        more: Further tables, below.
        main: Metrics that are drawn first; the others follow.
    """
    count = sum(len(group.runs) for group in groups)
    metrics = [*main, *(metric for metric in _common(groups) if metric not in main)]
    charts = "".join(
        line_chart(metric.replace("_", " "), [group.line(metric) for group in groups], unit="sample")
        for metric in metrics
    )
    bands = " Lines are means, bands reach from the least to the greatest run." if count > len(groups) else ""
    return document(
        title or f"{count} runs",
        [
            f'<header><p class="kicker">openeva · comparison of {count} runs</p>'
            f"<h1>{html.escape(title or f'{count} runs')}</h1>{paragraph(intro) if intro else ''}</header>",
            section(
                "Against the samples seen",
                paragraph(f"Measured on held-out images during training.{bands}")
                + f'<div class="charts">{charts}</div>',
            ),
            section("Numbers", "".join(map(table_html, [*tables(groups), *more]))),
            section("Runs", "".join(map(_runs, groups))),
        ],
    )


def _runs(group: Group) -> str:
    rows: Mapping[str, str] = {run.run.resolve().name: _in_words(run) for run in group.runs}
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in rows.items())
    recipe = html.escape(group.runs[0].recipe_text)
    details = f"<details><summary>The recipe of the first</summary><pre>{recipe}</pre></details>"
    return f"<h3>{html.escape(group.name)}</h3><dl>{listed}</dl>{details}"


def _in_words(facts: Facts) -> str:
    last: Record = facts.training[-1] if facts.training else {"samples": 0}
    state = "finished" if facts.finished else "unfinished"
    device = facts.environment.get("device", "an unknown machine")
    seconds = duration(facts.seconds)
    return f"{state}, seed {facts.recipe.run.seed}, {number_text(last['samples'])} samples in {seconds} on {device}"
