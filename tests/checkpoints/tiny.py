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


def official_eva02(
    *,
    sub_norm: bool,
    head: str = "mim",
    grid: int = 4,
    rope: str = "all",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """EVA-02: base and large with sub-LN (separate matrices), tiny and small without.

    `rope`: tables in the model and every "all" block, the "old" ones with an axis per axis of the grid, or "none".
    """
    weights = official(grid=grid, head=head, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for i in range(DEPTH):
        block = f"blocks.{i}."
        for layer in ("fc1", "fc2"):
            del weights[f"{block}mlp.{layer}.weight"], weights[f"{block}mlp.{layer}.bias"]
        shapes: dict[str, tuple[int, ...]] = {"w3.weight": (WIDTH, HIDDEN), "w3.bias": (WIDTH,)}
        if sub_norm:
            qkv = weights.pop(f"{block}attn.qkv.weight").chunk(3)
            weights |= {f"{block}attn.{n}_proj.weight": part.clone() for n, part in zip("qkv", qkv, strict=True)}
            shapes |= {f"w{n}.weight": (HIDDEN, WIDTH) for n in (1, 2)} | {f"w{n}.bias": (HIDDEN,) for n in (1, 2)}
            shapes |= {"ffn_ln.weight": (HIDDEN,), "ffn_ln.bias": (HIDDEN,)}
        else:
            shapes |= {"w12.weight": (2 * HIDDEN, WIDTH), "w12.bias": (2 * HIDDEN,)}
        for name, shape in shapes.items():
            weights[f"{block}mlp.{name}"] = torch.randn(shape, generator=generator).to(dtype)
    if rope != "none":
        table = _rope(grid).to(dtype)
        if rope == "old":
            table = table.unflatten(1, (grid, grid))
        for module in ("rope.", *(f"blocks.{i}.attn.rope." for i in range(DEPTH))):
            weights |= {f"{module}freqs_cos": table[0].clone(), f"{module}freqs_sin": table[1].clone()}
    return weights


def _rope(grid: int, pretrain_grid: int = 16) -> Tensor:
    """Written down from section 4.2 of the specification, one entry after the other."""
    half = WIDTH // HEADS // 2
    rows = []
    for row in range(grid):
        for column in range(grid):
            angles = []
            for place in (row, column):
                for k in range(half // 2):
                    omega = torch.tensor(1.0) / 10000.0 ** (torch.tensor(2.0 * k) / half)
                    angles += 2 * [torch.tensor(float(place)) / grid * pretrain_grid * omega]
            rows.append(torch.stack(angles))
    angle_NK = torch.stack(rows)
    return torch.stack([angle_NK.cos(), angle_NK.sin()])


def without_index(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state_dict.items() if not key.endswith("_index")}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key
