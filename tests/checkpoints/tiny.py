"""A tiny official EVA-01 state dict, written down from the table of the specification (section 1.8)."""

from typing import Any

import torch
from torch import Tensor

WIDTH, HEADS, HIDDEN, DEPTH, PATCH, PREDICT = 16, 2, 40, 2, 4, 12


def official(
    *,
    grid: int = 4,
    qkv_bias: str = "qv",
    relative: str = "none",
    layer_scale: bool = False,
    head: str = "mim",
    index: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """`relative`: none, shared, per_block, shared_decoupled or per_block_decoupled; `head`: mim, classifier or none."""
    generator = torch.Generator().manual_seed(0)
    tokens = 1 + grid * grid
    shapes: dict[str, Any] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, tokens, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
    }
    tables, joint_index = _tables(relative, grid)
    if relative.startswith("shared"):
        shapes |= {f"rel_pos_bias.{name}": shape for name, shape in tables.items()}
    for i in range(DEPTH):
        block = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.weight": (WIDTH,), f"{block}{norm}.bias": (WIDTH,)}
        if qkv_bias == "qv":
            shapes |= {f"{block}attn.q_bias": (WIDTH,), f"{block}attn.v_bias": (WIDTH,)}
        shapes |= {f"{block}attn.qkv.weight": (3 * WIDTH, WIDTH)}
        if qkv_bias == "full":
            shapes |= {f"{block}attn.qkv.bias": (3 * WIDTH,)}
        shapes |= {f"{block}attn.proj.weight": (WIDTH, WIDTH), f"{block}attn.proj.bias": (WIDTH,)}
        shapes |= {f"{block}mlp.fc1.weight": (HIDDEN, WIDTH), f"{block}mlp.fc1.bias": (HIDDEN,)}
        shapes |= {f"{block}mlp.fc2.weight": (WIDTH, HIDDEN), f"{block}mlp.fc2.bias": (WIDTH,)}
        if layer_scale:
            shapes |= {f"{block}gamma_1": (WIDTH,), f"{block}gamma_2": (WIDTH,)}
        if relative == "per_block":
            shapes |= {f"{block}attn.{name}": shape for name, shape in tables.items()}
        if relative == "per_block_decoupled":
            shapes |= {f"{block}attn.rel_pos_bias.{name}": shape for name, shape in tables.items()}
    if head == "mim":
        shapes |= {"mask_token": (1, 1, WIDTH), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
        shapes |= {"lm_head.weight": (PREDICT, WIDTH), "lm_head.bias": (PREDICT,)}
    elif head == "classifier":
        shapes |= {"fc_norm.weight": (WIDTH,), "fc_norm.bias": (WIDTH,), "head.weight": (5, WIDTH), "head.bias": (5,)}
    else:
        shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    result = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
    if index:
        for key in list(result):
            module, table = key.rpartition(".")[::2]
            if table in joint_index:
                result[f"{module}.{joint_index[table]}"] = torch.zeros(tokens, tokens, dtype=torch.int64)
    return result


def _tables(relative: str, grid: int) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    index = {
        "relative_position_bias_table": "relative_position_index",
        "relative_position_bias_for_high": "relative_position_high_index",
        "relative_position_bias_for_width": "relative_position_width_index",
    }
    if relative == "none":
        return {}, index
    if relative.endswith("decoupled"):
        names = ("relative_position_bias_for_high", "relative_position_bias_for_width")
        return dict.fromkeys(names, (2 * grid + 2, HEADS)), index
    return {"relative_position_bias_table": ((2 * grid - 1) ** 2 + 3, HEADS)}, index


def without_index(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state_dict.items() if not key.endswith("_index")}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key
