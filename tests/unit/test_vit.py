"""The transformer: sizes, initialisation, masks, gradients, compilation."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from openeva.backbones.vit import VARIANTS, Config, VisionTransformer
from openeva.heads.mim import MimStudent
from openeva.layers.flops import flop_counter
from openeva.losses.cosine import negative_cosine

TINY: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 48,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full bias": {"qkv_bias": "full"},
    "no bias, sincos": {"qkv_bias": "none", "positions": "sincos"},
    "shared bias, layer scale": {"positions": "none", "relative_position": "shared", "layer_scale": 0.1},
    "own biases": {"relative_position": "per_block"},
    "decoupled": {"relative_position": "per_block_decoupled"},
    "post-norm": {"norm_order": "post", "relative_position": "shared_decoupled"},
    "wide heads, no final norm": {"head_width": 24, "final_norm": False},
    "oblong": {"image_size": (16, 40), "relative_position": "shared"},
    "EVA-02": {"rope_grid": 3, "mlp": "swiglu"},
    "EVA-02 with sub-LN": {"rope_grid": 4, "mlp": "swiglu", "sub_norm": "mlp_attention", "image_size": (16, 40)},
    "sub-LN and GELU": {"sub_norm": "mlp"},
}


def tiny(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return Config(**{**TINY, **changes}).build()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def on_meta(**config: Any) -> VisionTransformer:
    with torch.device("meta"):
        return Config(**config).build()


def images(model: VisionTransformer, batch_size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image_BCYX = torch.randn(batch_size, 3, *model.image_size, generator=generator)
    mask_BN = torch.rand(batch_size, model.grid[0] * model.grid[1], generator=generator) < 0.4
    return image_BCYX, mask_BN


def shaken(module: nn.Module) -> nn.Module:
    """The module with every parameter away from its start, where many are 0."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


# --------------------------------------------------------------------------------------------------------------- sizes


def test_parameters_of_the_papers_student() -> None:
    backbone = on_meta(variant="eva_g_14")
    with torch.device("meta"):
        assert count(MimStudent(backbone, 768)) == 1_012_229_632
    assert count(backbone.blocks[0]) == 25_248_768


@pytest.mark.parametrize(
    ("variant", "image_size", "num_classes", "expected"),
    [
        ("eva_g_14", 224, 21_841, 1_041_920_081), ("eva_g_14", 224, 1000, 1_012_555_112),
        ("eva_g_14", 336, 1000, 1_013_005_672), ("eva_g_14", 560, 1000, 1_014_447_464),
        ("eva_l_14", 224, 21_841, 325_565_777), ("eva_l_14", 196, 1000, 304_142_312),
        ("eva_l_14", 336, 1000, 304_531_432),
        ("eva02_ti_14", 336, 1000, 5_756_584), ("eva02_s_14", 336, 1000, 22_129_000),
        ("eva02_b_14", 448, 1000, 87_117_544), ("eva02_l_14", 448, 1000, 305_080_232),
    ],
)  # fmt: skip
def test_parameters_of_the_classifiers(variant: str, image_size: int, num_classes: int, expected: int) -> None:
    backbone = on_meta(variant=variant, image_size=image_size, positions="learned")
    # a classifier has no mask token, and its norm comes after pooling instead of before
    assert count(backbone) - backbone.width + (backbone.width + 1) * num_classes == expected


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("eva02_ti_14", 5_699_968), ("eva02_s_14", 22_015_744), ("eva02_b_14", 86_546_944), ("eva02_l_14", 304_319_424)],
)
def test_parameters_of_the_students_of_eva02(variant: str, expected: int) -> None:
    backbone = on_meta(variant=variant)
    with torch.device("meta"):
        assert count(MimStudent(backbone, 1024)) == expected


def test_parameters_of_one_large_block() -> None:
    assert count(on_meta(variant="eva_l_14").blocks[0]) == 12_596_224


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("image_size", "patch_size"), [(224, 16), (196, 14), ((112, 224), 8)])
def test_every_variant_at_any_size(variant: str, image_size: Any, patch_size: int) -> None:
    config = Config(variant=variant, image_size=image_size, patch_size=patch_size, depth=1)
    with torch.device("meta"):
        model = config.build()
        features = model(torch.empty(2, 3, *config.image_shape))
    rows, columns = config.image_shape[0] // patch_size, config.image_shape[1] // patch_size
    assert features.patches.shape == (2, rows * columns, VARIANTS[variant]["width"])
    assert features.grid == (rows, columns)
    assert features.pooled.shape == (2, model.width)


def test_flops_are_those_of_the_operators() -> None:
    for options in ({}, {"head_width": 24}, {"image_size": (16, 40)}, OPTIONS["EVA-02"]):
        model = tiny(**options).eval()
        with flop_counter() as counter, torch.no_grad():
            model(torch.zeros(1, 3, *model.image_size))
        assert model.flops() == counter.get_total_flops(), options


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"image_size": 33}, "not a multiple of patch_size 8"),
     ({"num_heads": 5}, "not a multiple of num_heads 5; give head_width"),
     ({"width": 30, "positions": "sincos"}, "multiple of 4, not 30"),
     ({"head_width": 6, "rope_grid": 4}, "whose width is a multiple of 4, not 6"),
     ({"variant": "eva_b_61"}, "did you mean 'eva_b_16'")],
)  # fmt: skip
def test_sizes_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Config(**{**TINY, **changes})


def test_another_image_size_is_refused_with_the_fix() -> None:
    with pytest.raises(
        ValueError, match=r"takes \(32, 32\) pixels, got \(32, 40\); build it with image_size=\(32, 40\)"
    ):
        tiny()(torch.zeros(1, 3, 32, 40))


# ------------------------------------------------------------------------------------------------------ initialisation


def test_fresh_weights() -> None:
    model = tiny(width=128, depth=3, mlp_hidden=256, init_std=0.015)
    cut = math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(1 / math.sqrt(2)))  # 0.54 of a normal's
    for number, block in enumerate(model.blocks, start=1):
        for name, weight in block.named_parameters():
            if weight.ndim == 1:
                assert torch.all(weight == (1.0 if name in {"norm1.weight", "norm2.weight"} else 0.0)), name
                continue
            scale = (2 * number) ** -0.5 if name in {"attn.proj.weight", "mlp.fc2.weight"} else 1.0
            assert weight.abs().max().item() == pytest.approx(0.015 * scale, rel=1e-2), name
            assert weight.std().item() == pytest.approx(0.015 * cut * scale, rel=0.03), name
    for name in ("cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight"):
        weight = model.get_parameter(name)
        assert weight.std().item() == pytest.approx(0.015 * cut, rel=0.25), name
        assert weight.abs().max().item() <= 0.015, name
    assert torch.all(model.patch_embed.proj.bias == 0)
    head = MimStudent(model, 64).head
    assert head.weight.abs().max().item() == pytest.approx(0.015, rel=1e-2)
    assert torch.all(head.bias == 0)


def test_fresh_weights_of_a_classifier() -> None:
    model = tiny(width=128, depth=3, mlp_hidden=256, init="classifier")
    for number, block in enumerate(model.blocks, start=1):
        for name, weight in block.named_parameters():
            if weight.ndim > 1:
                scale = (2 * number) ** -0.5 if name in {"attn.proj.weight", "mlp.fc2.weight"} else 1.0
                assert weight.std().item() == pytest.approx(0.02 * scale, rel=0.03), name
                assert weight.abs().max() > 0.05 * scale, name  # not cut
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    kernel = model.patch_embed.proj
    assert kernel.weight.abs().max().item() == pytest.approx((3 * 8 * 8) ** -0.5, rel=0.01)  # PyTorch's own, uniform
    assert kernel.bias.any()


@pytest.mark.parametrize("sub_norm", ["none", "mlp"])
def test_fresh_weights_of_eva02(sub_norm: str) -> None:
    """Xavier's deviation of each matrix as the official files store it; larger ones where there is sub-LN."""
    width, hidden, depth = 192, 512, 3
    model = tiny(width=width, depth=depth, mlp_hidden=hidden, mlp="swiglu", sub_norm=sub_norm, init="xavier")
    split = sub_norm == "mlp"
    factor = math.sqrt(math.log(2 * depth)) if split else 1.0
    qkv = [(2 / (width + (1 if split else 3) * width)) ** 0.5] * 3
    w12 = [(2 / (width + (1 if split else 2) * hidden)) ** 0.5 * factor] * 2
    for block in model.blocks:
        parts = {
            "attn.qkv": [qkv[0], qkv[1], qkv[2] * factor],
            "attn.proj": [(1 / width) ** 0.5 * factor],
            "mlp.w12": w12,
            "mlp.w3": [(2 / (width + hidden)) ** 0.5 * factor],
        }
        for name, deviations in parts.items():
            matrices = block.get_parameter(f"{name}.weight").chunk(len(deviations))
            for matrix, deviation in zip(matrices, deviations, strict=True):
                assert matrix.std().item() == pytest.approx(deviation, rel=0.02), name
        for name, vector in block.named_parameters():
            if vector.ndim == 1:
                assert torch.all(vector == (1.0 if "norm" in name and "weight" in name else 0.0)), name
    kernel, fan = model.patch_embed.proj, 3 * 8 * 8
    assert kernel.weight.abs().max().item() == pytest.approx((6 / (fan + width)) ** 0.5, rel=0.01)
    assert kernel.bias.abs().max().item() == pytest.approx(fan**-0.5, rel=0.05)
    assert MimStudent(model, 320).head.weight.std().item() == pytest.approx((2 / (width + 320)) ** 0.5, rel=0.02)
    for token in (model.cls_token, model.mask_token, model.pos_embed):
        assert 0.019 < token.abs().max() <= 0.02


def test_post_norm_blocks_start_as_identities() -> None:
    model = tiny(norm_order="post")
    x_BSD = torch.randn(2, 5, 32)
    for block in model.blocks:
        assert torch.equal(block(x_BSD), x_BSD)


def test_stochastic_depth_rises_linearly_and_keeps_the_mean() -> None:
    model = tiny(depth=5, drop_path=0.4)
    assert isinstance(model.blocks[0].drop_path, nn.Identity)
    assert [block.drop_path.p for block in model.blocks[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    drop = model.blocks[4].drop_path.train()
    torch.manual_seed(0)
    out_BSD = drop(torch.ones(20_000, 2, 3))
    per_sample = out_BSD.flatten(1)
    assert torch.all((per_sample == 0).all(1) | torch.isclose(per_sample, torch.tensor(1 / 0.6)).all(1))
    assert (per_sample[:, 0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.015)
    assert torch.equal(drop.eval()(out_BSD), out_BSD)


# --------------------------------------------------------------------------------------------------- layers and masks


@pytest.mark.parametrize("option", OPTIONS)
def test_layers_by_index(option: str) -> None:
    model = tiny(**OPTIONS[option]).eval()
    image_BCYX, mask_BN = images(model)
    outputs: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    features = model(image_BCYX, mask_BN, layers=(0, -1))
    assert list(features.pyramid) == [0, -1]
    for layer, output_BSD in zip((0, -1), outputs, strict=True):
        map_BDyx = features.pyramid[layer]
        assert map_BDyx.shape[2:] == model.grid
        assert torch.equal(map_BDyx.flatten(2).transpose(1, 2), output_BSD[:, 1:])
    assert torch.equal(features.patches, model.norm(outputs[-1])[:, 1:])
    assert torch.equal(features.pooled, features.patches.mean(1))


def test_raster_order() -> None:
    model = tiny(depth=1)
    image_BCYX = torch.zeros(1, 3, 32, 32)
    image_BCYX[:, :, 8:16, 16:24] = 1.0  # row 1, column 2 of 4 x 4
    different = (model.patch_embed(image_BCYX) - model.patch_embed(torch.zeros_like(image_BCYX))).abs().sum(-1)[0]
    assert different.nonzero().flatten().tolist() == [6]
    conv = model.patch_embed.proj(image_BCYX).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.patch_embed(image_BCYX), conv, rtol=1e-5, atol=1e-6)


def pixels_of(mask_BN: torch.Tensor, model: VisionTransformer) -> torch.Tensor:
    mask_Byx = mask_BN.unflatten(1, model.grid)
    return mask_Byx.repeat_interleave(model.stride, 1).repeat_interleave(model.stride, 2)[:, None]


@pytest.mark.parametrize("option", OPTIONS)
def test_hidden_pixels_never_leak(option: str) -> None:
    student = shaken(MimStudent(tiny(**OPTIONS[option]), 8))
    model = student.backbone
    image_BCYX, mask_BN = images(model)
    every_M = torch.arange(mask_BN.numel())
    hidden = pixels_of(mask_BN, model)
    other_BCYX = torch.where(hidden, 100 * torch.randn_like(image_BCYX), image_BCYX)
    predicted = student(image_BCYX, mask_BN, every_M)
    assert torch.equal(student(other_BCYX, mask_BN, every_M), predicted)
    seen_BCYX = torch.where(hidden, image_BCYX, image_BCYX + 1)
    assert not torch.allclose(student(seen_BCYX, mask_BN, every_M), predicted)

    image_BCYX.requires_grad_(True)
    student(image_BCYX, mask_BN, every_M).square().sum().backward()
    hidden = hidden.expand_as(image_BCYX)
    assert torch.all(image_BCYX.grad[hidden] == 0)
    assert (image_BCYX.grad[~hidden] != 0).float().mean() > 0.99


def test_masked_patches_still_know_where_they_are() -> None:
    model = shaken(tiny()).eval()
    image_BCYX, _ = images(model)
    patches_BND = model(image_BCYX, torch.ones(3, 16, dtype=torch.bool)).patches
    assert torch.equal(patches_BND[0], patches_BND[1])
    assert not torch.allclose(patches_BND[0, 0], patches_BND[0, 1])


# ----------------------------------------------------------------------------------------------------------- gradients


def loss_and_gradients(student: MimStudent) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    image_BCYX, mask_BN = images(student.backbone)
    index_M = mask_BN.flatten().nonzero()[:, 0]
    target_MV = torch.randn(len(index_M), 8, generator=torch.Generator().manual_seed(2))
    student.zero_grad()
    torch.manual_seed(3)
    loss = negative_cosine(student(image_BCYX, mask_BN, index_M), target_MV)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_learns(option: str) -> None:
    student = shaken(MimStudent(tiny(**OPTIONS[option]), 8))
    _, gradients = loss_and_gradients(student)
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


@pytest.mark.parametrize("option", ["plain", "shared bias, layer scale", "post-norm", "EVA-02"])
def test_activation_checkpointing_changes_nothing(option: str) -> None:
    chance = {"drop_path": 0.5, "dropout": 0.1, "attention_dropout": 0.1}
    results = []
    for on in (False, True):
        student = shaken(MimStudent(tiny(**OPTIONS[option], **chance, depth=3, activation_checkpointing=on), 8))
        results.append(loss_and_gradients(student))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())


def test_activation_checkpointing_forgets_activations() -> None:
    calls = []
    student = MimStudent(tiny(activation_checkpointing=True), 8)
    student.backbone.blocks[0].register_forward_pre_hook(lambda module, args: calls.append(module.training))
    loss_and_gradients(student)
    assert len(calls) == 2  # once forwards, once more on the way back
    student.eval()
    with torch.no_grad():
        student.backbone(images(student.backbone)[0])
    assert len(calls) == 3


def test_gradient_into_the_patch_embedding_is_scaled() -> None:
    losses, gradients = {}, {}
    for scale in (1.0, 0.1, 0.0):
        student = shaken(MimStudent(tiny(patch_grad_scale=scale), 8))
        losses[scale], gradients[scale] = loss_and_gradients(student)
    torch.testing.assert_close(losses[0.1], losses[1.0])
    assert torch.equal(losses[0.0], losses[1.0])
    for name, full in gradients[1.0].items():
        expected = full * (0.1 if "patch_embed" in name else 1.0)
        torch.testing.assert_close(gradients[0.1][name], expected, rtol=1e-3, atol=1e-6, msg=name)
        if "patch_embed" in name:
            assert gradients[0.0][name] is None
        else:
            torch.testing.assert_close(gradients[0.0][name], full)
    learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, gradient in gradients[0.0].items() if gradient is not None}  # as DDP demands


def test_norms_compute_in_fp32_within_bf16() -> None:
    from openeva.layers.norm import LayerNorm

    norm = LayerNorm(64, eps=1e-6).to(torch.bfloat16)
    x_SD = (1000 + torch.randn(8, 64)).to(torch.bfloat16)
    expected = nn.functional.layer_norm(x_SD.float(), (64,), eps=1e-6).to(torch.bfloat16)
    assert torch.equal(norm(x_SD), expected)
    assert norm(x_SD).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert LayerNorm(64)(x_SD.float()).dtype == torch.float32


def test_bf16_is_close_to_fp32() -> None:
    model = shaken(tiny()).eval()
    image_BCYX, mask_BN = images(model)
    expected = model(image_BCYX, mask_BN).patches
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(image_BCYX, mask_BN).patches.float()
    assert nn.functional.cosine_similarity(actual, expected, dim=-1).min() > 0.999
