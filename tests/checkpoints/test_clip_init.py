"""What a CLIP starts from: which tensors come over, which start fresh, and that anything else is an error."""

import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from checkpoints.tiny import DEPTH, HEADS, HIDDEN, PATCH, WIDTH, official, official_eva02
from checkpoints.tiny_clip import TEXT, open_clip_model, openai_model, randomised
from openeva.checkpoints import weights as addresses
from openeva.checkpoints.clip import text_of, to_clip
from openeva.checkpoints.clip_init import start_towers
from openeva.checkpoints.convert import convert
from openeva.checkpoints.native import save_native
from openeva.checkpoints.official import from_official
from openeva.checkpoints.pretrained import VARIABLE
from openeva.checkpoints.resize import resize_patch_kernel, resize_position_embedding
from openeva.checkpoints.weights import WeightsError
from openeva.config import validate
from openeva.heads.clip import ClipConfig, ClipModel

PLAIN = {"width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_hidden": HIDDEN, "patch_size": PATCH}
EVA02 = {**PLAIN, "mlp": "swiglu", "rope_grid": 16, "sub_norm": "mlp_attention"}
TEXT_TOWER = {"context_length": 16, "vocab_size": TEXT["vocab_size"], "width": 64, "num_heads": 1, "depth": 2}
PROJECTIONS = {"backbone.projection.weight", "backbone.projection.bias", "text.text_projection", "logit_scale"}


def pair(grid: int = 4, text: dict[str, Any] = TEXT_TOWER, **backbone: Any) -> ClipModel:
    backbone = {**PLAIN, **backbone}
    backbone["image_size"] = grid * backbone["patch_size"]
    config = {"embed_dim": 12, "backbone": {"name": "vit", **backbone}, "text": text}
    return ClipModel(validate(ClipConfig, config, where="test"))


def put(path: Path, weights: Any) -> str:
    torch.save(weights, path)
    return str(path)


def changed(model: ClipModel, before: dict[str, Tensor]) -> set[str]:
    return {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}


def snapshot(model: ClipModel) -> dict[str, Tensor]:
    """Every value of a fresh model told apart from what weights could hold, norms and biases too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------ image tower


@pytest.mark.parametrize("head", ["mim", "none"])
def test_eva_gives_its_whole_trunk_and_nothing_else(tmp_path: Path, head: str) -> None:
    model = pair()
    before, weights = snapshot(model), official(head=head)
    weights |= {"head.weight": torch.randn(5, WIDTH), "head.bias": torch.randn(5)} if head == "none" else {}
    report = start_towers(model, init_image=put(tmp_path / "eva.pt", {"model": weights}))
    trunk = {key for key in before if key.startswith("backbone.")} - PROJECTIONS
    assert changed(model, before) == trunk
    assert torch.equal(model.backbone.norm.weight, weights["norm.weight"])  # the classifier by mean would drop it
    assert set(report.used) == trunk
    assert set(report.fresh) == set(before) - trunk
    assert f"{len(trunk)} tensors of the image tower, official names" in report.lines()[0]
    other = {"backbone.mask_token", "head.weight", "head.bias"} if head == "mim" else {"classifier.weight"}
    assert other <= set(report.dropped)


@pytest.mark.parametrize("source", ["run", "timm", "classifier by cls"])
def test_any_layout_of_a_transformer(tmp_path: Path, source: str) -> None:
    weights = official(head="mim" if source == "run" else "none")
    file = tmp_path / "eva.pt"
    put(file, {"model": weights})
    address = str(file)
    if source == "run":
        convert(file, tmp_path / "run" / "model", "openeva", num_heads=HEADS)
        address = str(tmp_path / "run")
    elif source == "timm":
        convert(file, tmp_path / "timm.safetensors", "timm")
        address = str(tmp_path / "timm.safetensors")
    model = pair()
    start_towers(model, init_image=address)
    assert torch.equal(model.backbone.blocks[1].attn.qkv.weight, weights["blocks.1.attn.qkv.weight"])


def test_eva02_lacks_the_norm_of_attention_which_starts_as_identity(tmp_path: Path) -> None:
    weights = official_eva02(sub_norm=True)
    model = pair(**EVA02)
    report = start_towers(model, init_image=put(tmp_path / "eva.pt", weights))
    norms = {key for key in report.fresh if ".attn.norm." in key}
    assert norms == {f"backbone.blocks.{i}.attn.norm.{kind}" for i in range(DEPTH) for kind in ("weight", "bias")}
    assert set(report.fresh) - norms == PROJECTIONS | {key for key in model.state_dict() if key.startswith("text.")}
    assert torch.equal(model.backbone.blocks[0].attn.norm.weight, torch.ones(WIDTH))
    assert any("rope" in key for key in report.dropped)
    broken = {**weights, "blocks.0.attn.inner_attn_ln.weight": torch.ones(WIDTH)}  # one of several: not that kind
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.norm\.weight 16 is missing"):
        start_towers(pair(**EVA02), init_image=put(tmp_path / "broken.pt", broken))


def test_another_grid_and_patch_size(tmp_path: Path) -> None:
    weights = official()
    model = pair(grid=6, patch_size=6)
    report = start_towers(model, init_image=put(tmp_path / "eva.pt", weights), grid=(6, 6))
    assert set(report.resized) == {"backbone.pos_embed", "backbone.patch_embed.proj.weight"}
    assert torch.equal(model.backbone.pos_embed, resize_position_embedding(weights["pos_embed"], (4, 4), (6, 6)))
    assert torch.equal(
        model.backbone.patch_embed.proj.weight, resize_patch_kernel(weights["patch_embed.proj.weight"], 6)
    )


def test_a_classifier_by_mean_has_no_final_norm(tmp_path: Path) -> None:
    model = pair()
    report = start_towers(model, init_image=put(tmp_path / "eva.pt", official(head="classifier")))
    assert {"backbone.norm.weight", "backbone.norm.bias"} <= set(report.fresh)
    assert {"fc_norm.weight", "classifier.weight"} <= set(report.dropped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {k: t for k, t in w.items() if k != "blocks.1.mlp.fc1.bias"},
            r"blocks\.1\.mlp\.fc1\.bias 40 is missing",
        ),
        (lambda w: {k: t for k, t in w.items() if not k.startswith("norm.")}, r"backbone\.norm\.weight 16 is missing"),
        (lambda w: w | {"blocks.0.gamma_1": torch.ones(WIDTH)}, r"blocks\.0\.gamma_1 16 has no place"),
        (lambda w: w | {"blocks.0.mlp.fc1.weight": torch.ones(41, WIDTH)}, r"41x16 does not fit 40x16"),
    ],
)
def test_an_image_tower_that_does_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    model = pair()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"init_image: .*(?s:.*){message}"):
        start_towers(model, init_image=put(tmp_path / "eva.pt", change(official())))
    assert not changed(model, before)


# ------------------------------------------------------------------------------------------------ text tower


def text_files(folder: Path) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Kind -> (address, the tower's tensors by their names in a CLIP of ours)."""
    flat, custom = openai_model().state_dict(), open_clip_model("EVA01-g", text=TEXT).state_dict()
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    theirs = CLIPTextModelWithProjection(
        CLIPTextConfig(vocab_size=TEXT["vocab_size"], max_position_embeddings=16, projection_dim=12, **sizes)
    )
    transformers = randomised(theirs, 3).state_dict() | {
        "vision_model.x": torch.zeros(1),
        "logit_scale": torch.zeros(()),
        "text_model.embeddings.position_ids": torch.arange(16)[None],  # in the files of OpenAI's models
    }
    buffers = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(16), "vocab_size": torch.tensor(9)}
    save_file(custom, folder / "open_clip.safetensors")
    return {
        "openai": (put(folder / "ViT-L-14.pt", {key: t.half() for key, t in flat.items()} | buffers), flat),
        "open_clip": (str(folder / "open_clip.safetensors"), custom),
        "transformers": (put(folder / "pytorch_model.bin", transformers), transformers),
        "module": (put(folder / "m.pt", {"state_dict": {f"module.{k}": t for k, t in flat.items()}}), flat),
    }


@pytest.mark.parametrize("kind", ["openai", "open_clip", "transformers", "module"])
def test_a_text_tower_of_any_layout(tmp_path: Path, kind: str) -> None:
    address, source = text_files(tmp_path)[kind]
    model = pair()
    before = snapshot(model)
    report = start_towers(model, init_text=address)
    tower = {key for key in before if key.startswith("text.")} - PROJECTIONS
    assert changed(model, before) == tower  # never a tower that stays random without a word
    expected = text_of(source)
    for key in tower:
        torch.testing.assert_close(model.state_dict()[key], expected[key].float(), rtol=1e-3, atol=1e-3)
    assert f"{len(tower)} tensors of the text tower" in report.lines()[0]
    assert "text.text_projection" in report.dropped
    assert set(report.fresh) == set(before) - tower
    assert not [key for key in report.dropped if "resblocks" in key and not key.startswith("visual.")]


def test_openais_archive(tmp_path: Path) -> None:
    """A TorchScript program, of which nothing is run."""
    theirs = openai_model()
    example = torch.randn(1, 3, 32, 32), torch.ones(1, 16, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(theirs, example, check_trace=False), tmp_path / "ViT-B-16.pt")
    model = pair()
    report = start_towers(model, init_text=str(tmp_path / "ViT-B-16.pt"))
    assert torch.equal(model.text.token_embedding.weight, theirs.token_embedding.weight)
    assert "visual.conv1.weight" in report.dropped


def test_a_name_of_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCLIP-H and -bigG come so; the official loader left their towers random."""
    flat = openai_model().state_dict()
    put(tmp_path / "h.pt", flat)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: str(tmp_path / "h.pt"))
    description = {"text_cfg": {"heads": 1}}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: description)
    model = pair()
    start_towers(model, init_text="ViT-H-14:laion2b_s32b_b79k")
    assert torch.equal(model.text.ln_final.weight, flat["ln_final.weight"])
    description["text_cfg"]["heads"] = 2  # which no shape shows
    with pytest.raises(ValueError, match=r"num_heads 2 instead of 1; .* set task\.text: \{num_heads: 2\}"):
        start_towers(pair(), init_text="ViT-H-14:laion2b_s32b_b79k")


def test_nothing_is_fetched_where_there_is_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(addresses.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(addresses.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"open_clip model ViT-bigG-14:laion2b_s39b_b160k.*HF_HUB_OFFLINE"):
        start_towers(pair(), init_text="ViT-bigG-14:laion2b_s39b_b160k")


def test_a_text_tower_of_another_size_is_one_line(tmp_path: Path) -> None:
    address = text_files(tmp_path)["openai"][0]
    model = pair(text={**TEXT_TOWER, "width": 32, "depth": 3})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^init_text .*width 64 instead of 32, depth 2 instead of 3; ") as error:
        start_towers(model, init_image=put(tmp_path / "eva.pt", official()), init_text=address)
    assert "\n" not in str(error.value)
    assert not changed(model, before)  # not the image tower either


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: t for k, t in w.items() if k != "ln_final.bias"}, r"text\.ln_final\.bias 64 is missing"),
        (
            lambda w: w | {"transformer.resblocks.0.extra": torch.ones(1)},
            r"no place for text\.transformer\.resblocks\.0\.extra",
        ),
        (lambda w: {k: t for k, t in w.items() if k.startswith("visual.")}, r"holds no text tower \(found visual"),
        (lambda w: {k: t for k, t in w.items() if k != "positional_embedding"}, r"lacks text\.positional_embedding"),
    ],
)
def test_a_text_tower_that_does_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    model = pair()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        start_towers(model, init_text=put(tmp_path / "clip.pt", change(openai_model().state_dict())))
    assert not changed(model, before)


def test_vision_weights_are_no_text_tower(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no text tower"):
        start_towers(pair(), init_text=put(tmp_path / "eva.pt", {"model": official()}))


# ------------------------------------------------------------------------------------------------ a whole CLIP


def saved_pair(folder: Path, model: ClipModel) -> str:
    save_native(
        folder / "model", model.state_dict(), {"task": {"name": "clip", **model.config.model_dump(mode="json")}}
    )
    return str(folder)


@pytest.mark.parametrize("layout", ["run", "official"])
def test_a_whole_clip_at_a_larger_size(tmp_path: Path, layout: str) -> None:
    """As L/14 became L/14-336: projections and temperature come too, positions are resized."""
    source = randomised(pair(**EVA02), 4)
    address = saved_pair(tmp_path / "run", source)
    if layout == "official":
        address = put(tmp_path / "clip.pt", to_clip(source.state_dict()))
    model = pair(grid=6, **EVA02)
    before = snapshot(model)
    report = start_towers(model, init_from=address, grid=(6, 6))
    assert changed(model, before) == set(before)
    assert list(report.resized) == ["backbone.pos_embed"]
    assert not report.fresh
    assert torch.equal(model.logit_scale, source.logit_scale)


def test_a_pair_gives_one_tower(tmp_path: Path) -> None:
    source = randomised(pair(), 4)
    address = saved_pair(tmp_path, source)
    model = pair()
    before = snapshot(model)
    report = start_towers(model, init_image=address, init_text=address)
    assert changed(model, before) == set(before) - PROJECTIONS
    assert set(report.fresh) == PROJECTIONS
    assert torch.equal(model.text.ln_final.weight, source.text.ln_final.weight)


def test_heads_of_a_run_must_agree(tmp_path: Path) -> None:
    address = saved_pair(tmp_path, pair(text={**TEXT_TOWER, "num_heads": 4}))
    for key in ("init_text", "init_from"):
        with pytest.raises(ValueError, match=rf"{key} .*num_heads 4 instead of 1"):
            start_towers(pair(), **{key: address})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_heads": 4}, r"num_heads 2 instead of 4, .*set task\.backbone: \{num_heads: 2\}"),
        ({"norm_order": "post"}, "norm_order pre instead of post"),
        ({"rope_grid": 4}, r"rope_grid None instead of 4, .*\{rope_grid: null\}"),
    ],
)
def test_what_no_shape_of_an_image_tower_shows_must_agree(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    address = saved_pair(tmp_path, pair())
    for key in ("init_image", "init_from"):
        model = pair(**other)
        before = snapshot(model)
        with pytest.raises(ValueError, match=rf"^{key} .*{message}"):
            start_towers(model, **{key: address})
        assert not changed(model, before)


def test_the_released_e_starts_no_tower_with_the_norm_first(tmp_path: Path) -> None:
    address = put(tmp_path / "EVA02_E_psz14.pt", official())
    with pytest.raises(ValueError, match="norm_order post instead of pre"):
        start_towers(pair(), init_image=address)
    assert start_towers(pair(norm_order="post"), init_image=address).used


def test_not_both_and_not_half(tmp_path: Path) -> None:
    address = put(tmp_path / "eva.pt", {"model": official()})
    with pytest.raises(ValueError, match="init_from is a whole CLIP; leave out"):
        start_towers(pair(), init_from=address, init_image=address)
    with pytest.raises(ValueError, match=r"is no whole CLIP: it holds backbone and head but no text tower.*init_image"):
        start_towers(pair(), init_from=address)
    whole = randomised(pair(), 4).state_dict()
    del whole["text.ln_final.weight"]
    with pytest.raises(ValueError, match=r"text\.ln_final\.weight 64 is missing"):
        start_towers(pair(), init_from=put(tmp_path / "clip.pt", to_clip(whole)))
    assert not start_towers(pair()).used


def test_official_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    put(tmp_path / "eva_psz14.pt", {"model": official()})
    put(tmp_path / "EVA02_CLIP_B_psz16_s8B.pt", to_clip(randomised(pair(), 4).state_dict()))
    model = pair()
    start_towers(model, init_image="eva_psz14", init_text="EVA02_CLIP_B_psz16_s8B")
    assert torch.equal(model.backbone.cls_token, from_official(official())["backbone.cls_token"])
