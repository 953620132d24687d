"""Evaluations and preparation in several processes: as in one, with the work shared."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from e2e.toy import recipe, train_here, train_in_processes
from openeva.engine.log import read_log
from openeva.evals import linear_probe
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
