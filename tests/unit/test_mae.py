"""Pre-training whose encoder sees visible patches only: the student, and whole runs of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from e2e.toy import checkpoint, copy_until, differences, recipe, train_in_processes
from openeva.backbones.vit import Config
from openeva.checkpoints.convert import convert
from openeva.checkpoints.files import read_state_dict
from openeva.checkpoints.native import read_native
from openeva.config import ConfigError, validate
from openeva.data.masking import RandomMasking
from openeva.engine.log import read_log
from openeva.engine.optim import param_groups
from openeva.heads.mae_decoder import MaeDecoderConfig, MaeStudent
from openeva.layers.flops import flop_counter
from openeva.models import load_checkpoint
from openeva.tasks.pretrain import Config as TaskConfig
from openeva.tasks.pretrain import PretrainTask
from openeva.train import train

TINY: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 64,
    "qkv_bias": "full", "positions": "sincos",
}  # fmt: skip
DECODER = {"width": 16, "depth": 2, "num_heads": 2, "mlp_hidden": 32}
AS_RECIPE = (
    "task.masking={name: random, ratio: 0.75}",
    "task.decoder={name: mae, width: 16, depth: 1, num_heads: 2, mlp_hidden: 32}",
    "task.backbone.qkv_bias=full",
    "task.backbone.positions=sincos",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENEVA_CACHE", str(tmp_path / "cache"))


def student(predict: int = 12, **changes: Any) -> MaeStudent:
    torch.manual_seed(0)
    backbone = Config(**{**TINY, **changes}).build()
    return MaeDecoderConfig(**DECODER).build(backbone, RandomMasking(ratio=0.75).build(backbone.grid), predict)


def batch(num_images: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, a mask of twelve of sixteen patches in each, and the places of the hidden ones."""
    generator = torch.Generator().manual_seed(1)
    mask_BN = torch.rand(num_images, 16, generator=generator).argsort(dim=1) >= 4
    return torch.randn(num_images, 3, 32, 32, generator=generator), mask_BN, mask_BN.flatten().nonzero()[:, 0]


def gradients(module: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor | None]:
    module.zero_grad()
    module(*inputs).square().mean().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


# ------------------------------------------------------------------------------------------------------------- student


def test_parameters_of_the_papers_student() -> None:
    with torch.device("meta"):
        backbone = Config(variant="eva_l_14").build()
        made = MaeDecoderConfig().build(backbone, RandomMasking(ratio=0.75).build((16, 16)), 1024)
    assert made.num_visible == 64
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == 316_576_768
    assert sum(p.numel() for p in made.decoder.blocks[0].parameters()) == 3_152_384


def test_all_that_learns_gets_a_gradient() -> None:
    """Else replicated training would wait for ever; the encoder's mask token, which nothing uses, is not there."""
    made = student()
    assert [name for name, gradient in gradients(made, *batch()).items() if gradient is None] == []
    assert [name for name in made.state_dict() if "mask_token" in name] == ["decoder.mask_token"]


def test_the_mask_token_decays_and_positions_do_not_learn() -> None:
    made = student()
    groups = param_groups(made.named_parameters(), weight_decay=0.05, no_decay=made.backbone.no_weight_decay())
    decays = {name: group["decays"] for group in groups for name in group["names"]}
    assert decays["decoder.mask_token"]
    assert not decays["backbone.cls_token"]
    assert not decays["decoder.embed.bias"]
    assert not any("pos_embed" in name for name in decays)


def test_hidden_patches_do_not_reach_the_encoder() -> None:
    made = student().eval()
    lengths: list[int] = []
    made.backbone.blocks[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    image, mask_BN, index_M = batch()
    expected = made(image, mask_BN, index_M)
    hidden = mask_BN.unflatten(1, (4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    assert torch.equal(made(image.masked_fill(hidden, 9.0), mask_BN, index_M), expected)
    assert not torch.allclose(made(image.masked_fill(~hidden, 9.0), mask_BN, index_M), expected)
    assert lengths == [1 + 4] * 3


def test_predictions_know_their_place() -> None:
    made = student().eval()
    image, mask_BN, index_M = batch(1)
    every_BNV = made(image, mask_BN, torch.arange(16))
    torch.testing.assert_close(made(image, mask_BN, index_M), every_BNV[index_M])
    assert torch.pdist(every_BNV).min() > 1e-4


def test_activation_checkpointing_changes_nothing() -> None:
    expected = gradients(student(), *batch())
    made = student(activation_checkpointing=True)
    calls: list[bool] = []
    made.decoder.blocks[0].register_forward_pre_hook(lambda module, args: calls.append(True))
    actual = gradients(made, *batch())
    assert len(calls) == 2  # once forwards, once more on the way back
    for name, gradient in expected.items():
        assert gradient is not None
        assert torch.equal(gradient, actual[name]), name  # type: ignore[arg-type]


def test_flops_are_those_of_the_operators() -> None:
    made = student().eval()
    image, mask_BN, index_M = batch(1)
    with flop_counter() as counter, torch.no_grad():
        made(image, mask_BN, index_M)
    assert made.flops(len(index_M)) == counter.get_total_flops()


def test_initial_weights() -> None:
    """Xavier-uniform matrices: bounded by, and as wide as, sqrt(6 / (inputs + outputs)); tokens normal with 0.02."""
    made = student(init="mae")
    matrices = {name: p for name, p in made.named_parameters() if p.ndim > 1 and "token" not in name}
    assert len(matrices) == 1 + 4 * 2 + 1 + 4 * 2 + 1
    for name, weight in matrices.items():
        flat = weight.flatten(1)
        bound = (6 / sum(flat.shape)) ** 0.5
        assert 0.9 * bound < flat.abs().max() <= bound, name
    for name, parameter in made.named_parameters():
        if name.endswith("bias") and "patch_embed" not in name:
            assert not parameter.any(), name
    assert 0.01 < made.decoder.mask_token.std() < 0.03
    assert 0.015 < made.backbone.cls_token.std() < 0.025
    assert made.backbone.cls_token.abs().max() > 0.03  # not cut


def test_blocks_of_both_parts_are_units_of_sharding(tmp_path: Path) -> None:
    task = recipe(tmp_path, *AS_RECIPE).task.build()
    assert task.blocks() == [*task.backbone.blocks, *task.student.decoder.blocks]


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_masks_must_leave_equally_many_patches(tmp_path: Path) -> None:
    content = recipe(tmp_path, *AS_RECIPE).task.model_dump()
    content["masking"] = {"name": "block", "num_masked": 6, "min_block": 2}
    with pytest.raises(ConfigError, match=r"masking block does not ensure that: set masking=\{name: random"):
        validate(TaskConfig, content)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"num_heads": 3}, "width 16 is not a multiple of num_heads 3"),
     ({"width": 18}, "multiple of 4, not 18"), ({"heads": 2}, "heads")],
)  # fmt: skip
def test_sizes_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MaeDecoderConfig(**{**DECODER, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [(["task.backbone={name: timm, model: vit_tiny_patch16_224, weights: random}"], "use a backbone of kind vit"),
     (["task.masking.ratio=0.95"], r"leave no patch visible; lower task.masking.ratio")],
)  # fmt: skip
def test_parts_that_do_not_fit(changes: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(tmp_path, *AS_RECIPE[:2], *changes).task.build()


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = recipe(tmp_path_factory.mktemp("run"), *AS_RECIPE, "evals=[masked_cosine]")
    assert train(made).status == "finished"
    return made.run.out


def test_a_run_learns_and_is_measured_with_its_own_kind_of_mask(run: Path) -> None:
    losses = [record["held_out_loss"] for record in read_log(run) if "held_out_loss" in record]
    assert losses[-1] < losses[0] < 0.5
    assert -1 < losses[-1] < 0  # minus the cosine
    task = recipe(run, *AS_RECIPE).task.build()
    assert task.view_spec(train=False).masking.max_masked == 12
    log = read_log(run)
    assert "masked_cosine" in log[-1] or any("masked_cosine" in record for record in log)


def test_a_stopped_run_continues_exactly(run: Path, tmp_path: Path) -> None:
    train(recipe(copy_until(run, 5, tmp_path), *AS_RECIPE, "evals=[masked_cosine]"))
    found = differences(checkpoint(run, 10), checkpoint(tmp_path, 10))
    assert [name for name in found if "python" not in name] == []  # those numbers check the types of these tests


def test_export_to_the_official_layout_and_back(run: Path, tmp_path: Path) -> None:
    weights, config = read_native(run / "model")
    assert config["task"]["decoder"]["name"] == "mae"
    convert(run / "model", tmp_path / "official.pth", "official")
    official = read_state_dict(tmp_path / "official.pth")
    assert official["mask_token"].shape == (1, 1, 16)
    assert {"decoder_embed.weight", "decoder_pos_embed", "decoder_pred.bias", "pos_embed"} <= set(official)
    convert(tmp_path / "official.pth", tmp_path / "back", "openeva", num_heads=2)
    back, config = read_native(tmp_path / "back")
    assert config["target"]["width"] == 16
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())


def start_from(out: Path, address: Path, *changes: str) -> PretrainTask:
    return recipe(out, *AS_RECIPE, f"task.init_from={address}", *changes).task.build()


def test_another_run_starts_from_its_encoder_and_decoder(run: Path, tmp_path: Path) -> None:
    weights, _ = read_native(run / "model")
    convert(run / "model", tmp_path / "official.pth", "official")
    for address in (run, tmp_path / "official.pth"):
        state = start_from(tmp_path, address).student.state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    larger = start_from(tmp_path, run, "task.backbone.image_size=48")
    assert larger.student.decoder.pos_embed.shape == (1, 37, 16)
    assert torch.equal(larger.student.decoder.embed.weight, weights["decoder.embed.weight"])
    assert "decoder.pos_embed" in larger.load_report.dropped


def test_another_target_or_decoder_needs_a_fresh_one(run: Path, tmp_path: Path) -> None:
    wider = "task.target.teacher.width=24"
    with pytest.raises(ValueError, match=r"predicts 16 channels, but this run's target has 24; set task.init_head"):
        start_from(tmp_path, run, wider)
    task = start_from(tmp_path, run, wider, "task.init_head=false")
    weights, _ = read_native(run / "model")
    assert torch.equal(task.backbone.cls_token, weights["backbone.cls_token"])
    assert not torch.equal(task.student.decoder.embed.weight, weights["decoder.embed.weight"])

    linear = "task.decoder={name: none}"
    with pytest.raises(
        ValueError, match=r"has no head \(only backbone and decoder\), but this run's task.decoder is none"
    ):
        start_from(tmp_path, run, linear)
    task = start_from(tmp_path, run, linear, "task.init_head=false")
    assert torch.equal(task.backbone.cls_token, weights["backbone.cls_token"])
    assert "backbone.mask_token" in task.load_report.fresh


def test_the_trained_encoder_is_a_backbone_for_other_uses(run: Path) -> None:
    weights, _ = read_native(run / "model")
    backbone = load_checkpoint(str(run))
    assert torch.equal(backbone.blocks[1].attn.qkv.bias, weights["backbone.blocks.1.attn.qkv.bias"])
    assert backbone(torch.zeros(1, 3, 32, 32)).patches.shape == (1, 16, 32)


def test_two_processes_are_one(tmp_path: Path) -> None:
    changes = ("run.micro_batch=4", "run.length=4 steps", "run.evaluate_every=4 steps", "optim.ema=null")
    one = train_in_processes(recipe(tmp_path / "one", *AS_RECIPE, *changes), 1)
    for strategy in ("ddp", "fsdp"):
        two = train_in_processes(recipe(tmp_path / strategy, *AS_RECIPE, *changes, f"run.strategy={strategy}"), 2)
        for expected, actual in zip(read_log(one), read_log(two), strict=True):
            for key in {"loss", "grad_norm", "held_out_loss"} & {*expected, *actual}:
                assert actual[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), (strategy, key)
