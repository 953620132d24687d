"""EVA-CLIP against the official code: both towers, logits, patch dropout, and the image tower as a teacher."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import openeva
from checkpoints.test_lossless import assert_same_content, load
from openeva.backbones.vit import Config
from openeva.checkpoints.convert import convert
from openeva.checkpoints.load import read_weights
from openeva.checkpoints.official import rope_buffers
from openeva.heads.clip import ClipModel
from parity.golden import Case, cases


def heads_of(case: Case) -> dict[str, int]:
    """What no shape tells."""
    vision, text = case.config["vision_cfg"], case.config["text_cfg"]
    return {"num_heads": vision["width"] // vision["head_width"], "text_heads": text["heads"]}


def file_of(case: Case, folder: Path) -> Path:
    torch.save({"model": case.prefix("sd.")}, folder / "clip.pt")
    return folder / "clip.pt"


def model_of(case: Case, folder: Path) -> ClipModel:
    """The official file, read by the public function; all but heads and the order of norms is told by it."""
    heads = heads_of(case)
    overrides: dict[str, Any] = {"num_heads": heads["num_heads"], "text": {"num_heads": heads["text_heads"]}}
    if case.config["vision_cfg"].get("postnorm"):
        overrides["norm_order"] = "post"
    model = openeva.load_checkpoint(str(file_of(case, folder)), **overrides)
    assert isinstance(model, ClipModel)
    return model


def trace(model: ClipModel, image_BCYX: Tensor, text_BL: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    parts: dict[str, Any] = {"visual_block0": model.backbone.blocks[0], "visual_last_block": model.backbone.blocks[-1]}
    parts |= {"visual_normed": model.backbone.norm, "text_last_block": model.text.transformer}
    hooks = [
        part.register_forward_hook(lambda _, __, out, n=name: seen.update({n: out})) for name, part in parts.items()
    ]
    seen["image_features"], seen["text_features"] = model.encode_image(image_BCYX), model.encode_text(text_BL)
    for hook in hooks:
        hook.remove()
    seen["visual_all_tokens_no_final_norm"] = seen["visual_last_block"]
    seen["visual_cls_prehead"] = seen["visual_normed"][:, 0]
    seen["text_all_tokens_ln_final"] = model.text.ln_final(seen["text_last_block"])
    end_B = text_BL.argmax(dim=1)
    seen["text_prehead"] = seen["text_all_tokens_ln_final"][torch.arange(len(text_BL)), end_B]
    return seen


@pytest.mark.parametrize("case", cases("clip_model"), ids=str)
def test_both_towers(case: Case, tmp_path: Path) -> None:
    model = model_of(case, tmp_path)
    image_BCYX, text_BL = case.tensors["in.image"], case.tensors["in.text"].long()
    expected = {name.removeprefix("out."): name for name in case.tensors if name.startswith("out.")}
    with torch.no_grad():
        for name, value in trace(model, image_BCYX, text_BL).items():
            if name in expected:
                case.close(value, expected.pop(name))
        of_some = re.search(r"\blogits_per_image(_b(\d+))", " ".join(expected))  # computed for the first rows only
        rows = int(of_some[2]) if of_some else len(image_BCYX)
        image_BE, text_BE, scale, bias = model(image_BCYX[:rows], text_BL[:rows])
        assert bias is None
        outputs = {"image_features_norm": image_BE, "text_features_norm": text_BE, "logit_scale_exp": scale}
        outputs["logits_per_image"] = scale * image_BE @ text_BE.T
        for name, value in outputs.items():
            case.close(value, expected.pop(name if name in expected or of_some is None else name + of_some[1]))
        if "image_features_patch_dropout" in expected:
            kept_BM = case.tensors["in.patch_keep_indices"].long()
            features = model.backbone.forward_visible(image_BCYX[: len(kept_BM)], kept_BM)
            case.close(features.pooled, expected.pop("image_features_patch_dropout"))
    assert not expected  # every output of the case was compared


@pytest.mark.parametrize("case", cases("clip_model"), ids=str)
def test_the_config_is_read_off_the_file(case: Case, tmp_path: Path) -> None:
    vision, text, heads = case.config["vision_cfg"], case.config["text_cfg"], heads_of(case)
    model = model_of(case, tmp_path)
    assert (model.config.embed_dim, model.backbone.image_size) == (
        case.config["embed_dim"],
        (vision["image_size"],) * 2,
    )
    ours = model.config.backbone
    hidden = int(vision["width"] * vision["mlp_ratio"])
    assert (ours.width, ours.depth, ours.mlp_hidden) == (vision["width"], vision["layers"], hidden)
    assert ours.num_heads == heads["num_heads"]
    assert ours.rope_grid == (vision["pt_hw_seq_len"] if vision.get("rope") else None)
    assert ours.sub_norm == ("mlp_attention" if vision.get("subln") else "none")
    assert ours.mlp == ("swiglu" if vision.get("naiveswiglu") else "gelu")
    names = {"context_length": "context_length", "vocab_size": "vocab_size", "width": "width", "depth": "layers"}
    assert all(getattr(model.config.text, key) == text[other] for key, other in names.items())


@pytest.mark.parametrize("case", cases("clip_model"), ids=str)
def test_the_official_file_comes_back(case: Case, tmp_path: Path) -> None:
    source = file_of(case, tmp_path)
    convert(source, tmp_path / "ours", "openeva", **heads_of(case))
    convert(tmp_path / "ours", tmp_path / "back.pt", "official")
    assert_same_content(load(tmp_path / "back.pt"), load(source))
    convert(tmp_path / "ours", tmp_path / "half.pt", "official", dtype="fp16")  # no memory of the file: written anew
    again = load(tmp_path / "half.pt")["model"]
    official = {key.replace("text.logit_scale", "logit_scale"): tensor for key, tensor in case.prefix("sd.").items()}
    assert set(again) == set(official)
    assert {key: tensor.shape for key, tensor in again.items()} == {key: t.shape for key, t in official.items()}
    tables = rope_buffers(read_weights(tmp_path / "ours").config["task"]["backbone"])
    assert {f"visual.{name}" for name in tables} == {key for key in official if "rope" in key}


@pytest.mark.parametrize("case", cases("eva02_teacher_features"), ids=str)
@pytest.mark.parametrize("kind", ["official file", "model folder"])
def test_an_official_file_is_a_teacher(case: Case, kind: str, tmp_path: Path) -> None:
    """As `teacher: {name: vit, weights: eva_clip_psz14.pt}` of a recipe has it."""
    path = file_of(case, tmp_path)
    num_heads = heads_of(case)["num_heads"]
    if kind == "model folder":
        convert(path, tmp_path / "ours", "openeva", num_heads=num_heads)
        teacher = Config(weights=str(tmp_path / "ours")).build().eval()
    else:
        teacher = Config(weights=str(path), num_heads=num_heads).build().eval()
    assert teacher.width == case.config["embed_dim"]
    with torch.no_grad():
        features = teacher(case.tensors["in.image"])
    case.close(features.patches, "out.teacher_patch_features")
    assert features.pooled is features.cls
