"""The robustness table beside published numbers, top-k on a source of its own, and `openeva evaluate` of weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from e2e.imagenet_sets import SIZE, Colours, expected, write_sets
from openeva import evaluate
from openeva.checkpoints.native import save_native
from openeva.checkpoints.pretrained import PRETRAINED
from openeva.cli import app
from openeva.config import validate
from openeva.data.imagenet_layout import FACTS
from openeva.evals import topk
from openeva.evals.base import Tally
from openeva.evals.robustness import AVERAGED, METRIC, compare, judge
from openeva.evaluate import load_recipe, published_row
from openeva.heads.classifier import ImageClassifier
from openeva.models import create_model

G_336 = "eva_21k_1k_336px_psz14_ema_89p6"
CORRECT = {"1k": 44_811, "v2": 8_157, "real": 42_541, "a": 6_465, "r": 26_485, "sketch": 34_469, "objectnet": 11_314}
"""Right answers of the official run, recomputed from its percentages (spec section 7)."""


def measured(**changes: int) -> dict[str, float]:
    """Metrics of a model that gives as many right answers as the official one, give or take some."""
    metrics = {}
    for name, facts in FACTS.items():
        top1 = (CORRECT[name] + changes.get(name, 0)) / facts.num_images
        metrics |= {f"{METRIC[name]}_top1": top1, f"{METRIC[name]}_top5": 1.0}
        metrics |= {f"{METRIC[name]}_images": float(facts.num_images), f"{METRIC[name]}_loss": 1.0}
    mean = sum(metrics[f"{METRIC[name]}_top1"] for name in AVERAGED) / 6
    return {**metrics, "mean": mean, "gap": metrics["imagenet_1k_top1"] - mean}


# --------------------------------------------------------------------------------------------------- the verdict


def test_the_official_counts_repeat_the_published_numbers_and_padding_is_said() -> None:
    rows = {row.title: row for row in compare(measured(), published_row(G_336))}
    assert len(rows) == 9
    for row in rows.values():
        if row.published is not None:
            assert "repeats it" in row.verdict, row
    assert rows["ImageNet-A"].top1 == pytest.approx(100 * 6465 / 7500)
    assert rows["ImageNet-A"].published == 86.154
    assert "officially of 7,504 with padding" in rows["ImageNet-A"].verdict
    assert "officially of 50,896 with padding" in rows["ImageNet-Sketch"].verdict
    assert "officially of 18,576 with padding" in rows["ObjectNet, its first class"].verdict
    assert "padding" not in rows["ImageNet-V2"].verdict
    assert rows["mean of six"].published == pytest.approx(79.043, abs=1e-3)
    assert rows["gap: ImageNet-1K - mean"].published == pytest.approx(10.579, abs=1e-3)


def test_more_than_the_tolerance_is_a_difference() -> None:
    rows = {row.title: row for row in compare(measured(**{"1k": 51, "v2": -10}), published_row(G_336))}
    assert "DIFFERS" in rows["ImageNet-1K"].verdict
    assert rows["ImageNet-1K"].verdict.startswith("+0.10")
    assert "repeats it" in rows["ImageNet-V2"].verdict
    for name, changes in {"v2": {"v2": -100}, "1k": {"1k": -500}}.items():  # a sixth of a point each in mean and gap
        rows = {row.title: row for row in compare(measured(**changes), published_row(G_336))}
        assert "DIFFERS" in rows["mean of six"].verdict, name
    assert "DIFFERS" in rows["gap: ImageNet-1K - mean"].verdict  # five sixths of a point
    assert "repeats it" in judge(88.1, 88.0, 50_000)
    assert "DIFFERS" in judge(87.89, 88.0, 50_000)


def test_an_incomplete_set_is_not_compared() -> None:
    metrics = {**measured(), "imagenet_v2_images": 9_999.0}
    rows = {row.title: row for row in compare(metrics, published_row(G_336))}
    assert rows["ImageNet-V2"].verdict == "9,999 of 10,000 images: not to be compared"
    for title in ("mean of six", "gap: ImageNet-1K - mean"):
        assert rows[title].verdict == "not all sets are complete: not to be compared"


def test_published_rows_are_found_by_any_name() -> None:
    timm = PRETRAINED[G_336].timm[0]
    assert published_row(timm) == published_row(f"/some/folder/{G_336}.pt") == published_row(G_336)
    assert set(published_row(G_336)) == set(METRIC.values())
    assert published_row("mine") == {}
    assert [row.published for row in compare(measured(), {})] == [None] * 9


# --------------------------------------------------------------------------------------------------------- top-k


def test_a_tally_counts_any_label_and_leaves_out_images_without() -> None:
    logits_BV = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0.0, 1, 2, 3, 4, 5], [9.0, 0, 0, 0, 0, 0]])
    tally = Tally()
    tally.add(logits_BV, torch.tensor([[5, 4], [0, 5], [-1, -1]]))
    assert tally.result()[:3] == (2, 1, 2)
    few = Tally()
    few.add(logits_BV[:, :2], torch.tensor([[0], [0], [1]]))
    assert few.result()[:3] == (3, 1, 3)
    assert few.result().loss == pytest.approx((0.3133 + 1.3133 + 9.0001) / 3, abs=1e-3)
    assert Tally().result() == (0, 0, 0, 0.0)


@pytest.mark.parametrize(("name", "folder"), [("a", "imagenet-a"), ("sketch", "sketch")])
def test_topk_on_a_source_of_its_own(name: str, folder: str, tmp_path: Path) -> None:
    source = {"name": "imagenet", "set": name, "root": write_sets(tmp_path) / folder}
    content: dict[str, Any] = {"source": source, "num_workers": 0, "prefix": "mine_"}
    metrics = validate(topk.Config, content).build().run(Colours(), {})
    wanted = dict(zip(("mine_top1", "mine_top5", "mine_images"), expected()[f"imagenet_{name}"], strict=True))
    assert {key: metrics[key] for key in wanted} == pytest.approx(wanted)


def test_topk_refuses_the_models_classes_in_another_order(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / name / "a.png")
    source = {"name": "image_folder", "roots": [str(tmp_path)], "labels": True}
    evaluation = validate(topk.Config, {"source": source, "num_workers": 0, "prefix": "mine_"}).build()
    task = Colours()
    task.class_names = ("dog", "cat")
    with pytest.raises(ValueError, match=r"in another order \(cat, dog, ... instead of dog, cat"):
        evaluation.check(task)
    task.class_names = ("cat", "dog")
    evaluation.check(task)


def test_topk_without_images_or_labels_says_so() -> None:
    evaluation = topk.Config().build()
    with pytest.raises(ValueError, match="has no images: give it a `source`"):
        evaluation.run(Colours(), {})
    unlabelled = {"image": torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), "label": torch.tensor([-1, -1])}
    with pytest.raises(ValueError, match="no images with labels"):
        evaluation.run(Colours(), {"val": [unlabelled]})


# ------------------------------------------------------------------------------------------- openeva evaluate


def openeva(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A small classifier of 1,000 classes in openeva's format."""
    torch.manual_seed(0)
    backbone = {"image_size": SIZE, "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2, "mlp_hidden": 32}
    model = create_model("eva_b_16", num_classes=1000, **backbone)
    assert isinstance(model, ImageClassifier)
    torch.nn.init.normal_(model.classifier.weight)
    task = {"name": "classify", "backbone": model.backbone.config.model_dump(mode="json"), "num_classes": 1000}
    save_native(tmp_path / "mine", model.state_dict(), {"task": task})
    return tmp_path / "mine"


def test_evaluate_weights_on_imagenet(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_sets(tmp_path / "sets")
    changes = ["evals.0.allow_incomplete=true", "evals.0.num_workers=0", "run.device=cpu", "run.precision=fp32"]
    result = openeva("evaluate", "--weights", weights, "--imagenet", root, *changes, "--json", "mine.json")
    assert result.exit_code == 0, result.output
    for facts in FACTS.values():
        assert facts.title in result.stdout
    for part in ("any of its classes", "mean of six", "gap", "8 of 50,000 images: not to be compared", "32 x 32"):
        assert part in result.stdout
    assert "written: runs/evaluation-mine/evaluation.json" in result.stdout
    written = json.loads(Path("mine.json").read_text())
    assert written == json.loads(Path("runs/evaluation-mine/evaluation.json").read_text())
    assert written["metrics"]["imagenet_a_images"] == 5
    assert written["recipe"]["weights"] == str(weights)
    assert written["table"][0]["title"] == "ImageNet-1K"
    # the same model on the same pixels, by the recipe and by hand
    metrics = evaluate.measure(load_recipe(None, changes, weights=str(weights), imagenet=root)).metrics
    assert metrics == pytest.approx(written["metrics"])


def test_evaluate_says_what_is_missing_before_it_loads_weights(tmp_path: Path) -> None:
    result = openeva("evaluate", "--weights", G_336, "--imagenet", tmp_path, f"run.out={tmp_path / 'out'}")
    assert result.exit_code == 2
    for facts in FACTS.values():
        assert facts.title in result.stderr
    assert "openeva data check imagenet" in result.stderr
    assert not (tmp_path / "out").exists()


def test_metrics_that_the_table_shows_are_not_said_twice() -> None:
    metrics = {**measured(), "mean_class_accuracy": 0.5, "standard_mean": 0.5, "standard_gap": 0.1}
    done = evaluate.Measurement("mine", metrics, compare(metrics, {}), [], {}, None)
    assert done.other_metrics() == {"mean_class_accuracy": 0.5}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "neither the folder of a run nor a recipe"),
        (["evaluate/imagenet_robustnes"], "did you mean 'evaluate/imagenet_robustness'"),
        (["--eval", "knn", "--weights", "x"], "a recipe lists its evals itself"),
        (["evals=[knn]"], "knn is measured on the images of a run"),
        (["evals.0.protocl=standard"], "did you mean 'protocol'"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], said: str) -> None:
    result = openeva("evaluate", *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_weights_without_a_classifier_are_refused(tmp_path: Path) -> None:
    model = create_model("eva_b_16", image_size=SIZE, patch_size=8, width=16, depth=1, num_heads=2, mlp_hidden=32)
    task = {"name": "pretrain", "backbone": model.config.model_dump(mode="json")}
    tensors = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    save_native(tmp_path / "model", tensors, {"task": task})
    with pytest.raises(ValueError, match="hold no classifier"):
        evaluate.open_classifier(str(tmp_path / "model"))
