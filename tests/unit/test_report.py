import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from openeva.config import ConfigError, validate
from openeva.data.loader import EvalLoader
from openeva.evals.masked_cosine import Config as MaskedCosine
from openeva.evaluate import open_run, read_run_recipe
from openeva.report import Row, Table, Value, looking, print_tables, read_results, write_report, write_results
from openeva.report.curves import MAX_POINTS, line_chart, number_text, series, tick_texts
from openeva.report.look import LOOKED_AT, Look, NoPicturesError, Worst, look
from openeva.report.page import duration, read_facts
from openeva.report.pictures import HIDDEN, masked, surroundings
from openeva.train import Recipe, train

NUM_IMAGES = 3

VIT = {"name": "vit", "patch_size": 8, "width": 32, "depth": 1, "num_heads": 2, "mlp_hidden": 64}
RECIPE = {
    "task": {
        "name": "pretrain",
        "backbone": {**VIT, "image_size": 32},
        "target": {
            "name": "features", "teacher": {**VIT, "image_size": 48, "width": 16}, "standardise": True, "cache": True,
        },
        "masking": {"name": "block", "num_masked": 6, "min_block": 2},
    },
    "data": {
        "train": [{"name": "scenes", "num_images": 24, "size": 48}],
        "val": [{"name": "scenes", "num_images": 10, "size": 48, "seed": 1}],
        "crop": {"kind": "center", "crop_pct": 1.0},
        "val_crop": {"kind": "center", "crop_pct": 1.0, "hflip": 0.0},
        "num_workers": 0,
    },
    "optim": {"warmup": "1 steps"},
    "run": {
        "length": "4 steps", "batch_size": 8, "log_every": "1 steps", "evaluate_every": "2 steps",
        "save_every": "2 steps", "device": "cpu", "precision": "fp32",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny <run>"
    train(validate(Recipe, {**RECIPE, "run": {**RECIPE["run"], "out": str(out)}}))
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; it lies elsewhere than `run.out` says, as a moved run does."""
    return shutil.copytree(finished, tmp_path / finished.name)


@pytest.fixture(scope="module")
def seen(finished: Path) -> Look:
    return look(finished, read_run_recipe(finished), num_images=NUM_IMAGES, num_worst=4)


class _Page(HTMLParser):
    """Text, images and open tags of a page; an end tag that closes nothing fails."""

    VOID = frozenset({"meta", "img", "line", "polyline", "circle", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def report(run: Path) -> _Page:
    return _Page(write_report(run, num_images=NUM_IMAGES).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ the page


def test_one_file_that_needs_nothing_else(run: Path) -> None:
    file = write_report(run, num_images=NUM_IMAGES)
    text = file.read_text(encoding="utf-8")
    assert file == run / "report.html"
    assert not re.search(r"<script|<link|https?://|url\(|@import", text)
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text
    for source in _Page(text).images:
        kind, data = source.removeprefix("data:image/").split(";base64,")
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == {"jpeg": "JPEG", "png": "PNG"}[kind]


def test_says_what_was_run_and_how_it_went(run: Path) -> None:
    page = report(run)
    held_out = [
        r["held_out_loss"]
        for r in map(json.loads, (run / "log.jsonl").read_text().splitlines())
        if "held_out_loss" in r
    ]
    assert f"{-held_out[-1]:.3f}" in page.text
    assert "tiny <run>" in page.text  # escaped in the file
    torch.manual_seed(0)  # as the run did: the teacher has random weights
    assert read_run_recipe(run).task.build().target.identity in page.text
    assert "24 for training, 10 held out" in page.text
    assert "Every file could be read." in page.text
    assert len(page.images) == NUM_IMAGES * 6 + NUM_IMAGES * 6 + 10  # tiles, query and 5 neighbours, a patch per image
    for title in ("Loss", "Learning rate", "Gradient norm", "Images per second", "Time"):
        assert title in page.text


def test_unfinished_run_shows_its_last_checkpoint(run: Path, seen: Look) -> None:
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "target" / "features")  # a large cache is not made again for a report
    again = look(run, read_run_recipe(run), num_images=NUM_IMAGES, num_worst=4)
    assert again.source == "the checkpoint of step 4"
    np.testing.assert_array_equal(again.cosines, seen.cosines)  # the last checkpoint has the finished weights
    assert not (run / "target" / "features").exists()
    assert "unfinished, at step 4" in report(run).text


def _remove_weights(run: Path) -> str:
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints")
    return "it has not saved any weights yet"


def _move_data(run: Path) -> str:
    change_recipe(run, "data", train=[{"name": "image_folder", "roots": [str(run / "gone")]}], val=[])
    return str(run / "gone")


def _break_images(run: Path) -> str:
    images = run / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.jpg").write_bytes(b"nothing")
    change_recipe(run, "data", val=[{"name": "image_folder", "roots": [str(images)]}])
    return "reads failed"


@pytest.mark.parametrize("take_away", [_remove_weights, _move_data, _break_images])
def test_without_pictures_the_rest_is_shown_with_the_reason(run: Path, take_away) -> None:
    reason = take_away(run)
    page = report(run)
    assert "There are no pictures of this run: " in page.text
    assert reason in page.text
    assert not page.images
    assert "Learning rate" in page.text


def test_a_run_that_has_only_begun(run: Path) -> None:
    for name in ("model", "checkpoints", "tensorboard"):
        shutil.rmtree(run / name)
    (run / "log.jsonl").unlink()
    (run / "summary.json").unlink()
    page = report(run)
    assert "has not logged a step yet" in page.text
    assert "Curves" not in page.text


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not the folder of a run.*config\.yaml"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_at_least_one_image(run: Path) -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        write_report(run, num_images=0)


def test_a_damaged_file_is_named(run: Path) -> None:
    (run / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not valid JSON"):
        write_report(run)


def test_broken_files_are_named_and_escaped(run: Path) -> None:
    broken = {f"folder/{number}<b>.jpg": "the file is empty" for number in range(60)}
    (run / "summary.json").write_text(json.dumps({"broken_files": 70, "broken": broken}))
    page = report(run)
    assert "folder/0<b>.jpg" in page.text
    assert "Broken files (70)" in page.text
    assert "and 20 more" in page.text


def test_time_split_weighs_log_lines_by_their_time(run: Path) -> None:
    shares = [{"student": 1.0}, {"student": 0.5, "teacher": 0.3, "optimiser": 0.1, "data": 0.1}]
    lines = [
        {"step": step, "samples": 8 * step, "loss": -0.5, "lr": 1.0, "grad_norm": 1.0, "step_ms": ms}
        | {f"share_{key}": value for key, value in share.items()}
        for step, ms, share in zip((10, 20), (100, 300), shares, strict=True)
    ]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = report(run).text
    assert "4 s" in text  # 1 s + 3 s
    for words in ("student 62.5%", "teacher 22.5%", "optimiser 7.5%", "waiting for data 7.5%", "200 ms"):
        assert words in text


# ------------------------------------------------------------------------------------------------ pictures


def change_recipe(run: Path, part: str, **keys: object) -> Recipe:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content[part] |= keys
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    return read_run_recipe(run)


def test_cosines_are_those_of_the_evaluation(finished: Path, seen: Look) -> None:
    opened = open_run(finished)
    loader = EvalLoader(
        opened.recipe.data.open()[1], opened.task.view_spec(train=False), opened.recipe.data.val_crop, batch_size=16
    )
    expected = MaskedCosine(baselines=False).build().run(opened.task, {"val": loader, "train": []})["masked_cosine"]
    assert seen.num_images == 10 <= LOOKED_AT
    assert seen.cosines.mean() == pytest.approx(expected, abs=1e-5)


def test_shown_images_are_the_teachers_view_with_their_masks(seen: Look) -> None:
    assert len(seen.shown) == NUM_IMAGES
    assert len({shown.name for shown in seen.shown}) == NUM_IMAGES
    for shown in seen.shown:
        assert shown.image.shape == (48, 48, 3)
        assert shown.mask.shape == shown.cosine.shape == (4, 4)
        assert 0 < shown.mask.sum() <= 6
        for colours in (shown.target, shown.prediction, shown.features):
            assert colours.shape == (4, 4, 3)
            assert 0 <= colours.min() < colours.max() <= 1


def test_worst_patches_are_the_lowest_hidden_ones(seen: Look) -> None:
    cosines = [worst.cosine for worst in seen.worst]
    assert len(cosines) == 4
    assert cosines == sorted(cosines)
    assert cosines[0] == pytest.approx(seen.cosines.min())
    assert all(worst.mask[worst.place] for worst in seen.worst)


def test_nearest_image_of_a_query_that_is_in_the_gallery_is_itself(run: Path) -> None:
    recipe = change_recipe(run, "data", val=[{"name": "scenes", "num_images": 10, "size": 48}])
    for shown in look(run, recipe, num_images=2, num_worst=1).shown:
        assert shown.neighbours[0].cosine == pytest.approx(1, abs=1e-5)
        np.testing.assert_array_equal(shown.neighbours[0].image, shown.image)
        assert shown.neighbours[0].same_label is True
        cosines = [found.cosine for found in shown.neighbours]
        assert cosines == sorted(cosines, reverse=True)


def test_without_held_out_images_a_query_is_not_its_own_neighbour(run: Path) -> None:
    recipe = change_recipe(run, "data", val=[])
    found = look(run, recipe, num_images=2, num_worst=1)
    assert not found.held_out
    for shown in found.shown:
        assert len(shown.neighbours) == 5
        assert not any(np.array_equal(neighbour.image, shown.image) for neighbour in shown.neighbours)
    assert "training images through the finished model" in report(run).text


def test_progress_counts_to_the_end(run: Path) -> None:
    calls: list[tuple[int, int]] = []
    look(run, read_run_recipe(run), num_images=1, num_worst=1, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (34, 34)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_no_weights_is_an_error_of_its_own(run: Path) -> None:
    _remove_weights(run)
    with pytest.raises(NoPicturesError, match="not saved any weights"):
        look(run, read_run_recipe(run), num_images=1, num_worst=1)


def test_only_hidden_patches_are_painted_over() -> None:
    image = np.random.default_rng(0).integers(0, 255, (30, 20, 3), np.uint8)
    mask = np.zeros((3, 2), bool)
    mask[1, 0] = True
    painted = masked(image, mask)
    assert (painted[10:20, :10] == HIDDEN).all()
    painted[10:20, :10] = image[10:20, :10]
    np.testing.assert_array_equal(painted, image)


@pytest.mark.parametrize("place", [(0, 0), (2, 1), (3, 3)])
def test_outline_lies_on_the_patch_also_in_corners(place: tuple[int, int]) -> None:
    image = np.full((64, 64, 3), 90, np.uint8)
    row, column = place
    image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = (200, 0, 0)
    crop = surroundings(Worst("a", image, np.ones((4, 4), bool), place, 0.1)).astype(int)
    red = np.argwhere((crop[..., 0] > 150) & (crop[..., 1] < 50))
    white = np.argwhere((crop > 240).all(axis=2))
    assert np.abs(red.mean(axis=0) - white.mean(axis=0)).max() < 2
    assert crop.shape[0] == crop.shape[1]


# ------------------------------------------------------------------------------------------------ curves


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline class="line c\d" points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def test_curve_leaves_out_what_is_not_a_number() -> None:
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": float("nan")}]
    assert series(records, "loss", "").points == [(1.0, 2.0)]
    assert line_chart("Loss", [series([{"step": 1}], "loss", "")]) == ""


def test_curve_goes_up_where_values_do() -> None:
    (line,) = points_of(line_chart("a", [series([{"step": s, "v": s * s} for s in range(10)], "v", "")]))
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert [y for _, y in line] == sorted((y for _, y in line), reverse=True)  # SVG's y grows downwards


def test_log_scale_spaces_powers_evenly() -> None:
    records = [{"step": s, "v": 10.0**s} for s in range(4)]
    (line,) = points_of(line_chart("a", [series(records, "v", "")], log_scale=True))
    gaps = np.diff([y for _, y in line])
    np.testing.assert_allclose(gaps, gaps[0], atol=0.15)


def test_long_series_are_drawn_as_means() -> None:
    records = [{"step": s, "v": float(s % 2)} for s in range(10 * MAX_POINTS)]
    (line,) = points_of(line_chart("a", [series(records, "v", "")]))
    assert len(line) == MAX_POINTS
    assert len({y for _, y in line}) == 1


@example([1.0, 2.225073858507203e-309], True)
@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=20), st.booleans())
def test_any_values_stay_inside_the_drawing(values: list[float], log_scale: bool) -> None:
    chart = line_chart("a", [series([{"step": i, "v": v} for i, v in enumerate(values)], "v", "")], log_scale=log_scale)
    assert all(0 <= x <= 360 and 0 <= y <= 190 for x, y in points_of(chart)[0])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.6533, "0.653"),
        (-0.6913, "−0.691"),
        (1500, "1500"),
        (41_600, "41.6k"),
        (1.01e9, "1.01G"),
        (3.4e-5, "3.4e−5"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number_text(value) == text


def test_ticks_have_the_same_digits() -> None:
    assert tick_texts([-0.8, -0.75, 0.0]) == ["−0.80", "−0.75", "0.00"]
    assert tick_texts([0, 2e-4]) == ["0", "2e−4"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (280, "4 min 40 s"), (3600, "1 h"), (90_000, "1 d 1 h"), (3599.9, "1 h")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ------------------------------------------------------------------------------------------------ tables

TABLE = Table(
    title="Probes <b>",
    columns=["AUC", "accuracy"],
    rows=[
        Row(name="student", values=[Value(mean=0.8123, std=0.0042, n=3, best=True), 0.7]),
        Row(name="pixels", values=[0.5, None]),
    ],
    note="Three seeds.",
)


def test_tables_come_back_and_stand_in_the_report(run: Path) -> None:
    write_results(run, [TABLE])
    assert read_results(run) == [TABLE]
    assert read_facts(run).results == [TABLE]
    text = write_report(run, num_images=1).read_text(encoding="utf-8")
    assert "Probes &lt;b&gt;" in text
    assert "<td class=best>0.812 ± 0.004</td><td>0.700</td>" in text
    assert "<td>0.500</td><td>–</td>" in text


def test_tables_on_a_console() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    print_tables([TABLE], console)
    text = console.export_text()
    for words in ("Probes <b>", "0.812 ± 0.004", "0.700", "–", "Three seeds."):
        assert words in text


def test_no_results_yet(tmp_path: Path) -> None:
    assert read_results(tmp_path) == []


def test_a_row_must_fit_the_columns() -> None:
    with pytest.raises(ValueError, match=r"row 'a' has 1 values for 2 columns"):
        Table(title="t", columns=["x", "y"], rows=[Row(name="a", values=[1.0])])


@pytest.mark.parametrize("text", ["{", "[]", '{"tables": [{"title": "t"}]}'])
def test_damaged_results_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json is not a file of results"):
        read_results(tmp_path)


def test_how_far_a_report_is_is_shown_on_a_terminal() -> None:
    console = Console(force_terminal=True, file=io.StringIO(), width=100)
    with looking(console) as progress:
        progress(3, 10)
    assert "looked at 3 of 10 images" in console.file.getvalue()
