"""CLIP files: every layout read, written and told apart; open_clip and openeva compute the same from one file."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import openeva
from checkpoints.test_lossless import CONTAINERS, assert_same_content, load
from checkpoints.tiny import assert_same
from checkpoints.tiny_clip import EMBED, HEADS, TEXT, TOWERS, WIDTH, inputs, open_clip_model, openai_model, randomised
from openeva.checkpoints.clip import from_clip, infer_text_config, text_of, to_clip
from openeva.checkpoints.convert import convert
from openeva.checkpoints.load import described_clip, read_weights
from openeva.checkpoints.native import read_native, save_native
from openeva.checkpoints.official import rope_buffers
from openeva.heads.clip import ClipModel

POST_NORM = {"EVA02-E": {"norm_order": "post"}}
STYLES = list(TOWERS)


def official(style: str = "EVA02-B", layout: str = "official", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A file as the official code writes it, rotary tables included."""
    ours = from_clip(open_clip_model(style).state_dict())
    weights = to_clip(ours, layout)
    if style == "EVA02-B":
        backbone = {"rope_grid": 16, "image_size": 32, "patch_size": 8, "width": WIDTH, "num_heads": HEADS, "depth": 2}
        weights |= {f"visual.{name}": table for name, table in rope_buffers(backbone).items()}
    return {key: tensor.to(dtype) for key, tensor in weights.items()}


def write(path: Path, weights: Any) -> Path:
    torch.save(weights, path)
    return path


# ------------------------------------------------------------------------------------------------ open_clip, live


@pytest.mark.parametrize("style", STYLES)
def test_open_clips_file_gives_its_features(tmp_path: Path, style: str) -> None:
    theirs = open_clip_model(style)
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    ours = openeva.load_checkpoint(
        str(tmp_path / "open_clip_model.safetensors"), num_heads=HEADS, **POST_NORM.get(style, {})
    )
    assert isinstance(ours, ClipModel)
    assert not ours.load_report.fresh
    assert not ours.load_report.dropped
    assert_equal_features(ours, theirs)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_open_clip_loads_what_we_write(tmp_path: Path, style: str, suffix: str) -> None:
    """Through its own loader, from a file in the official layout."""
    write(tmp_path / "eva_clip.pt", {"model": official(style)})
    convert(tmp_path / "eva_clip.pt", tmp_path / f"out.{suffix}", "open_clip")
    theirs = open_clip_model(style, seed=1)
    assert not open_clip.load_checkpoint(theirs, str(tmp_path / f"out.{suffix}"), strict=True).missing_keys
    ours = openeva.load_checkpoint(str(tmp_path / "eva_clip.pt"), num_heads=HEADS, **POST_NORM.get(style, {}))
    assert_equal_features(ours, theirs)


@torch.no_grad()
def assert_equal_features(ours: Any, theirs: Any) -> None:
    image_BCYX, text_BL = inputs()
    expected = theirs(image_BCYX, text_BL)
    found = ours(image_BCYX, text_BL)
    for one, other in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(one.reshape(other.shape), other, rtol=1e-4, atol=1e-5)
    assert expected[0].std() > 0.01  # features that depend on the input
    short_BL = text_BL[:, :12]  # ours takes rows without the padding
    torch.testing.assert_close(ours.encode_text(short_BL), ours.encode_text(text_BL))


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("layout", ["official", "official/flat", "official/scale_in_text"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_an_official_file_comes_back_as_it_was(tmp_path: Path, layout: str, container: str) -> None:
    source = write(tmp_path / "clip.pt", CONTAINERS[container](official(layout=layout, dtype=torch.float16)))
    report = convert(source, tmp_path / "ours", "openeva", num_heads=HEADS)
    assert all("rope" in key for key, why in report.kept.items() if "for the way back" in why)  # every weight was taken
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert {key.split(".")[0] for key in ours} == {"backbone", "text", "logit_scale"}
    assert ours["logit_scale"].shape == (1,)
    convert(tmp_path / "ours", tmp_path / "back" / "clip.pt", "official")
    assert_same_content(load(tmp_path / "back" / "clip.pt"), load(source))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_open_clips_file_comes_back_as_it_was(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"clip.{suffix}"
    weights = open_clip_model("EVA02-B").state_dict()
    save_file(weights, source) if suffix == "safetensors" else torch.save(weights, source)
    convert(source, tmp_path / "ours", "openeva", num_heads=HEADS)
    convert(tmp_path / "ours", tmp_path / "back" / source.name, "open_clip")
    assert (tmp_path / "back" / source.name).read_bytes() == source.read_bytes()


def test_the_image_tower_alone_under_its_prefix(tmp_path: Path) -> None:
    weights = {key: tensor for key, tensor in official().items() if key.startswith("visual.")}
    source = write(tmp_path / "clip.pt", {"model": weights})
    convert(source, tmp_path / "ours", "openeva", num_heads=HEADS)
    convert(tmp_path / "ours", tmp_path / "back.pt", "official")
    assert_same_content(load(tmp_path / "back.pt"), load(source))
    with pytest.raises(ValueError, match="hold no text tower, so they are no CLIP"):
        convert(tmp_path / "ours", tmp_path / "open.pt", "open_clip")


def test_to_timm_is_the_image_tower(tmp_path: Path) -> None:
    source = write(tmp_path / "clip.pt", official("EVA02-B"))
    report = convert(source, tmp_path / "timm.safetensors", "timm")
    theirs = open_clip_model("EVA02-B", seed=1)
    theirs.visual.trunk.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True)
    image_BCYX, _ = inputs()
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_image(image_BCYX), open_clip_model("EVA02-B").encode_image(image_BCYX))
    assert "logit_scale" in report.dropped
    assert any(line.startswith("dropped: text.transformer.resblocks.*.attn") for line in report.lines())


def test_layouts_are_one_model(tmp_path: Path) -> None:
    """Whatever the names and places, the same tensors under openeva's names."""
    expected = from_clip(open_clip_model("EVA02-B").state_dict())
    for layout in ("official", "official/flat", "official/scale_in_text", "open_clip", "open_clip/flat"):
        path = write(tmp_path / "clip.pt", {"state_dict": to_clip(expected, layout)})
        weights = read_weights(path)
        assert_same(weights.state_dict, expected)
        assert weights.layout.parts == ("backbone", "text", "logit_scale")
    with pytest.raises(ValueError, match="2 heads do not divide the text tower's width"):
        infer_text_config(expected | {"text.token_embedding.weight": torch.zeros(9, 33)}, num_heads=2)
    told = described_clip(weights, num_heads=HEADS)
    assert (told["embed_dim"], told["text"]["num_heads"], told["backbone"]["projection"]) == (EMBED, 1, EMBED)


def test_a_trained_pair_goes_to_open_clip(tmp_path: Path) -> None:
    """A run's folder, with the bias of the sigmoid loss, which open_clip has too."""
    weights = from_clip(open_clip_model("EVA01-g").state_dict()) | {"logit_bias": torch.tensor([-9.0])}
    backbone = {"name": "vit", "width": WIDTH, "depth": 2, "num_heads": HEADS, "mlp_hidden": 80, "patch_size": 8}
    text = {"width": 64, "num_heads": 1, "depth": 2, "context_length": 16, "vocab_size": TEXT["vocab_size"]}
    task = {"name": "clip", "embed_dim": EMBED, "backbone": {**backbone, "image_size": 32}, "text": text}
    save_native(tmp_path / "run" / "model", weights, {"task": {**task, "loss": "sigmoid"}})
    model = openeva.load_checkpoint(str(tmp_path / "run"))
    assert isinstance(model, ClipModel)
    assert model.logit_bias is not None
    assert model.logit_bias.item() == -9
    convert(tmp_path / "run" / "model", tmp_path / "open.pt", "open_clip")
    theirs = load(tmp_path / "open.pt")
    assert (theirs["logit_bias"].shape, theirs["logit_scale"].shape) == ((), ())
    assert_same(from_clip(theirs), weights)
    convert(tmp_path / "run" / "model", tmp_path / "copy", "openeva", dtype="fp16")
    assert read_native(tmp_path / "copy")[1]["task"] == task | {"loss": "sigmoid"} | {
        "backbone": {**backbone, "image_size": 32}
    }


# ------------------------------------------------------------------------------------------------ mistakes


def test_what_the_shapes_do_not_tell(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", official())
    with pytest.raises(ValueError, match=r"number of heads cannot be told: 32 channels .*pass num_heads"):
        openeva.load_checkpoint(str(write(tmp_path / "g.pt", official("EVA01-g"))))
    narrow = {
        key: tensor[..., :48] if key == "text.token_embedding.weight" else tensor for key, tensor in official().items()
    }
    with pytest.raises(ValueError, match=r"text tower's heads cannot be told: its width of 48 .*pass text_heads"):
        convert(write(tmp_path / "narrow.pt", narrow), tmp_path / "ours", "openeva")
    assert openeva.load_checkpoint(str(path)).backbone.config.num_heads == HEADS  # rotary tables tell


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"text.unknown": torch.zeros(2)}, r"text\.unknown"),
        (lambda w: {k: t for k, t in w.items() if "ln_final.weight" not in k}, r"text\.ln_final\.weight 64 is missing"),
        (
            lambda w: {k: t for k, t in w.items() if k != "visual.head.bias"},
            r"backbone\.projection\.bias 24 is missing",
        ),
        (lambda w: {k: t for k, t in w.items() if k != "logit_scale"}, r"logit_scale 1 is missing"),
    ],
)
def test_nothing_is_made_up_or_passed_over(tmp_path: Path, change: Any, message: str) -> None:
    path = write(tmp_path / "clip.pt", change(official()))
    with pytest.raises(ValueError, match=message):
        openeva.load_checkpoint(str(path))


def test_openais_own_image_tower_is_none_of_evas(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", openai_model().state_dict())
    with pytest.raises(ValueError, match=r"image tower has OpenAI's architecture.*name: open_clip"):
        openeva.load_checkpoint(str(path))


# ------------------------------------------------------------------------------------------------ transformers


def test_transformers_text_tower() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = CLIPTextConfig(
        vocab_size=TEXT["vocab_size"],
        max_position_embeddings=16,
        projection_dim=EMBED,
        hidden_act="gelu",
        eos_token_id=TEXT["vocab_size"] - 1,
        **sizes,
    )
    theirs = randomised(CLIPTextModelWithProjection(config), 3).eval()
    ours = open_clip_model("EVA01-g", text=TEXT)
    weights = text_of(theirs.state_dict())
    ours.text.load_state_dict({key.removeprefix("text."): tensor for key, tensor in weights.items()}, strict=True)
    _, text_BL = inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_text(text_BL), theirs(text_BL).text_embeds, rtol=1e-4, atol=1e-5)
