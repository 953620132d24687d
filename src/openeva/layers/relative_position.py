"""Relative position biases of BEiT-style transformers: one joint table, or one table per axis.

grid -> index (token pair -> table row) -> bias[H, S, S] that is added to the attention logits. Token 0 is cls.

Source: spec of the official code, section 1.5. The decoupled tables count key minus query, the joint table query
minus key; both signs are kept because released weights depend on them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def joint_index(grid: tuple[int, int]) -> Int[Tensor, "S S"]:
    """Row of the joint table for each (query, key) pair of `1 + y * x` tokens."""
    rows, columns = grid
    y_N, x_N = _coordinates(grid)
    offset_y = y_N[:, None] - y_N[None, :] + rows - 1
    offset_x = x_N[:, None] - x_N[None, :] + columns - 1
    return _with_cls(offset_y * (2 * columns - 1) + offset_x, num_rows=joint_table_rows(grid))


def axis_indices(grid: tuple[int, int]) -> tuple[Int[Tensor, "S S"], Int[Tensor, "S S"]]:
    """Rows of the height table and of the width table for each (query, key) pair."""
    y_N, x_N = _coordinates(grid)
    height = y_N[None, :] - y_N[:, None] + grid[0] - 1
    width = x_N[None, :] - x_N[:, None] + grid[1] - 1
    return _with_cls(height, num_rows=2 * grid[0] + 2), _with_cls(width, num_rows=2 * grid[1] + 2)


def joint_table_rows(grid: tuple[int, int]) -> int:
    """Rows of the joint table: every offset, and three for the pairs with cls."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def _coordinates(grid: tuple[int, int]) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
    y_N, x_N = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return y_N.flatten(), x_N.flatten()


def _with_cls(index_NN: Int[Tensor, "N N"], num_rows: int) -> Int[Tensor, "S S"]:
    """Add cls as token 0: cls -> any is row -3 of the table, any -> cls row -2, cls -> cls row -1."""
    index_SS = torch.nn.functional.pad(index_NN, (1, 0, 1, 0))
    index_SS[0, :] = num_rows - 3
    index_SS[:, 0] = num_rows - 2
    index_SS[0, 0] = num_rows - 1
    return index_SS


class RelativePositionBias(nn.Module):
    """One joint table over (row offset, column offset), zero at the start."""

    index_SS: Tensor

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(joint_table_rows(grid), num_heads))
        self.register_buffer("index_SS", joint_index(grid), persistent=False)

    def forward(self) -> Float[Tensor, "H S S"]:
        """The bias of each head for each (query, key) pair."""
        return self.relative_position_bias_table[self.index_SS].permute(2, 0, 1)


class DecoupledRelativePositionBias(nn.Module):
    """The sum of a table over row offsets and a table over column offsets, zero at the start."""

    height_index_SS: Tensor
    width_index_SS: Tensor

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_for_high = nn.Parameter(torch.zeros(2 * grid[0] + 2, num_heads))
        self.relative_position_bias_for_width = nn.Parameter(torch.zeros(2 * grid[1] + 2, num_heads))
        height_SS, width_SS = axis_indices(grid)
        self.register_buffer("height_index_SS", height_SS, persistent=False)
        self.register_buffer("width_index_SS", width_SS, persistent=False)

    def forward(self) -> Float[Tensor, "H S S"]:
        """The bias of each head for each (query, key) pair."""
        high_SSH = self.relative_position_bias_for_high[self.height_index_SS]
        wide_SSH = self.relative_position_bias_for_width[self.width_index_SS]
        return (high_SSH + wide_SSH).permute(2, 0, 1)
