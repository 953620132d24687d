"""Which patches are hidden: mask generators, chosen by name in a recipe.

`random.Random` -> generator of a patch grid -> boolean mask `[y, x]`, true = masked.

Source: the block-wise generator follows the official one call by call (area, log-aspect, top, left), so that equal
seeds give equal masks. Paper: BEiT (arXiv 2106.08254), algorithm 1; EVA (arXiv 2211.07636), section 2.2.
"""

import math
import random
from typing import Annotated, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from openeva.config import Config

Mask = npt.NDArray[np.bool_]


@runtime_checkable
class MaskGenerator(Protocol):
    """Draws masks of one grid.

    Attributes:
        grid: `(y, x)`, rows and columns of patches.
        max_masked: No mask ever hides more patches than this.
    """

    grid: tuple[int, int]
    max_masked: int

    def __call__(self, rng: random.Random) -> Mask:
        """A new mask `[y, x]`, true = masked."""
        ...


class BlockMasking(Config):
    """Union of random rectangles.

    Attributes:
        num_masked: M, upper bound on the number of masked patches; often missed by a few, never exceeded.
        min_block: Least area of a rectangle in patches (the last ones may be smaller).
        max_block: Largest area; None = `num_masked`.
        aspect: Range of height / width.
        tries: Draws per rectangle; when all of them fail the mask is finished.
        equal_counts: Whether every mask hides the same number of patches, so that encoders can leave them out.
    """

    equal_counts: ClassVar[bool] = False

    name: Literal["block"] = "block"
    num_masked: int = Field(gt=0)
    min_block: int = Field(16, gt=0)
    max_block: int | None = Field(None, gt=0)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    tries: int = Field(10, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "BlockMasking":
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect is (least, largest) height / width with 0 < least <= largest, not {self.aspect}")
        return self

    def build(self, grid: tuple[int, int]) -> "BlockMaskGenerator":
        """Generator for a grid `(y, x)`.

        Raises:
            ValueError: The grid has no more patches than are to be masked.
        """
        return BlockMaskGenerator(self, grid)


class RandomMasking(Config):
    """Uniformly random patches.

    Attributes:
        ratio: Share of masked patches; `floor(N * (1 - ratio))` stay visible.
        equal_counts: As in `BlockMasking`.
    """

    equal_counts: ClassVar[bool] = True

    name: Literal["random"] = "random"
    ratio: float = Field(0.75, gt=0, lt=1)

    def build(self, grid: tuple[int, int]) -> "RandomMaskGenerator":
        """Generator for a grid `(y, x)`."""
        return RandomMaskGenerator(self.ratio, grid)


class AlternateMasking(Config):
    """Every second patch, always the same: the mask of the validation loss (even flattened indices are masked)."""

    equal_counts: ClassVar[bool] = True

    name: Literal["alternate"] = "alternate"

    def build(self, grid: tuple[int, int]) -> "AlternateMaskGenerator":
        """Generator for a grid `(y, x)`."""
        return AlternateMaskGenerator(grid)


Masking = Annotated[BlockMasking | RandomMasking | AlternateMasking, Field(discriminator="name")]
"""Field type of a recipe: `masking: {name: block, num_masked: 105}`."""


class BlockMaskGenerator:
    """See `BlockMasking`. The mask is one whole number with a bit per patch, so that counting is one operation."""

    def __init__(self, config: BlockMasking, grid: tuple[int, int]) -> None:
        if config.num_masked >= grid[0] * grid[1]:
            raise ValueError(
                f"num_masked={config.num_masked} must be less than the {grid[0]} x {grid[1]} patches of the grid"
            )
        self.grid = grid
        self.max_masked = config.num_masked
        self._min_block, self._max_block = config.min_block, config.max_block or config.num_masked
        self._log_aspect = (math.log(config.aspect[0]), math.log(config.aspect[1]))
        self._tries = config.tries
        self._rows = [(1 << w) - 1 for w in range(grid[1] + 1)]
        self._columns = [sum(1 << grid[1] * i for i in range(h)) for h in range(grid[0] + 1)]

    def __call__(self, rng: random.Random) -> Mask:
        """A new mask `[y, x]`, true = masked."""
        mask = count = 0
        while count < self.max_masked:
            block = self._block(rng, mask, min(self.max_masked - count, self._max_block))
            if not block:
                break
            mask |= block
            count = mask.bit_count()
        return _to_array(mask, self.grid)

    def _block(self, rng: random.Random, mask: int, budget: int) -> int:
        """A rectangle that adds between 1 and `budget` patches to the mask, or 0 when all tries failed."""
        height, width = self.grid
        uniform, randint = rng.uniform, rng.randint
        for _ in range(self._tries):
            area = uniform(self._min_block, budget)  # the ends may be in reverse order; the official code allows it
            aspect = math.exp(uniform(*self._log_aspect))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < width and h < height:
                top, left = randint(0, height - h), randint(0, width - w)
                block = (self._rows[w] * self._columns[h]) << (top * width + left)
                if 0 < (block & ~mask).bit_count() <= budget:
                    return block
        return 0


class RandomMaskGenerator:
    """See `RandomMasking`."""

    def __init__(self, ratio: float, grid: tuple[int, int]) -> None:
        self.grid = grid
        num_patches = grid[0] * grid[1]
        self.max_masked = num_patches - math.floor(num_patches * (1 - ratio))

    def __call__(self, rng: random.Random) -> Mask:
        """A new mask `[y, x]`, true = masked."""
        mask = np.zeros(self.grid[0] * self.grid[1], dtype=np.bool_)
        mask[rng.sample(range(mask.size), self.max_masked)] = True
        return mask.reshape(self.grid)


class AlternateMaskGenerator:
    """See `AlternateMasking`."""

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self.max_masked = (grid[0] * grid[1] + 1) // 2

    def __call__(self, rng: random.Random) -> Mask:
        """The mask `[y, x]`, true = masked; takes nothing from `rng`."""
        return (np.arange(self.grid[0] * self.grid[1]) % 2 == 0).reshape(self.grid)


def _to_array(bits: int, grid: tuple[int, int]) -> Mask:
    num_patches = grid[0] * grid[1]
    packed = np.frombuffer(bits.to_bytes(-(-num_patches // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=num_patches, bitorder="little").view(np.bool_).reshape(grid)
