"""Official video checkpoints: found by name, told apart by their shapes, the same bytes after both ways."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import openeva
from openeva.backbones.vit import Config
from openeva.checkpoints.class_map import map_by_names
from openeva.checkpoints.convert import convert
from openeva.checkpoints.detect import clip_grid, infer_vit_config
from openeva.checkpoints.load import load_into, read_weights
from openeva.checkpoints.native import read_native
from openeva.checkpoints.official import to_official
from openeva.data.kinetics_classes import ALIASES
from openeva.heads.classifier import ImageClassifier

WIDTH = {"width": 64, "depth": 2, "num_heads": 1, "mlp_hidden": 96}
CLIPS = {**WIDTH, "patch_size": 112, "image_size": 224, "num_frames": 4, "final_norm": False}
"""Two by two patches per frame, of the size of all official models."""


def official(num_classes: int = 5, **changes: object) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = ImageClassifier(Config(**{**CLIPS, **changes}).build(), num_classes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return to_official(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_official_to_openeva_and_back_is_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in official().items()}
    assert weights["patch_embed.proj.weight"].shape == (64, 3, 1, 112, 112)
    torch.save({"model": weights, "epoch": 3}, tmp_path / "video.pth")
    convert(tmp_path / "video.pth", tmp_path / "model", "openeva")
    _, config = read_native(tmp_path / "model")
    backbone = config["task"]["backbone"]
    assert (backbone["num_frames"], backbone["tubelet"], backbone["image_size"]) == (4, 1, 224)
    convert(tmp_path / "model", tmp_path / "back.pth", "official")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["epoch"] == 3
    assert list(back["model"]) == list(weights)
    assert all(torch.equal(back["model"][name], tensor) for name, tensor in weights.items())
    assert all(back["model"][name].dtype == dtype for name in weights)


def test_a_file_becomes_a_model_of_clips(tmp_path: Path) -> None:
    save_file(official(tubelet=2), tmp_path / "video.safetensors")
    model = openeva.load_checkpoint(str(tmp_path / "video.safetensors"))
    assert isinstance(model, ImageClassifier)
    assert (model.backbone.num_frames, model.backbone.config.tubelet, model.num_classes) == (4, 2, 5)
    assert model(torch.randn(2, 4, 3, 224, 224)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"takes clips \[B, 4, 3, Y, X\], got \(2, 3, 224, 224\)"):
        model(torch.randn(2, 3, 224, 224))
    longer = openeva.load_checkpoint(str(tmp_path / "video.safetensors"), num_frames=8)
    assert longer.backbone.pos_embed.shape == (1, 1 + 4 * 4, 64)
    assert "grid 2x2x2 -> 4x2x2" in " ".join(longer.load_report.lines())


def test_frames_that_cannot_be_told_are_asked_for(tmp_path: Path) -> None:
    weights = official(patch_size=16, image_size=32, num_frames=4)  # 16 patches: 4 of 2 x 2, or one of 4 x 4
    save_file(weights, tmp_path / "video.safetensors")
    with pytest.raises(ValueError, match="number of frames cannot be told"):
        openeva.load_checkpoint(str(tmp_path / "video.safetensors"))
    convert(tmp_path / "video.safetensors", tmp_path / "model", "openeva", num_frames=4)
    assert openeva.load_checkpoint(str(tmp_path / "model")).backbone.image_size == (32, 32)


def test_grids_of_clips() -> None:
    assert clip_grid(2048, 14) == (8, 16, 16)
    assert clip_grid(4096, 14) == (16, 16, 16)
    assert clip_grid(16, 14) is None
    assert clip_grid(16, 14, num_slots=4) == (4, 2, 2)
    assert clip_grid(16, 14, num_slots=3) is None
    assert clip_grid(7, 14) == (7, 1, 1)


def test_models_of_clips_have_no_place_elsewhere(tmp_path: Path) -> None:
    save_file(official(), tmp_path / "video.safetensors")
    for to in ("timm", "open_clip"):
        with pytest.raises(ValueError, match="is a model of clips"):
            convert(tmp_path / "video.safetensors", tmp_path / "out.safetensors", to)  # type: ignore[arg-type]
    weights = read_weights(tmp_path / "video.safetensors")
    image = Config(**{**CLIPS, "num_frames": None}).build()
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight"):
        load_into(image, weights, part="backbone", fresh=("mask_token",))


def test_an_official_name_says_how_many_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openeva.checkpoints import pretrained

    tiny = official(patch_size=16, image_size=32, num_frames=4, num_classes=400)
    save_file(tiny, tmp_path / "eva_video_k400.safetensors")
    monkeypatch.setenv("OPENEVA_WEIGHTS", str(tmp_path))
    entry = pretrained.PRETRAINED["eva_video_k400"]
    assert entry.overrides == {"num_frames": 16}
    monkeypatch.setitem(
        pretrained.PRETRAINED, "eva_video_k400", entry.__class__(**{**vars(entry), "overrides": {"num_frames": 4}})
    )
    weights = read_weights(pretrained.resolve("eva_video_k400"))
    assert weights.grid == (4, 2, 2)
    assert infer_vit_config(weights.state_dict, grid=weights.grid)["num_frames"] == 4


def test_a_guess_about_clips_gives_way_to_the_model(tmp_path: Path) -> None:
    """8 frames of 112 pixels have as many patches as 2 of the usual 224: nothing is resized, and a guess is told."""
    changes = {"patch_size": 14, "image_size": 112, "num_frames": 8}
    save_file(official(**changes), tmp_path / "video.safetensors")
    weights = read_weights(tmp_path / "video.safetensors")
    assert "taken for 2 time slots of 16 x 16 patches" in weights.described
    model = ImageClassifier(Config(**{**CLIPS, **changes}).build(), 5)
    report = load_into(model, weights, grid=model.backbone.token_grid)
    assert report.resized == {}
    assert torch.equal(model.backbone.pos_embed, weights.state_dict["backbone.pos_embed"])


def test_an_image_model_may_have_as_many_patches_as_a_clip() -> None:
    """8 x 8 patches of an image, 4 slots of 16 x 16: each has its own grid."""
    image = Config(**{**CLIPS, "num_frames": None, "patch_size": 28}).build()
    clips = Config(**{**CLIPS, "patch_size": 14, "num_frames": 4}).build()
    state_dict = {f"backbone.{name}": tensor for name, tensor in image.state_dict().items()}
    report = load_into(clips, state_dict, part="backbone", grid=clips.token_grid)
    assert "grid 8x8 -> 4x16x16" in " ".join(report.lines())


def test_numbers_are_no_names_of_classes() -> None:
    assert map_by_names(["grow", "jump", "run"], ["run", "grow"]) == [2, 0]
    assert map_by_names(["a", "changing wheel (not on bike)"], ["changing wheel"], ALIASES) == [1]
    assert map_by_names(["0", "1", "2"], ["0", "1"]) == []
    assert map_by_names(["a", "b"], ["a", "c"]) == []


@pytest.mark.parametrize(("num_frames", "tubelet"), [(5, 2), (6, 1)])
def test_frames_that_do_not_fit_are_refused(num_frames: int, tubelet: int, tmp_path: Path) -> None:
    save_file(official(tubelet=tubelet), tmp_path / "video.safetensors")
    with pytest.raises(ValueError, match=f"num-frames {num_frames} does not fit"):
        convert(tmp_path / "video.safetensors", tmp_path / "model", "openeva", num_frames=num_frames)
