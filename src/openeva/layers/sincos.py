"""Fixed sin-cos position table of MAE-style encoders.

Source: spec section 1.7: the first half of the channels encodes the column, the second half the row; each half is
[sin, cos] with frequencies 10000^(-k / (D/4)), computed in float64; the cls row is zero.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def sincos_positions(grid: tuple[int, int], width: int) -> Float[Tensor, "1 S D"]:
    """Position table of `1 + y * x` tokens.

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, got {width}")
    frequency_K = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y_N, x_N = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    halves = [torch.outer(axis_N.flatten(), frequency_K) for axis_N in (x_N, y_N)]
    table_ND = torch.cat([part for half_NK in halves for part in (half_NK.sin(), half_NK.cos())], dim=1)
    return torch.nn.functional.pad(table_ND, (0, 0, 1, 0)).float()[None]
