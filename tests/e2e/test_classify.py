"""Fine-tuning runs: two processes are one, a stop changes nothing, what is kept, and what the command's user gets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from e2e.test_resume import in_one_go_and_in_two
from e2e.toy import BASE, CHANCE, STUDENT, recipe, train_in_processes
from openeva.config import ConfigError, apply_overrides, load_config
from openeva.engine.log import read_log
from openeva.evaluate import evaluate
from openeva.report import write_report
from openeva.report.look import NoPicturesError, bring_back
from openeva.tasks.classify import ClassifyTask
from openeva.train import Recipe, dry_run, train

TASK = {"name": "classify", "backbone": {**STUDENT, "patch_grad_scale": 0.0}, "class_weights": "balanced"}
SAME = (
    "loss",
    "accuracy",
    "grad_norm",
    "top1",
    "ema_top1",
    "held_out_loss",
    "ema_held_out_loss",
    "mean_class_accuracy",
)


def classify(out: Path, *overrides: str, **task: Any) -> Recipe:
    """The toy recipe as a classification of its pictures by the shape of the main object."""
    content = {**BASE, "task": {**TASK, **task}}
    return Recipe.model_validate(apply_overrides(content, [*overrides, f"run.out={out}"]))


def numbers(out: Path) -> dict[tuple[int, str], float]:
    return {(record["step"], key): record[key] for record in read_log(out) for key in SAME if key in record}


@pytest.fixture(scope="module")
def mim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run."""
    out = tmp_path_factory.mktemp("mim")
    train(recipe(out, "run.length=2 steps", "run.evaluate_every=0 steps", "data.holdout=0"))
    return out


def test_two_processes_are_one(tmp_path: Path) -> None:
    """17 held-out images: 9 for one process, 8 for the other, each counted once; with layer decay and class weights."""
    changes = ("run.micro_batch=4", "data.train.0.num_images=63", "data.holdout=0.27", "optim.layer_decay=0.7")
    train(classify(tmp_path / "one", *changes))
    one = numbers(tmp_path / "one")
    assert {key for _, key in one} == set(SAME)
    for strategy in ("ddp", "fsdp"):
        two = numbers(train_in_processes(classify(tmp_path / strategy, *changes, f"run.strategy={strategy}"), 2))
        assert two == pytest.approx(one, abs=2e-5, rel=1e-4)


def test_two_processes_start_from_the_same_regression(tmp_path: Path) -> None:
    """The folds of its cross-validation go by the order of the images, which must not depend on who looked at them."""
    changes = ("run.length=2 steps", "run.evaluate_every=0 steps")
    train(classify(tmp_path / "one", *changes, probe_first=True))
    train_in_processes(classify(tmp_path / "two", *changes, probe_first=True), 2)
    one, two = (load_file(tmp_path / name / "target/probe.safetensors") for name in ("one", "two"))
    assert one["weight"].abs().max() > 0
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)


def test_two_processes_probe_with_lars_and_measure_the_same_batch_norm(tmp_path: Path) -> None:
    """Each trains with the statistics of its own images; the run ends with their mean, in both."""
    changes = ("tune={mode: head, export: merged}", "optim.name=lars", "optim.clip_grad=null", "optim.ema=null")
    head = {"pooling": "cls", "batch_norm": True, "smoothing": 0.0, "class_weights": "none"}
    made = classify(tmp_path, *changes, "optim.lr=1.0", **head)
    train_in_processes(made, 2)
    records = read_log(tmp_path)
    assert [record["top1"] for record in records if "top1" in record]
    measured = evaluate(tmp_path)  # in this process, with the exported statistics
    last = [record for record in records if "held_out_loss" in record][-1]
    assert measured["held_out_loss"] == pytest.approx(last["held_out_loss"], rel=1e-4)


def test_a_stop_changes_nothing_although_images_are_mixed_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixing = {"mixup": {"mixup": 0.8, "cutmix": 1.0, "prob": 0.9}, "erasing": {"prob": 0.5}}
    in_one_go_and_in_two(
        lambda out: classify(out, *CHANCE, "run.length=8 steps", "data.crop.kind=random", **mixing),
        tmp_path, monkeypatch, stop=3,
    )  # fmt: skip
    plain = classify(tmp_path / "plain", *CHANCE, "run.length=8 steps", "data.crop.kind=random")
    train(plain)
    assert numbers(tmp_path / "plain")[1, "loss"] != numbers(tmp_path / "whole")[1, "loss"]  # mixing was on


def test_the_exported_model_knows_its_classes_and_measures_as_the_run(tmp_path: Path) -> None:
    train(
        classify(tmp_path, "evals=[{name: knn, k: 5}, {name: linear_probe, folds: 2}]", "data.train.0.num_images=128")
    )
    stored = json.loads((tmp_path / "model/config.json").read_text())["task"]
    assert stored["num_classes"] == len(stored["class_names"]) == 8
    assert len(stored["class_weights"]) == 8
    names = {name.split(".")[0] for name in load_file(tmp_path / "model/model.safetensors")}
    assert names == {"backbone", "fc_norm", "classifier"}
    last = [record for record in read_log(tmp_path) if "top1" in record][-1]
    assert evaluate(tmp_path) == pytest.approx({key: last[key] for key in evaluate(tmp_path)})
    assert {"top1", "top5", "mean_class_accuracy", "held_out_loss", "knn_accuracy", "probe_accuracy"} <= set(last)


def test_the_best_weights_are_kept_over_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Best of every evaluation, averaged weights for a metric of theirs; a continued run knows what was best before."""
    values = iter([0.1, 0.1, 0.2, 0.5, 0.3, 0.2, 0.4, 0.4])  # raw and averaged, in turn
    monkeypatch.setattr(ClassifyTask, "evaluate", lambda self, loader: {"top1": next(values)})
    kept = ("run.keep_best=ema_top1", "run.evaluate_every=1 steps")
    best = tmp_path / "model_best"
    train(classify(tmp_path, *kept, "run.length=2 steps"))
    assert json.loads((best / "config.json").read_text())["best"] == {"ema_top1": 0.5}
    averaged = load_file(tmp_path / "model_ema/model.safetensors")
    found = load_file(best / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in averaged.items())
    train(classify(tmp_path, *kept, "run.length=4 steps"))
    config = json.loads((best / "config.json").read_text())
    assert (config["best"], config["step"]) == ({"ema_top1": 0.5}, 2)


def test_less_loss_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(ClassifyTask, "evaluate", lambda self, loader: {"held_out_loss": next(values)})
    changes = ("run.keep_best=held_out_loss", "run.evaluate_every=1 steps", "run.length=3 steps", "optim.ema=null")
    train(classify(tmp_path, *changes))
    config = json.loads((tmp_path / "model_best/config.json").read_text())
    assert (config["best"], config["step"]) == ({"held_out_loss": 1.0}, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [(["optim.ema=null", "run.keep_best=ema_top1"], "set optim.ema"),
     (["data.holdout=0", "run.keep_best=top1"], "goes by held-out images")],
)  # fmt: skip
def test_a_best_that_cannot_be_told_is_refused(changes: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        classify(tmp_path, *changes)


def test_a_best_of_something_that_is_not_measured_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.keep_best 'top_1' is not measured; measured are top1"):
        train(classify(tmp_path, "run.keep_best=top_1", "run.length=2 steps", "run.evaluate_every=1 steps"))


@pytest.mark.parametrize("name", ["finetune_folder", "linear_probe_folder"])
def test_the_recipes_for_own_folders_run_from_any_pre_trained_model(name: str, mim: Path, tmp_path: Path) -> None:
    """Classes of different sizes and images of different sizes, on a CPU; nothing but the folder is said."""
    rng = np.random.default_rng(0)
    for label, count in (("cat", 20), ("dog", 8)):
        for number in range(count):
            pixels = rng.integers(0, 100, (30 + number, 40, 3), np.uint8) + (100 if label == "cat" else 0)
            path = tmp_path / "images" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    given = [f"data.train.0.roots={tmp_path / 'images'}", f"run.out={tmp_path / 'run'}", f"task.init_from={mim}"]
    small = ["task.backbone.image_size=32", "run.length=3 epochs", "run.batch_size=8", "run.micro_batch=8"]
    made = load_config(Recipe, f"classify/{name}", [*given, *small, "run.device=cpu", "data.num_workers=0"])
    assert train(made).status == "finished"
    found = [record for record in read_log(tmp_path / "run") if "top1" in record]
    assert len(found) == 3
    assert {"auc", "mean_class_accuracy"} <= set(found[-1])
    assert found[-1]["auc"] > 0.8  # bright cats and dark dogs
    stored = json.loads((tmp_path / "run/model/config.json").read_text())["task"]
    assert stored["class_names"] == ["cat", "dog"]
    assert stored["class_weights"][1] > 2 * stored["class_weights"][0]
    assert (tmp_path / "run/model_best/model.safetensors").is_file()


def test_an_evaluation_of_another_task_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="masked_cosine needs a task that predicts hidden patches, not classify"):
        dry_run(classify(tmp_path, "evals=[masked_cosine, topk]"))
    with pytest.raises(ConfigError, match="topk needs a task that classifies images, not pretrain"):
        train(recipe(tmp_path, "evals=[masked_cosine, topk]"))


def test_topk_beside_training_is_no_training_step_and_hides_no_metric(tmp_path: Path) -> None:
    train(classify(tmp_path / "run", "run.length=2 steps", "evals=[topk]"))
    (found,) = [record for record in read_log(tmp_path / "run") if "top1" in record]
    assert found["images"] > 0
    assert "loss" not in found
    held_out = {"name": "topk", "source": BASE["data"]["train"][0]}
    with pytest.raises(ValueError, match=r"topk with a `source` would report under the names .* prefix"):
        dry_run(classify(tmp_path, f"evals=[{json.dumps(held_out)}]"))
    dry_run(classify(tmp_path, f"evals=[{json.dumps({**held_out, 'prefix': 'same_'})}]"))


def test_a_batch_that_cannot_be_mixed_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pair the images of a batch, and 7 is odd"):
        dry_run(classify(tmp_path, "run.batch_size=7", "run.micro_batch=7", mixup={"cutmix": 1.0}))


def test_a_report_of_a_classification_has_no_pictures_of_patches(tmp_path: Path) -> None:
    made = classify(tmp_path, "run.length=2 steps")
    train(made)
    with pytest.raises(NoPicturesError, match="'classify' does not predict patches"):
        bring_back(tmp_path, made)
    assert "held-out" in write_report(tmp_path).read_text()


def test_from_pre_training_to_fine_tuning(mim: Path, tmp_path: Path) -> None:
    made = classify(tmp_path / "fine", "run.length=2 steps")
    content = made.model_dump(mode="json")
    content["task"] = {
        "name": "classify",
        "init_from": str(mim),
        "backbone": {"name": "vit", "drop_path": 0.1},
    }
    train(Recipe.model_validate(content))
    task = json.loads((tmp_path / "fine/model/config.json").read_text())["task"]
    assert task["backbone"]["width"] == STUDENT["width"]
    assert task["backbone"]["drop_path"] == 0.1
