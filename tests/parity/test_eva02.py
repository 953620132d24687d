"""EVA-02 against the official code: rotary tables, students, classifiers at two sizes, conversion to patch 16."""

import math
import re
from typing import Any

import pytest
import torch

from openeva.backbones.vit import Config
from openeva.checkpoints.detect import infer_vit_config
from openeva.checkpoints.load import load_into
from openeva.checkpoints.official import from_official, rope_buffers, to_official
from openeva.checkpoints.resize import resize_patch_kernel, resize_position_embedding, square_grid
from openeva.heads.classifier import ImageClassifier
from openeva.heads.mim import MimStudent
from openeva.layers.rope import rope_table, rotate
from openeva.losses.cosine import negative_cosine
from parity.golden import Case, cases


def config_of(official: dict[str, Any], image_size: int, **changes: Any) -> Config:
    grid = official["img_size"] // official["patch_size"]
    config = {
        "image_size": image_size,
        "patch_size": official["patch_size"],
        "width": official["embed_dim"],
        "depth": official["depth"],
        "num_heads": official["num_heads"],
        "mlp": "swiglu" if official.get("swiglu") or official.get("naiveswiglu") else "gelu",
        "mlp_hidden": int(official["embed_dim"] * official["mlp_ratio"]),
        "sub_norm": "mlp" if official.get("subln") else "none",
        "qkv_bias": "qv" if official["qkv_bias"] else "none",
        "rope_grid": official.get("pt_hw_seq_len", grid) if official.get("rope") else None,
        "layer_scale": official.get("init_values") or None,
        "patch_grad_scale": 0.1 if official.get("stop_grad_conv1") else 1.0,
        **changes,
    }
    return Config(**config)


@pytest.mark.parametrize("case", cases("rope_tables"), ids=str)
def test_rotary_tables_and_rotation(case: Case) -> None:
    for table in case.config["tables"]:
        index, head_width = table["index"], table["head_dim"]
        side = table["ft_seq_len"] or table["pt_seq_len"]
        rope_SP2 = rope_table((side, side), head_width, table["pt_seq_len"])
        every = re.search(r"every (\d+)", table["rows"])
        rows_NK2 = rope_SP2[1 :: int(every[1]) if every else 1].repeat_interleave(2, dim=1)
        case.close(rows_NK2[..., 0], f"out.cos{index}")
        case.close(rows_NK2[..., 1], f"out.sin{index}")
        if f"in.x{index}" in case.tensors:
            x_BSHK = torch.nn.functional.pad(case.tensors[f"in.x{index}"], (0, 0, 1, 0)).transpose(1, 2)
            case.close(rotate(x_BSHK, rope_SP2)[:, 1:].transpose(1, 2), f"out.rotated{index}")


@pytest.mark.parametrize("case", cases("eva02_mim_model"), ids=str)
def test_student(case: Case) -> None:
    official, weights = case.config, case.prefix("sd.")
    config = config_of(official, official["img_size"])
    student = MimStudent(config.build(), official["predict_feature_dim"]).eval()
    assert not load_into(student, from_official(weights)).fresh
    for name, table in rope_buffers(config.model_dump()).items():
        case.close(table, f"sd.{name}")

    mask_BN = case.tensors["in.bool_masked_pos"].bool()
    index_M = mask_BN.flatten().nonzero()[:, 0]
    tokens = {}
    student.backbone.norm.register_forward_hook(lambda module, args, out: tokens.update(out=out))
    predicted_MV = student(case.tensors["in.image"], mask_BN, index_M)
    target_MV = case.tensors["in.teacher_features"].flatten(0, 1)[index_M]
    loss = negative_cosine(predicted_MV, target_MV)
    case.close(tokens["out"], "out.normed_tokens")
    case.close(predicted_MV, "out.pred_masked")
    case.close(target_MV, "out.target_masked")
    case.close(loss, "out.loss")
    loss.backward()
    gradients = to_official({name: parameter.grad for name, parameter in student.named_parameters()})
    expected = case.prefix("out.grad.")
    assert len(expected) > 10
    for name in expected:
        case.close(
            gradients[name], f"out.grad.{name}", "grad_tolerance" if "grad_tolerance" in case.json else "tolerance"
        )


@pytest.mark.parametrize("case", cases("eva02_mim_model") + cases("eva02_classifier"), ids=str)
def test_the_architecture_is_read_off_the_file(case: Case) -> None:
    official = case.config
    inferred = Config(**infer_vit_config(from_official(case.prefix("sd."))))
    expected = config_of(official, official["img_size"])
    for key in ("image_size", "width", "depth", "num_heads", "mlp", "mlp_hidden", "sub_norm", "qkv_bias", "rope_grid"):
        assert getattr(inferred, key) == getattr(expected, key), key


def classifier_of(case: Case, image_size: int, **changes: Any) -> ImageClassifier:
    official = case.config
    mean = official["use_mean_pooling"]
    config = config_of(official, image_size, final_norm=not mean, **changes)
    model = ImageClassifier(config.build(), official["num_classes"], pooling="mean" if mean else "cls").eval()
    assert not load_into(model, from_official(case.prefix("sd."))).fresh
    return model


@pytest.mark.parametrize("case", cases("eva02_classifier"), ids=str)
def test_classifier(case: Case) -> None:
    model = classifier_of(case, case.config["img_size"])
    image_BCYX = case.tensors["in.image"]
    case.close(model(image_BCYX), "out.logits")
    case.close(model.pool(image_BCYX), "out.features")
    case.close(model.patches(image_BCYX), "out.patch_tokens")


@pytest.mark.parametrize("case", cases("eva02_classifier"), ids=str)
def test_classifier_at_a_larger_size(case: Case) -> None:
    """Adapted once on loading, or for every image."""
    large = case.config["img_size_big"]
    model = classifier_of(case, large)
    case.close(model.backbone.pos_embed, "out.pos_embed_big")
    case.close(model(case.tensors["in.image_big"]), "out.logits_big")
    tables = rope_buffers(model.backbone.config.model_dump())
    case.close(tables["rope.freqs_cos"], "out.rope_cos_big")
    case.close(tables["rope.freqs_sin"], "out.rope_sin_big")
    dynamic = classifier_of(case, case.config["img_size"], dynamic_size=True)
    case.close(dynamic(case.tensors["in.image_big"]), "out.logits_big")


@pytest.mark.parametrize("case", cases("patch_interpolation"), ids=str)
def test_another_patch_size(case: Case) -> None:
    kernel_DCYX, pos_1SD = case.tensors["in.patch_embed.proj.weight"], case.tensors["in.pos_embed"]
    patch_size = case.tensors["out.patch_embed.proj.weight"].shape[-1]
    case.close(resize_patch_kernel(kernel_DCYX, patch_size), "out.patch_embed.proj.weight")
    grid_from = square_grid(pos_1SD.shape[1] - 1)
    assert grid_from is not None
    assert math.prod(grid_from) == pos_1SD.shape[1] - 1
    side = case.config["new_grid"]
    case.close(resize_position_embedding(pos_1SD, grid_from, (side, side)), "out.pos_embed")
