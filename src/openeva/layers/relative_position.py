"""Relative position biases of BEiT-style transformers: one joint table, or one table per axis.

grid -> index (token pair -> table row) -> bias[H, S, S] that is added to the attention logits. Token 0 is cls.

Source: spec of the official code, section 1.5. The decoupled tables count key minus query, the joint table query
minus key; both signs are kept because released weights depend on them. Deliberate differences: index tables are never
stored; a module can look up another grid than its own, through its table resized as on loading.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openeva.layers.per_grid import PerGrid

Grid = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where tokens stand.

    No tuple on purpose: FSDP casts the tensors in a module's arguments, those in tuples too, to the weights' dtype,
    and rotary angles need more digits than bf16 has.

    Attributes:
        grid: Rows and columns of patches.
        token_BS: Index of each token among cls and the patches of `grid`; None for all of them in order.
        rope: Table of `layers/rope.py` for these tokens; None turns nothing.
    """

    grid: Grid
    token_BS: Int[Tensor, "B S"] | None = None
    rope: Float[Tensor, "S P 2"] | Float[Tensor, "B S P 2"] | None = None


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


class RelativePosition(nn.Module):
    """What both kinds share: a bias that is looked up by index tables, for the own grid or another one."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, place: Place | None = None) -> Float[Tensor, "H S S"] | Float[Tensor, "B H S S"]:
        """The bias of each head for each (query, key) pair: of all tokens of the own grid, or of those of `place`."""
        grid = self.grid if place is None else place.grid
        bias_HSS = self._bias(grid)
        if place is None or place.token_BS is None:
            return bias_HSS
        token_BS = place.token_BS
        return bias_HSS[:, token_BS[:, :, None], token_BS[:, None, :]].transpose(0, 1)

    def _bias(self, grid: Grid) -> Tensor:
        raise NotImplementedError


class RelativePositionBias(RelativePosition):
    """One joint table over (row offset, column offset), zero at the start.

    Args:
        grid: Rows and columns of patches that the table is for.
        num_heads: H.
        resize: `(table, own grid, wanted grid) -> table` for other grids; None where none ever comes.
    """

    index_SS: Tensor

    def __init__(
        self, grid: Grid, num_heads: int, resize: Callable[[Tensor, Grid, Grid], Tensor] | None = None
    ) -> None:
        super().__init__(grid)
        self.resize = resize
        self.relative_position_bias_table = nn.Parameter(torch.zeros(joint_table_rows(grid), num_heads))
        self.register_buffer("index_SS", joint_index(grid), persistent=False)
        self.indices = PerGrid()

    def _bias(self, grid: Grid) -> Tensor:
        table_RH: Tensor = self.relative_position_bias_table
        index_SS = self.index_SS
        if grid != self.grid:
            assert self.resize is not None
            table_RH = self.resize(table_RH, self.grid, grid)
            index_SS = self.indices.get(grid, table_RH.device, lambda grid, device: joint_index(grid).to(device))
        return table_RH[index_SS].permute(2, 0, 1)


class DecoupledRelativePositionBias(RelativePosition):
    """The sum of a table over row offsets and a table over column offsets, zero at the start.

    Args:
        grid: Rows and columns of patches that the tables are for.
        num_heads: H.
        resize: `(table, own length, wanted length) -> table` for other grids; None where none ever comes.
    """

    height_index_SS: Tensor
    width_index_SS: Tensor

    def __init__(self, grid: Grid, num_heads: int, resize: Callable[[Tensor, int, int], Tensor] | None = None) -> None:
        super().__init__(grid)
        self.resize = resize
        self.relative_position_bias_for_high = nn.Parameter(torch.zeros(2 * grid[0] + 2, num_heads))
        self.relative_position_bias_for_width = nn.Parameter(torch.zeros(2 * grid[1] + 2, num_heads))
        height_SS, width_SS = axis_indices(grid)
        self.register_buffer("height_index_SS", height_SS, persistent=False)
        self.register_buffer("width_index_SS", width_SS, persistent=False)
        self.indices = PerGrid()

    def _bias(self, grid: Grid) -> Tensor:
        high_RH: Tensor = self.relative_position_bias_for_high
        wide_RH: Tensor = self.relative_position_bias_for_width
        height_SS, width_SS = self.height_index_SS, self.width_index_SS
        if grid != self.grid:
            assert self.resize is not None
            high_RH = self.resize(high_RH, self.grid[0], grid[0])
            wide_RH = self.resize(wide_RH, self.grid[1], grid[1])
            height_SS, width_SS = self.indices.get(
                grid, high_RH.device, lambda grid, device: torch.stack(axis_indices(grid)).to(device)
            ).unbind(0)
        return (high_RH[height_SS] + wide_RH[width_SS]).permute(2, 0, 1)
