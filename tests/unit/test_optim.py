import pytest
import torch
from torch import nn

from openeva.backbones.vit import Config
from openeva.config import ConfigError, load_config
from openeva.engine.lars import Lars
from openeva.engine.loop import LoopConfig, set_schedules
from openeva.engine.optim import OptimConfig, TowerLayout, adamw, build_optimizer, check_towers, layer_of, param_groups
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


# ------------------------------------------------------------------------------------------------------------ towers


class Pair(nn.Module):
    """Two towers of two blocks and a temperature, which stands first, as in a CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.backbone = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        self.backbone.pos_embed = nn.Parameter(torch.ones(1, 2, 2))
        self.text = nn.ModuleDict({"transformer": nn.ModuleDict({"resblocks": nn.ModuleList([nn.Linear(2, 2)])})})
        self.text.positional_embedding = nn.Parameter(torch.ones(2, 2))
        self.projection = nn.Linear(2, 2, bias=False)


TOWERS = {
    "image": TowerLayout("backbone.", 2, frozenset({"pos_embed"}), also=("projection.",)),
    "text": TowerLayout("text.", 1, frozenset({"positional_embedding"})),
}


def settings_after(module: Pair, config: OptimConfig, lr: float = 1.0, weight_decay: float = 1.0) -> dict[str, tuple]:
    """Learning rate and weight decay of each parameter where the schedules are at these values."""
    optimizer = build_optimizer(module, config, no_decay=(), num_layers=0, towers=TOWERS)
    set_schedules(optimizer, LoopConfig(1, Schedule(lr, lr, 1), Schedule(weight_decay, weight_decay, 1), 1), 0)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_each_tower_follows_the_schedules_at_its_own_rates() -> None:
    config = OptimConfig(
        lr=0.5, weight_decay=0.1,
        towers={"image": {"lr": 0.4, "layer_decay": 0.5}, "text": {"lr": 0.05, "weight_decay": 0.2}},
    )  # fmt: skip
    found = settings_after(Pair(), config, lr=0.25, weight_decay=0.05)  # half-way
    assert found["logit_scale"] == (0.25, 0.0)
    assert found["backbone.pos_embed"] == pytest.approx((0.2 * 0.125, 0.0))
    assert found["backbone.blocks.0.weight"] == pytest.approx((0.2 * 0.25, 0.05))
    assert found["backbone.blocks.1.bias"] == pytest.approx((0.2 * 0.5, 0.0))
    assert found["projection.weight"] == pytest.approx((0.2, 0.05))
    assert found["text.positional_embedding"] == pytest.approx((0.025, 0.0))
    assert found["text.transformer.resblocks.0.weight"] == pytest.approx((0.025, 0.1))
    assert len(found) == len(list(Pair().parameters()))


def test_towers_without_settings_have_those_of_the_whole_model() -> None:
    found = settings_after(Pair(), OptimConfig(layer_decay=0.5))
    assert {name: rate for name, (rate, _) in found.items() if "bias" not in name} == {
        "logit_scale": 1.0, "backbone.pos_embed": 0.125, "backbone.blocks.0.weight": 0.25,
        "backbone.blocks.1.weight": 0.5, "projection.weight": 1.0, "text.positional_embedding": 0.25,
        "text.transformer.resblocks.0.weight": 0.5,
    }  # fmt: skip


def test_one_step_moves_each_tower_by_its_rate() -> None:
    module = Pair()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    config = OptimConfig(lr=0.5, weight_decay=0.0, towers={"image": {"lr": 0.0}, "text": {"lr": 0.01}})
    optimizer = build_optimizer(module, config, no_decay=(), num_layers=0, towers=TOWERS)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_schedules(optimizer, LoopConfig(1, Schedule(0.5, 0.5, 1), Schedule(0.0, 0.0, 1), 1), 0)
    optimizer.step()
    for name, parameter in module.named_parameters():
        expected = {"logit": 0.5, "backb": 0.0, "proje": 0.0, "text.": 0.01}[name[:5]]
        moved = (before[name] - parameter.detach()).flatten()
        assert moved.tolist() == pytest.approx([expected] * len(moved), abs=1e-5), name


def test_a_recipe_of_a_clip_reaches_the_optimizer() -> None:
    from openeva.tasks.clip import Config as Clip
    from openeva.train import Recipe

    config = load_config(Recipe, "clip/eva02_clip_b_16").optim
    task = Clip(
        embed_dim=8, backbone={**TINY, "projection": 8}, text={"width": 8, "num_heads": 1, "depth": 2}
    ).build()  # fmt: skip
    optimizer = build_optimizer(task.model, config, no_decay=(), num_layers=0, towers=task.towers)
    assert type(optimizer).__name__ == "Lamb"
    assert {(g["betas"], g["eps"]) for g in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}
    loop = LoopConfig(9000, *config.schedules(9000, 2000), 1)
    set_schedules(optimizer, loop, 999)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in task.model.named_parameters()}
    assert named["logit_scale"] == pytest.approx(2.5e-4)
    assert named["backbone.projection.weight"] == pytest.approx(1e-4)
    assert named["backbone.patch_embed.proj.weight"] == pytest.approx(1e-4 * 0.75**3)
    assert named["text.text_projection"] == pytest.approx(1e-5)
    assert named["text.token_embedding.weight"] == pytest.approx(1e-5 * 0.75**3)


def test_towers_that_are_not_there_are_refused() -> None:
    config = OptimConfig(towers={"image": {"lr": 1e-3}, "text": {"lr": 1e-4}})
    with pytest.raises(ConfigError, match=r"no tower image \(it has none") as error:
        check_towers(config, {})
    assert len(error.value.problems) == 2
    with pytest.raises(ConfigError, match=r"no tower text \(it has image\)"):
        check_towers(config, {"image": TOWERS["image"]})
    check_towers(config, TOWERS)
    with pytest.raises(ConfigError, match="no tower image"):
        build_optimizer(nn.Linear(2, 2), config, no_decay=(), num_layers=0)


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_a_tower_needs_a_schedule_to_follow(key: str) -> None:
    with pytest.raises(ValueError, match=f"towers.text.{key} follows the schedule of {key}"):
        OptimConfig(**{key: 0.0, "towers": {"text": {key: 0.1}}})
    OptimConfig(**{key: 0.0, "towers": {"text": {key: 0.0}}})


def test_layer_decay_of_a_tower_without_known_layers_is_refused() -> None:
    module = nn.ModuleDict({"backbone": nn.Linear(2, 2), "text": nn.Linear(2, 2)})
    config = OptimConfig(towers={"text": {"layer_decay": 0.9}})
    towers = {
        name: TowerLayout(f"{prefix}.", 2, frozenset()) for name, prefix in (("image", "backbone"), ("text",) * 2)
    }
    with pytest.raises(ValueError, match="layer_decay goes by the transformer's own names"):
        build_optimizer(module, config, no_decay=(), num_layers=0, towers=towers)
    module["text"].requires_grad_(False)  # as a frozen tower is
    build_optimizer(module, config, no_decay=(), num_layers=0, towers=towers)
