import pytest
import torch
from torch import nn

from openeva.backbones.vit import Config
from openeva.engine.loop import LoopConfig, set_schedules
from openeva.engine.optim import OptimConfig, adamw, layer_of, param_groups
from openeva.engine.schedule import Schedule
from openeva.tasks.pretrain import MimStudent

TINY = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "num_heads": 2, "mlp_hidden": 32}


def student() -> MimStudent:
    return MimStudent(Config(**TINY, layer_scale=0.1, relative_position="shared").build(), 8)


def test_what_decays() -> None:
    module = student()
    groups = param_groups(module.named_parameters(), weight_decay=0.05, no_decay=module.backbone.no_weight_decay())
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert set(decays) == {name for name, _ in module.named_parameters()}
    assert len(groups) == 2
    for name, parameter in module.named_parameters():
        exempt = parameter.ndim == 1 or name in {"backbone.pos_embed", "backbone.cls_token"}
        assert decays[name] == (0.0 if exempt else 0.05), name
    assert decays["backbone.mask_token"] == 0.05  # as in the official code
    assert decays["backbone.relative_position.relative_position_bias_table"] == 0.05


def test_layer_decay_scales_rate_and_weight_decay_from_the_top() -> None:
    module = student()
    optimizer = adamw(module, OptimConfig(layer_decay=0.5, weight_decay=0.1), no_decay=set(), num_layers=2)
    scales = {}
    for group in optimizer.param_groups:
        scales |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        assert scales[id(parameter)] == 0.5 ** (3 - layer_of(name, 2)), name
    config = LoopConfig(10, Schedule(1.0, 1.0, 10), Schedule(0.2, 0.2, 10), 1)
    assert set_schedules(optimizer, config, 0) == 1.0
    for group in optimizer.param_groups:
        assert group["lr"] == group["lr_scale"]
        assert group["weight_decay"] == (0.2 if group["decays"] else 0.0)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("cls_token", 0), ("backbone.mask_token", 0), ("backbone.patch_embed.proj.bias", 0),
     ("backbone.blocks.0.norm1.weight", 1), ("blocks.11.attn.q_bias", 12), ("backbone.norm.weight", 13),
     ("head.weight", 13),
     ("backbone.relative_position.relative_position_bias_table", 13)],
)  # fmt: skip
def test_layer_numbers(name: str, layer: int) -> None:
    assert layer_of(name, 12) == layer


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    (group,) = param_groups(module.named_parameters(), weight_decay=0.1, no_decay=set())
    assert group["names"] == ["weight"]


def test_adamw_is_decoupled_and_fused() -> None:
    module = nn.Linear(3, 3, bias=False)
    before = module.weight.detach().clone()
    optimizer = adamw(module, OptimConfig(lr=0.1, weight_decay=0.5), no_decay=set(), num_layers=0)
    module.weight.grad = torch.zeros_like(before)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before * (1 - 0.1 * 0.5))
    assert optimizer.defaults["fused"]


def test_schedules_of_the_config() -> None:
    lr, decay = OptimConfig(lr=1.0, min_lr=0.1, weight_decay=0.05, weight_decay_end=0.5).schedules(100, 10)
    assert (lr.at(0), lr.at(9), decay.at(0)) == pytest.approx((0.0, 1.0, 0.05))
    assert decay.at(99) == pytest.approx(0.5, abs=1e-3)
    constant = OptimConfig(weight_decay=0.05).schedules(100, 10)[1]
    assert constant.at(0) == constant.at(99) == 0.05
