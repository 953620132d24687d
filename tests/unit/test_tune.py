"""Which part of a model learns, and files that hold only that part."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from openeva.backbones import vit
from openeva.checkpoints.adapters import Adapter, inject, merge
from openeva.checkpoints.load import read_model
from openeva.checkpoints.native import save_native
from openeva.checkpoints.weights import WeightsError
from openeva.config import ConfigError, validate
from openeva.data.views import normalise
from openeva.engine.optim import param_groups
from openeva.layers.flops import training_passes
from openeva.models import load_checkpoint
from openeva.tasks.base import Task
from openeva.tasks.classify import Config
from openeva.train import Recipe, dry_run
from openeva.tune import Tune, apply_tuning

VIT: dict[str, Any] = {
    "name": "vit", "image_size": 16, "patch_size": 8, "width": 16, "depth": 3, "num_heads": 2, "mlp_hidden": 32,
}  # fmt: skip


def made(tune: dict[str, Any], seed: int = 0, pooling: str = "mean", **backbone: Any) -> Task:
    """A small classifier; further keys are the backbone's, or the task's own."""
    torch.manual_seed(seed)
    own = {key: backbone.pop(key) for key in ("init_from", "init_head", "batch_norm") if key in backbone}
    task: Task = Config(backbone={**VIT, **backbone}, num_classes=3, pooling=pooling, smoothing=0.0, **own).build()
    apply_tuning(TypeAdapter(Tune).validate_python(tune), task)
    return task


def learning(task: Task) -> set[str]:
    return {name for name, parameter in task.trainable.named_parameters() if parameter.requires_grad}


def saved(task: Task, folder: Path) -> Path:
    """What a run exports."""
    tensors, notes = dict(task.trainable.state_dict()), {}
    if task.trained_part:
        tensors, notes = task.trained_part.export(tensors)
    save_native(folder, tensors, {"task": task.config.model_dump(mode="json"), **notes})
    return folder


def trained(task: Task, seed: int = 1) -> Task:
    """As if it had learned: all that learns is another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in task.trainable.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return task


def images(height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))


def logits(task: Task) -> Tensor:
    with torch.no_grad():
        return task.eval().trainable(images(*task.backbone.image_size))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(made({"mode": "all"}, seed=7), tmp_path / "base" / "model")


def test_modes() -> None:
    everything = learning(made({"mode": "all"}))
    head = {name for name in everything if not name.startswith("backbone.")}
    assert head == {"fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"}
    assert learning(made({"mode": "head"})) == head
    upper = learning(made({"mode": "blocks", "first_block": 1}))
    assert upper == head | {
        name for name in everything if name.startswith(("backbone.blocks.1.", "backbone.blocks.2."))
    }
    assert learning(made({"mode": "blocks", "first_block": 3})) == head
    norms = {name for name in everything if ".norm1." in name}
    assert learning(made({"mode": "head", "also": ["*.norm1.*"]})) == head | norms
    lora = learning(made({"mode": "lora", "rank": 2}))
    assert lora - everything == {
        f"backbone.blocks.{block}.attn.{layer}.lora_{side}.default.weight"
        for block in range(3)
        for layer in ("qkv", "proj")
        for side in "AB"
    }
    assert lora & everything == head
    wrapped = learning(made({"mode": "lora", "also": ["blocks.0.attn.qkv.weight"]})) - lora
    assert wrapped == {"backbone.blocks.0.attn.qkv.base_layer.weight"}


def test_a_frozen_patch_embedding_stays_frozen() -> None:
    task = made({"mode": "head", "also": ["*"]}, patch_grad_scale=0.0)
    assert not any("patch_embed" in name for name in learning(task))


def test_the_final_norm_learns_with_the_upper_blocks() -> None:
    assert "backbone.norm.weight" in learning(made({"mode": "blocks", "first_block": 2}, pooling="cls"))
    assert "backbone.norm.weight" not in learning(made({"mode": "head"}, pooling="cls"))


CHANCE = {"drop_path": 0.5, "dropout": 0.3, "attention_dropout": 0.3}


def test_what_is_frozen_has_no_chance_in_it() -> None:
    task = made({"mode": "head"}, **CHANCE)
    task.train()
    one, other = (task.backbone(images()).pooled for _ in range(2))
    assert torch.equal(one, other)
    assert not one.requires_grad  # nothing of it is kept for a backward pass
    assert task.trainable.training
    task = made({"mode": "head", "stochastic": True}, **CHANCE).train()
    assert not torch.equal(task.backbone(images()).pooled, task.backbone(images()).pooled)
    task = made({"mode": "blocks", "first_block": 1}, **CHANCE).train()
    assert [block.training for block in task.backbone.blocks] == [False, True, True]


ARCHITECTURES = [
    {},
    {"qkv_bias": "full", "relative_position": "shared"},
    {"qkv_bias": "none", "positions": "sincos"},
    {"mlp": "swiglu", "sub_norm": "mlp_attention", "rope_grid": 2},
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("tune", [{"mode": "lora"}, {"mode": "peft", "type": "ia3"}], ids=str)
def test_every_adapter_is_at_work(architecture: dict[str, Any], tune: dict[str, Any], tmp_path: Path) -> None:
    """Fresh ones change nothing; trained ones do, each of them gets a gradient, and merging agrees."""
    if not set(architecture) <= set(vit.Config.model_fields):
        pytest.skip("not an architecture of this version")
    plain = trained(made({"mode": "all"}, **architecture), seed=2)
    address = str(saved(plain, tmp_path / "model"))
    task = made({**tune, "targets": ["all"]}, init_from=address, **architecture)
    before = logits(task)
    torch.testing.assert_close(before, logits(plain), atol=1e-6, rtol=1e-5)
    trained(task)
    task.trainable(images()).square().sum().backward()
    idle = [n for n, p in task.trainable.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []
    assert (logits(task) - before).abs().max() > 1e-3
    plain.trainable.load_state_dict(merge(task.trainable.state_dict(), task.trained_part.delta.adapter))
    torch.testing.assert_close(logits(task), logits(plain), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LORA", {"r": 2, "lora_alpha": 4.0, "lora_dropout": 0.1}),
        ("LORA", {"r": 2, "use_dora": True, "use_rslora": True}),
        ("IA3", {"feedforward_modules": ["body.1"]}),
        ("LOHA", {"r": 2}),
        ("LOKR", {"r": 2}),
        ("OFT", {"oft_block_size": 4}),
        ("HRA", {"r": 2}),
    ],
)
def test_merged_weights_give_the_same_output(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = nn.Module()
    plain.body = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8, bias=False))
    wrapped, adapter = copy.deepcopy(plain), Adapter(kind, ("body.0", "body.1"), options)
    own = {id(parameter) for parameter in wrapped.parameters()}
    inject(wrapped, adapter)
    for parameter in wrapped.parameters():
        if id(parameter) not in own and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    x, before = torch.randn(5, 8), plain.body(torch.ones(8))
    plain.load_state_dict(merge(wrapped.state_dict(), adapter))
    torch.testing.assert_close(plain.body(x), wrapped.eval().body(x), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(plain.body(torch.ones(8)), before, atol=1e-2)


def test_lora_learns_with_few_parameters_in_groups_of_their_layers() -> None:
    task = made({"mode": "lora", "rank": 1, "targets": ["qkv"]}, width=64, mlp_hidden=256)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in task.trainable.parameters()]
    assert sum(size for size, learns in sizes if learns) < 0.02 * sum(size for size, _ in sizes)
    groups = param_groups(
        task.trainable.named_parameters(), weight_decay=0.1, no_decay=set(), layer_decay=0.5, num_layers=3
    )
    assert {group["layer"] for group in groups} == {1, 2, 3, 4}


def test_passes() -> None:
    for tune, passes in (
        ({"mode": "all"}, 3.0),
        ({"mode": "head"}, 1.0),
        ({"mode": "blocks", "first_block": 2}, (1 + 1 + 3) / 3),
    ):
        task = made(tune)
        assert training_passes(task.backbone) == passes
        assert task.flops_per_sample() == pytest.approx(passes * task.backbone.flops() + 6 * 16 * 3)
    assert 2.0 < training_passes(made({"mode": "lora", "rank": 1}).backbone) < 2.2


def test_a_head_alone_is_logistic_regression_on_the_features() -> None:
    task = made(
        {"mode": "head"}, pooling="cls", width=8, mlp_hidden=16, init_std=0.5, batch_norm=True, **CHANCE
    ).train()
    generator = torch.Generator().manual_seed(2)
    image_BCYX = torch.randint(256, (128, 3, 2, 2), generator=generator, dtype=torch.uint8).repeat(1, 1, 8, 8)
    batch = {"image": image_BCYX, "label": torch.randint(3, (128,), generator=generator)}
    learns = [parameter for parameter in task.trainable.parameters() if parameter.requires_grad]
    optimizer = torch.optim.LBFGS(learns, max_iter=300, tolerance_change=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, _ = task(batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    statistics = task.backbone.normalisation
    x = task.backbone(normalise(image_BCYX, statistics.mean, statistics.std)).cls.numpy()
    # a trace of decay, as a normed token has one direction in which there is nothing but rounding to fit
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1e5, max_iter=10_000, tol=1e-8))
    probe.fit(x.astype("float64"), batch["label"].numpy())
    best = log_loss(batch["label"].numpy(), probe.predict_proba(x))
    assert best < 1.08  # below that of guessing
    assert closure().item() == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize(
    ("tune", "says"),
    [
        ({"mode": "lora", "targets": ["qkw"]}, "tune.targets: 'qkw' is no linear layer.* qkv, proj, fc1, fc2"),
        ({"mode": "blocks", "first_block": 4}, "tune.first_block 4: the backbone has 3 blocks"),
        ({"mode": "head", "also": ["*.norm9.*"]}, r"tune.also: '\*.norm9.\*' fits no parameter"),
        ({"mode": "peft", "type": "loha", "options": {"rank": 3}}, "peft refuses tune.options.*rank"),
    ],
)
def test_mistakes(tune: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made(tune)


def test_keys_of_another_mode_are_unknown() -> None:
    with pytest.raises(ConfigError, match=r"tune.rank: unknown key"):
        validate(Recipe, {"tune": {"mode": "head", "rank": 4}})
    with pytest.raises(ConfigError, match=r"tune.*unknown mode 'lorra'; did you mean 'lora'"):
        validate(Recipe, {"tune": {"mode": "lorra"}})


def test_a_layer_that_an_adapter_cannot_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.linear(x, self.fc1.weight, self.fc1.bias))

    monkeypatch.setattr(type(made({"mode": "all"}).backbone.blocks[0].mlp), "forward", forward)
    with pytest.raises(ConfigError, match=r"reads the weights of blocks.0.mlp.fc1 past any adapter"):
        made({"mode": "lora", "targets": ["fc1"]})


def test_frozen_random_weights_are_told(base: Path) -> None:
    """Legal, as a baseline, but seldom meant."""
    scenes = {"name": "scenes", "num_images": 16, "size": 16}
    keys = {"data": {"train": [scenes], "num_workers": 0}, "run": {"out": "unused", "length": "2 steps",
            "batch_size": 4, "device": "cpu"}, "optim": {"lr": 0.1, "warmup": "0 steps"}}  # fmt: skip

    def told(tune: dict[str, Any], **start: Any) -> bool:
        task = {"name": "classify", "backbone": VIT, "num_classes": 8, **start}
        return "random weights" in "\n".join(dry_run(validate(Recipe, {"task": task, "tune": tune, **keys})))

    assert told({"mode": "head"})
    assert not told({"mode": "all"})
    assert not told({"mode": "head"}, backbone={**VIT, "weights": str(base)})
    assert not told({"mode": "head"}, init_from=str(base), num_classes=8)


# ------------------------------------------------------------------------------------------------ files


PARTS = [{"mode": "head"}, {"mode": "blocks", "first_block": 2}, {"mode": "lora", "rank": 2}]


@pytest.mark.parametrize("tune", PARTS, ids=str)
@pytest.mark.parametrize("size", [16, 24, (24, 16)], ids=str)
def test_base_and_delta_are_the_whole_model(tune: dict[str, Any], size: Any, base: Path, tmp_path: Path) -> None:
    """Also where the base's positions are resized."""
    task = trained(made(tune, init_from=str(base.parent), image_size=size))
    delta = saved(task, tmp_path / "delta")
    merged = made({**tune, "export": "merged"}, init_from=str(base.parent), image_size=size)
    merged.trainable.load_state_dict(task.trainable.state_dict())
    whole = saved(merged, tmp_path / "whole")
    assert set(load_file(delta / "model.safetensors")) == learning(task)
    one, other = read_model(delta)[0], read_model(whole)[0]
    assert one.keys() == other.keys() == made({"mode": "all"}, image_size=size).trainable.state_dict().keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-7, rtol=0)
    plain = made({"mode": "all"}, image_size=size)
    plain.trainable.load_state_dict(one)
    torch.testing.assert_close(logits(plain), logits(task), atol=1e-6, rtol=1e-5)
    assert "delta" in json.loads((delta / "config.json").read_text())
    assert "delta" not in json.loads((whole / "config.json").read_text())
    model = load_checkpoint(str(delta))
    assert torch.equal(model.state_dict()["backbone.blocks.0.norm1.weight"], one["backbone.blocks.0.norm1.weight"])


def test_without_weights_to_refer_to_all_is_saved(tmp_path: Path) -> None:
    """The frozen part was drawn at random and is nowhere else."""
    task = trained(made({"mode": "lora"}))
    folder = saved(task, tmp_path / "model")
    plain = made({"mode": "all"}, seed=3)
    plain.trainable.load_state_dict(read_model(folder)[0])
    torch.testing.assert_close(logits(plain), logits(task), atol=1e-6, rtol=1e-5)


def test_statistics_of_a_batch_norm_that_learns_are_saved(tmp_path: Path) -> None:
    base = saved(made({"mode": "all"}, batch_norm=True), tmp_path / "base")
    task = made({"mode": "head"}, init_from=str(base), batch_norm=True)
    names = task.trained_part.names
    assert {"classifier.0.running_mean", "classifier.0.running_var", "classifier.0.num_batches_tracked"} <= names
    assert not any(name.startswith("backbone.") for name in names)


def test_a_delta_on_a_delta(base: Path, tmp_path: Path) -> None:
    first = saved(trained(made({"mode": "lora", "rank": 2}, init_from=str(base))), tmp_path / "first")
    second = trained(made({"mode": "head"}, init_from=str(first)))
    plain = made({"mode": "all"})
    plain.trainable.load_state_dict(read_model(saved(second, tmp_path / "second"))[0])
    torch.testing.assert_close(logits(plain), logits(second), atol=1e-6, rtol=1e-5)


def test_a_base_that_is_gone_or_another_is_named(base: Path, tmp_path: Path) -> None:
    delta = saved(trained(made({"mode": "head"}, init_from=str(base))), tmp_path / "delta")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(WeightsError, match=r"delta holds only what was trained on top of .*base.*not there any more"):
        read_model(delta)
    saved(trained(made({"mode": "all"})), base)
    with pytest.raises(WeightsError, match=r"has other weights now \(digest .*write where they are as delta.bases"):
        read_model(delta)
    content = json.loads((delta / "config.json").read_text())
    content["delta"]["bases"][0]["address"] = str(moved)
    (delta / "config.json").write_text(json.dumps(content))
    assert torch.equal(
        read_model(delta)[0]["backbone.cls_token"], load_file(moved / "model.safetensors")["backbone.cls_token"]
    )
