"""The installed timm and our transformer compute the same from the same weights, in both directions."""

from collections.abc import Callable

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from openeva.backbones.vit import Config
from openeva.backbones.vit import VisionTransformer as OurViT
from openeva.checkpoints.detect import infer_vit_config, to_openeva
from openeva.checkpoints.load import load_into
from openeva.checkpoints.timm import to_timm
from openeva.heads.classifier import ImageClassifier

SIZE = {
    "img_size": 20,
    "patch_size": 5,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 0,
    "global_pool": "",
}
ROPE = {**SIZE, "use_rot_pos_emb": True, "ref_feat_shape": (16, 16)}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "eva": lambda: Eva(**SIZE, mlp_ratio=50 / 24),
    "eva_layer_scale": lambda: Eva(**SIZE, init_values=0.5),
    "eva_no_bias": lambda: Eva(**SIZE, qkv_bias=False),
    "eva02_tiny": lambda: Eva(**ROPE, swiglu_mlp=True, mlp_ratio=50 / 24),
    "eva02_base": lambda: Eva(**ROPE, swiglu_mlp=True, mlp_ratio=50 / 24, qkv_fused=False, scale_mlp=True),
    "eva02_clip": lambda: Eva(**ROPE, swiglu_mlp=True, qkv_fused=False, scale_mlp=True, scale_attn_inner=True),
    "eva02_oblong": lambda: Eva(**{**ROPE, "img_size": (15, 25)}, swiglu_mlp=True),
    "vit": lambda: TimmViT(**SIZE),
    "vit_layer_scale": lambda: TimmViT(**SIZE, init_values=0.5),
}


def randomised(model: nn.Module) -> nn.Module:
    """Weights far from any initial value, so that a swapped bias or a wrong norm cannot hide."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def compare(theirs: nn.Module, ours: OurViT) -> None:
    image = torch.randn(2, 3, *ours.image_size, generator=torch.Generator().manual_seed(5))
    expected = theirs.forward_features(image)[:, 1:]
    actual = ours(image).patches
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)
    their_gradients = to_openeva(gradients(theirs, expected.square().mean()))
    our_gradients = {f"backbone.{key}": grad for key, grad in gradients(ours, actual.square().mean()).items()}
    assert set(our_gradients) == set(their_gradients)
    for key, gradient in our_gradients.items():
        torch.testing.assert_close(
            gradient, their_gradients[key], rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_from_timm(name: str) -> None:
    theirs = randomised(MODELS[name]())
    weights, grid = to_openeva(theirs.state_dict()), theirs.patch_embed.grid_size
    ours = Config(**infer_vit_config(weights, num_heads=SIZE["num_heads"], grid=grid)).build().eval()
    report = load_into(ours, weights, part="backbone", fresh=("backbone.mask_token",), grid=ours.grid, source_grid=grid)
    assert report.fresh == ["backbone.mask_token"]
    assert not report.dropped
    compare(theirs, ours)


@pytest.mark.parametrize("name", MODELS)
def test_to_timm(name: str) -> None:
    theirs = MODELS[name]()
    weights, grid = to_openeva(theirs.state_dict()), theirs.patch_embed.grid_size
    ours = randomised(Config(**infer_vit_config(weights, num_heads=SIZE["num_heads"], grid=grid)).build())
    weights, dropped = to_timm({f"backbone.{key}": tensor for key, tensor in ours.state_dict().items()})
    assert set(dropped) == {"backbone.mask_token"}
    theirs.load_state_dict(weights, strict=True)
    compare(theirs.eval(), ours)


HEADED = {
    "eva": lambda **head: Eva(**{**SIZE, **head}),
    "eva02_tiny": lambda **head: Eva(**{**ROPE, **head}, swiglu_mlp=True),
    "eva02_base": lambda **head: Eva(**{**ROPE, **head}, swiglu_mlp=True, qkv_fused=False, scale_mlp=True),
    "vit": lambda **head: TimmViT(**{**SIZE, **head}),
}


@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize(("timm_pool", "pooling"), [("avg", "mean"), ("token", "cls")])
def test_classifiers(name: str, timm_pool: str, pooling: str) -> None:
    """timm -> ours -> another of timm's: the same logits three times."""
    make = HEADED[name]
    theirs, others = (randomised(make(num_classes=7, global_pool=timm_pool)) for _ in range(2))
    with torch.no_grad():
        others.head.weight.zero_()
    weights = to_openeva(theirs.state_dict())
    backbone = Config(**infer_vit_config(weights, num_heads=SIZE["num_heads"])).build()
    ours = ImageClassifier(backbone, 7, pooling=pooling).eval()
    report = load_into(ours, weights)
    assert (report.fresh, report.dropped, report.resized) == ([], {}, {})
    back, dropped = to_timm(ours.state_dict())
    assert not dropped
    others.load_state_dict(back, strict=True)
    image = torch.randn(2, 3, 20, 20)
    expected = theirs(image)
    torch.testing.assert_close(ours(image), expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(others(image), expected)
