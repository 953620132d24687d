"""The table of released weights against the models that we build and against timm, and how a name becomes a file."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from torch import nn

import openeva
from openeva.backbones.base import STATISTICS
from openeva.backbones.vit import VARIANTS, Config
from openeva.checkpoints.clip import infer_text_config
from openeva.checkpoints.detect import infer_vit_config
from openeva.checkpoints.native import model_path
from openeva.checkpoints.pretrained import OPEN_CLIP, PRETRAINED, TIMM, VARIABLE, find_entry, resolve
from openeva.checkpoints.released import PretrainedWeights
from openeva.checkpoints.weights import WeightsError
from openeva.config import validate
from openeva.heads.classifier import ImageClassifier
from openeva.heads.clip import CLIP_VARIANTS, ClipConfig, ClipModel
from openeva.heads.mae_decoder import MaeDecoder, MaeDecoderConfig

ENTRIES = list(PRETRAINED.values())
CLIP_224 = ("clip_224.laion400m", "clip_224.merged2b", "clip_224.laion2b", "clip_224.laion2b_plus")
TEXT_KEYS = {"context_length": "context_length", "vocab_size": "vocab_size", "width": "width", "depth": "layers"}
TEXT_KEYS["num_heads"] = "heads"
TIMM_SQUASHES = "timm squashes images into a square for these tags; the official evaluation cuts the centre"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_number_of_parameters_is_that_of_the_model(entry: PretrainedWeights) -> None:
    if entry.num_parameters is None:
        assert entry.kind == "clip"
        assert entry.repository is None or "never seen" in entry.note  # then nobody here knows what is in the file
        return
    if entry.clip is not None:
        with torch.device("meta"):
            pair = ClipModel(ClipConfig(variant=entry.clip))
        assert sum(p.numel() for p in pair.parameters()) == entry.num_parameters
        expected = Config(**{"variant": entry.variant, "image_size": entry.image_size, **entry.overrides})
        keys = ("image_shape", "patch_size", "width", "depth", "sub_norm", "norm_order", "rope_grid")
        assert all(getattr(pair.config.backbone, key) == getattr(expected, key) for key in keys)
        return
    backbone: dict = {"variant": entry.variant, "image_size": entry.image_size, **entry.overrides}
    if entry.kind != "mim" and entry.variant == "eva_l_14":
        backbone["positions"] = "learned"
    with torch.device("meta"):
        model = Config(**backbone, final_norm=entry.pooling != "mean").build()
        parts: list[nn.Module] = [model]
        if entry.num_classes:
            parts = [ImageClassifier(model, entry.num_classes, pooling=entry.pooling, batch_norm=entry.batch_norm)]
        elif entry.variant == "eva_l_14":
            model.mask_token = None  # the decoder has its own
            parts.append(MaeDecoder(MaeDecoderConfig(), model.width, entry.predict_width, model.grid))
        else:
            parts.append(nn.Linear(model.width, entry.predict_width))
    assert sum(p.numel() for part in parts for p in part.parameters()) == entry.num_parameters


@pytest.mark.parametrize("tag", TIMM)
def test_timm_agrees_or_differs_where_we_say_so(tag: str) -> None:
    entry, theirs = PRETRAINED[TIMM[tag]], get_pretrained_cfg(tag)
    assert theirs is not None
    assert theirs.hf_hub_id == f"timm/{tag}"
    assert theirs.license == entry.licence.lower()
    assert theirs.interpolation == entry.interpolation
    assert theirs.input_size[1:] == (entry.image_size, entry.image_size)
    projected = 0 if entry.clip is None else CLIP_VARIANTS[entry.clip]["embed_dim"]
    assert theirs.num_classes == (entry.num_classes or projected)
    ours = STATISTICS[entry.statistics]
    if "m30m" in tag:
        assert theirs.mean != ours.mean  # every official command uses CLIP's
    else:
        assert (theirs.mean, theirs.std) == (ours.mean, ours.std)
    if entry.kind == "mim" or tag == "eva_giant_patch14_224.clip_ft_in1k" or tag.endswith(CLIP_224):
        assert (theirs.crop_pct, entry.crop_pct) == (0.9, 1.0)
    else:
        assert theirs.crop_pct == entry.crop_pct
    assert theirs.crop_mode in {"center", "squash"}, TIMM_SQUASHES


def test_every_classifier_of_the_family_in_timm_is_in_the_table() -> None:
    assert set(timm.list_pretrained("eva*")) == set(TIMM)


@pytest.mark.parametrize("name", [name for name in CLIP_VARIANTS if "micro" not in name])
def test_shapes_tell_the_whole_pair(name: str) -> None:
    """At full size: heads, and for EVA-02 E the order of norms, which no shape tells but that of no other model."""
    with torch.device("meta"):
        pair = ClipModel(validate(ClipConfig, {"variant": name}, where=name))
    weights = {key: torch.ones(1).expand(tensor.shape) for key, tensor in pair.state_dict().items()}
    found = infer_vit_config(weights)
    assert infer_text_config(weights) == {key: getattr(pair.config.text, key) for key in TEXT_KEYS}
    assert found.pop("layer_scale", None) == (1.0 if name == "eva01_clip_b_16" else None)  # that there is one
    expected = pair.config.backbone.model_dump()
    assert found == {key: expected[key] for key in found}
    told = {"width", "depth", "num_heads", "mlp_hidden", "image_size", "patch_size", "projection", "qkv_bias"}
    assert told | ({"norm_order"} if "_e_14" in name else set()) <= set(found)


def test_every_eva_clip_of_open_clip_is_in_the_table() -> None:
    theirs = {f"{name}:{tag}" for name, tag in open_clip.list_pretrained() if name.startswith("EVA")}
    assert theirs == set(OPEN_CLIP)
    for name, stem in OPEN_CLIP.items():
        entry, config = PRETRAINED[stem], open_clip.get_model_config(name.split(":")[0])
        ours = validate(ClipConfig, {"variant": entry.clip}, where=name)
        assert (config["embed_dim"], config["vision_cfg"]["image_size"]) == (ours.embed_dim, entry.image_size)
        text = {key: config["text_cfg"][other] for key, other in TEXT_KEYS.items()}
        assert text == {key: getattr(ours.text, key) for key in TEXT_KEYS}


def test_the_facts_are_consistent() -> None:
    for entry in ENTRIES:
        assert entry.variant in VARIANTS
        assert Path(entry.file).stem == entry.name
        classifies = entry.kind in {"in21k", "in1k", "probe", "video"}
        assert bool(entry.num_classes) == (entry.pooling is not None) == classifies
        clip = entry.clip is not None and not entry.note.startswith("its file was never seen")
        assert bool(entry.published) == (entry.kind in {"in1k", "probe", "video"} or clip)
        assert bool(entry.retrieval) == bool(entry.started_from) == clip
        for accuracy in entry.published.values():
            assert 50 < accuracy.top1 < (accuracy.top5 or 100)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("eva_psz14", "eva_psz14"),
        ("/some/where/eva_psz14.pt", "eva_psz14"),
        ("eva_giant_patch14_336.m30m_ft_in22k_in1k", "eva_21k_1k_336px_psz14_ema_89p6"),
        ("eva_giant_patch14_336.m30m_ft_in22k_in1k.safetensors", "eva_21k_1k_336px_psz14_ema_89p6"),
        ("EVA02-B-16:merged2b_s8b_b131k", "EVA02_CLIP_B_psz16_s8B"),
        ("eva02_base_patch16_clip_224.merged2b", "EVA02_CLIP_B_psz16_s8B"),
    ],
)
def test_facts_by_any_name(name: str, stem: str) -> None:
    entry = find_entry(name)
    assert entry is not None
    assert entry.name == stem


def test_other_names_are_unknown() -> None:
    assert find_entry("eva_giant_patch14_336") is None
    assert find_entry("runs/demo") is None


# ---------------------------------------------------------------------------------------------- names to files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("eva_psz14", "eva_psz14.pt"),
        ("eva_psz14.pt", "eva_psz14.safetensors"),
        ("eva_clip_vis_enc_sz224_lincls_86p5", "eva_clip_vis_enc_sz224_lincls_86p5.pth"),
        ("eva02_B_pt_in21k_p14", "eva02/pt/eva02_B_pt_in21k_p14.pt"),  # a copy of the hub's repository
        ("eva_large_patch14_196.in22k_ft_in1k", "eva_large_patch14_196.in22k_ft_in1k.safetensors"),
        ("eva_large_patch14_196.in22k_ft_in1k", "eva_l_psz14_196px_1k_ft_88p0.bin"),  # the same weights
        ("eva_l_psz14_196px_1k_ft_88p0", "eva_large_patch14_196.in22k_ft_in1k.safetensors"),
        ("EVA02-B-16:merged2b_s8b_b131k", "EVA02_CLIP_B_psz16_s8B.pt"),
    ],
)
def test_the_local_folder_comes_first(folder: Path, name: str, file: str) -> None:
    touch(folder / file)
    assert resolve(name) == folder / file
    assert model_path(name) == folder / file


def test_model_folders_count_too(folder: Path) -> None:
    touch(folder / "eva_psz14" / "model.safetensors")
    assert resolve("eva_psz14") == folder / "eva_psz14"
    touch(folder / "eva_large_patch14_196.in22k_ft_in1k" / "model.safetensors")
    assert resolve("eva_l_psz14_196px_1k_ft_88p0") == folder / "eva_large_patch14_196.in22k_ft_in1k"


def test_a_path_is_a_path_even_where_it_looks_like_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(folder / "eva_psz14.pt")
    here = folder / "here"
    touch(here / "eva_psz14.pt")
    monkeypatch.chdir(here)
    assert resolve("eva_psz14.pt") == Path("eva_psz14.pt")


def test_timms_file_without_mask_token_does_not_stand_for_the_official_one(folder: Path) -> None:
    touch(folder / "eva02_tiny_patch14_224.mim_in22k.safetensors")
    with pytest.raises(WeightsError, match="eva02_Ti_pt_in21k_p14"):
        resolve("eva02_Ti_pt_in21k_p14")


def test_timms_tower_does_not_stand_for_the_whole_clip(folder: Path) -> None:
    touch(folder / "eva02_base_patch16_clip_224.merged2b.safetensors")
    with pytest.raises(WeightsError, match="QuanSun/EVA-CLIP"):
        resolve("EVA02_CLIP_B_psz16_s8B")


def test_names_of_open_clip(folder: Path) -> None:
    """Also of models that are none of EVA's: text towers come from there."""
    with pytest.raises(WeightsError, match=r"open_clip model ViT-H-14:laion2b_s32b_b79k.*give the path"):
        resolve("ViT-H-14:laion2b_s32b_b79k")
    with pytest.raises(WeightsError, match=r"open_clip model EVA02-B-16:merged2b_s8b_b131k"):
        resolve("EVA02-B-16:merged2b_s8b_b131k")
    with pytest.raises(WeightsError, match="open_clip has no model 'ViTH-14'; did you mean 'ViT-H-14'"):
        resolve("ViTH-14:laion2b_s32b_b79k")
    with pytest.raises(WeightsError, match="ViT-H-14 has no weights 'openai'; it has laion2b_s32b_b79k"):
        resolve("ViT-H-14:openai")


def test_neither_here_nor_reachable_is_one_message_with_the_fix(folder: Path) -> None:
    with pytest.raises(WeightsError) as error:
        resolve("eva_21k_1k_336px_psz14_ema_89p6")
    text = str(error.value)
    for part in (str(folder), "BAAI/EVA", "eva_21k_1k_336px_psz14_ema_89p6.pt", VARIABLE, "HF_HUB_OFFLINE is set"):
        assert part in text
    with pytest.raises(WeightsError, match=r"timm/eva_large_patch14_196\.in22k_ft_in1k.*model\.safetensors"):
        resolve("eva_large_patch14_196.in22k_ft_in1k")
    with pytest.raises(WeightsError, match=r"not published on a hub.*eva_clip_psz14_vision_enc\.pt"):
        resolve("eva_clip_psz14_vision_enc")


def test_mistyped_names_and_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        WeightsError, match=r"unknown weights 'eva_l_psz41'; did you mean 'eva_l_psz14'\?.*list --weights"
    ):
        resolve("eva_l_psz41")
    with pytest.raises(WeightsError, match=r"did you mean 'eva_large_patch14_196\.in22k_ft_in1k'"):
        resolve("eva_large_patch14_196.in22k_ft_in2k")
    with pytest.raises(WeightsError, match=r"the folder holds no model\.safetensors"):
        resolve(str(folder))
    with pytest.raises(WeightsError, match="no such file"):
        resolve("./eva.pt")
    monkeypatch.setenv(VARIABLE, f"{folder}:{folder / 'gone'}")
    with pytest.raises(WeightsError, match=rf"{VARIABLE} names folders that do not exist: .*gone"):
        resolve("eva_psz14")


def test_timms_own_file_by_timms_name_gives_timms_logits(folder: Path) -> None:
    """The smallest released architecture in full size: name, file, rotary positions, pooling, head."""
    tag = "eva02_tiny_patch14_336.mim_in22k_ft_in1k"
    theirs = timm.create_model(tag, pretrained=False).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    save_file(theirs.state_dict(), folder / f"{tag}.safetensors")
    ours = openeva.load_checkpoint(tag)
    assert isinstance(ours, ImageClassifier)
    assert ours.load_report.lines()[1:] == []
    view = openeva.transforms_for(ours).evaluate(np.zeros((500, 400, 3), np.uint8) + 90)
    with torch.no_grad():
        torch.testing.assert_close(ours(view[None]), theirs(view[None]), rtol=1e-4, atol=1e-4)
