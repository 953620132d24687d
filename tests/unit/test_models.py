"""Models by name with weights of every kind: what is taken, resized, dropped and fresh; their transforms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torch import Tensor

import openeva
from checkpoints.tiny import DEPTH, HEADS, HIDDEN, PATCH, WIDTH, official, official_eva02
from openeva.backbones import vit
from openeva.backbones.base import CLIP_STATISTICS, IMAGENET_STATISTICS
from openeva.backbones.vit import VisionTransformer
from openeva.checkpoints.convert import convert
from openeva.checkpoints.files import write_state_dict
from openeva.checkpoints.native import save_native
from openeva.checkpoints.official import from_official, to_official
from openeva.checkpoints.pretrained import PRETRAINED, VARIABLE
from openeva.config import ConfigError, validate
from openeva.data.loader import DataConfig, EvalLoader
from openeva.data.views import CropConfig, ViewSpec
from openeva.heads.classifier import ImageClassifier
from openeva.models import FRESH_HEAD, OFFICIAL_EVALUATION

TINY = {"patch_size": PATCH, "width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_hidden": HIDDEN}
SIDE = 4 * PATCH
HEAD_KEYS = {"fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Local weights, for a family whose members are tiny."""
    for name, values in vit.VARIANTS.items():
        monkeypatch.setitem(vit.VARIANTS, name, {**values, **TINY})
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def put(folder: Path, name: str, weights: dict[str, Tensor], wrapper: Any = "model") -> str:
    write_state_dict(folder / f"{name}.pt", weights, wrapper)
    return name


def image(seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- spec section 1.9, by name


def test_pretrained_weights_are_a_backbone(folder: Path) -> None:
    model = openeva.create_model("eva_g_14", weights=put(folder, "eva_psz14", official()))
    assert isinstance(model, VisionTransformer)
    assert model.image_size == (SIDE, SIDE)
    assert model.load_report.fresh == []
    assert set(model.load_report.dropped) == {"head.weight", "head.bias"}
    assert torch.equal(model.mask_token, official()["mask_token"])
    assert model.origin.entry is PRETRAINED["eva_psz14"]
    assert model.identity.startswith("vit:eva_g_14/eva_psz14.pt-")


@pytest.mark.parametrize(("pooling", "fresh"), [("mean", HEAD_KEYS), ("cls", {"classifier.weight", "classifier.bias"})])
def test_a_classifier_of_pretrained_weights(folder: Path, pooling: Any, fresh: set[str]) -> None:
    """Mean pooling throws the pre-trained norm away, cls pooling keeps it; both start a fresh classifier."""
    name = put(folder, "eva_psz14", official())
    model = openeva.create_model("eva_g_14", weights=name, num_classes=7, pooling=pooling)
    assert isinstance(model, ImageClassifier)
    report = model.load_report
    assert set(report.fresh) == fresh
    dropped = {"backbone.mask_token", "head.weight", "head.bias"}
    norm = {"backbone.norm.weight", "backbone.norm.bias"}
    assert set(report.dropped) == (dropped | norm if pooling == "mean" else dropped)
    assert model(image()).shape == (2, 7)


def test_eva_l_learns_the_positions_that_were_fixed(folder: Path) -> None:
    weights = official(qkv_bias="full", head="none")
    weights["pos_embed"][:, 0] = 0  # as in the fixed table
    weights |= {"decoder_embed.weight": torch.randn(3, 3), "mask_token": torch.randn(1, 1, 3)}
    name = put(folder, "eva_l_psz14", weights)
    backbone = openeva.create_model("eva_l_14", weights=name)
    assert not isinstance(backbone.pos_embed, torch.nn.Parameter)
    model = openeva.create_model("eva_l_14", weights=name, num_classes=3, image_size=6 * PATCH)
    assert isinstance(model.backbone.pos_embed, torch.nn.Parameter)
    assert model.load_report.resized["backbone.pos_embed"].endswith("(grid 4x4 -> 6x6)")
    assert set(model.load_report.fresh) == HEAD_KEYS
    assert {"decoder.embed.weight", "decoder.mask_token"} <= set(model.load_report.dropped)


def test_a_released_classifier_comes_whole_and_is_fresh_for_other_classes(folder: Path) -> None:
    weights = official(head="classifier")
    name = put(folder, "eva_21k_1k_336px_psz14_ema_89p6", weights)
    model = openeva.create_model("eva_g_14", weights=name)
    assert isinstance(model, ImageClassifier)
    assert (model.num_classes, model.pooling) == (5, "mean")
    assert model.load_report.lines()[1:] == []  # nothing resized, dropped or fresh
    assert {key: t for key, t in to_official(model.state_dict()).items() if not torch.equal(t, weights[key])} == {}
    other = openeva.create_model("eva_g_14", weights=name, num_classes=9)
    assert set(other.load_report.fresh) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(other.fc_norm.weight, weights["fc_norm.weight"])
    assert any(
        line.startswith("dropped: classifier.weight: 5x16 does not fit 9x16") for line in other.load_report.lines()
    )
    assert isinstance(openeva.create_model("eva_g_14", weights=name, num_classes=0), VisionTransformer)


def test_a_released_classifier_that_lacks_something_is_refused(folder: Path) -> None:
    weights = official(head="classifier")
    del weights["fc_norm.bias"]
    name = put(folder, "eva_21k_224px_psz14", weights)
    with pytest.raises(ValueError, match=r"fc_norm\.bias 16 is missing"):
        openeva.create_model("eva_g_14", weights=name)


def test_a_linear_probe_keeps_its_batch_norm(folder: Path) -> None:
    weights = official(head="none") | {
        "head.0.running_mean": torch.randn(WIDTH),
        "head.0.running_var": torch.rand(WIDTH),
    }
    weights |= {"head.0.num_batches_tracked": torch.tensor(7), "head.1.weight": torch.randn(5, WIDTH)}
    weights |= {"head.1.bias": torch.randn(5)}
    name = put(folder, "eva_clip_vis_enc_sz224_lincls_86p5", weights)
    model = openeva.create_model("eva_g_14", weights=name).eval()
    assert model.pooling == "cls"
    cls = model.backbone(image()).cls
    scaled = (cls - weights["head.0.running_mean"]) / (weights["head.0.running_var"] + 1e-6).sqrt()
    torch.testing.assert_close(model(image()), scaled @ weights["head.1.weight"].T + weights["head.1.bias"])
    plain = openeva.create_model("eva_g_14", weights=name, num_classes=3)
    assert isinstance(plain.classifier, torch.nn.Linear)
    assert plain.load_report.dropped["classifier.1.weight"] == "the model's classifier is of another kind"


def test_the_projection_of_a_clip_tower_is_no_classifier(folder: Path) -> None:
    weights = official(head="none") | {"head.weight": torch.randn(8, WIDTH), "head.bias": torch.randn(8)}
    name = put(folder, "eva_clip_psz14_vision_enc", weights)
    assert isinstance(openeva.create_model("eva_g_14", weights=name), VisionTransformer)
    model = openeva.create_model("eva_g_14", weights=name, num_classes=8)  # as many as it projects to
    assert set(model.load_report.fresh) == HEAD_KEYS


def test_eva02_by_name_with_averaged_weights(folder: Path) -> None:
    raw = official_eva02(sub_norm=True, head="classifier", dtype=torch.float16)
    averaged = {key: tensor + 1 for key, tensor in raw.items()}
    name = "eva02_B_pt_in21k_medft_in21k_ft_in1k_p14"
    torch.save({"module": raw, "model_ema": averaged}, folder / f"{name}.pt")
    model = openeva.create_model("eva02_b_14", weights=name, image_size=6 * PATCH)
    assert "averaged weights" in model.load_report.lines()[0]
    assert torch.equal(model.backbone.cls_token, averaged["cls_token"].float())
    assert model.load_report.fresh == []
    assert model(image(size=(6 * PATCH, 6 * PATCH))).shape == (2, 5)
    torch.save({"module": raw, "model_ema": averaged}, folder / "mine.pt")  # of unknown origin: the raw ones
    assert torch.equal(openeva.load_checkpoint(str(folder / "mine.pt")).backbone.cls_token, raw["cls_token"].float())


def test_timms_file_of_pretrained_weights_has_its_norm_elsewhere(folder: Path) -> None:
    weights = official_eva02(sub_norm=False, rope="none")
    theirs = {key: tensor for key, tensor in weights.items() if not key.startswith(("lm_head", "mask_token", "norm"))}
    theirs |= {f"fc_norm.{kind}": weights[f"norm.{kind}"] for kind in ("weight", "bias")}
    swiglu = {"w12": "fc1", "w3": "fc2"}
    for old, new in swiglu.items():
        theirs = {key.replace(f"mlp.{old}.", f"mlp.{new}."): tensor for key, tensor in theirs.items()}
    name = put(folder, "eva02_tiny_patch14_224.mim_in22k", theirs, "bare")
    model = openeva.create_model("eva02_ti_14", weights=name)
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    assert model.load_report.fresh == ["backbone.mask_token"]
    assert "resized: backbone.norm.weight: named fc_norm.weight in timm's file" in model.load_report.lines()


@pytest.mark.parametrize(
    ("repository", "file", "name"),
    [
        ("BAAI/EVA", "eva_21k_1k_336px_psz14_ema_89p6.pt", "eva_21k_1k_336px_psz14_ema_89p6"),
        (
            "timm/eva_giant_patch14_336.m30m_ft_in22k_in1k",
            "model.safetensors",
            "eva_giant_patch14_336.m30m_ft_in22k_in1k",
        ),
    ],
)
def test_what_the_hub_brought_once_is_found_without_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch, repository: str, file: str, name: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    cached = folder / "hub" / f"models--{repository.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("f00")
    write_state_dict(cached / "snapshots" / "f00" / file, official(head="classifier"))
    model = openeva.create_model("eva_g_14", weights=name)
    assert isinstance(model, ImageClassifier)
    assert model.origin.entry is PRETRAINED["eva_21k_1k_336px_psz14_ema_89p6"]  # timm's file is called as all others


@pytest.mark.parametrize("image_size", [6 * PATCH, (3 * PATCH, 6 * PATCH)])
def test_any_image_size(folder: Path, image_size: Any) -> None:
    name = put(folder, "eva_21k_224px_psz14", official(head="classifier"))
    model = openeva.create_model("eva_g_14", weights=name, image_size=image_size)
    shape = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    assert model(image(size=shape)).shape == (2, 5)
    assert list(model.load_report.resized) == ["backbone.pos_embed"]


def test_patch_kernels_are_resized_only_where_asked(folder: Path) -> None:
    name = put(folder, "eva_psz14", official())
    model = openeva.create_model("eva_g_14", weights=name, patch_size=PATCH + 2, image_size=4 * (PATCH + 2))
    assert list(model.load_report.resized) == ["backbone.patch_embed.proj.weight"]


# ------------------------------------------------------------------------------------------------ names and mistakes


def test_released_weights_say_their_own_variant(folder: Path) -> None:
    put(folder, "eva_l_psz14_196px_1k_ft_88p0", official(head="classifier", qkv_bias="full"))
    for name in ("eva_l_psz14_196px_1k_ft_88p0", "eva_large_patch14_196.in22k_ft_in1k"):
        model = openeva.create_model(name)
        assert model.backbone.config.variant == "eva_l_14"
        assert openeva.load_checkpoint(name).training is False


def test_weights_of_another_variant_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "eva_psz14", official())
    with pytest.raises(ValueError, match=r"are of eva_g_14, not of eva_l_14; use create_model\('eva_g_14'"):
        openeva.create_model("eva_l_14", weights="eva_psz14")
    monkeypatch.setitem(vit.VARIANTS, "eva_s_16", {**vit.VARIANTS["eva_s_16"], "depth": 9})
    put(folder, "mine", official())
    with pytest.raises(ValueError, match=r"not of eva_s_16: depth 2 instead of 9; they fit eva_g_14"):
        openeva.create_model("eva_s_16", weights=str(folder / "mine.pt"))
    put(folder, "swiglu", official_eva02(sub_norm=False))
    with pytest.raises(ValueError, match=r"not of eva_b_16: mlp swiglu instead of"):
        openeva.create_model("eva_b_16", weights=str(folder / "swiglu.pt"))
    with pytest.raises(ConfigError, match="unknown variant 'eva_g'; did you mean 'eva_g_14'"):
        openeva.create_model("eva_g", weights="eva_psz14")
    with pytest.raises(ConfigError, match="unknown weights 'eva_psz15'; did you mean 'eva_psz14'"):
        openeva.create_model("eva_g_14", weights="eva_psz15")
    with pytest.raises(ConfigError, match="imagesize: unknown key; did you mean 'image_size'"):
        openeva.create_model("eva_g_14", weights="eva_psz14", imagesize=32)


def test_another_pooling_than_the_weights_is_reported(folder: Path) -> None:
    name = put(folder, "eva_21k_224px_psz14", official(head="classifier"))
    model = openeva.create_model("eva_g_14", weights=name, pooling="cls")
    assert set(model.load_report.fresh) == {"backbone.norm.weight", "backbone.norm.bias"}
    assert "fc_norm.weight" in model.load_report.dropped
    assert "backbone.norm" in FRESH_HEAD


def test_without_weights() -> None:
    model = openeva.create_model("eva_b_16", num_classes=4, image_size=SIDE)
    assert isinstance(model, ImageClassifier)
    assert not model.backbone.config.final_norm
    assert model.backbone.config.init == "classifier"
    assert isinstance(openeva.create_model("eva_b_16", image_size=SIDE), VisionTransformer)


# ------------------------------------------------------------------------------------------------ openeva's own folders


def run_folder(folder: Path, **notes: Any) -> str:
    backbone = {"name": "vit", "image_size": SIDE, "final_norm": False, "statistics": "imagenet", **TINY}
    task = {"name": "classify", "backbone": backbone, "num_classes": 5, "pooling": "mean", "class_names": list("abcde")}
    weights = from_official(official(head="classifier"))
    save_native(folder / "run" / "model", weights, {"task": task, **notes})
    return str(folder / "run")


def test_a_run_is_a_classifier_with_its_own_statistics_and_crop(folder: Path) -> None:
    crop = {"kind": "center", "hflip": 0.0, "crop_pct": 0.9, "interpolation": "bilinear"}
    model = openeva.load_checkpoint(run_folder(folder, val_crop=crop))
    assert isinstance(model, ImageClassifier)
    assert model.origin.config["task"]["class_names"] == list("abcde")
    evaluate = openeva.transforms_for(model).evaluate
    assert evaluate.mean == IMAGENET_STATISTICS.mean
    assert (evaluate.crop.crop_pct, evaluate.crop.interpolation) == (0.9, "bilinear")


def test_a_run_that_did_not_record_its_crop_used_the_default(folder: Path) -> None:
    model = openeva.load_checkpoint(run_folder(folder))
    assert openeva.transforms_for(model).evaluate.crop == DataConfig.model_fields["val_crop"].default


def test_converted_weights_are_still_known(folder: Path) -> None:
    put(folder, "eva_21k_224px_psz14", official(head="classifier"))
    convert(folder / "eva_21k_224px_psz14.pt", folder / "ours", "openeva", num_heads=HEADS)
    model = openeva.load_checkpoint(str(folder / "ours"))
    assert model.origin.entry is PRETRAINED["eva_21k_224px_psz14"]
    assert openeva.transforms_for(model).evaluate.crop == OFFICIAL_EVALUATION


# ------------------------------------------------------------------------------------------------ transforms


def photograph(size: tuple[int, int] = (40, 56)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (5, 7, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)


def test_the_evaluation_transform_is_the_loaders(folder: Path) -> None:
    model = openeva.create_model("eva_g_14", weights=put(folder, "eva_21k_224px_psz14", official(head="classifier")))
    transform = openeva.transforms_for(model).evaluate
    file = folder / "images" / "a.png"
    file.parent.mkdir()
    photograph().save(file)
    crop = {"kind": "center", "hflip": 0.0, "crop_pct": 1.0}
    source = {"name": "image_folder", "roots": [str(file.parent)]}
    data = validate(DataConfig, {"train": [source], "val": [source], "val_crop": crop, "num_workers": 0})
    val = data.open()[1]
    assert val is not None
    loader = EvalLoader(val, ViewSpec(model.backbone.image_size), data.val_crop, batch_size=1, num_workers=0)
    pixels = next(iter(loader))["image"][0]
    expected = (pixels / 255 - torch.tensor(CLIP_STATISTICS.mean)[:, None, None]) / torch.tensor(CLIP_STATISTICS.std)[
        :, None, None
    ]
    for given in (file, str(file), file.read_bytes(), photograph(), np.array(photograph())):
        torch.testing.assert_close(transform(given), expected)
    assert transform(photograph()).shape == (3, SIDE, SIDE)
    assert torch.equal(transform(photograph()), transform(photograph()))


def test_the_training_transform_is_that_of_the_official_recipes(folder: Path) -> None:
    model = openeva.create_model("eva_b_16", num_classes=3, image_size=SIDE)
    transform = openeva.transforms_for(model).train
    assert transform.crop == CropConfig(scale=(0.08, 1.0), randaugment="rand-m9-mstd0.5-inc1")
    views = torch.stack([transform(photograph()) for _ in range(4)])
    assert views.shape == (4, 3, SIDE, SIDE)
    assert not torch.equal(views[0], views[1])


@pytest.mark.parametrize("wrong", [np.full((4, 4, 3), -1.0), np.zeros((4, 4, 5), np.uint8)])
def test_what_is_no_image(wrong: Any) -> None:
    transform = openeva.transforms_for(openeva.create_model("eva_b_16", image_size=SIDE)).evaluate
    with pytest.raises(ValueError, match=r"is no image|must be floats in 0\.\.1"):
        transform(wrong)
