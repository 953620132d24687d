"""Images of any size and shape, some patches only, rotary positions."""

import math
from typing import Any

import pytest
import torch

from openeva.backbones.vit import Config, VisionTransformer
from openeva.checkpoints.load import load_into
from openeva.layers.rope import rope_table, rotate

TINY: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 48,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "learned": {},
    "sincos": {"positions": "sincos"},
    "joint": {"relative_position": "shared", "positions": "none"},
    "joint per block": {"relative_position": "per_block"},
    "decoupled": {"relative_position": "shared_decoupled"},
    "decoupled per block": {"relative_position": "per_block_decoupled"},
    "EVA-02": {"rope_grid": 4, "mlp": "swiglu", "sub_norm": "mlp"},
}


def build(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = Config(**{**TINY, **changes}).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", [(48, 48), (24, 64), (56, 8)], ids=str)
def test_a_dynamic_model_is_the_one_built_for_the_size(option: str, size: tuple[int, int]) -> None:
    """Whether positions are adapted once on loading or for each image: the same features and the same gradients."""
    dynamic = build(**OPTIONS[option], dynamic_size=True)
    fixed = Config(**{**TINY, **OPTIONS[option], "image_size": size}).build().eval()
    weights = {f"backbone.{key}": tensor for key, tensor in dynamic.state_dict().items()}
    load_into(fixed, weights, part="backbone", grid=fixed.grid, source_grid=dynamic.grid)
    image_BCYX = torch.randn(2, 3, *size)
    expected, actual = fixed(image_BCYX, layers=(0,)), dynamic(image_BCYX, layers=(0,))
    assert actual.grid == fixed.grid == (size[0] // 8, size[1] // 8)
    assert actual.pyramid[0].shape[2:] == fixed.grid
    torch.testing.assert_close(actual.patches, expected.patches)
    torch.testing.assert_close(actual.cls, expected.cls)
    expected.patches.square().sum().backward()
    actual.patches.square().sum().backward()
    gradients = dict(fixed.named_parameters())
    for name, parameter in dynamic.named_parameters():
        if name == "mask_token":
            continue
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.any(), name
        if parameter.shape == gradients[name].shape:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_masks_follow_the_size() -> None:
    model = build(**OPTIONS["EVA-02"], dynamic_size=True)
    image_BCYX, mask_BN = torch.randn(2, 3, 16, 40), torch.rand(2, 10) < 0.5
    changed = torch.where(mask_BN.view(2, 1, 2, 5).repeat_interleave(8, 2).repeat_interleave(8, 3), 9.0, image_BCYX)
    assert torch.equal(model(image_BCYX, mask_BN).patches, model(changed, mask_BN).patches)


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [({"dynamic_size": True}, (33, 40), r"\(33, 40\) pixels cannot be cut into patches of 8; .* to \(40, 40\)"),
     ({}, (40, 32), r"image_size=\(40, 32\), or with dynamic_size=true"),
     ({"image_size": 16, "relative_position": "shared", "dynamic_size": True}, (32, 32), "fewer than 3 patches")],
)  # fmt: skip
def test_sizes_that_no_model_takes(options: dict[str, Any], size: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(**options)(torch.zeros(1, 3, *size))


def test_many_sizes_do_not_fill_the_memory() -> None:
    model = build(**OPTIONS["EVA-02"], dynamic_size=True)
    with torch.no_grad():
        for columns in range(1, 30):
            model(torch.zeros(1, 3, 8, 8 * columns))
    assert len(model.rope_tables) <= 8


# ---------------------------------------------------------------------------------------------------- some patches only


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (16, 56)], ids=str)
def test_visible_patches_in_any_order_know_where_they_are(option: str, size: tuple[int, int]) -> None:
    model = build(**OPTIONS[option], dynamic_size=True)
    image_BCYX = torch.randn(2, 3, *size)
    num_patches = size[0] * size[1] // 64
    order_BN = torch.stack([torch.randperm(num_patches) for _ in range(2)])
    every, shuffled = model(image_BCYX), model.forward_visible(image_BCYX, order_BN)
    torch.testing.assert_close(shuffled.patches, every.patches.take_along_dim(order_BN[:, :, None], dim=1))
    torch.testing.assert_close(shuffled.cls, every.cls)


def test_what_is_not_visible_plays_no_part() -> None:
    model = build(**OPTIONS["EVA-02"])
    image_BCYX, visible_BM = torch.randn(1, 3, 32, 32), torch.tensor([[5, 0, 15]])
    some = model.forward_visible(image_BCYX, visible_BM)
    assert some.patches.shape == (1, 3, 32)
    seen_BCYX = torch.zeros_like(image_BCYX)
    for index in visible_BM[0].tolist():
        y, x = 8 * (index // 4), 8 * (index % 4)
        seen_BCYX[:, :, y : y + 8, x : x + 8] = image_BCYX[:, :, y : y + 8, x : x + 8]
    assert torch.equal(model.forward_visible(seen_BCYX, visible_BM).patches, some.patches)
    assert not torch.allclose(model.forward_visible(seen_BCYX, torch.tensor([[5, 1, 15]])).patches, some.patches)
    assert model.flops(3) < model.flops() / 3


# ------------------------------------------------------------------------------------------------------------ rotary


def test_attention_between_patches_depends_on_their_offset_alone() -> None:
    """Queries and keys that are all the same: turned, their product knows how far apart the patches are, in 2-D."""
    rope = rope_table((5, 7), 16, 16)
    q_1SHK, k_1SHK = (torch.randn(1, 1, 1, 16).expand(1, 36, 1, 16) for _ in range(2))
    product = torch.einsum("bshk,bthk->st", rotate(q_1SHK, rope), rotate(k_1SHK, rope))[1:, 1:].view(5, 7, 5, 7)
    for (y, x), (other_y, other_x) in [((0, 0), (1, 2)), ((3, 4), (4, 6)), ((2, 1), (3, 3))]:
        torch.testing.assert_close(product[y, x, other_y, other_x], product[0, 0, 1, 2], rtol=1e-4, atol=1e-4)
    assert not torch.isclose(product[0, 0, 1, 2], product[1, 2, 0, 0])


def test_grids_of_other_sizes_span_the_coordinates_of_pre_training() -> None:
    fine, coarse = rope_table((32, 48), 16, 16)[1:], rope_table((16, 16), 16, 16)[1:]
    every_second = fine.view(32, 48, 8, 2)[::2, ::3]
    torch.testing.assert_close(every_second, coarse.view(16, 16, 8, 2), rtol=1e-5, atol=1e-5)
    cos, sin = coarse.view(16, 16, 8, 2)[3, 5, 0].tolist()
    assert (cos, sin) == pytest.approx((math.cos(3), math.sin(3)), abs=1e-6)  # first half: rows
    assert coarse.view(16, 16, 8, 2)[3, 5, 4, 0].item() == pytest.approx(math.cos(5), abs=1e-6)


def test_cls_is_not_turned_and_values_keep_their_dtype() -> None:
    x_BSHK = torch.randn(2, 10, 3, 8).to(torch.bfloat16)
    turned = rotate(x_BSHK, rope_table((3, 3), 8, 16))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned[:, 0], x_BSHK[:, 0])
    assert not torch.equal(turned[:, 5], x_BSHK[:, 5])


def test_tables_stay_precise_in_a_model_of_low_precision() -> None:
    """bf16 tables would know places of a large grid to two digits only."""
    model = build(**OPTIONS["EVA-02"]).to(torch.bfloat16)
    model(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16))
    table = model._rope(model.grid, torch.device("cpu"))
    assert torch.equal(table, rope_table((4, 4), 16, 4))
    assert not any("rope" in name for name in model.state_dict())
    arguments: list[Any] = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: arguments.extend(args[1:]))
    model(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16))
    assert not any(isinstance(argument, torch.Tensor | tuple) for argument in arguments)  # which FSDP would cast
