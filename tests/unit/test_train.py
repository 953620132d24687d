"""What a run says to whoever started it: scanning, and what a resumed run cannot do exactly."""

import io
import itertools
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from torch import nn

from e2e.toy import recipe
from openeva.backbones import vit
from openeva.config import ConfigError
from openeva.data.mixture import open_sources
from openeva.data.sources.image_folder import Config as ImageFolder
from openeva.engine.log import read_log
from openeva.engine.loop import NonFiniteError
from openeva.tasks.pretrain import PretrainTask
from openeva.train import Recipe, dry_run, train


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENEVA_CACHE", str(tmp_path / "cache"))


def image(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    return path


def made(tmp_path: Path, source: str, steps: int) -> Recipe:
    return recipe(
        tmp_path / "run", f"data.train=[{source}]", "data.holdout=0", f"run.length={steps} steps",
        "run.evaluate_every=0 steps", "run.batch_size=2", "optim.warmup=0 steps",
    )  # fmt: skip


def messages(out: Path) -> list[str]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["message"] for line in lines if "message" in line]


def test_a_resumed_run_says_when_its_images_have_changed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for number in range(6):
        image(folder / f"{number}.png")
    source = f"{{name: image_folder, roots: {folder}}}"
    train(made(tmp_path, source, 1))
    (folder / "notes.txt").touch()  # the folder is scanned again, the images are the same
    train(made(tmp_path, source, 2))
    said = messages(tmp_path / "run")
    assert any("after step 1 of 2" in text for text in said)
    assert not any("images are not those" in text for text in said)
    image(folder / "new.png")
    result = train(made(tmp_path, source, 3))
    assert (result.status, result.step) == ("finished", 3)
    assert sum("images are not those of the checkpoint" in text for text in messages(tmp_path / "run")) == 1


def test_a_run_on_a_stream_says_only_when_resumed_that_this_is_not_exact(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for number in range(8):
            shard.add(image(tmp_path / "images" / f"{number}.png"), f"{number}.png")
    source = f"{{name: webdataset, shards: {tmp_path / 'a.tar'}, stream: true, samples_per_epoch: 8}}"
    train(made(tmp_path, source, 1))
    assert messages(tmp_path / "run") == []
    train(made(tmp_path, source, 2))
    assert sum("cannot be read from the middle" in text for text in messages(tmp_path / "run")) == 1


def test_the_scan_of_a_folder_is_shown_on_a_terminal(tmp_path: Path) -> None:
    image(tmp_path / "[bold] images" / "1.png")
    image(tmp_path / "[bold] images" / "2.png")
    console = Console(force_terminal=True, file=io.StringIO(), width=400)
    train(made(tmp_path, f"{{name: image_folder, roots: '{tmp_path / '[bold] images'}'}}", 1), console=console)
    assert f"scanning: 2 images; now in {tmp_path / '[bold] images'}" in console.file.getvalue()


def test_parts_of_a_source_are_told_apart(tmp_path: Path) -> None:
    for number in range(6):
        image(tmp_path / "images" / f"{number}.png")
    whole, half, weighted = (
        open_sources([ImageFolder(roots=[tmp_path / "images"], **keys)]).identity
        for keys in ({}, {"limit": 3}, {"weight": 2.0})
    )
    assert whole == open_sources([ImageFolder(roots=[tmp_path / "images"])]).identity
    assert whole != half
    assert whole != weighted


def test_a_run_cannot_be_silent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log_every cannot be 0: skipped steps and broken files"):
        recipe(tmp_path, "run.log_every=0 steps")


def test_the_number_of_returns_is_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = PretrainTask.forward, itertools.count()

    def bad_after_two_steps(self: PretrainTask, batch: dict[str, Any]) -> Any:
        loss, scalars = forward(self, batch)
        return loss * (1.0 if next(calls) < 2 else math.nan), scalars

    monkeypatch.setattr(PretrainTask, "forward", bad_after_two_steps)
    changes = ("run.save_every=1 steps", "run.max_bad_in_a_row=2", "run.evaluate_every=0 steps")
    with pytest.raises(NonFiniteError, match=r"1 rewinds so far"):
        train(recipe(tmp_path, *changes, "run.max_rewinds=1"))


def test_evaluations_without_held_out_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"held-out images: give data.val or data.holdout, or set evals=\[\]"):
        recipe(tmp_path, "data.holdout=0", "evals=[knn]")


@pytest.mark.parametrize("name", ["knn", "linear_probe"])
def test_evaluations_that_need_labels_are_refused_before_a_model_is_built(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vit.Config, "build", lambda self: pytest.fail("a model was built"))
    for number in range(6):
        image(tmp_path / "images" / f"{number}.png")
    source = f"data.train=[{{name: image_folder, roots: {tmp_path / 'images'}}}, {{name: scenes, num_images: 9}}]"
    made = recipe(tmp_path / "run", source, "evals=[masked_cosine, " + name + "]")
    for start in (train, dry_run):
        with pytest.raises(ConfigError, match=f"evals: {name} needs labels, but data.train has none") as caught:
            start(made)
        assert "masked_cosine" not in str(caught.value)


def test_evaluations_that_need_training_images_refuse_a_stream(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for number in range(8):
            shard.add(image(tmp_path / "images" / f"{number}.png"), f"{number}.png")
    source = f"data.train=[{{name: webdataset, shards: {tmp_path / 'a.tar'}, stream: true, samples_per_epoch: 8}}]"
    val = "data.val=[{name: scenes, num_images: 8, size: 32}]"
    made = recipe(tmp_path / "run", source, val, "data.holdout=0", "evals=[masked_cosine]")
    with pytest.raises(ConfigError, match="masked_cosine needs training images that are files"):
        dry_run(made)
    dry_run(recipe(tmp_path / "run", source, val, "data.holdout=0", "evals=[{name: masked_cosine, baselines: false}]"))


def test_without_held_out_images_the_log_has_no_empty_evaluations(tmp_path: Path) -> None:
    train(recipe(tmp_path, "data.holdout=0", "run.length=2 steps", "run.evaluate_every=1 steps"))
    assert [set(record) >= {"loss"} for record in read_log(tmp_path)] == [True, True]


def test_what_learns_is_one_child_of_the_task(tmp_path: Path) -> None:
    task = recipe(tmp_path).task.build()
    assert {name.split(".")[0] for name in task.state_dict()} == {"target", "trainable"}
    assert task.student is task.trainable


@pytest.mark.parametrize("mode", ["off", "blocks", "model"])
def test_compilation_includes_the_teacher(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    train(recipe(tmp_path, f"run.compile={mode}", "run.length=1 steps", "optim.warmup=0 steps", "data.holdout=0"))
    student = {"off": [], "blocks": ["Block", "Block"], "model": ["MimStudent"]}[mode]
    assert compiled == student + ["VisionTransformer"] * (mode != "off")
