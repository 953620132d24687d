"""Every layout to every other, on tiny files."""

import json
from pathlib import Path

import pytest
import torch

from checkpoints.tiny import HEADS, PATCH, PREDICT, assert_same, official, without_index
from openeva.backbones.vit import Config
from openeva.checkpoints.convert import convert
from openeva.checkpoints.detect import detect_layout, to_openeva
from openeva.checkpoints.files import read_state_dict, write_state_dict
from openeva.checkpoints.load import load_into, read_weights
from openeva.checkpoints.native import CONFIG_FILE, WEIGHTS_FILE, read_native, save_native
from openeva.checkpoints.official import from_official
from openeva.tasks.pretrain import MimStudent

KINDS = ["none", "shared", "per_block", "shared_decoupled", "per_block_decoupled"]


@pytest.mark.parametrize("wrapper", ["model", "module", "bare", "safetensors"])
@pytest.mark.parametrize("relative", KINDS)
def test_official_to_openeva_and_back_keeps_every_bit(tmp_path: Path, wrapper: str, relative: str) -> None:
    weights = official(relative=relative, layer_scale=relative != "none", dtype=torch.float16)
    name = "eva.safetensors" if wrapper == "safetensors" else "eva.pt"
    source, back = tmp_path / name, tmp_path / "back" / name
    write_state_dict(source, weights, "model" if wrapper == "safetensors" else wrapper)
    report = convert(source, tmp_path / "ours", "openeva", num_heads=HEADS)
    assert set(report.kept) == set(weights) - set(without_index(weights))
    assert len(report.used) + len(report.kept) == len(weights)
    assert not report.fresh
    convert(tmp_path / "ours", back, "official")
    assert back.read_bytes() == source.read_bytes()
    convert(tmp_path / "ours", tmp_path / "plain.pt", "official", wrapper="module")
    assert_same(torch.load(tmp_path / "plain.pt")["module"], without_index(weights))


def test_an_openeva_folder_describes_its_model(tmp_path: Path) -> None:
    write_state_dict(tmp_path / "eva.pt", official(relative="shared"))
    convert(tmp_path / "eva.pt", tmp_path / "ours", "openeva")
    weights = read_weights(tmp_path / "ours")
    assert weights.layout.names == "openeva"
    assert weights.grid == (4, 4)
    task = weights.config["task"]
    assert weights.config["target"]["width"] == PREDICT
    assert {"openeva", "torch", "python"} <= set(weights.config["versions"])
    student = MimStudent(Config(**task["backbone"]).build(), PREDICT)
    assert not load_into(student, weights).fresh


def test_an_openeva_folder_keeps_its_own_config(tmp_path: Path) -> None:
    backbone = {"name": "vit", "image_size": 16, "patch_size": 4, "norm_order": "post", "num_heads": HEADS}
    config = {"task": {"name": "pretrain", "backbone": backbone}, "target": {"identity": "clip", "width": PREDICT}}
    save_native(tmp_path / "a", from_official(official()), config)
    convert(tmp_path / "a", tmp_path / "b", "openeva", grid=(6, 6), num_heads=HEADS)
    _, kept = read_native(tmp_path / "b")
    assert kept["task"]["backbone"] == {**backbone, "image_size": 24}
    assert kept["target"] == config["target"]


@pytest.mark.parametrize("qkv_bias", ["qv", "full"])
@pytest.mark.parametrize("layer_scale", [False, True])
def test_openeva_to_timm_and_back(tmp_path: Path, qkv_bias: str, layer_scale: bool) -> None:
    weights = from_official(official(qkv_bias=qkv_bias, layer_scale=layer_scale))
    config = {"task": {"name": "pretrain", "backbone": {"image_size": 16, "patch_size": 4}}}
    save_native(tmp_path / "ours", weights, config)
    report = convert(tmp_path / "ours", tmp_path / "timm.safetensors", "timm")
    assert set(report.dropped) == {"backbone.mask_token", "head.weight", "head.bias"}
    renamed = read_state_dict(tmp_path / "timm.safetensors")
    assert detect_layout(renamed).names == ("timm" if layer_scale and qkv_bias == "full" else "official")
    assert_same(to_openeva(renamed), {key: tensor for key, tensor in weights.items() if key not in report.dropped})


def test_a_classifier_keeps_its_head_everywhere(tmp_path: Path) -> None:
    weights = official(head="classifier")
    write_state_dict(tmp_path / "a.pt", weights)
    convert(tmp_path / "a.pt", tmp_path / "timm.pt", "timm")
    assert_same(read_state_dict(tmp_path / "timm.pt"), weights)
    convert(tmp_path / "a.pt", tmp_path / "ours", "openeva", num_heads=HEADS)
    convert(tmp_path / "ours", tmp_path / "b.pt", "official")
    assert_same(read_state_dict(tmp_path / "b.pt"), weights)


def test_mae_style_weights_keep_their_decoder(tmp_path: Path) -> None:
    weights = official(qkv_bias="full", head="none")
    decoder = ("decoder_embed.weight", "decoder_blocks.0.norm1.weight", "decoder_pred.bias", "decoder_pos_embed")
    weights |= {key: torch.randn(3, 3) for key in decoder}
    weights["mask_token"] = torch.randn(1, 1, 7)  # of the decoder's width
    write_state_dict(tmp_path / "a.pt", weights)
    assert "decoder" in read_weights(tmp_path / "a.pt").layout.parts
    report = convert(tmp_path / "a.pt", tmp_path / "timm.pt", "timm")
    assert "decoder.mask_token" in report.dropped
    convert(tmp_path / "a.pt", tmp_path / "b.pt", "official")
    assert_same(read_state_dict(tmp_path / "b.pt"), weights)


def test_resizing_on_the_way(tmp_path: Path) -> None:
    """The offline patch 14 -> 16 conversion: kernel in fp32, positions in the file's dtype."""
    write_state_dict(tmp_path / "a.pt", official(relative="shared", dtype=torch.float16))
    report = convert(tmp_path / "a.pt", tmp_path / "b.pt", "official", patch_size=PATCH + 2, grid=(6, 6))
    result = read_state_dict(tmp_path / "b.pt")
    assert result["patch_embed.proj.weight"].shape[-1] == PATCH + 2
    assert result["patch_embed.proj.weight"].dtype == torch.float32
    assert result["pos_embed"].shape[1] == 37
    assert result["pos_embed"].dtype == torch.float16
    assert result["rel_pos_bias.relative_position_bias_table"].shape[0] == 11 * 11 + 3
    assert len(report.resized) == 3
    convert(tmp_path / "a.pt", tmp_path / "c.pt", "official", dtype="fp32")
    assert {tensor.dtype for tensor in read_state_dict(tmp_path / "c.pt").values()} == {torch.float32}


def test_what_timm_cannot_express_is_an_error(tmp_path: Path) -> None:
    write_state_dict(tmp_path / "a.pt", official(relative="per_block"))
    with pytest.raises(ValueError, match=r"no relative position bias.*convert to 'official'"):
        convert(tmp_path / "a.pt", tmp_path / "b.pt", "timm")
    assert not (tmp_path / "b.pt").exists()


def test_unknown_names_are_all_named(tmp_path: Path) -> None:
    weights = {**official(), "blocks.0.attn.rope.freqs": torch.zeros(2), "extra": torch.zeros(2)}
    write_state_dict(tmp_path / "a.pt", weights)
    with pytest.raises(ValueError, match=r"(?s)a\.pt: no known model.*rope\.freqs.*extra"):
        convert(tmp_path / "a.pt", tmp_path / "b.pt", "official")


def test_another_kind_of_network(tmp_path: Path) -> None:
    write_state_dict(tmp_path / "a.pt", {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"a\.pt: not a vision transformer in a known layout.*conv1\.weight"):
        read_weights(tmp_path / "a.pt")


def test_a_native_folder_round_trip(tmp_path: Path) -> None:
    weights = from_official(official(dtype=torch.bfloat16))
    save_native(tmp_path / "m", weights, {"task": {"name": "pretrain"}, "step": 7})
    state_dict, config = read_native(tmp_path / "m")
    assert_same(state_dict, weights)
    assert config["format"] == "openeva/1"
    assert config["step"] == 7
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_a_native_folder_that_is_not_whole(tmp_path: Path) -> None:
    weights = from_official(official())
    for name in ("a", "b"):
        save_native(tmp_path / name, weights, {"step": 1})
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        read_native(tmp_path)
    config = tmp_path / "a" / CONFIG_FILE
    config.write_text((tmp_path / "b" / CONFIG_FILE).read_text())
    with pytest.raises(ValueError, match="from different saves"):
        read_native(tmp_path / "a")
    config.write_text(json.dumps({"format": "openeva/9"}))
    with pytest.raises(ValueError, match=r"format 'openeva/9', but this version reads 'openeva/1'"):
        read_native(tmp_path / "a")
    config.write_text('{"format": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        read_native(tmp_path / "a")
    with pytest.raises(ValueError, match="plain finite JSON values"):
        save_native(tmp_path / "c", weights, {"step": torch.zeros(1)})
    assert not (tmp_path / "c").exists()
