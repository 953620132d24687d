"""Resizing of position tables, relative position tables and patch kernels: the one place that does it.

table or kernel of one grid -> the same for another one. Only what depends on the grid changes; prefix rows are kept.

Source: the official loaders and the offline 14 -> 16 converter (spec sections 1.9.4 to 1.9.6); of video models, section
2.3 and 2.4 of video, with the spatial resize that the official code lacks where an image's grid differs. timm's
functions of the same purpose differ: they resize with antialiasing, and patch kernels by a pseudo-inverse.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.interpolate import make_interp_spline
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

Grid = tuple[int, int]
"""(rows, columns) of patches."""
AnyGrid = tuple[int, ...]
"""The same, or (time slots, rows, columns) of the patches of a clip."""

NUM_CLS_ROWS = 3
"""Last rows of every relative position table: cls to any, any to cls, cls to cls."""

DECOUPLED_RATIO = 1.0903078
"""Ratio of the geometric progression of decoupled tables; the joint rule finds it for a 14 x 14 -> 24 x 24 grid."""


def square_grid(num_patches: int) -> Grid | None:
    """The square grid of this many patches, or None where there is none."""
    side = math.isqrt(max(num_patches, 0))
    return (side, side) if side > 0 and side * side == num_patches else None


def resize_position_embedding(
    pos_1SD: Float[Tensor, "1 S D"], grid_from: AnyGrid, grid_to: AnyGrid, num_prefix: int = 1
) -> Float[Tensor, "1 S2 D"]:
    """Resize learned positions of a patch grid: bicubic in fp32, without antialiasing, cast back to the given dtype.

    An image's positions are repeated for each time slot of a clip. A clip's are resized trilinearly.

    Args:
        pos_1SD: Prefix rows, then one row per patch in raster order, time slot after time slot.
        grid_from: Grid of the given table.
        grid_to: Wanted grid.
        num_prefix: Leading rows that are kept as they are (the cls token).

    Raises:
        ValueError: The table does not have the rows of `grid_from`, or is a clip's and an image's is wanted.
    """
    rows = num_prefix + math.prod(grid_from)
    if pos_1SD.shape[1] != rows:
        raise ValueError(
            f"a position table of {pos_1SD.shape[1]} rows is not one of a {_text(grid_from)} grid with {num_prefix} "
            f"prefix rows ({rows}); pass the grid that it was made for"
        )
    if grid_from == grid_to:
        return pos_1SD
    if len(grid_from) > len(grid_to):
        raise ValueError(
            "these positions are those of a model of clips, and the model takes images: give it num_frames"
        )
    if len(grid_from) < len(grid_to):
        pos_1SD = resize_position_embedding(pos_1SD, grid_from, grid_to[1:], num_prefix)
        return torch.cat([pos_1SD[:, :num_prefix], pos_1SD[:, num_prefix:].repeat(1, grid_to[0], 1)], dim=1)
    patches_1Dyx = pos_1SD[:, num_prefix:].transpose(1, 2).unflatten(2, grid_from).float()
    mode = "bicubic" if len(grid_to) == 2 else "trilinear"
    resized_1Dyx = F.interpolate(patches_1Dyx, size=grid_to, mode=mode, align_corners=False)
    resized_1ND = resized_1Dyx.flatten(2).transpose(1, 2).to(pos_1SD.dtype)
    return torch.cat([pos_1SD[:, :num_prefix], resized_1ND], dim=1)


def resize_patch_kernel(kernel_DCYX: Float[Tensor, "D C *T Y X"], patch_size: int) -> Float[Tensor, "D C *T Y2 X2"]:
    """Resize the kernel of the patch embedding: bicubic, without antialiasing, without a correction of its magnitude.

    A resized kernel is fp32 whatever the given dtype, as the official converter leaves it.
    """
    if kernel_DCYX.shape[-2:] == (patch_size, patch_size):
        return kernel_DCYX
    flat_DCYX = kernel_DCYX.float().flatten(1, -3)
    resized_DCYX = F.interpolate(flat_DCYX, size=(patch_size, patch_size), mode="bicubic", align_corners=False)
    return resized_DCYX.reshape(*kernel_DCYX.shape[:-2], patch_size, patch_size)


def inflate_patch_kernel(kernel_DCYX: Float[Tensor, "D C Y X"], tubelet: int) -> Float[Tensor, "D C t Y X"]:
    """The kernel of clips that sees the mean of a tubelet's frames as the given one sees an image."""
    return kernel_DCYX[:, :, None].repeat(1, 1, tubelet, 1, 1) / tubelet


def resize_relative_position_table(
    table_RH: Float[Tensor, "R H"], grid_from: Grid, grid_to: Grid
) -> Float[Tensor, "R2 H"]:
    """Resize a joint table: per head a cubic spline over offsets that grow geometrically with the distance.

    The three cls rows are kept. The result is fp32, and the table's gradient flows through it. Grids that are not
    square, which the official code cannot resize, follow the same rule along each axis.

    Args:
        table_RH: `(2 y - 1)(2 x - 1) + 3` rows, one column per head.
        grid_from: Grid of the given table.
        grid_to: Wanted grid.

    Raises:
        ValueError: The table does not have the rows of `grid_from`, or an axis that changes is too short for a spline.
    """
    rows = (2 * grid_from[0] - 1) * (2 * grid_from[1] - 1) + NUM_CLS_ROWS
    if table_RH.shape[0] != rows:
        raise ValueError(
            f"a relative position table of {table_RH.shape[0]} rows is not one of a {_text(grid_from)} grid ({rows} "
            "rows); pass the grid that it was made for"
        )
    if grid_from == grid_to:
        return table_RH
    offsets_YXH = table_RH[:-NUM_CLS_ROWS].double().unflatten(0, (2 * grid_from[0] - 1, 2 * grid_from[1] - 1))
    for axis in (0, 1):
        if grid_from[axis] != grid_to[axis]:
            spline = _spline(grid_from[axis], grid_to[axis], decoupled=False).to(table_RH.device)
            offsets_YXH = torch.tensordot(spline, offsets_YXH, dims=([1], [axis])).movedim(0, axis)
    return torch.cat([offsets_YXH.flatten(0, 1).float(), table_RH[-NUM_CLS_ROWS:].float()])


def resize_decoupled_relative_position_table(
    table_RH: Float[Tensor, "R H"], length_from: int, length_to: int
) -> Float[Tensor, "R2 H"]:
    """Resize a table of one axis: a cubic spline over offsets that grow geometrically, extrapolated where it ends.

    The three cls rows are kept. The result is fp32, and the table's gradient flows through it.

    Args:
        table_RH: `2 length + 2` rows, one column per head.
        length_from: Patches along the axis that the table was made for.
        length_to: Wanted patches along the axis.

    Raises:
        ValueError: The table does not have the rows of `length_from`, or that is too small for a cubic spline.
    """
    if table_RH.shape[0] != 2 * length_from - 1 + NUM_CLS_ROWS:
        raise ValueError(
            f"a decoupled relative position table of {table_RH.shape[0]} rows is not one of {length_from} patches "
            f"({2 * length_from + 2} rows); pass the grid that it was made for"
        )
    if length_from == length_to:
        return table_RH
    spline = _spline(length_from, length_to, decoupled=True).to(table_RH.device)
    return torch.cat([(spline @ table_RH[:-NUM_CLS_ROWS].double()).float(), table_RH[-NUM_CLS_ROWS:].float()])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _spline(length_from: int, length_to: int, *, decoupled: bool) -> Float[Tensor, "to from"]:
    """The matrix that takes values at one axis' offsets to values at the offsets of another length.

    A cubic interpolating spline is linear in its values, so that a matrix per pair of lengths is all there is to it.
    """
    with unset_fake_temporarily():
        return torch.from_numpy(_spline_values(length_from, length_to, decoupled))


@functools.cache
def _spline_values(length_from: int, length_to: int, decoupled: bool) -> np.ndarray:
    size_from, size_to = 2 * length_from - 1, 2 * length_to - 1
    if size_from < 5:
        raise ValueError(
            f"relative positions of fewer than 3 patches per axis ({size_from} offsets) cannot be resized by a cubic "
            "spline; keep the grid, or use relative_position: none"
        )
    source = _geometric_offsets(size_from, DECOUPLED_RATIO if decoupled else _joint_ratio(size_from, size_to))
    wanted = _integer_offsets(size_to)
    if not decoupled:
        # PARITY: the ratio is capped, so wanted offsets can lie outside the source's; they are clamped.
        wanted = np.clip(wanted, source[0], source[-1])
    return make_interp_spline(source, np.eye(size_from), k=3)(wanted)


def _joint_ratio(size_from: int, size_to: int) -> float:
    """Ratio at which the source's offsets reach as far as the wanted ones, by bisection within [1.01, 1.5]."""
    low, high = 1.01, 1.5
    ratio = low
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if sum(ratio**k for k in range(size_from // 2)) > size_to // 2:
            high = ratio
        else:
            low = ratio
    return ratio


def _geometric_offsets(size: int, ratio: float) -> np.ndarray:
    """`size` offsets around 0 whose distances grow by `ratio`: ..., -(1 + r), -1, 0, 1, 1 + r, ..."""
    positive = np.cumsum(ratio ** np.arange(size // 2))
    return np.concatenate([-positive[::-1], [0.0], positive])


def _integer_offsets(size: int) -> np.ndarray:
    return np.arange(-(size // 2), size // 2 + 1, dtype=np.float64)


def _text(grid: AnyGrid) -> str:
    return "x".join(map(str, grid))
