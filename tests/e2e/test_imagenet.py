"""ImageNet-1K and the six robustness sets, from the folders of their archives to the table, with known answers."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from e2e.imagenet_sets import (
    BACKPACK,
    CLOCK,
    DIGITAL_CLOCK,
    OBJECTNET,
    SIZE,
    V2,
    V2_FOLDER,
    VAL,
    A,
    Colours,
    answers,
    expected,
    write_sets,
)  # fmt: skip
from e2e.toy import join, start
from openeva.config import ConfigError, validate
from openeva.data.imagenet_classes import subset_rows
from openeva.data.loader import TooManyBrokenError
from openeva.data.views import CropConfig
from openeva.engine import distributed
from openeva.evals.base import OFFICIAL_CROP, own_crop
from openeva.evals.robustness import Config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


def run(roots: Any, task: Colours | None = None, **options: Any) -> dict[str, float]:
    content = {"roots": roots, "allow_incomplete": True, "num_workers": 0, "batch_size": 3, **options}
    return validate(Config, content).build().run(task or Colours(), {})


def test_every_set_is_counted_by_its_own_rules(root: Path) -> None:
    metrics = run(root)
    for name, (top1, top5, images) in expected().items():
        found = tuple(metrics[f"{name}_{key}"] for key in ("top1", "top5", "images"))
        assert found == pytest.approx((top1, top5, images)), name
    six = [expected()[n][0] for n in ("imagenet_1k", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch")]
    mean = (sum(six) + expected()["objectnet"][0]) / 6
    assert metrics["mean"] == pytest.approx(mean)
    assert metrics["gap"] == pytest.approx(six[0] - mean)


def test_batches_do_not_matter(root: Path) -> None:
    assert run(root, batch_size=100) == pytest.approx(run(root, batch_size=1), abs=1e-6)


def measure(root: str, out: str) -> None:
    distributed.start("cpu")
    metrics = run(root, protocol="both")
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(metrics))
    distributed.stop()


def test_two_processes_count_every_image_once(root: Path, tmp_path: Path) -> None:
    """Sets of 7, 5 and 3 images: a sampler that fills the shares up would count 8, 6 and 4."""
    join(start(measure, str(root), str(tmp_path), size=2, errors=tmp_path), tmp_path)
    alone = run(root, protocol="both")
    assert [alone[f"imagenet_{name}_images"] for name in ("v2", "a", "sketch")] == [7, 5, 3]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(alone, abs=1e-6)


# ------------------------------------------------------------------------------------------------ one set at a time


def test_slicing_the_head_changes_answers(root: Path) -> None:
    """A picture of class 10 in the folder of class 11: right among the classes of A, to which 10 does not belong."""
    in_a = {path: shown for path, shown in A.items() if answers(shown)[0] != answers(shown, subset_rows("a"))[0]}
    assert len(in_a) >= 2
    whole = [answers(shown)[0] for shown in A.values()]
    assert run(root, sets=["a"])["imagenet_a_top1"] == pytest.approx(4 / 5)
    assert sum(row == shown for row, shown in zip(whole, [6, 11, 13, 988, 15], strict=True)) / 5 == pytest.approx(2 / 5)


def test_real_goes_by_file_name_and_shares_the_pixels_of_1k(root: Path, tmp_path: Path) -> None:
    """Folders bring the files into another order than their numbers; without labels they do not count."""
    assert [int(path[-13:-5]) for path in VAL] != sorted(int(path[-13:-5]) for path in VAL)
    task = Colours()
    both = run(root, task, sets=["1k", "real"])
    assert len(task.seen) == len(VAL)
    alone = run({"real": root / "imagenet"})
    assert alone["imagenet_real_top1"] == both["imagenet_real_top1"] == pytest.approx(expected()["imagenet_real"][0])
    assert both["imagenet_real_images"] == 6


def test_v2_folders_are_numbers_whatever_their_order(root: Path) -> None:
    """0, 1, 10, 100, ... is the order of a listing: by position, three of these would be wrong."""
    folders = sorted({path.partition("/")[0] for path in V2})
    assert folders[:4] == ["0", "1", "10", "100"]
    assert run(root, sets=["v2"])["imagenet_v2_top1"] == pytest.approx(5 / 7)


def test_objectnet_first_class_and_any(root: Path) -> None:
    """An alarm clock is officially a digital clock only; backpacks count, air fresheners do not."""
    assert list(OBJECTNET.values()) == [CLOCK, DIGITAL_CLOCK, 700, BACKPACK, CLOCK]
    metrics = run(root, sets=["objectnet"])
    assert (metrics["objectnet_top1"], metrics["objectnet_any_top1"]) == pytest.approx((2 / 4, 3 / 4))
    assert metrics["objectnet_images"] == 4
    assert "mean" not in metrics


@pytest.mark.parametrize(("protocol", "red"), [("official", 255), ("standard", 175)])
def test_the_red_border_stays_on_officially(protocol: str, red: int, root: Path) -> None:
    task = Colours()
    run(root, task, sets=["objectnet"], protocol=protocol)
    assert max(task.corners) == pytest.approx(red, abs=2)  # 175: the red of the class 700 that one of them shows


@pytest.mark.parametrize(("backbone", "pixels"), [({}, 336), ({"rope_grid": 16}, 448)])
def test_v2_and_objectnet_have_a_size_of_their_own(backbone: dict[str, Any], pixels: int, root: Path) -> None:
    task = Colours(dynamic_size=True, **backbone)
    run(root, task, sets=["1k", "v2"])
    assert set(task.seen[: len(VAL)]) == {(SIZE, SIZE)}
    assert set(task.seen[len(VAL) :]) == {(pixels, pixels)}
    task = Colours(dynamic_size=True, **backbone)
    run(root, task, sets=["1k", "v2"], protocol="standard")
    assert set(task.seen) == {(SIZE, SIZE)}


def test_a_model_of_one_size_says_that_the_official_one_does_not_fit(root: Path) -> None:
    content = {"roots": root, "allow_incomplete": True}
    (note,) = validate(Config, content).build().notes(Colours())
    assert "32 x 32" in note
    assert "336" in note
    assert validate(Config, content).build().notes(Colours(336)) == []


def test_standard_numbers_have_names_of_their_own_and_count_any_class(root: Path) -> None:
    task = Colours()
    both = run(root, task, protocol="both")
    assert len(task.seen) == len({*VAL}) + 2 * len(V2) + 5 + 4 + 3 + 2 * 4  # what is alike in both is looked at once
    alone = run(root, protocol="standard")
    assert {name: value for name, value in both.items() if name.startswith("standard_")} == pytest.approx(alone)
    official = run(root)
    assert {name: value for name, value in both.items() if name not in alone} == pytest.approx(official)
    any_class = expected()["objectnet_any"][0] - expected()["objectnet"][0]
    assert both["standard_mean"] - both["mean"] == pytest.approx(any_class / 6)


def test_standard_cuts_as_the_weights_want_it_and_official_does_not(root: Path) -> None:
    task = Colours()
    task.crop = CropConfig(kind="center", hflip=0.0, crop_pct=0.5)
    for protocol, sizes in (("official", {1.0}), ("standard", {0.5})):
        evaluation = validate(Config, {"roots": root, "allow_incomplete": True, "protocol": protocol}).build()
        passes = evaluation._passes((SIZE, SIZE), (SIZE, SIZE), own_crop(task, {}))
        assert {one.crop.crop_pct for one in passes} == sizes
    in_a_run = SimpleNamespace(identity={"crop": {"kind": "center", "hflip": 0.0, "crop_pct": 0.7}})
    assert own_crop(task, {"val": in_a_run}).crop_pct == 0.7  # the held-out images of a run win
    assert own_crop(Colours(), {}) == OFFICIAL_CROP


def test_files_that_cannot_be_read_are_named_and_not_counted(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sketch"
    shutil.copytree(root / "sketch", copy)
    next(copy.rglob("sketch_1.JPEG")).write_bytes(b"no image")
    content = {"roots": {"sketch": copy}, "allow_incomplete": True, "num_workers": 0}
    with pytest.raises(TooManyBrokenError, match="max_broken"):
        validate(Config, content).build().run(Colours(), {})
    evaluation = validate(Config, {**content, "max_broken": 0.5}).build()
    metrics = evaluation.run(Colours(), {})
    assert (metrics["imagenet_sketch_images"], metrics["imagenet_sketch_top1"]) == (2, 1)
    (note,) = [note for note in evaluation.notes(Colours()) if "could not be read" in note]
    assert "sketch_1.JPEG" in note


# ----------------------------------------------------------------------------------------------------- mistakes


def test_what_is_missing_is_said_before_anything_runs(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        validate(Config, {"roots": root}).build()
    text = str(error.value)
    for part in ("ImageNet-V2: 7 of 10,000 images", "ImageNet-A: 5 of 200 class folders", "allow_incomplete: true"):
        assert part in text
    with pytest.raises(ConfigError, match=r"7 problems|8 problems"):
        validate(Config, {"roots": tmp_path, "allow_incomplete": True}).build()


def test_a_model_of_other_classes_is_refused(root: Path) -> None:
    task = Colours()
    task.class_names = ("cat", "dog")
    with pytest.raises(ValueError, match=r"images of 1,000 classes, but the model tells 2 apart"):
        run(root, task, sets=["v2"])
    with pytest.raises(ValueError, match="needs a task that classifies"):
        run(root, torch.nn.Identity(), sets=["v2"])


def test_one_folder_per_set(root: Path) -> None:
    metrics = run({"v2": root / V2_FOLDER, "a": root / "imagenet-a"})
    assert {name.rpartition("_")[0] for name in metrics} == {"imagenet_v2", "imagenet_a"}
    with pytest.raises(ConfigError, match="roots has no folder for r"):
        run({"v2": root / V2_FOLDER}, sets=["v2", "r"])
