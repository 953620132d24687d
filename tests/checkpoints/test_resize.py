"""What holds for any table and any grid."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RectBivariateSpline

from openeva.checkpoints.resize import (
    _geometric_offsets,
    _joint_ratio,
    resize_decoupled_relative_position_table,
    resize_patch_kernel,
    resize_position_embedding,
    resize_relative_position_table,
    square_grid,
)

side = st.integers(1, 7)
grid = st.tuples(side, side)
fast = settings(max_examples=25)


def positions(of_grid: tuple[int, int], num_prefix: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, num_prefix + of_grid[0] * of_grid[1], 6).to(dtype)


@fast
@given(grid, grid, st.integers(0, 3), st.sampled_from([torch.float32, torch.float16]))
def test_positions_keep_their_prefix_and_dtype(
    grid_from: tuple[int, int], grid_to: tuple[int, int], num_prefix: int, dtype: torch.dtype
) -> None:
    table = positions(grid_from, num_prefix, dtype)
    resized = resize_position_embedding(table, grid_from, grid_to, num_prefix)
    assert resized.shape == (1, num_prefix + grid_to[0] * grid_to[1], 6)
    assert resized.dtype == dtype
    assert torch.equal(resized[:, :num_prefix], table[:, :num_prefix])


@fast
@given(grid)
def test_the_same_size_changes_nothing(same: tuple[int, int]) -> None:
    table = positions(same)
    assert torch.equal(resize_position_embedding(table, same, same), table)
    joint = torch.randn((2 * same[0] - 1) * (2 * same[1] - 1) + 3, 2)
    assert torch.equal(resize_relative_position_table(joint, same, same), joint)
    axis = torch.randn(2 * same[0] + 2, 2)
    assert torch.equal(resize_decoupled_relative_position_table(axis, same[0], same[0]), axis)
    kernel = torch.randn(4, 3, same[0], same[0]).half()
    assert resize_patch_kernel(kernel, same[0]) is kernel


@fast
@given(grid, grid)
def test_positions_are_resized_row_by_row_and_column_by_column(
    grid_from: tuple[int, int], grid_to: tuple[int, int]
) -> None:
    """Rows and columns swapped before equal rows and columns swapped after: a non-square grid is not read sideways."""

    def swapped(table: torch.Tensor, of_grid: tuple[int, int]) -> torch.Tensor:
        patches = table[:, 1:].unflatten(1, of_grid).transpose(1, 2).flatten(1, 2)
        return torch.cat([table[:, :1], patches], dim=1)

    table = positions(grid_from)
    after = swapped(resize_position_embedding(table, grid_from, grid_to), grid_to)
    before = resize_position_embedding(swapped(table, grid_from), grid_from[::-1], grid_to[::-1])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@fast
@given(st.integers(3, 6), st.integers(1, 9))
def test_relative_tables_keep_their_cls_rows_and_centre(length_from: int, length_to: int) -> None:
    joint = torch.randn((2 * length_from - 1) ** 2 + 3, 2)
    resized = resize_relative_position_table(joint, (length_from,) * 2, (length_to,) * 2)
    assert resized.shape == ((2 * length_to - 1) ** 2 + 3, 2)
    assert torch.equal(resized[-3:], joint[-3:])
    middle = slice((joint.shape[0] - 3) // 2, (joint.shape[0] - 3) // 2 + 1)
    middle_resized = slice((resized.shape[0] - 3) // 2, (resized.shape[0] - 3) // 2 + 1)
    torch.testing.assert_close(resized[middle_resized], joint[middle], rtol=1e-5, atol=1e-5)  # offset 0 stays offset 0

    axis = torch.randn(2 * length_from + 2, 2)
    stretched = resize_decoupled_relative_position_table(axis, length_from, length_to)
    assert stretched.shape == (2 * length_to + 2, 2)
    assert torch.equal(stretched[-3:], axis[-3:])
    torch.testing.assert_close(stretched[length_to - 1], axis[length_from - 1], rtol=1e-5, atol=1e-5)


@fast
@given(*[st.tuples(st.integers(3, 6), st.integers(3, 6)) for _ in range(2)])
def test_relative_tables_of_any_grid_follow_an_interpolating_spline(
    grid_from: tuple[int, int], grid_to: tuple[int, int]
) -> None:
    """The spline of scipy's regular grids, axis by axis; the rows of a table are the vertical offsets."""
    table = torch.randn((2 * grid_from[0] - 1) * (2 * grid_from[1] - 1) + 3, 2, requires_grad=True)
    resized = resize_relative_position_table(table, grid_from, grid_to)
    axes = []
    for size_from, size_to in zip(grid_from, grid_to, strict=True):
        if size_from == size_to:
            source = wanted = np.arange(1.0 - size_from, size_from)
        else:
            source = _geometric_offsets(2 * size_from - 1, _joint_ratio(2 * size_from - 1, 2 * size_to - 1))
            wanted = np.arange(1.0 - size_to, size_to).clip(source[0], source[-1])
        axes.append((source, wanted))
    (y_from, y_to), (x_from, x_to) = axes
    for head in range(2):
        values = table[:-3, head].detach().double().numpy().reshape(len(y_from), len(x_from))
        expected = RectBivariateSpline(y_from, x_from, values)(y_to, x_to)
        actual = resized[:-3, head].detach().numpy().reshape(expected.shape)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    resized.sum().backward()
    assert torch.isfinite(table.grad).all()
    assert (table.grad[-3:] == 1).all()


def test_a_resized_constant_kernel_keeps_its_value() -> None:
    """No correction of the magnitude: the sum over the kernel grows with its area."""
    kernel = torch.full((2, 3, 14, 14), 0.5)
    torch.testing.assert_close(resize_patch_kernel(kernel, 16), torch.full((2, 3, 16, 16), 0.5))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: resize_position_embedding(positions((4, 4)), (4, 5), (6, 6)), "17 rows is not one of a 4x5 grid"),
        (lambda: resize_relative_position_table(torch.zeros(24, 2), (4, 2), (4, 6)), "fewer than 3 patches"),
        (lambda: resize_relative_position_table(torch.zeros(12, 2), (2, 2), (4, 4)), "fewer than 3 patches"),
        (
            lambda: resize_relative_position_table(torch.zeros(12, 2), (3, 3), (4, 4)),
            "12 rows is not one of a 3x3 grid",
        ),
        (lambda: resize_decoupled_relative_position_table(torch.zeros(6, 2), 2, 4), "fewer than 3 patches"),
        (lambda: resize_decoupled_relative_position_table(torch.zeros(6, 2), 3, 4), "not one of 3 patches"),
    ],
)
def test_impossible_sizes_are_explained(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_square_grid() -> None:
    assert square_grid(16) == (4, 4)
    assert square_grid(15) is None
    assert square_grid(0) is None
