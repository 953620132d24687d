"""EVA-CLIP's tower as a teacher, as open_clip builds it: final norm and projection on every patch token."""

import functools
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from openeva.backbones.open_clip import Config
from parity.golden import Case, cases

PUBLISHED = "EVA01-g-14"
"""The published teacher; what a case does not say is taken from open_clip's description of it."""


@pytest.fixture
def of_the_cases_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def make(case: Case) -> str:
        vision = case.config["vision_cfg"]
        create = functools.partial(
            timm.create_model, img_size=vision["image_size"], patch_size=vision["patch_size"], depth=vision["layers"],
            embed_dim=vision["width"], num_heads=vision["width"] // vision["head_width"], mlp_ratio=vision["mlp_ratio"],
        )  # fmt: skip
        monkeypatch.setattr(timm, "create_model", create)
        published = open_clip.get_model_config(PUBLISHED)
        published["vision_cfg"]["image_size"] = vision["image_size"]
        content = {**published, "embed_dim": case.config["embed_dim"], "text_cfg": case.config["text_cfg"]}
        (tmp_path / "small-eva-clip.json").write_text(json.dumps(content))
        open_clip.add_model_config(tmp_path)
        return "small-eva-clip"

    yield make
    open_clip.factory._MODEL_CONFIGS.pop("small-eva-clip", None)


@pytest.mark.parametrize("case", cases("eva02_teacher_features"), ids=str)
def test_patches_of_official_teacher(case: Case, of_the_cases_size: Any, tmp_path: Path) -> None:
    weights = {f"visual.trunk.{name}": value for name, value in case.prefix("sd.visual.").items()}
    save_file(weights, tmp_path / "eva_clip.safetensors")
    name = of_the_cases_size(case)
    teacher = Config(model=name, pretrained=str(tmp_path / "eva_clip.safetensors")).build().eval()
    assert teacher.width == case.config["embed_dim"]
    with torch.no_grad():
        features = teacher(case.tensors["in.image"])
    case.close(features.patches, "out.teacher_patch_features")


def test_the_published_teacher_has_this_tower() -> None:
    tower = open_clip.get_model_config(PUBLISHED)["vision_cfg"]
    assert tower["timm_model_name"] == "eva_giant_patch14_224"
    assert open_clip.get_model_config(PUBLISHED)["embed_dim"] == 1024
    Config(model=PUBLISHED, pretrained="laion400m_s11b_b41k")  # a tag that open_clip knows
