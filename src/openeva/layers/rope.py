"""Rotary position embedding (RoPE) of a patch grid, in two dimensions.

grid -> angle of each patch and pair of channels -> (cos, sin) table[S, K/2, 2] -> pairs of q's and k's channels turned

The first half of a head's channels turns by the row, the second half by the column. A grid of another size than the
pre-training one spans the same coordinates, in finer or coarser steps. Token 0 is cls and is not turned.

Paper: EVA-02 (arXiv 2303.11331) section 2.1. Source: spec of EVA-02, section 4.2. Deliberate differences: grids need
not be square; tables are fp32 whatever the model's dtype, never stored, and made for each grid when it first comes.
"""

import torch
from jaxtyping import Float
from torch import Tensor

THETA = 10000.0


def rope_angles(
    grid: tuple[int, int], head_width: int, pretrain_grid: int, device: torch.device | str | None = None
) -> Float[Tensor, "N P"]:
    """Angle in radians of each patch (raster order) and pair of channels.

    Args:
        grid: Rows and columns of patches.
        head_width: K, a multiple of 4.
        pretrain_grid: Side of the grid whose coordinates are 0, 1, 2, ...; others are scaled to its extent.
        device: Of the result.

    Raises:
        ValueError: `head_width` is not a multiple of 4.
    """
    if head_width % 4:
        raise ValueError(f"RoPE needs heads whose width is a multiple of 4, got {head_width}")
    half = head_width // 2
    frequency_F = 1.0 / THETA ** (torch.arange(0, half, 2, device=device).float() / half)
    angle_yF, angle_xF = (
        torch.outer(torch.arange(length, device=device) / length * pretrain_grid, frequency_F) for length in grid
    )
    rows, columns = grid
    return torch.cat([angle_yF[:, None].expand(-1, columns, -1), angle_xF[None].expand(rows, -1, -1)], dim=-1).flatten(
        0, 1
    )


def rope_table(
    grid: tuple[int, int], head_width: int, pretrain_grid: int, device: torch.device | str | None = None
) -> Float[Tensor, "S P 2"]:
    """(cos, sin) of `rope_angles`, behind a first row for cls that turns nothing."""
    angle_SP = torch.nn.functional.pad(rope_angles(grid, head_width, pretrain_grid, device), (0, 0, 1, 0))
    return torch.stack([angle_SP.cos(), angle_SP.sin()], dim=-1)


def rotate(
    x_BSHK: Float[Tensor, "B S H K"], rope: Float[Tensor, "S P 2"] | Float[Tensor, "B S P 2"]
) -> Float[Tensor, "B S H K"]:
    """Turn each pair of neighbouring channels (a, b) to (a cos - b sin, b cos + a sin).

    The turn is computed in fp32, the result has the input's dtype. Called eagerly it is one complex product, which is
    several times faster than its parts; compilers and exporters get the parts, which they fuse.

    Args:
        x_BSHK: Queries or keys of all heads, or both along the axis of heads.
        rope: Table of the tokens, the same for all samples or one per sample.
    """
    pair_BSHP2 = x_BSHK.float().unflatten(-1, (-1, 2))
    table = rope.unsqueeze(-3)
    if torch.compiler.is_compiling():
        a, b = pair_BSHP2.unbind(-1)
        cos, sin = table.unbind(-1)
        turned_BSHP2 = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        turned_BSHP2 = torch.view_as_real(torch.view_as_complex(pair_BSHP2) * torch.view_as_complex(table))
    return turned_BSHP2.flatten(-2).to(x_BSHK.dtype)
