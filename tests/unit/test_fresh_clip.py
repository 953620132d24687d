"""A fresh CLIP: sizes of the towers, first values of the weights (spec sections 1.1 and 1.6), bounds of the scale."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from openeva.backbones.vit import Config as BackboneConfig
from openeva.config import validate
from openeva.heads.clip import CLIP_VARIANTS, ClipConfig, ClipModel
from openeva.tasks import clip

WIDTH, EMBED, DEPTH = 128, 96, 2
TOWER = {"width": WIDTH, "depth": DEPTH, "num_heads": 4}
IMAGE = {**TOWER, "image_size": 64, "patch_size": 8, "mlp_hidden": 256}
TEXT = {**TOWER, "context_length": 32, "vocab_size": 3000}
CONFIG: dict[str, Any] = {"embed_dim": EMBED, "backbone": IMAGE, "text": TEXT}

PARAMETERS = {
    "eva01_clip_b_16": (86_201_600, 63_428_096),
    "eva01_clip_g_14": (1_012_588_928, 123_846_912),
    "eva01_clip_g_14_plus": (1_012_588_928, 354_032_640),
    "eva02_clip_b_16": (86_263_040, 63_428_096),
    "eva02_clip_l_14": (304_105_152, 123_650_304),
    "eva02_clip_l_14_336": (304_432_832, 123_650_304),
    "eva02_clip_e_14": (4_350_556_928, 354_032_640),
    "eva02_clip_e_14_plus": (4_350_556_928, 694_332_160),
}
"""Of the image tower and the text tower; the temperature is one more."""


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_the_sizes_of_both_towers(name: str) -> None:
    with torch.device("meta"):
        model = ClipModel(validate(ClipConfig, {"variant": name}, where=name))
    towers = [sum(p.numel() for p in tower.parameters()) for tower in (model.backbone, model.text)]
    assert tuple(towers) == PARAMETERS[name]
    assert sum(p.numel() for p in model.parameters()) == sum(towers) + 1


def fresh(**changes: Any) -> ClipModel:
    torch.manual_seed(0)
    return ClipModel(validate(ClipConfig, {**CONFIG, **changes}, where="test"))


def std(tensor: Tensor) -> float:
    return tensor.std(correction=0).item()


def close(value: float) -> Any:
    return pytest.approx(value, rel=0.05)


@pytest.mark.parametrize("eva02", [False, True])
def test_a_fresh_image_tower(eva02: bool) -> None:
    """EVA-02's CLIPs are drawn as EVA-01's, not as EVA-02's own pre-training; the projection is next to zero."""
    variant = {"variant": "eva02_b_14", "sub_norm": "mlp_attention"} if eva02 else {}
    tower = fresh(backbone={**variant, **IMAGE}).backbone
    assert std(tower.projection.weight) == close(0.02 * 0.001)
    assert not tower.projection.bias.any()
    assert std(tower.pos_embed) == close(0.02)
    for number, block in enumerate(tower.blocks, start=1):
        last = (2 * number) ** -0.5
        assert std(block.attn.qkv.weight) == close(0.02)
        assert std(block.attn.proj.weight) == close(0.02 * last)
        assert std(block.mlp.last.weight) == close(0.02 * last)
        assert not block.mlp.last.bias.any()
    kernel = tower.patch_embed.proj.weight
    assert kernel.abs().max().item() == pytest.approx((3 * 8 * 8) ** -0.5, rel=0.01)  # PyTorch's own, uniform


def test_norms_after_the_block_start_as_identities() -> None:
    """Zero is the rule of masked pre-training (spec section 1.6 of EVA-01), not of a CLIP drawn anew."""
    tower = fresh(backbone={**IMAGE, "norm_order": "post"}).backbone
    assert all((norm.weight == 1).all() for block in tower.blocks for norm in (block.norm1, block.norm2))
    student = validate(BackboneConfig, {**IMAGE, "norm_order": "post"}).build()
    assert not any(norm.weight.any() for block in student.blocks for norm in (block.norm1, block.norm2))


def test_a_fresh_text_tower() -> None:
    tower = fresh().text
    of_last = WIDTH**-0.5 * (2 * DEPTH) ** -0.5
    assert std(tower.token_embedding.weight) == close(0.02)
    assert std(tower.positional_embedding) == close(0.01)
    assert std(tower.text_projection) == close(WIDTH**-0.5)
    for block in tower.transformer.resblocks:
        assert std(block.attn.in_proj_weight) == close(WIDTH**-0.5)
        assert std(block.attn.out_proj.weight) == close(of_last)
        assert std(block.mlp.c_fc.weight) == close((2 * WIDTH) ** -0.5)
        assert std(block.mlp.c_proj.weight) == close(of_last)
        assert not block.attn.in_proj_bias.any()
        assert not block.attn.out_proj.bias.any()
        assert (block.ln_1.eps, type(block.mlp.gelu), block.mlp.gelu.approximate) == (1e-5, torch.nn.GELU, "none")


def test_every_pair_is_drawn_so_whatever_its_variant() -> None:
    for name in CLIP_VARIANTS:
        assert validate(ClipConfig, {"variant": name}, where=name).backbone.init == "classifier", name


@pytest.mark.parametrize(("start", "end"), [(9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)])
def test_the_scale_stays_between_1_and_100(start: float, end: float) -> None:
    task = validate(clip.Config, CONFIG, where="task").build()
    assert task.model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    with torch.no_grad():
        task.model.logit_scale.fill_(start)
    task.after_step()
    assert task.model.logit_scale.item() == pytest.approx(end)


def loss_and_kept(model: ClipModel, text_BL: Tensor) -> tuple[Tensor, int]:
    """A value of all texts, and how many numbers its backward pass keeps."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.encode_text(text_BL).square().sum()
    return loss, sum(sizes)


def test_activation_checkpointing_of_texts_changes_no_gradient_and_keeps_less() -> None:
    text_BL = torch.randint(1, 2999, (3, 16))
    text_BL[:, -1] = 2999
    found = []
    for on in (False, True):
        model = fresh(text={**TEXT, "activation_checkpointing": on})
        loss, size = loss_and_kept(model, text_BL)
        loss.backward()
        gradients = [p.grad for p in model.text.parameters()]
        assert all(gradient is not None for gradient in gradients)
        found.append((size, loss, gradients))
    (plain, loss, gradients), (less, other, again) = found
    assert less < plain / 3
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(again, gradients)
