"""CLIP runs: what is learnt, that a batch is one batch however it is cut up, and what its temperature may be."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from e2e.pairs import PAIRS
from e2e.test_resume import in_one_go_and_in_two
from e2e.toy import BASE, checkpoint, train_in_processes
from e2e.toy import recipe as pretraining
from openeva.backbones.base import CLIP_STATISTICS
from openeva.backbones.vit import VisionTransformer
from openeva.config import ConfigError, apply_overrides, validate
from openeva.data.loader import EvalLoader
from openeva.data.mixture import Mixture
from openeva.data.views import normalise
from openeva.engine.log import read_log
from openeva.engine.precision import Precision
from openeva.heads.clip import MAX_LOGIT_SCALE, ClipModel
from openeva.tasks.clip import ClipTask, Config
from openeva.train import Recipe, dry_run, train

IMAGE = {
    "image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 64, "rope_grid": 4,
}  # fmt: skip
TEXT = {"width": 16, "num_heads": 2, "depth": 2, "context_length": 16}
TASK: dict[str, Any] = {"name": "clip", "embed_dim": 16, "backbone": IMAGE, "text": TEXT}
CHANCE = ["task.backbone.drop_path=0.3", "task.backbone.patch_dropout=0.4", "task.backbone.dropout=0.1"]
"""Everything in the model that is random."""
CLIP: dict[str, Any] = {
    **BASE,
    "task": TASK,
    "data": {
        "train": [{"name": "e2e.pairs", "num_images": 32}], "holdout": 0.25, "num_workers": 0,
        "crop": {"scale": [0.9, 1.0], "hflip": 0.0},
    },
    "optim": {"lr": 0.002, "warmup": "2 steps", "ema": 0.9},
}  # fmt: skip


def recipe(out: Path, *overrides: str) -> Recipe:
    """24 pairs, 3 steps per epoch, 8 held out."""
    return Recipe.model_validate(apply_overrides(CLIP, [*overrides, f"run.out={out}"]))


def task_of(*overrides: str) -> ClipTask:
    """A task whose features are not close to each other, as those of fresh towers are."""
    torch.manual_seed(0)
    task = Config.model_validate(apply_overrides({"task": TASK}, list(overrides))["task"]).build()
    with torch.no_grad():
        task.model.backbone.projection.weight.mul_(1000)  # type: ignore[union-attr,operator]
    return task.train()


def micro_batches(task: ClipTask, number: int, size: int = 4) -> list[dict[str, Any]]:
    words = [" beside ".join(pair) for pair in PAIRS]
    return [
        {
            "image": torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8),
            "text": task.tokenizer(words[first : first + size]),
        }
        for first in range(0, number * size, size)
    ]


# ------------------------------------------------------------------------------------------------ one batch


def plain(task: ClipTask, batches: list[dict[str, Any]], backward: Callable[[Tensor], None]) -> Tensor:
    """Loss and gradient with all activations in memory, drawing chance in the same order."""
    features = [task._features(task.model, batch) for batch in batches]
    image_BE, text_BE = (torch.cat(column) for column in zip(*features, strict=True))
    loss = task._loss(image_BE, text_BE, *task._temperature()).loss
    backward(loss)
    return loss.detach()


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 0.01), ("bf16", 0.05)])
def test_feature_caching_gives_the_gradient_of_the_whole_batch(loss: str, precision: Any, tolerance: float) -> None:
    task = task_of(f"task.loss={loss}", *CHANCE)
    batches, engine = micro_batches(task, 3), Precision(precision, torch.device("cpu"))
    if precision == "fp16":  # 2^16 would have to be halved a few times first
        engine.scale = torch.tensor(2.0**8)
    found = []
    for compute in (task.forward_backward, lambda *args: (plain(task, *args), None)):
        torch.manual_seed(1)
        with engine.autocast():
            value, _ = compute(batches, engine.backward)
        engine.finish(task, value, None)
        found.append((value, {key: p.grad for key, p in task.named_parameters()}, torch.get_rng_state()))
        task.zero_grad()
    (one, gradients, state), (other, expected, expected_state) = found
    assert one == pytest.approx(other.item(), rel=tolerance)
    assert torch.equal(state, expected_state), "the model has drawn another amount of chance"
    for key, gradient in gradients.items():
        assert gradient is not None, key
        assert (gradient - expected[key]).norm() <= tolerance * expected[key].norm(), key


def test_negatives_come_from_all_micro_batches() -> None:
    task = task_of()
    batches = micro_batches(task, 4)
    whole, scalars = task.forward_backward(batches, lambda value: value.backward())
    parts = [task(batch)[0].item() for batch in batches]
    assert sum(parts) / 4 < whole.item() - 0.5  # 4 pairs to choose from, not 16
    assert set(scalars) == {"accuracy_i2t", "accuracy_t2i", "scale", "text_length"}
    assert scalars["scale"].item() == pytest.approx(1 / 0.07)
    assert scalars["text_length"] == 8
    assert not any(value.requires_grad for value in scalars.values())


ALIKE = ("loss", "grad_norm", "held_out_loss", "ema_held_out_loss", "accuracy_i2t", "accuracy_t2i", "scale")


def numbers(out: Path) -> dict[tuple[int, str], float]:
    return {(record["step"], key): record[key] for record in read_log(out) for key in ALIKE if key in record}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run in one process without feature caching, by its loss."""
    done: dict[str, Path] = {}

    def run(loss: str) -> Path:
        if loss not in done:
            made = recipe(tmp_path_factory.mktemp("alone"), f"task.loss={loss}", "run.length=5 steps")
            done[loss] = train_in_processes(made, 1)
        return done[loss]

    return run


@pytest.mark.parametrize(
    ("loss", "size", "changes"),
    [
        ("infonce", 1, "run.micro_batch=2"),
        ("infonce", 2, "run.strategy=ddp"),
        ("infonce", 2, "run.strategy=fsdp run.micro_batch=2"),
        ("sigmoid", 2, "run.strategy=ddp run.micro_batch=2"),
    ],
)
def test_a_batch_is_one_batch_on_any_number_of_processes(
    loss: str, size: int, changes: str, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    out = alone(loss)
    made = recipe(tmp_path, f"task.loss={loss}", "run.length=5 steps", *changes.split())
    other = train_in_processes(made, size)
    expected = {key: value for key, value in numbers(out).items() if key in numbers(other)}
    assert len(expected) >= 5 * 4
    assert {key: numbers(other)[key] for key in expected} == pytest.approx(expected, abs=2e-6, rel=2e-5)
    one, two = checkpoint(out, 5), checkpoint(other, 5)
    for key, value in one.items():
        if key.startswith(("model.", "ema.")):
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_stopped_and_continued_is_the_run_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [*CHANCE, "run.micro_batch=4", "run.length=6 steps", "task.smoothing=0.1"]
    in_one_go_and_in_two(lambda out: recipe(out, *changes), tmp_path, monkeypatch, stop=3)


# ------------------------------------------------------------------------------------------------ temperature


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_temperature_is_exact_and_stays_in_bounds(strategy: str, tmp_path: Path) -> None:
    """At a rate at which it would leave them, in a precision that could not tell 100 from 99.6."""
    changes = [
        *("optim.lr=2", "optim.min_lr=2", "optim.warmup=0 steps", "optim.towers={image: {lr: 1.0e-5}, text: {lr: 0}}"),
        *("run.precision=bf16", "run.save_every=1 steps", f"run.strategy={strategy}", "run.evaluate_every=0 steps"),
        *("run.length=5 steps", "optim.ema=null"),
    ]
    out = train_in_processes(recipe(tmp_path, *changes), 2)
    stored = [checkpoint(out, step)["model.logit_scale"] for step in range(1, 6)]
    assert all(value.dtype == torch.float32 and value.shape == (1,) for value in stored)
    values = [value.item() for value in stored]
    assert all(0 <= value <= MAX_LOGIT_SCALE + 1e-6 for value in values)
    bounds = [value for value in values if value == 0 or value == pytest.approx(MAX_LOGIT_SCALE)]
    assert bounds, "the rate was too low for this test"
    logged = [record["scale"] for record in read_log(out)]
    assert logged[1:] == pytest.approx([math.exp(value) for value in values[:-1]], rel=1e-6)


# ------------------------------------------------------------------------------------------------ patch dropout


def test_patch_dropout_keeps_other_patches_for_each_image_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("task.backbone.patch_dropout=0.4")
    seen: list[Tensor] = []
    original = VisionTransformer.forward_visible

    def spy(self: VisionTransformer, image_BCYX: Tensor, visible_BM: Tensor) -> Any:
        seen.append(visible_BM)
        return original(self, image_BCYX, visible_BM)

    monkeypatch.setattr(VisionTransformer, "forward_visible", spy)
    tokens: list[int] = []
    task.model.backbone.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    (batch,) = micro_batches(task, 1, size=16)
    for _ in range(64):
        task(batch)
    visible_KBM = torch.stack(seen)
    assert visible_KBM.shape == (64, 16, 9)  # int(16 * 0.6)
    assert set(tokens) == {10}  # and cls
    drawn = [frozenset(row) for row in visible_KBM.flatten(0, 1).tolist()]
    assert all(len(row) == 9 for row in drawn)
    assert len(set(drawn)) > 0.9 * len(drawn)
    share_N = torch.bincount(visible_KBM.flatten(), minlength=16) / len(drawn)
    assert (share_N - 9 / 16).abs().max() < 0.1
    task.eval()
    task(batch)
    assert len(seen) == 64
    assert tokens[-1] == 17


# ------------------------------------------------------------------------------------------------ what is learnt


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_pairs_are_learnt_by_heart(loss: str, tmp_path: Path) -> None:
    changes = [
        *("data.train.0.num_images=16", "data.holdout=0", "data.val=[{name: e2e.pairs, num_images: 16}]"),
        *("run.length=240 steps", "run.batch_size=16", "run.micro_batch=8", "run.log_every=50 steps"),
        *("run.evaluate_every=240 steps", "run.save_every=0 steps", "optim.ema=null", f"task.loss={loss}"),
        *("optim.lr=0.004", "optim.warmup=30 steps", "optim.clip_grad=1", "optim.weight_decay=0"),
    ]
    train(recipe(tmp_path, *changes))
    (held_out,) = [record["held_out_loss"] for record in read_log(tmp_path) if "held_out_loss" in record]
    last = [record for record in read_log(tmp_path) if "loss" in record][-1]
    assert last["accuracy_i2t"] > 0.9
    # who cannot tell the 16 apart: a guess among them, or for each of 16 questions the share of those with a yes
    chance = math.log(16) if loss == "infonce" else math.log(16) + 15 * math.log(16 / 15)
    assert held_out < chance / 4
    weights = load_file(tmp_path / "model/model.safetensors")
    assert ("logit_bias" in weights) == (loss == "sigmoid")


def test_the_held_out_loss_is_that_of_all_pairs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without smoothing, whatever the size of batches and of the blocks that are compared at a time."""
    task = task_of("task.smoothing=0.1").eval()
    made = recipe(Path("unused"))
    data = Mixture([made.data.train[0].build()], [1.0])
    (batch,) = EvalLoader(data, task.view_spec(train=False), made.data.val_crop, batch_size=32)
    with torch.no_grad():
        image_BCYX = normalise(batch["image"], CLIP_STATISTICS.mean, CLIP_STATISTICS.std)
        image_BE, text_BE, scale_1, _ = task.model(image_BCYX, batch["text"])
    logits_BB = scale_1 * image_BE @ text_BE.T
    expected = sum(F.cross_entropy(x, torch.arange(32)) for x in (logits_BB, logits_BB.T)).item() / 2
    monkeypatch.setattr("openeva.tasks.clip.EVALUATED_ROWS", 7)
    for size in (32, 5):
        loader = EvalLoader(data, task.view_spec(train=False), made.data.val_crop, batch_size=size)
        assert task.evaluate(loader) == {"held_out_loss": pytest.approx(expected, rel=1e-5)}


# ------------------------------------------------------------------------------------------------ what is refused


def test_images_without_captions_are_refused(tmp_path: Path) -> None:
    sources = "data.train=[{name: e2e.pairs}, {name: e2e.pairs, captions: false}]"
    with pytest.raises(
        ConfigError, match=r"data\.train\.1 has no captions.*webdataset: caption_key; .*scenes: captions: true"
    ):
        train(recipe(tmp_path, sources))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gather_with_grad": False}, "task: gather_with_grad is no key.*wrong gradients.*remove it"),
        ({"local_loss": True}, "local_loss is no key"),
        ({"loss": "sigmoid", "smoothing": 0.1}, "no labels to smooth"),
        ({"init_from": "a", "init_text": "b"}, "give either it"),
        ({"backbone": {"projection": 8}}, "projection 8 is not embed_dim 128"),
        ({"text": {"num_heads": 3}}, "width 128 is not a multiple of num_heads 3"),
        ({"variant": "eva_clip_micro"}, "did you mean 'eva_clip_micro_8'"),
        ({"los": "sigmoid"}, "unknown key.*did you mean 'loss'"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(Recipe, {**CLIP, "task": {"name": "clip", "variant": "eva_clip_micro_8", **change}})


def test_a_tower_starts_from_a_masked_pre_training(tmp_path: Path) -> None:
    """Its architecture too, with the keys of the recipe on top; the run says what became of each tensor."""
    pretrained = pretraining(tmp_path / "mim", "run.length=2 steps", "task.backbone.rope_grid=4")
    train(pretrained)
    start = {"name": "clip", "init_image": str(tmp_path / "mim"), "text": TEXT, "embed_dim": 16}
    task = Config.model_validate({**start, "backbone": {"drop_path": 0.2}}).build()
    weights = load_file(tmp_path / "mim/model/model.safetensors")
    assert task.config.backbone.rope_grid == 4
    assert task.config.backbone.drop_path == 0.2
    assert torch.equal(task.backbone.blocks[1].attn.qkv.weight, weights["backbone.blocks.1.attn.qkv.weight"])
    assert task.load_report is not None
    assert {"backbone.projection.weight", "logit_scale"} <= set(task.load_report.fresh)


def test_a_task_is_asked_for_features_of_any_length(tmp_path: Path) -> None:
    task = task_of().eval()
    (batch,) = micro_batches(task, 1)
    image_BE, text_BE = task.encode_image(batch["image"]), task.encode_text(["black beside black", "a word"])
    assert image_BE.shape == (4, 16)
    assert text_BE.shape == (2, 16)
    assert not image_BE.requires_grad
    assert (image_BE.norm(dim=1) - 1).abs().min() > 0.01
    assert isinstance(task.model, ClipModel)
    expected_BE, _ = task._features(task.model, batch)
    torch.testing.assert_close(F.normalize(image_BE, dim=1), expected_BE)


def test_a_dry_run_tells_the_rates_of_the_towers(tmp_path: Path) -> None:
    lines = dry_run(recipe(tmp_path, "optim.towers={image: {lr: 0.0001}, text: {layer_decay: 0.9}}"))
    assert "  learning rates: image 0.0001, text 0.002, the rest 0.002" in lines
    assert not [line for line in dry_run(recipe(tmp_path)) if "learning rates" in line]


def test_a_batch_that_cannot_be_cut_up_is_told_what_would_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"100 samples each, not a multiple of run.micro_batch 64; 50 would fit"):
        dry_run(recipe(tmp_path, "run.batch_size=100", "run.micro_batch=64"))


def test_wrong_class_names_are_told_before_training(tmp_path: Path) -> None:
    scenes = "{name: scenes, num_images: 16, size: 32, captions: true}"
    names = "evals=[{name: zeroshot, class_names: [disc, square]}]"
    asked = recipe(tmp_path, f"data.train=[{scenes}]", f"data.val=[{scenes}]", "data.holdout=0", names)
    with pytest.raises(ConfigError, match="zeroshot: class_names has 2 names, but the images have 8 classes"):
        dry_run(asked)
