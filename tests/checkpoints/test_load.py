"""Weights of other sizes, kinds and parts into our model, and the account of it."""

import pytest
import torch
from torch import Tensor, nn

from checkpoints.tiny import DEPTH, HEADS, HIDDEN, PATCH, PREDICT, WIDTH, official, without_index
from openeva.backbones.vit import Config, VisionTransformer
from openeva.checkpoints.detect import infer_vit_config, prediction_width
from openeva.checkpoints.load import LoadReport, load_into
from openeva.checkpoints.official import from_official, to_official
from openeva.tasks.pretrain import MimStudent

KINDS = ["none", "shared", "per_block", "shared_decoupled", "per_block_decoupled"]


def config(**changes) -> Config:
    sizes = {"patch_size": PATCH, "width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_hidden": HIDDEN}
    return Config(**{"image_size": 4 * PATCH, **sizes, **changes})


def student(predict: int = PREDICT, **changes) -> MimStudent:
    return MimStudent(config(**changes).build(), predict)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("relative", KINDS)
@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("qkv_bias", ["qv", "full", "none"])
def test_every_official_tensor_finds_its_place(relative: str, layer_scale: bool, qkv_bias: str) -> None:
    weights = official(relative=relative, layer_scale=layer_scale, qkv_bias=qkv_bias)
    model = student(relative_position=relative, layer_scale=0.1 if layer_scale else None, qkv_bias=qkv_bias)
    report = load_into(model, from_official(weights))
    expected = without_index(weights)
    loaded = to_official(model.state_dict())
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
    assert set(report.used) == set(model.state_dict())
    assert not report.fresh
    assert len(report.dropped) == len(weights) - len(expected)


@pytest.mark.parametrize("relative", KINDS)
def test_the_architecture_is_read_off_the_shapes(relative: str) -> None:
    weights = from_official(official(relative=relative, layer_scale=True, qkv_bias="full"))
    inferred = infer_vit_config(weights, num_heads=None if relative != "none" else HEADS)
    wanted = config(relative_position=relative, layer_scale=1.0, qkv_bias="full")
    assert Config(**inferred) == wanted
    assert prediction_width(weights) == PREDICT


@pytest.mark.parametrize("relative", ["shared", "per_block", "shared_decoupled"])
def test_relative_positions_alone_tell_the_grid(relative: str) -> None:
    weights = from_official(official(grid=5, relative=relative))
    del weights["backbone.pos_embed"]
    assert Config(**infer_vit_config(weights)) == config(
        image_size=5 * PATCH, relative_position=relative, positions="none"
    )
    del weights["backbone.blocks.0.attn.q_bias"]
    assert infer_vit_config(weights)["qkv_bias"] == "none"


def test_heads_of_released_widths() -> None:
    def heads(width: int) -> int:
        shapes = {
            "patch_embed.proj.weight": (width, 3, 14, 14),
            "blocks.0.attn.qkv.weight": (3 * width, width),
            "blocks.0.mlp.fc1.weight": (8, width),
            "pos_embed": (1, 257, width),
        }
        return infer_vit_config({f"backbone.{k}": torch.ones(s) for k, s in shapes.items()})["num_heads"]

    assert heads(1408) == 16
    assert heads(1024) == 16
    assert heads(768) == 12
    with pytest.raises(ValueError, match="pass num_heads"):
        heads(100)


def test_half_precision_files_fill_the_models_own_dtype() -> None:
    model = student()
    load_into(model, from_official(official(dtype=torch.float16)))
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, official(dtype=torch.float16)["lm_head.weight"].float())


def test_another_image_size_and_patch_size() -> None:
    model = student(image_size=6 * 5, patch_size=5)
    report = load_into(model, from_official(official()))
    assert set(report.resized) == {"backbone.pos_embed", "backbone.patch_embed.proj.weight"}
    assert report.resized["backbone.pos_embed"] == "1x17x16 -> 1x37x16 (grid 4x4 -> 6x6)"
    assert "resized: backbone.patch_embed.proj.weight: 16x3x4x4 -> 16x3x5x5 (kernel)" in report.lines()


@pytest.mark.parametrize("kind", ["", "_decoupled"])
def test_shared_relative_positions_into_blocks_of_another_size(kind: str) -> None:
    model = student(image_size=6 * PATCH, relative_position=f"per_block{kind}")
    report = load_into(model, from_official(official(relative=f"shared{kind}")))
    tables = [key for key in report.resized if "relative_position_bias" in key]
    assert len(tables) == DEPTH * (2 if kind else 1)
    assert all("copied from backbone.relative_position." in report.resized[key] for key in tables)
    assert all("grid 4x4 -> 6x6" in report.resized[key] for key in tables)


def test_grids_that_are_not_square() -> None:
    wide = student(image_size=(3 * PATCH, 6 * PATCH))
    source = from_official(official())
    with pytest.raises(ValueError, match="pass grid, that of the model"):
        load_into(wide, source)
    assert load_into(wide, source, grid=(3, 6)).resized["backbone.pos_embed"].endswith("(grid 4x4 -> 3x6)")

    wide = student(image_size=(3 * PATCH, 6 * PATCH), relative_position="shared_decoupled")
    report = load_into(wide, from_official(official(relative="shared_decoupled")), grid=(3, 6))
    assert len(report.resized) == 3
    wide = student(image_size=(3 * PATCH, 6 * PATCH), relative_position="shared")
    report = load_into(wide, from_official(official(relative="shared")), grid=(3, 6))
    assert report.resized["backbone.relative_position.relative_position_bias_table"].endswith("(grid 4x4 -> 3x6)")

    as_many = student(image_size=(2 * PATCH, 8 * PATCH))  # 16 patches as well: nothing may be guessed here
    with pytest.raises(ValueError, match="pass source_grid, that of the weights"):
        load_into(as_many, source, grid=(2, 8))
    stretched = load_into(as_many, source, grid=(2, 8), source_grid=(4, 4))
    assert "grid 4x4 -> 2x8" in stretched.resized["backbone.pos_embed"]
    assert not load_into(as_many, as_many.state_dict(), grid=(2, 8), source_grid=(2, 8)).resized


def test_fixed_positions_of_another_grid_are_computed_not_resized() -> None:
    small, large = (student(image_size=n * PATCH, positions="sincos", qkv_bias="full") for n in (4, 6))
    own = large.backbone.pos_embed.clone()
    report = load_into(large, small.state_dict())
    assert torch.equal(large.backbone.pos_embed, own)
    assert "computes its own" in report.dropped["backbone.pos_embed"]
    learned = from_official(official(qkv_bias="full"))
    with pytest.raises(ValueError, match="set positions: learned"):
        load_into(large, learned)
    assert infer_vit_config(small.state_dict(), num_heads=HEADS)["positions"] == "sincos"


def test_another_teacher_only_where_asked() -> None:
    source = from_official(official())
    model = student(predict=PREDICT + 1)
    before = values(model)
    with pytest.raises(ValueError, match=r"(?s)head\.weight.*12x16 does not fit 13x16.*head\.bias"):
        load_into(model, source)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())  # nothing half-loaded
    report = load_into(model, source, fresh=("head",))
    assert report.fresh == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(model.backbone.cls_token, source["backbone.cls_token"])


def test_the_backbone_alone() -> None:
    model: VisionTransformer = config().build()
    report = load_into(model, from_official(official()), part="backbone")
    assert torch.equal(model.mask_token, official()["mask_token"])
    assert report.dropped["head.weight"] == "not part of the backbone"


def test_a_classifier_cannot_pass_for_a_student() -> None:
    """Its linear layer is no prediction head, even where the shapes agree."""
    source = from_official(official(head="classifier"))
    model = student(predict=5)
    with pytest.raises(ValueError, match=r"(?s)mask_token.*missing.*norm\.weight.*missing.*head\.weight.*missing"):
        load_into(model, source)
    report = load_into(model, source, fresh=("head", "backbone.mask_token", "backbone.norm"))
    assert set(report.dropped) >= {"classifier.weight", "fc_norm.weight"}


def test_everything_unexplained_is_in_one_message() -> None:
    source = from_official(official(relative="shared", layer_scale=True))
    source["backbone.blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    source["backbone.cls_tokem"] = source.pop("backbone.cls_token")
    with pytest.raises(ValueError, match="the weights do not fit the model") as error:
        load_into(student(), source)
    text = str(error.value)
    assert "backbone.blocks.0.mlp.fc1.weight: 3x3 does not fit 40x16" in text
    assert "did you mean 'backbone.cls_token'" in text
    assert "backbone.cls_token 1x1x16 is missing" in text
    assert "backbone.relative_position.relative_position_bias_table 52x2 has no place" in text
    assert "backbone.blocks.1.gamma_2 16 has no place" in text


def test_the_report_groups_blocks() -> None:
    report = LoadReport("w.pt", "official names", used=["a", "b"])
    report.dropped = {f"backbone.blocks.{i}.attn.position_bias.relative_position_index": "index" for i in range(40)}
    report.fresh = ["head.weight"]
    assert report.lines() == [
        "w.pt (official names): 2 tensors used as they are",
        "dropped: backbone.blocks.*.attn.position_bias.relative_position_index (40 tensors): index",
        "fresh: head.weight",
    ]
