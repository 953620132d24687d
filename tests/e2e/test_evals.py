"""Evaluations and preparation in several processes: as in one, with the work shared."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from checkpoints.tiny_clip import randomised
from e2e.pairs import Pairs
from e2e.toy import join, recipe, start, train_here, train_in_processes
from openeva import evaluate
from openeva.checkpoints.native import save_native
from openeva.config import validate
from openeva.engine.log import read_log
from openeva.evals import linear_probe
from openeva.heads.clip import ClipConfig, ClipModel
from openeva.targets.features import FeatureTarget

EVALS = "evals=[{name: knn, k: 5}, {name: linear_probe, folds: 2}, {name: masked_cosine}]"
METRICS = ("knn_accuracy", "probe_accuracy", "masked_cosine", "visible_mean", "position_mean", "other_image")


def count_work(content: dict[str, Any]) -> None:
    """Train, and write down how many images this process prepared and how many probes it fitted."""
    images, fits = [0], [0]
    of_batch, probe = FeatureTarget._of_batch, linear_probe.probe

    def counted(self: FeatureTarget, batch: dict[str, Any], *, flip: bool = False) -> Any:
        images[0] += len(batch["index"])
        return of_batch(self, batch, flip=flip)

    def counted_probe(*args: Any, **options: Any) -> dict[str, float]:
        fits[0] += 1
        return probe(*args, **options)

    FeatureTarget._of_batch = counted  # type: ignore[method-assign]
    linear_probe.probe = counted_probe
    train_here(content)
    file = Path(content["run"]["out"]) / f"work_{os.environ['RANK']}.json"
    file.write_text(json.dumps({"images": images[0], "fits": fits[0]}))


def metrics(out: Path) -> dict[str, float]:
    return {key: record[key] for record in read_log(out) for key in METRICS if key in record}


CACHED = (
    "task.target.cache=true", "task.target.standardise=true", "data.crop={kind: center, crop_pct: 1, hflip: 0.5}",
    "data.holdout=0.27", "run.length=4 steps", "run.evaluate_every=4 steps", EVALS,
)  # fmt: skip


def test_two_processes_share_preparation_and_measure_what_one_measures(tmp_path: Path) -> None:
    one = train_in_processes(recipe(tmp_path / "one", *CACHED), 1, count_work)
    two = train_in_processes(recipe(tmp_path / "two", *CACHED, "run.strategy=fsdp"), 2, count_work)
    expected = metrics(one)
    assert set(expected) == {*METRICS}
    other = expected.pop("other_image")
    found = metrics(two)
    assert found.pop("other_image") == pytest.approx(other, abs=0.2)  # which other image depends on the shares
    assert found == pytest.approx(expected, abs=1e-4)
    (alone,) = [json.loads((one / "work_0.json").read_text())]
    shares = [json.loads((two / f"work_{rank}.json").read_text()) for rank in range(2)]
    done = [share["images"] for share in shares]
    assert sum(done) == alone["images"] == 2 * 47
    assert abs(done[0] - done[1]) == 2  # one image and its mirror image
    assert [share["fits"] for share in shares] == [alone["fits"], 0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_features_are_measured_in_reduced_precision(strategy: str, tmp_path: Path) -> None:
    changes = ("run.precision=bf16", "run.length=2 steps", "run.evaluate_every=2 steps", "optim.ema=0.9", EVALS)
    found = metrics(train_in_processes(recipe(tmp_path, f"run.strategy={strategy}", *changes), 2))
    assert set(found) == {*METRICS}
    assert all(-1 <= value <= 1 for value in found.values())


def measure_clip(folder: str) -> None:
    """Zero-shot classification and retrieval, in a process of its own."""
    os.environ["OPENEVA_CACHE"] = f"{folder}/cache"
    evaluate.measure(evaluate.load_recipe(f"{folder}/recipe.yaml", [f"run.out={folder}/{os.environ['WORLD_SIZE']}"]))


def test_two_processes_measure_a_clip_as_one_does(tmp_path: Path) -> None:
    tower = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "num_heads": 2, "mlp_hidden": 64}
    text = {"width": 16, "num_heads": 2, "depth": 1}
    model = randomised(ClipModel(validate(ClipConfig, {"backbone": tower, "embed_dim": 16, "text": text})), 0)
    task = {"name": "clip", **model.config.model_dump(mode="json")}
    save_native(tmp_path / "clip", model.state_dict(), {"task": task})
    pairs = Pairs(11, 40, captions=True)
    for number in range(len(pairs)):
        path = tmp_path / "images" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs.read(number).image.save(path)
    folder = {"name": "image_folder", "roots": str(tmp_path / "images"), "labels": True}
    own = {"num_workers": 0, "batch_size": 3}
    evals = [
        {"name": "zeroshot", "source": folder, **own, "templates": "simple", "text_batch_size": 2},
        {"name": "retrieval", "source": {"name": "e2e.pairs", "num_images": 11}, **own, "text_batch_size": 3},
    ]
    content = {"weights": str(tmp_path / "clip"), "evals": evals, "run": {"device": "cpu", "precision": "fp32"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    found = []
    for size in (1, 2):
        join(start(measure_clip, str(tmp_path), size=size, errors=tmp_path), tmp_path)
        found.append(json.loads((tmp_path / str(size) / "evaluation.json").read_text()))
    alone, together = (one["metrics"] for one in found)
    assert (alone["zeroshot_images"], alone["retrieval_captions"]) == (11, 22)
    assert together == pytest.approx(alone)
    assert [one["processes"] for one in found] == [1, 2]
