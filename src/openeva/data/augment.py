"""RandAugment: a few random changes of colour and geometry of a crop.

uint8 `[3, Y, X]` -> Pillow -> timm's RandAugment, driven by the sample's own generator -> uint8 `[3, Y, X]`

Paper: Cubuk et al. (arXiv 1909.13719). Source: spec section 4, `rand-m9-mstd0.5-inc1` with the semantics of timm
0.5.4; those of the installed timm are the same, which tests/unit/test_augment.py checks operation by operation.
Geometric changes are bicubic and fill with the mean colour of the model's statistics.
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor

Mean = tuple[float, float, float]

_SECTION = r"m\d+|n[1-9]\d*|p(?:0?\.\d+|1(?:\.0*)?)|mstd\d+(?:\.\d+)?|mmax\d+|inc[01]|t(?:weights|3a|3aw)"


def check_rand_augment(text: str) -> str:
    """The text, if it describes a RandAugment.

    Raises:
        ValueError: It does not.
    """
    if not re.fullmatch(rf"rand(?:-(?:{_SECTION}))*", text):
        raise ValueError(
            f"{text!r} is no RandAugment: write rand-m9-mstd0.5-inc1, that is `rand` and any of -m (magnitude, 0 to"
            " 10), -mstd (its standard deviation), -inc1 (stronger with the magnitude), -n (operations per image), -p"
            " (probability of each), -mmax (largest magnitude), joined by dashes"
        )
    return text


@lru_cache
def rand_augment(text: str, mean: Mean) -> RandAugment:
    """The transform that a text describes, filling with a mean colour in [0, 1]."""
    fill = tuple(min(255, round(255 * value)) for value in mean)
    transform = rand_augment_transform(text, {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC})
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the highest bits of each channel.

    PARITY: magnitude 10 keeps none, which is black; current Pillow refuses that, and with it one image in 700.
    """
    mask = 256 - 2 ** (8 - bits_to_keep)
    return image.point([value & mask for value in range(256)] * 3)


def apply_rand_augment(image_CYX: UInt8[Tensor, "3 Y X"], text: str, mean: Mean, rng: random.Random) -> Tensor:
    """The image, changed as chance wants it; all chance comes from `rng`."""
    image = Image.fromarray(np.ascontiguousarray(image_CYX.permute(1, 2, 0).numpy()))
    with _global_generators_from(rng):
        image = rand_augment(text, mean)(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextmanager
def _global_generators_from(rng: random.Random) -> Iterator[None]:
    """Within this context Python's and NumPy's global generators, which timm draws from, follow `rng`."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(rng.getrandbits(64))
    np.random.seed(rng.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
