"""Tensors that follow from the patch grid alone: made when a grid first comes, kept for the next time."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Grid = tuple[int, int]

MOST_GRIDS = 8
"""Kept per table; the oldest goes first."""


class PerGrid:
    """A small cache of tensors by grid and device.

    It is no buffer of a module on purpose: it is not stored, not cast with the weights, and survives `to_empty`.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Grid, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, grid: Grid, device: torch.device, make: Callable[[Grid, torch.device], Tensor]) -> Tensor:
        """The tensor of a grid, made by `make(grid, device)` if need be.

        While compilers trace, nothing is kept: what they see has no values.
        """
        if torch.compiler.is_compiling():
            return make(grid, device)
        key = (grid, device)
        if key not in self._known:
            with torch.no_grad():
                made = make(grid, device)
            if isinstance(made, FakeTensor):
                return made
            while len(self._known) >= MOST_GRIDS:
                del self._known[next(iter(self._known))]
            self._known[key] = made
        return self._known[key]
