"""Runs of which only a part learns: what they learn, what they leave on disk, and that they continue exactly."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from e2e.test_resume import in_one_go_and_in_two, stop_after
from e2e.toy import BASE, CHANCE, checkpoint, recipe, train_in_processes
from openeva.checkpoints.convert import convert
from openeva.checkpoints.load import read_model, read_weights
from openeva.checkpoints.native import read_native
from openeva.checkpoints.weights import WeightsError
from openeva.config import apply_overrides
from openeva.engine.log import read_log
from openeva.engine.state import CheckpointError
from openeva.evaluate import evaluate
from openeva.models import load_checkpoint
from openeva.report.look import bring_back
from openeva.train import Recipe, dry_run, train

LORA = "tune={mode: lora, rank: 2, dropout: 0.1}"
HEAD = "tune={mode: head}"
BLOCKS = "tune={mode: blocks, first_block: 1}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained model that all of this starts from."""
    out = tmp_path_factory.mktemp("base")
    train(recipe(out, "optim.ema=null", "run.evaluate_every=0 steps"))
    return out


def classify(out: Path, *overrides: str, **task: Any) -> Recipe:
    content = {**BASE, "task": {"name": "classify", "backbone": {"name": "vit", "drop_path": 0.0}, **task}}
    return Recipe.model_validate(apply_overrides(content, [*overrides, f"run.out={out}"]))


def names(out: Path) -> set[str]:
    return set(load_file(out / "model" / "model.safetensors"))


def weight_bytes(out: Path) -> int:
    return sum(path.stat().st_size for path in (out / "checkpoints").glob("step_00000010/*.distcp"))


def of_model(out: Path) -> set[str]:
    """Names of the model's tensors in the last checkpoint."""
    return {name.removeprefix("model.") for name in checkpoint(out, 10) if name.startswith("model.")}


@pytest.mark.parametrize("tune", [HEAD, BLOCKS, LORA], ids=["head", "blocks", "lora"])
def test_only_what_is_trained_is_stored_and_the_rest_is_as_it_was(tune: str, base: Path, tmp_path: Path) -> None:
    train(recipe(tmp_path, tune, f"task.init_from={base}"))
    before, after = load_file(base / "model" / "model.safetensors"), read_model(tmp_path / "model")[0]
    learned = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    expected = {
        HEAD: {"head.weight", "head.bias"},
        BLOCKS: {n for n in before if n.startswith(("head.", "backbone.blocks.1.", "backbone.norm."))},
        LORA: {"head.weight", "head.bias"}
        | {n for n in before if n.endswith((".attn.qkv.weight", ".attn.proj.weight"))},
    }[tune]
    assert learned == expected
    stored = names(tmp_path)
    assert stored == of_model(tmp_path)
    if tune == LORA:
        assert stored == {"head.weight", "head.bias"} | {name for name in stored if ".lora_" in name}
    else:
        assert stored == expected
    if tune == HEAD:
        assert weight_bytes(tmp_path) < weight_bytes(base) / 5  # some kB of the format itself
        size = (tmp_path / "model" / "model.safetensors").stat().st_size
        assert size < (base / "model" / "model.safetensors").stat().st_size / 20
    last = [record for record in read_log(tmp_path) if "held_out_loss" in record][-1]
    assert evaluate(tmp_path, [])["held_out_loss"] == pytest.approx(last["held_out_loss"], abs=1e-6)
    averaged, raw = read_model(tmp_path / "model_ema")[0], after["head.weight"]
    assert not torch.equal(averaged["head.weight"], raw)
    assert torch.equal(averaged["backbone.cls_token"], before["backbone.cls_token"])
    model = load_checkpoint(str(tmp_path))
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], after["backbone.blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("tune", [HEAD, LORA], ids=["head", "lora"])
def test_a_stop_changes_nothing(tune: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(out: Path) -> Recipe:
        return recipe(out, tune, *CHANCE, f"task.init_from={base}", "run.length=8 steps", "data.crop.kind=random")

    in_one_go_and_in_two(made, tmp_path, monkeypatch, stop=3)


@pytest.mark.parametrize(
    ("tune", "strategy"), [(BLOCKS, "ddp"), ("tune={mode: lora, rank: 2}", "fsdp")], ids=["blocks-ddp", "lora-fsdp"]
)
def test_two_processes_are_one(tune: str, strategy: str, base: Path, tmp_path: Path) -> None:
    def made(out: Path, *changes: str) -> Recipe:
        return recipe(out, tune, f"task.init_from={base}", "run.micro_batch=4", "run.length=6 steps", *changes)

    def losses(out: Path) -> list[float]:
        return [record[key] for record in read_log(out) for key in ("loss", "held_out_loss") if key in record]

    one = train_in_processes(made(tmp_path / "one"), 1)
    two = train_in_processes(made(tmp_path / "two", f"run.strategy={strategy}"), 2)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert names(two) == names(one)
    tensors = read_model(two / "model")[0]
    for name, tensor in read_model(one / "model")[0].items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-4, rtol=1e-3)


def test_lora_learns_to_classify_with_few_parameters(base: Path, tmp_path: Path) -> None:
    made = classify(
        tmp_path, "tune={mode: lora, rank: 1, targets: [qkv]}", "run.length=30 steps", "optim.lr=0.02",
        "run.batch_size=16", init_from=str(base), smoothing=0.0,
    )  # fmt: skip
    train(made)
    losses = [record["loss"] for record in read_log(tmp_path) if "loss" in record]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    share = re.search(r"of [\d,]+ \((.*)%\) parameters learn", dry_run(made)[0])
    assert share
    assert float(share[1]) < 5
    assert all("lora_" in name or name.startswith(("classifier.", "fc_norm.")) for name in names(tmp_path))


def test_weights_that_training_started_from_must_stay(base: Path, tmp_path: Path) -> None:
    own = tmp_path / "base"
    train(recipe(own, "run.length=2 steps"))
    changes = (HEAD, f"task.init_from={own}")
    train(recipe(tmp_path / "run", *changes, "run.length=4 steps", "run.save_every=2 steps"))
    (own / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=r"base"):
        evaluate(tmp_path / "run", [])
    with pytest.raises(WeightsError, match=r"holds only what was trained on top of"):
        load_checkpoint(str(tmp_path / "run"))
    (base / "model").rename(own / "model")
    try:
        with pytest.raises(CheckpointError, match=r"base: checkpoint \["):
            train(recipe(tmp_path / "run", *changes, "run.length=6 steps"))
        with pytest.raises(WeightsError, match=r"other weights now"):
            evaluate(tmp_path / "run", [])
    finally:
        (own / "model").rename(base / "model")


def test_pictures_of_a_run_that_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tmp_path, LORA, f"task.init_from={base}")
    stop_after(monkeypatch, 3)
    assert train(made).status == "stopped"
    task, source = bring_back(tmp_path, made)
    assert source == "the checkpoint of step 3"
    content = checkpoint(tmp_path, 3)
    state = task.trainable.state_dict()
    assert all(torch.equal(state[n.removeprefix("model.")], v) for n, v in content.items() if n.startswith("model."))
    frozen = load_file(base / "model" / "model.safetensors")["backbone.blocks.0.mlp.fc1.weight"]
    assert torch.equal(state["backbone.blocks.0.mlp.fc1.weight"], frozen)


def test_converting_merges(base: Path, tmp_path: Path) -> None:
    train(recipe(tmp_path, LORA, f"task.init_from={base}", "run.length=2 steps", "run.evaluate_every=0 steps"))
    convert(tmp_path / "model", tmp_path / "merged", "openeva")
    assert read_native(tmp_path / "merged")[1].keys().isdisjoint({"delta"})
    convert(tmp_path / "model", tmp_path / "official.pt", "official")
    expected = read_model(tmp_path / "model")[0]
    for path in ("merged", "official.pt"):
        found = read_weights(tmp_path / path).state_dict
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
