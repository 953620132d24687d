import pytest
import torch
from torch import nn

from openeva.backbones.vit import Config
from openeva.engine.lars import Lars
from openeva.engine.loop import LoopConfig, set_schedules
from openeva.engine.optim import OptimConfig, adamw, build_optimizer, layer_of, param_groups
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
     ("head.weight", 13), ("fc_norm.weight", 13), ("classifier.weight", 13), ("classifier.1.bias", 13),
     ("attention_pool.query", 13),
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


def test_lars_scales_steps_by_the_norms_of_weight_and_gradient() -> None:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 0, 0], [0, 4.0, 0]]))  # norm 5
        module.bias.zero_()
    config = OptimConfig(name="lars", lr=1.0, momentum=0.5, trust_coefficient=0.1, weight_decay=0.0)
    optimizer = build_optimizer(module, config, no_decay=set(), num_layers=0)
    assert isinstance(optimizer, Lars)
    before = module.weight.detach().clone()
    gradient = torch.tensor([[0.0, 0, 2.0], [0, 0, 0]])
    for gradient_scale in (1.0, 100.0):  # the length of the gradient does not matter
        module.weight.grad, module.bias.grad = gradient_scale * gradient, torch.ones(2)
        optimizer.step()
    first, norm = 0.1 * 5, (25 + 0.25) ** 0.5
    expected = before.clone()
    expected[0, 2] = -first - (0.5 * first + 0.1 * norm)
    torch.testing.assert_close(module.weight.detach(), expected)
    torch.testing.assert_close(module.bias.detach(), torch.full((2,), -2.5))  # momentum only: 1, then 1.5


def test_lars_skips_a_bad_step_whole() -> None:
    module = nn.Linear(3, 2)
    optimizer = Lars(module.parameters(), lr=1.0, weight_decay=0.1)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    weights = [p.detach().clone() for p in module.parameters()]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for parameter, weight, momentum in zip(module.parameters(), weights, momenta, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum)


def test_a_model_of_which_nothing_learns_is_refused() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing learns"):
        adamw(module, OptimConfig(), no_decay=set(), num_layers=0)


def test_layer_decay_is_refused_where_layers_are_not_known() -> None:
    module = nn.ModuleDict({"backbone": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="layer_decay goes by the transformer's own names"):
        adamw(module, OptimConfig(layer_decay=0.9), no_decay=set(), num_layers=4)
    module["backbone"].requires_grad_(False)  # then there is nothing to scale
    adamw(module, OptimConfig(layer_decay=0.9), no_decay=set(), num_layers=4)
