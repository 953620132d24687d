"""CLIP models by name and from weights; the image tower in other tasks: where they start, and as a teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import openeva
from checkpoints.tiny import DEPTH, HEADS, HIDDEN, PATCH, WIDTH, official
from checkpoints.tiny_clip import randomised
from openeva.backbones import vit
from openeva.backbones.vit import VisionTransformer
from openeva.checkpoints.clip import to_clip
from openeva.checkpoints.files import write_state_dict
from openeva.checkpoints.native import save_native
from openeva.checkpoints.official import to_official
from openeva.checkpoints.pretrained import PRETRAINED, VARIABLE
from openeva.config import ConfigError, validate
from openeva.data.views import CropConfig
from openeva.heads import clip
from openeva.heads.classifier import ImageClassifier
from openeva.heads.clip import ClipConfig, ClipModel
from openeva.inference.predictor import Predictor
from openeva.tasks import classify, pretrain

TINY = {"patch_size": PATCH, "width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_hidden": HIDDEN}
SIDE, EMBED = 4 * PATCH, 12
TEXT = {"context_length": 16, "vocab_size": 300, "width": 64, "num_heads": 1, "depth": 2}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Local weights, for a family whose members are tiny."""
    for name, values in vit.VARIANTS.items():
        monkeypatch.setitem(vit.VARIANTS, name, {**values, **TINY, "image_size": SIDE})
    for name, values in clip.CLIP_VARIANTS.items():
        backbone = {**values["backbone"], **TINY, "image_size": SIDE}
        monkeypatch.setitem(clip.CLIP_VARIANTS, name, {"embed_dim": EMBED, "backbone": backbone, "text": TEXT})
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def pair(variant: str = "eva01_clip_g_14", seed: int = 0) -> ClipModel:
    return randomised(ClipModel(validate(ClipConfig, {"variant": variant}, where=variant)), seed)


def put(folder: Path, name: str, weights: dict[str, Tensor]) -> str:
    write_state_dict(folder / f"{name}.pt", weights)
    return name


def run_folder(folder: Path, model: ClipModel, **notes: Any) -> str:
    task = {"name": "clip", **model.config.model_dump(mode="json"), "loss": "infonce", "init_image": "eva_psz14"}
    save_native(folder / "run" / "model", model.state_dict(), {"task": task, **notes})
    return str(folder / "run")


def image(seed: int = 0, side: int = SIDE) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def assert_same_model(ours: Any, expected: ClipModel) -> None:
    assert isinstance(ours, ClipModel)
    assert set(ours.state_dict()) == set(expected.state_dict())
    for key, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


# ------------------------------------------------------------------------------------------------ by name


@pytest.mark.parametrize("name", list(clip.CLIP_VARIANTS))
def test_every_pair_has_a_name(name: str) -> None:
    assert name in openeva.list_models()
    model = openeva.create_model(name, drop_path=0.1, text={"depth": 1})
    assert isinstance(model, ClipModel)
    assert model.backbone.config.drop_path == 0.1
    assert model.text.num_layers == 1
    assert model.encode_image(image()).shape == (2, EMBED)
    assert model.encode_text(torch.tensor([[5, 299], [299, 1]])).shape == (2, EMBED)


@pytest.mark.parametrize(
    "stem",
    ["eva_clip_psz14", "EVA01_CLIP_g_14_plus_psz14_s11B", "EVA02_CLIP_B_psz16_s8B", "EVA02_CLIP_E_psz14_plus_s9B"],
)
def test_released_weights_by_every_name(folder: Path, stem: str) -> None:
    entry = PRETRAINED[stem]
    assert entry.clip is not None
    expected = pair(entry.clip)
    put(folder, stem, to_clip(expected.state_dict()))
    names = [stem, *([entry.open_clip] if entry.open_clip else [])]
    for name in names:
        model = openeva.create_model(name)
        assert_same_model(model, expected)
        assert_same_model(openeva.create_model(entry.clip, weights=name), expected)
        assert model.origin.entry is entry
        assert model.config.variant == entry.clip
        assert model.backbone.config.norm_order == ("post" if "_E_" in stem else "pre")  # which the file does not say
        with torch.no_grad():
            torch.testing.assert_close(model.eval().encode_image(image()), expected.eval().encode_image(image()))
    assert f"/{stem}.pt-" in openeva.load_checkpoint(stem).backbone.identity
    for tower in entry.timm:  # timm's name stands for the image tower alone
        assert isinstance(openeva.create_model(tower), VisionTransformer)


def test_the_order_of_norms_reaches_converted_weights_and_teachers(folder: Path) -> None:
    from openeva.checkpoints.convert import convert

    expected = pair("eva02_clip_e_14").eval()
    put(folder, "EVA02_CLIP_E_psz14_s4B", to_clip(expected.state_dict()))
    file = folder / "EVA02_CLIP_E_psz14_s4B.pt"
    convert(file, folder / "ours", "openeva", num_heads=HEADS)
    teachers = [vit.Config(weights=str(folder / "ours")), vit.Config(weights=str(file), num_heads=HEADS)]
    with torch.no_grad():
        for teacher in (config.build().eval() for config in teachers):
            torch.testing.assert_close(teacher(image()).pooled, expected.encode_image(image()))


def test_larger_images_and_other_mistakes(folder: Path) -> None:
    name = put(folder, "EVA02_CLIP_L_psz14_s4B", to_clip(pair("eva02_clip_l_14").state_dict()))
    model = openeva.create_model("eva02_clip_l_14", weights=name, image_size=6 * PATCH)
    assert list(model.load_report.resized) == ["backbone.pos_embed"]
    assert model.encode_image(image(side=6 * PATCH)).shape == (2, EMBED)
    with pytest.raises(ValueError, match=r"are of eva02_clip_l_14, not of eva02_clip_b_16; use create_model"):
        openeva.create_model("eva02_clip_b_16", weights=name)
    put(folder, "mine", to_clip(pair("eva02_clip_l_14").state_dict()))
    with pytest.raises(ValueError, match=r"not of eva01_clip_g_14: backbone\.mlp swiglu instead of gelu"):
        openeva.create_model("eva01_clip_g_14", weights=str(folder / "mine.pt"))
    with pytest.raises(ConfigError, match="imagesize: unknown key; did you mean 'image_size'"):
        openeva.create_model("eva02_clip_l_14", weights=name, imagesize=32)
    with pytest.raises(ConfigError, match=r"takes no num_classes.*create_model\('eva02_l_14'"):
        openeva.create_model("eva02_clip_l_14", weights=name, num_classes=3)
    put(folder, "eva_psz14", official())
    with pytest.raises(ValueError, match=r"hold no text tower, only backbone and head; .*create_model\('eva_g_14'"):
        openeva.create_model("eva01_clip_g_14", weights="eva_psz14")


def test_a_run(folder: Path) -> None:
    """Its own sizes, head widths and crop."""
    config = validate(ClipConfig, {"variant": "eva_clip_micro_8", "text": {"num_heads": 4}}, where="test")
    expected = ClipModel(config, bias=True)
    address = run_folder(folder, randomised(expected, 3), val_crop={"kind": "center", "hflip": 0.0, "crop_pct": 0.9})
    model = openeva.load_checkpoint(address)
    assert_same_model(model, expected)
    assert model.config == expected.config
    assert not model.training
    transforms = openeva.transforms_for(model)
    assert transforms.evaluate.crop.crop_pct == 0.9
    assert transforms.train.crop == CropConfig(scale=(0.9, 1.0), hflip=0.0)  # spec section 1.8: no colour, no mirror


def test_predictions_use_the_image_tower(folder: Path) -> None:
    address = run_folder(folder, pair())
    Image.new("RGB", (40, 30), (200, 10, 60)).save(folder / "a.png")
    predictor = Predictor(address)
    view = predictor.transform(folder / "a.png")[None]
    with torch.no_grad():
        expected = openeva.load_checkpoint(address).encode_image(view)
        torch.testing.assert_close(predictor.backbone(view).pooled, expected)


# ------------------------------------------------------------------------------------------------ the image tower alone


@pytest.mark.parametrize("source", ["file", "run", "tower"])
def test_a_classifier_starts_from_a_clip(folder: Path, source: str) -> None:
    expected = pair()
    tower = {key: tensor for key, tensor in expected.state_dict().items() if key.startswith("backbone.")}
    address = {
        "file": lambda: str(folder / f"{put(folder, 'clip', to_clip(expected.state_dict()))}.pt"),
        "run": lambda: run_folder(folder, expected),
        "tower": lambda: put(folder, "eva_clip_psz14_vision_enc", to_official(tower)),
    }[source]()
    backbone = {"name": "vit", **({"num_heads": HEADS} if source == "file" else {})}
    config = {"init_from": address, "backbone": backbone, "num_classes": EMBED}  # as many as it projects to
    task = validate(classify.Config, config, where="task").build()
    assert task.backbone.config.projection is None
    assert torch.equal(task.backbone.blocks[1].attn.qkv.weight, expected.backbone.blocks[1].attn.qkv.weight)
    report = task.load_report
    assert set(report.fresh) == {"fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"}
    assert report.dropped["backbone.projection.weight"].startswith("the model has no projection to the joint space")
    others = {"backbone.norm.weight", "backbone.norm.bias", "backbone.projection.weight", "backbone.projection.bias"}
    texts = {key for key in expected.state_dict() if key not in tower}
    assert set(report.dropped) == (others if source == "tower" else others | texts)


def test_load_checkpoint_makes_a_classifier_where_asked(folder: Path) -> None:
    name = put(folder, "eva_clip_psz14", to_clip(pair().state_dict()))
    model = openeva.load_checkpoint(name, num_classes=EMBED, pooling="cls")
    assert isinstance(model, ImageClassifier)
    assert set(model.load_report.fresh) == {"classifier.weight", "classifier.bias"}
    assert model.backbone.projection is None
    tower = openeva.load_checkpoint(name, num_classes=0)
    assert isinstance(tower, VisionTransformer)
    assert tower.width == EMBED  # with its projection
    assert isinstance(openeva.create_model("eva_g_14", weights=name, projection=None), VisionTransformer)


def student(teacher: dict[str, Any], init_from: str | None = None) -> dict[str, Any]:
    return {
        "backbone": {"name": "vit", "variant": "eva_g_14"}, "init_from": init_from, "init_head": False,
        "target": {"name": "features", "teacher": teacher},
        "masking": {"name": "block", "num_masked": 6, "min_block": 2},
    }  # fmt: skip


def test_a_student_starts_from_a_clip(folder: Path) -> None:
    expected = pair()
    address = run_folder(folder, expected)
    task = validate(pretrain.Config, student({"name": "vit", "variant": "eva_b_16"}, address), where="task").build()
    assert torch.equal(task.student.backbone.cls_token, expected.backbone.cls_token)
    assert "backbone.mask_token" in task.load_report.fresh
    assert "text.text_projection" in task.load_report.dropped


@pytest.mark.parametrize("source", ["file", "run"])
def test_the_teacher_of_the_next_eva(folder: Path, source: str) -> None:
    """`teacher: {name: vit, weights: ...}`: projected patch tokens, frozen."""
    expected = pair().eval()
    address = run_folder(folder, expected)
    if source == "file":
        address = str(folder / f"{put(folder, 'clip', to_clip(expected.state_dict()))}.pt")
    teacher = {"name": "vit", "weights": address, **({"num_heads": HEADS} if source == "file" else {})}
    task = validate(pretrain.Config, student(teacher), where="task").build()
    assert task.target.width == EMBED
    with torch.no_grad():
        torch.testing.assert_close(task.target.teacher(image()).patches, expected.backbone(image()).patches)
