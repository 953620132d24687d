"""EVA-02 files: their two layouts, rotary tables, and the same file again."""

from pathlib import Path

import pytest
import torch

from checkpoints.tiny import DEPTH, HEADS, HIDDEN, PREDICT, WIDTH, assert_same, official_eva02
from openeva.backbones.vit import Config
from openeva.checkpoints.convert import convert
from openeva.checkpoints.detect import detect_layout, infer_vit_config, unknown_names
from openeva.checkpoints.files import read_state_dict, write_state_dict
from openeva.checkpoints.load import ROPE_REASON, load_into, read_weights
from openeva.checkpoints.native import save_native
from openeva.checkpoints.official import from_official, rope_buffers, to_official
from openeva.heads.classifier import ImageClassifier
from openeva.heads.mim import MimStudent

FAMILY = pytest.mark.parametrize("sub_norm", [False, True], ids=["tiny", "base"])


@FAMILY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rope", ["all", "old", "none"])
def test_every_official_tensor_finds_its_place(sub_norm: bool, rope: str, dtype: torch.dtype) -> None:
    weights = official_eva02(sub_norm=sub_norm, rope=rope, dtype=dtype)
    ours = from_official(weights)
    assert unknown_names(ours) == []
    assert str(detect_layout(weights)) == "official names, with backbone and head"
    config = Config(**infer_vit_config(ours, num_heads=HEADS))
    student = MimStudent(config.build(), PREDICT)
    report = load_into(student, ours)
    assert report.fresh == []
    assert not report.resized
    assert len(report.used) == len(student.state_dict())
    tables = 0 if rope == "none" else 2 * (1 + DEPTH)
    assert list(report.dropped.values()) == [ROPE_REASON] * tables
    assert sum("rotary table" in line for line in report.lines()) == (4 if tables else 0)

    back = to_official(student.state_dict()) | (rope_buffers(config.model_dump()) if rope == "all" else {})
    expected = {key: tensor.float() for key, tensor in weights.items() if rope == "all" or "rope" not in key}
    if dtype == torch.float16:
        back = {key: tensor.to(dtype).float() for key, tensor in back.items()}
    assert_same(back, expected)


@FAMILY
def test_the_architecture_is_read_off_the_shapes(sub_norm: bool) -> None:
    config = infer_vit_config(from_official(official_eva02(sub_norm=sub_norm, head="classifier")))
    assert config["num_heads"] == HEADS  # by the width of the rotary tables
    assert config["mlp"] == "swiglu"
    assert config["mlp_hidden"] == HIDDEN
    assert config["rope_grid"] == 16
    assert config.get("sub_norm", "none") == ("mlp" if sub_norm else "none")
    assert config["qkv_bias"] == "qv"
    assert not config["final_norm"]
    inner = {
        f"blocks.{i}.attn.inner_attn_ln.{kind}": torch.zeros(WIDTH) for i in range(DEPTH) for kind in ("weight", "bias")
    }
    clip = from_official({**official_eva02(sub_norm=True, rope="none"), **inner})
    assert infer_vit_config(clip, num_heads=HEADS)["sub_norm"] == "mlp_attention"
    assert infer_vit_config(clip, num_heads=HEADS)["rope_grid"] == 16
    assert unknown_names(clip) == []


def test_the_pretraining_grid_is_read_off_the_tables() -> None:
    config = {"rope_grid": 4, "image_size": 28, "patch_size": 4, "width": WIDTH, "num_heads": HEADS, "depth": DEPTH}
    weights = {**official_eva02(sub_norm=False, grid=7, rope="none"), **rope_buffers(config)}
    inferred = infer_vit_config(from_official(weights))
    assert (inferred["rope_grid"], inferred["num_heads"]) == (4, HEADS)


@FAMILY
@pytest.mark.parametrize("rope", ["all", "old"])
@pytest.mark.parametrize("head", ["mim", "classifier"])
def test_there_and_back_is_the_same_file(tmp_path: Path, sub_norm: bool, rope: str, head: str) -> None:
    weights = official_eva02(sub_norm=sub_norm, rope=rope, head=head, dtype=torch.float16)
    write_state_dict(tmp_path / "eva02.pt", weights, "module")
    convert(tmp_path / "eva02.pt", tmp_path / "ours", "openeva")
    convert(tmp_path / "ours", tmp_path / "back" / "eva02.pt", "official")
    assert_same(read_state_dict(tmp_path / "back" / "eva02.pt"), weights)
    assert (tmp_path / "back" / "eva02.pt").read_bytes() == (tmp_path / "eva02.pt").read_bytes()


@FAMILY
def test_a_model_of_ours_gets_the_tables_that_the_official_loader_wants(tmp_path: Path, sub_norm: bool) -> None:
    backbone = {
        "name": "vit",
        "image_size": (8, 12),
        "patch_size": 4,
        "width": WIDTH,
        "num_heads": HEADS,
        "depth": DEPTH,
    }
    backbone |= {"mlp": "swiglu", "mlp_hidden": HIDDEN, "rope_grid": 2, "sub_norm": "mlp" if sub_norm else "none"}
    model = ImageClassifier(Config(**backbone, final_norm=False).build(), 5)
    save_native(tmp_path / "ours", model.state_dict(), {"task": {"name": "classify", "backbone": backbone}})
    convert(tmp_path / "ours", tmp_path / "official.pt", "official")
    weights = read_state_dict(tmp_path / "official.pt")
    assert weights["rope.freqs_cos"].shape == (6, WIDTH // HEADS)
    assert torch.equal(weights["blocks.1.attn.rope.freqs_sin"], weights["rope.freqs_sin"])
    assert ("blocks.0.attn.k_proj.weight" in weights) == sub_norm
    again = read_weights(tmp_path / "official.pt")
    kept = {key: tensor for key, tensor in again.state_dict.items() if "rope" not in key}
    assert_same(kept, model.state_dict())


@FAMILY
def test_another_size(sub_norm: bool) -> None:
    """Positions are resized as official loaders do; rotary positions need nothing from the file."""
    ours = from_official(official_eva02(sub_norm=sub_norm, head="classifier"))
    config = Config(**{**infer_vit_config(ours), "image_size": (24, 28)})
    model = ImageClassifier(config.build(), 5)
    report = load_into(model, ours, grid=config.grid)
    assert list(report.resized) == ["backbone.pos_embed"]
    assert model(torch.zeros(1, 3, 24, 28)).shape == (1, 5)
