"""The comparison of several runs: which are one line, their curves, after how many samples one is as good."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from openeva.cli import app
from openeva.config import ConfigError, dump_yaml, validate
from openeva.evals.base import less_is_better
from openeva.report import group_runs, write_comparison
from openeva.report.compare import samples_until, tables
from openeva.train import Recipe

TASK = {
    "name": "clip", "embed_dim": 16,
    "backbone": {"name": "vit", "image_size": 32, "patch_size": 16, "width": 32, "depth": 1, "num_heads": 2,
                 "mlp_hidden": 64},
    "text": {"width": 16, "num_heads": 2, "depth": 1},
}  # fmt: skip
SOURCE = {"name": "scenes", "num_images": 8, "captions": True}


def a_run(
    folder: Path, evaluations: dict[str, list[float]], *, seed: int = 0, lr: float = 1e-3, batch: int = 10
) -> Path:
    """The folder of a run that was evaluated every 100 steps."""
    content: dict[str, Any] = {
        "task": TASK, "data": {"train": [SOURCE], "val": [SOURCE]}, "optim": {"lr": lr},
        "run": {"out": str(folder), "seed": seed, "length": "300 steps", "batch_size": batch},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(validate(Recipe, content)))
    lines = [{"step": 100, "samples": 100 * batch, "loss": 1.0, "step_ms": 5.0}]
    for number in range(len(next(iter(evaluations.values())))):
        lines.append({"step": 100 * (number + 1), "time": 0.0} | {k: v[number] for k, v in evaluations.items()})
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two seeds of a slow recipe and two of a fast one."""
    return [
        a_run(tmp_path / "slow-0", {"top1": [0.1, 0.2, 0.3], "held_out_loss": [3.0, 2.0, 1.0]}),
        a_run(tmp_path / "fast-0", {"top1": [0.2, 0.4, 0.5], "held_out_loss": [2.0, 1.0, 0.5]}, lr=1e-2),
        a_run(tmp_path / "slow-1", {"top1": [0.2, 0.3, 0.5], "held_out_loss": [3.0, 2.0, 1.0]}, seed=1),
        a_run(tmp_path / "fast-1", {"top1": [0.4, 0.6, 0.7], "held_out_loss": [2.0, 1.5, 1.1]}, seed=1, lr=1e-2),
    ]


def test_runs_that_differ_in_seed_and_folder_are_one_line(runs: list[Path]) -> None:
    slow, fast = group_runs(runs)
    assert (slow.name, fast.name) == ("optim.lr=0.001", "optim.lr=0.01")
    assert [run.run.name for run in slow.runs] == ["slow-0", "slow-1"]
    line = slow.line("top1")
    assert line.points == [(1000, pytest.approx(0.15)), (2000, pytest.approx(0.25)), (3000, pytest.approx(0.4))]
    assert line.band == [(1000, 0.1, 0.2), (2000, 0.2, 0.3), (3000, 0.3, 0.5)]


def test_another_batch_size_is_compared_by_samples(tmp_path: Path) -> None:
    one = a_run(tmp_path / "one", {"top1": [0.1, 0.2]})
    two = a_run(tmp_path / "two", {"top1": [0.1, 0.2]}, batch=20)
    small, large = group_runs([one, two])
    assert [x for x, _ in small.line("top1").points] == [1000, 2000]
    assert [x for x, _ in large.line("top1").points] == [2000, 4000]


def test_only_points_that_all_seeds_have_are_averaged(tmp_path: Path) -> None:
    whole = a_run(tmp_path / "whole", {"top1": [0.1, 0.2, 0.3]})
    stopped = a_run(tmp_path / "stopped", {"top1": [0.3, 0.4]}, seed=1)
    (group,) = group_runs([whole, stopped])
    assert group.line("top1").points == [(1000, pytest.approx(0.2)), (2000, pytest.approx(0.3))]


def test_values_at_the_end_and_samples_until_then(runs: list[Path]) -> None:
    end, until = tables(group_runs(runs))
    rows = {row.name: row.values for row in end.rows}
    assert list(rows) == ["held_out_loss", "top1"]
    assert [(value.mean, value.best) for value in rows["top1"]] == [
        (pytest.approx(0.4), False),
        (pytest.approx(0.6), True),
    ]
    assert rows["top1"][0].std == pytest.approx(0.2 / 2**0.5)
    assert [value.best for value in rows["held_out_loss"]] == [False, True], "of a loss less is better"
    reached = {row.name: row.values[0] for row in until.rows}
    assert reached["top1"].mean == pytest.approx((2000 + 1000) / 2), "0.4 after 2,000 samples and after 1,000"
    assert reached["held_out_loss"] is None, "one of the seeds never comes to 1.0"


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(-5, 5), st.booleans())
def test_where_a_line_first_reaches_a_value(values: list[float], wanted: float, less: bool) -> None:
    points = [(100.0 * (number + 1), value) for number, value in enumerate(values)]
    found = samples_until(points, wanted, less=less)
    there = [value <= wanted if less else value >= wanted for value in values]
    if not any(there):
        assert found is None
        return
    first = there.index(True)
    low = 100.0 * max(first, 1) if first else 100.0
    assert found is not None
    assert low - 1e-6 <= found <= 100.0 * (first + 1) + 1e-6


def test_between_two_evaluations_in_proportion() -> None:
    assert samples_until([(100, 0.0), (200, 1.0)], 0.25, less=False) == pytest.approx(125)
    assert samples_until([(100, 4.0), (300, 2.0)], 3.5, less=True) == pytest.approx(150)


def test_losses_ranks_and_gaps_are_better_when_they_are_small() -> None:
    small = [m for m in ("top1", "ema_held_out_loss", "retrieval_i2t_median_rank", "auc", "gap") if less_is_better(m)]
    assert small == ["ema_held_out_loss", "retrieval_i2t_median_rank", "gap"]


def test_page_stands_alone_and_names_what_it_shows(runs: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "new" / "page.html"
    write_comparison(group_runs(runs), file, title="slow & fast", main=["top1"])
    text = file.read_text(encoding="utf-8")
    assert "slow &amp; fast" in text
    assert "http" not in text
    assert "<script" not in text
    assert text.index("<h3>top1</h3>") < text.index("<h3>held out loss</h3>"), "what matters most is drawn first"
    assert text.count("<polygon") == 4, "a band for each group in each chart"
    assert "optim.lr=0.01 <b>0.6</b>" in text, "the legend has the last mean"


def test_command_prints_the_tables_and_writes_beside_the_first_run(runs: list[Path]) -> None:
    result = CliRunner().invoke(app, ["report", *map(str, runs)])
    assert result.exit_code == 0, result.output
    assert "optim.lr=0.01" in result.output
    assert (runs[0].parent / "comparison.html").is_file()


def test_what_cannot_be_compared_is_said(runs: list[Path], tmp_path: Path) -> None:
    other = a_run(tmp_path / "other", {"auc": [0.5]}, lr=1.0)
    with pytest.raises(ConfigError, match=r"no held-out metric is common to .*slow-0.*other"):
        write_comparison(group_runs([runs[0], other]), tmp_path / "page.html")
    many = [a_run(tmp_path / f"lr{n}", {"top1": [0.5]}, lr=1e-3 * (n + 2)) for n in range(7)]
    with pytest.raises(ConfigError, match="7 different recipes are more than the 6 lines"):
        write_comparison(group_runs(many), tmp_path / "page.html")
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        group_runs([runs[0], tmp_path])
    assert not (tmp_path / "page.html").exists()
