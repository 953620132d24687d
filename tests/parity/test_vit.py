"""The transformer against the official code: tokens, predictions, loss and gradients."""

import pytest
import torch

from openeva.backbones.vit import Block, Config, Mlp
from openeva.checkpoints.official import from_official, official_name
from openeva.heads.mim import MimStudent
from openeva.layers.attention import Attention
from openeva.layers.relative_position import axis_indices, joint_index
from openeva.losses.cosine import negative_cosine
from parity.golden import Case, cases
from parity.official_config import vit_config


def config_of(official: dict) -> Config:
    return vit_config(
        official,
        norm_order="post" if official.get("postnorm") or official.get("use_postnorm") else "pre",
        patch_grad_scale=0.1 if official.get("stop_grad_conv1") else 1.0,
    )


def student_of(case: Case, official: dict) -> MimStudent:
    config = config_of(official)
    if case.json["description"].find("post-norm blocks") >= 0:
        config = config.model_copy(update={"norm_order": "post"})
    student = MimStudent(config.build(), official["predict_feature_dim"])
    weights = {name: value for name, value in case.prefix("sd.").items() if not name.endswith("_index")}
    student.load_state_dict(from_official(weights), strict=True)
    return student


@pytest.mark.parametrize("case", cases("mim_model"), ids=str)
def test_student(case: Case) -> None:
    student = student_of(case, case.config).eval()
    image, mask = case.tensors["in.image"], case.tensors["in.mask"]
    index = mask.flatten().nonzero()[:, 0]
    tokens = {}
    student.backbone.norm.register_forward_hook(lambda module, args, out: tokens.update(out=out))
    predicted = student(image, mask, index)
    loss = negative_cosine(predicted, case.tensors["in.target_full"].flatten(0, 1)[index])
    loss.backward()
    case.close(tokens["out"], "out.tokens")
    case.close(predicted, "out.preds")
    case.close(loss, "out.loss")
    parameters = dict(student.named_parameters())
    gradients = from_official(case.prefix("out.grad."))
    assert len(gradients) > 10
    for name in gradients:
        case.close(parameters[name].grad, f"out.grad.{official_name(name)}", "grad_tolerance")
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
    case.close(norm, "out.grad_norm_total", "grad_tolerance")


@pytest.mark.parametrize("case", cases("block_variants"), ids=str)
def test_block(case: Case) -> None:
    config = case.config
    variants = sorted({key.split(".")[1] for key in case.tensors if key.startswith("sd.")})
    for tag in variants:
        weights = case.prefix(f"sd.{tag}.")
        head_width = config["attn_head_dim_case"] if tag.startswith("headdim") else None
        attention = Attention(config["dim"], config["num_heads"], head_width=head_width)
        if tag.startswith("headdim"):
            module = attention
        else:
            module = Block(
                attention,
                Mlp(config["dim"], int(config["dim"] * config["mlp_ratio"])),
                width=config["dim"],
                norm_eps=config["ln_eps"],
                norm_order="post" if tag.startswith("post") else "pre",
                layer_scale=1.0 if "gamma_1" in weights else None,
            )
        module.load_state_dict(weights, strict=True)
        case.close(module(case.tensors["in.x"]), f"out.{tag}")
        if f"out.{tag}_masked" in case.tensors:
            masked = module(case.tensors["in.x"], visible_BS=case.tensors["in.key_mask"])
            case.close(masked, f"out.{tag}_masked")
        if f"out.{tag}_small" in case.tensors:
            case.close(module(case.tensors["in.x_small"]), f"out.{tag}_small")


@pytest.mark.parametrize("case", cases("relpos_index"), ids=str)
def test_relative_position_indices(case: Case) -> None:
    for name, expected in case.tensors.items():
        kind, size = name.removeprefix("out.").rsplit("_", 1)
        grid = tuple(int(n) for n in size.split("x"))
        height, width = axis_indices(grid)
        actual = {"index": joint_index(grid), "decoupled_high": height, "decoupled_width": width}[kind]
        assert torch.equal(actual, expected.long()), name
