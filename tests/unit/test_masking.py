import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from openeva.data.masking import AlternateMasking, BlockMasking, Masking, RandomMasking

grids = st.tuples(st.integers(2, 20), st.integers(2, 20))


@settings(max_examples=200)
@given(grid=grids, share=st.floats(0.01, 0.99), min_block=st.integers(1, 40), seed=st.integers())
def test_block_mask_never_exceeds_its_bound_and_repeats(grid, share, min_block, seed):
    num_patches = grid[0] * grid[1]
    num_masked = min(max(1, round(share * num_patches)), num_patches - 1)
    generator = BlockMasking(num_masked=num_masked, min_block=min_block).build(grid)
    mask = generator(random.Random(seed))
    assert mask.shape == grid
    assert mask.dtype == np.bool_
    assert mask.sum() <= num_masked == generator.max_masked
    assert (mask == generator(random.Random(seed))).all()


@settings(max_examples=50)
@given(seed=st.integers(), grid=st.tuples(st.integers(8, 18), st.integers(8, 18)))
def test_block_mask_is_blocky_and_nearly_full(seed, grid):
    num_masked = round(0.4 * grid[0] * grid[1])
    generator = BlockMasking(num_masked=num_masked).build(grid)
    masks = np.stack([generator(random.Random(seed + number)) for number in range(20)])
    assert masks.sum(axis=(1, 2)).min() >= num_masked - 16
    same_as_right = (masks[:, :, 1:] == masks[:, :, :-1]).mean()
    assert same_as_right > 0.7  # about 0.84 to 0.91; independent patches would give 0.52


def test_max_block_limits_each_rectangle():
    mask = BlockMasking(num_masked=40, min_block=4, max_block=4, aspect=(1, 1)).build((16, 16))(random.Random(0))
    # 2 x 2 squares only: every masked patch lies in a masked 2 x 2 square
    squares = mask[1:, 1:] & mask[:-1, 1:] & mask[1:, :-1] & mask[:-1, :-1]
    covered = np.zeros_like(mask)
    for y, x in zip(*np.nonzero(squares), strict=True):
        covered[y : y + 2, x : x + 2] = True
    assert (covered == mask).all()


def test_no_block_spans_the_whole_grid():
    """As officially: a block must be narrower and lower than the grid, else the try counts as failed."""
    config = BlockMasking(num_masked=4, min_block=4, aspect=(0.25, 0.25))  # 1 x 4 patches
    assert config.build((4, 4))(random.Random(0)).sum() == 0
    assert config.build((4, 5))(random.Random(0)).sum() == 4


@given(grid=grids, ratio=st.floats(0.01, 0.99), seed=st.integers())
def test_random_mask_leaves_the_same_number_visible(grid, ratio, seed):
    generator = RandomMasking(ratio=ratio).build(grid)
    mask = generator(random.Random(seed))
    num_patches = grid[0] * grid[1]
    assert mask.sum() == generator.max_masked == num_patches - int(num_patches * (1 - ratio))


def test_alternate_mask_hides_even_patches():
    generator = AlternateMasking().build((3, 5))
    mask = generator(random.Random(0))
    assert mask.flatten().tolist() == [i % 2 == 0 for i in range(15)]
    assert generator.max_masked == 8


def test_masking_is_chosen_by_name():
    adapter = TypeAdapter(Masking)
    assert isinstance(adapter.validate_python({"name": "block", "num_masked": 5}), BlockMasking)
    assert isinstance(adapter.validate_python({"name": "alternate"}), AlternateMasking)
    with pytest.raises(ValidationError, match="bloc"):
        adapter.validate_python({"name": "bloc", "num_masked": 5})


def test_more_masked_than_patches_is_an_error():
    with pytest.raises(ValueError, match="num_masked=16 must be less than the 4 x 4"):
        BlockMasking(num_masked=16).build((4, 4))
    with pytest.raises(ValidationError, match="aspect"):
        BlockMasking(num_masked=4, aspect=(2, 1))
