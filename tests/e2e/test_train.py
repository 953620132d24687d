"""Whole runs in this process: what is learnt, what is refused, what a folder of real files brings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from e2e.toy import BASE, checkpoint, differences, recipe
from openeva.backbones import vit
from openeva.checkpoints import native
from openeva.config import ConfigError, apply_overrides
from openeva.data.loader import TooManyBrokenError
from openeva.engine.log import read_log
from openeva.engine.state import CheckpointError
from openeva.evaluate import open_run
from openeva.report.look import bring_back
from openeva.train import Recipe, train

NO_EVALUATION = ("data.holdout=0", "run.evaluate_every=0 steps", "run.save_every=0 steps")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty-four pictures, two of them broken."""
    rng = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "images" / f"class_{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(path)
        if number in {4, 9}:
            path.write_bytes(path.read_bytes()[:60])
    return tmp_path / "images"


def of_folder(folder: Path, out: Path, *changes: str) -> Recipe:
    sources = f"data.train=[{{name: image_folder, roots: [{folder}]}}]"
    return recipe(out, sources, "data.holdout=0.25", "run.length=9 steps", "run.batch_size=4", *changes)


def test_eight_images_are_learnt_by_heart(tmp_path: Path) -> None:
    changes = [
        *("data.train.0.num_images=8", "data.crop={kind: center, hflip: 0}", "task.masking={name: alternate}"),
        *("task.target.standardise=true", "optim.lr=0.005", "optim.weight_decay=0", "optim.ema=null"),
        *("run.length=400 steps", "run.log_every=100 steps"),
    ]
    train(recipe(tmp_path, *changes, *NO_EVALUATION))
    losses = [record["loss"] for record in read_log(tmp_path)]
    assert losses[0] > -0.8  # standardised: whoever does not see the image has a cosine near 0
    assert losses[-1] < -0.9  # the loss is minus the masked cosine


def test_both_exported_models_are_those_of_the_last_checkpoint(tmp_path: Path) -> None:
    train(recipe(tmp_path, "run.length=4 steps", *NO_EVALUATION))
    last = checkpoint(tmp_path, 4)
    for name, prefix in (("model", "model."), ("model_ema", "ema.")):
        expected = {key.removeprefix(prefix): value for key, value in last.items() if key.startswith(prefix)}
        exported = load_file(tmp_path / name / "model.safetensors")
        assert differences(exported, {key: expected[key] for key in exported}) == []
    assert differences(*(load_file(tmp_path / name / "model.safetensors") for name in ("model", "model_ema")))


def test_a_run_killed_while_its_model_is_written_is_unfinished_and_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path, "run.length=2 steps")

    class Killed(BaseException):
        pass

    def die(path: Path, write: Callable[[Path], None], original: Any = native.write_atomically) -> None:
        if path == tmp_path / "model" / "config.json":
            raise Killed
        original(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(native, "write_atomically", die)
        with pytest.raises(Killed):
            train(made)
    assert (tmp_path / "model/model.safetensors").is_file()
    with pytest.raises(FileNotFoundError, match="finish it with `openeva train"):
        open_run(tmp_path)
    assert bring_back(tmp_path, made)[1] == "the checkpoint of step 2"
    train(made)
    assert open_run(tmp_path).recipe == made
    assert bring_back(tmp_path, made)[1] == "the finished model"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_learns_on_a_cpu(precision: str, tmp_path: Path) -> None:
    for name in (precision, "fp32"):
        changes = ("run.length=30 steps", f"run.precision={name}", "run.log_every=10 steps")
        train(recipe(tmp_path / name, *changes, *NO_EVALUATION))
    reduced, full = ([record["loss"] for record in read_log(tmp_path / name)] for name in (precision, "fp32"))
    assert reduced[-1] < reduced[0] - 0.1
    skipped = precision == "fp16"  # a few steps, until the loss scale fits
    assert reduced == pytest.approx(full, abs=0.15 if skipped else 0.05)
    assert reduced != full


def test_broken_files_are_skipped_named_and_counted(folder: Path, tmp_path: Path) -> None:
    result = train(of_folder(folder, tmp_path / "run", "data.max_broken=0.5"))
    assert result.status == "finished"
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["broken_files"] == 2  # 4.jpg is held out, 9.jpg is not
    messages = (tmp_path / "run/log.jsonl").read_text()
    for name in summary["broken"]:
        assert Path(name).name in {"4.jpg", "9.jpg"}
        assert f"skipped a broken file: {name}" in messages
    records = read_log(tmp_path / "run")
    assert all(np.isfinite(record["held_out_loss"]) for record in records if "held_out_loss" in record)


def test_a_continued_run_keeps_the_names_of_broken_files(folder: Path, tmp_path: Path) -> None:
    train(of_folder(folder, tmp_path / "run", "data.max_broken=0.5"))
    before = json.loads((tmp_path / "run/summary.json").read_text())
    assert before["broken_files"] == 2
    train(of_folder(folder, tmp_path / "run", "data.max_broken=0.5"))  # nothing left to do, nothing read
    assert json.loads((tmp_path / "run/summary.json").read_text()) == before


def test_too_many_broken_files_stop_the_run_with_their_names(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TooManyBrokenError, match=r"\d+\.jpg"):
        train(of_folder(folder, tmp_path / "run", "data.max_broken=0.001", "run.length=40 steps"))


def test_an_empty_folder_is_an_error_before_any_model_is_built(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vit.Config, "build", lambda self: pytest.fail("a model was built"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no images below .*empty"):
        train(of_folder(tmp_path / "empty", tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "words"),
    [("task.target.teacher.width=24", "target_width: checkpoint 16, this run 24"),
     ("task.target.layer=0", "layer 0"), ("task.backbone.depth=1", "this run 'vit:custom/random-"),
     ("task.backbone.final_norm=false", "only the checkpoint has model.backbone.norm."),
     ("task.backbone.layer_scale=0.1", "only this run has model.backbone.blocks.0.")],
)  # fmt: skip
def test_a_run_with_another_teacher_or_student_is_not_continued(change: str, words: str, tmp_path: Path) -> None:
    train(recipe(tmp_path, "run.length=2 steps", *NO_EVALUATION))
    with pytest.raises(CheckpointError) as caught:
        train(recipe(tmp_path, "run.length=4 steps", *NO_EVALUATION, change))
    assert words in str(caught.value)
    assert "run.out" in str(caught.value)


def test_an_openeva_model_as_the_teacher(tmp_path: Path) -> None:
    first = recipe(tmp_path / "first", "run.length=2 steps", *NO_EVALUATION)
    train(first)
    teacher = {"name": "vit", "weights": str(tmp_path / "first")}
    content = {**BASE, "task": {**BASE["task"], "target": {"name": "features", "teacher": teacher}}}
    second = Recipe.model_validate(
        apply_overrides(content, [*NO_EVALUATION, "run.length=2 steps", f"run.out={tmp_path / 'second'}"])
    )
    train(second)
    task = second.task.build()
    assert task.target.width == 32  # the file says how large it is
    weights = load_file(tmp_path / "first/model/model.safetensors")
    assert torch.equal(task.target.teacher.blocks[0].attn.qkv.weight, weights["backbone.blocks.0.attn.qkv.weight"])
    train(recipe(tmp_path / "third", "run.length=2 steps", "run.seed=5", *NO_EVALUATION))
    other = second.model_dump(mode="json")
    other["task"]["target"]["teacher"]["weights"] = str(tmp_path / "third")
    other["run"]["length"] = "4 steps"
    with pytest.raises(CheckpointError, match="target: checkpoint"):
        train(Recipe.model_validate(other))
