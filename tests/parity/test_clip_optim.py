"""Parameter groups, schedule and optimizer steps of EVA-CLIP's training against the official code."""

from typing import Any

import pytest
import torch
from torch import nn

from openeva.checkpoints.clip import to_clip
from openeva.engine.lamb import Lamb, Rule
from openeva.engine.loop import LoopConfig, set_schedules
from openeva.engine.optim import OptimConfig, tower_groups
from openeva.tasks.clip import Config as Clip
from parity.golden import Case, cases


def clip_config(official: dict[str, Any]) -> Clip:
    """The configuration of a CLIP, in the official code's words, as ours."""
    vision, text = official["vision_cfg"], official["text_cfg"]
    eva02 = vision.get("rope", False)
    backbone = {
        "image_size": vision["image_size"], "patch_size": vision["patch_size"], "width": vision["width"],
        "depth": vision["layers"], "num_heads": vision["width"] // vision["head_width"],
        "mlp_hidden": int(vision["width"] * vision["mlp_ratio"]), "mlp": "swiglu" if eva02 else "gelu",
        "sub_norm": "mlp_attention" if eva02 else "none", "rope_grid": vision["pt_hw_seq_len"] if eva02 else None,
        "norm_order": "post" if vision.get("postnorm") else "pre",
    }  # fmt: skip
    towers = {"width": text["width"], "num_heads": text["heads"], "depth": text["layers"]}
    sizes = {"context_length": text["context_length"], "vocab_size": text["vocab_size"]}
    return Clip(embed_dim=official["embed_dim"], backbone=backbone, text=towers | sizes)


def optim_config(args: dict[str, float]) -> OptimConfig:
    own = {
        tower: {"lr": args[f"{key}_lr"], "layer_decay": args[f"{key}_ld"], "weight_decay": args[f"{key}_wd"]}
        for tower, key in (("image", "visual"), ("text", "text"))
    }
    return OptimConfig(lr=args["lr"], weight_decay=args["wd"], layer_decay=args["ld"], towers=own)


@pytest.mark.parametrize("case", cases("clip_param_groups"), ids=str)
def test_parameter_groups(case: Case) -> None:
    for name, official in case.json["models"].items():
        args = official["args"]
        task = clip_config(official["config"]).build()
        official_names = {name: [] for name, _ in task.model.named_parameters()}  # of what is cut in several there
        numbered = {ours: torch.full_like(p.data, i) for i, (ours, p) in enumerate(task.model.named_parameters())}
        for theirs, tensor in to_clip(numbered).items():
            official_names[list(numbered)[int(tensor.flatten()[0])]].append(theirs)
        config = optim_config(args)
        groups = tower_groups(task.model.named_parameters(), config, task.towers)
        assert len(groups) == len(official["groups"]), name
        for group, expected in zip(groups, official["groups"], strict=True):  # the same order
            where = f"{name}, group {expected['order']}"
            found = [theirs for ours in group["names"] for theirs in official_names[ours]]
            assert sorted(found) == sorted(expected["params"]), where
            rate = expected["lr_scale"] * expected["base_lr"]
            assert group["lr_scale"] * config.lr == pytest.approx(rate, rel=1e-12), where
            assert group["weight_decay"] == pytest.approx(expected["weight_decay"], rel=1e-12), where


@pytest.mark.parametrize("case", cases("clip_lr_schedule"), ids=str)
def test_rates_of_each_tower_at_each_step(case: Case) -> None:
    config, total = case.config, case.config["total_steps"]
    optim = OptimConfig(lr=config["lr"], min_lr=0.0, warmup_from="first_step")
    lr, weight_decay = optim.schedules(total, config["warmup"])
    loop = LoopConfig(total, lr, weight_decay, samples_per_step=1)
    base = {"visual": config["visual_lr"], "text": config["text_lr"], "other": config["lr"]}
    scales = [group["lr_scale"] * base[group["group"]] / config["lr"] for group in config["groups"]]
    optimizer = Lamb([{"params": [nn.Parameter(torch.ones(1))], "lr_scale": s, "decays": False} for s in scales], lr=0)
    for step, expected in enumerate(case.json["lr_by_step"]):
        set_schedules(optimizer, loop, step)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize("case", cases("lamb_deepspeed"), ids=str)
def test_lamb_of_the_released_models(case: Case) -> None:
    check_lamb("deepspeed", case)


@pytest.mark.parametrize("case", cases("lamb_nvlamb"), ids=str)
def test_the_other_lamb(case: Case) -> None:
    check_lamb("nvlamb", case)


def check_lamb(rule: Rule, case: Case) -> None:
    config = case.config
    names = [group["name"] for group in config["groups"]]
    weights = {name: nn.Parameter(case.tensors[f"in.p0.{name}"].clone()) for name in names}
    optimizer = Lamb(
        [
            {"params": [weights[group["name"]]], "lr": group["lr"], "weight_decay": group["weight_decay"]}
            for group in config["groups"]
        ],
        lr=0.0, betas=tuple(config["betas"]), eps=config["eps"], rule=rule,
    )  # fmt: skip
    steps = sum(key.startswith("in.grad") for key in case.tensors) // len(names)
    assert steps > 2
    for step in range(steps):
        for name, weight in weights.items():
            weight.grad = case.tensors[f"in.grad{step}.{name}"].clone()
        if clip := config.get("max_grad_norm"):  # inside the official optimizer; in our loop before it
            torch.nn.utils.clip_grad_norm_(weights.values(), clip)
        optimizer.step()
        for name, weight in weights.items():
            case.close(weight, f"out.p{step + 1}.{name}")
    for moment in ("exp_avg", "exp_avg_sq"):  # after the last step
        for name in case.prefix(f"out.{moment}."):
            case.close(optimizer.state[weights[name]][moment], f"out.{moment}.{name}")
