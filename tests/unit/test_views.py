import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import functional as tv

from openeva.data.views import Crop, CropConfig, normalise, one_box, random_box

sides = st.integers(1, 300)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=300)
@given(height=sides, width=sides, seed=st.integers())
def test_random_box_lies_inside_and_keeps_its_range(height, width, seed):
    top, left, h, w = random_box(height, width, (0.2, 1.0), (3 / 4, 4 / 3), random.Random(seed))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0
    if min(height, width) >= 100:
        assert 0.73 < w / h < 1.36


def test_box_of_an_extreme_image_is_the_largest_centred_one():
    assert random_box(10, 1000, (0.9, 1.0), (3 / 4, 4 / 3), random.Random(0)) == (0, 493, 10, 13)
    assert random_box(1000, 10, (0.9, 1.0), (3 / 4, 4 / 3), random.Random(0)) == (493, 0, 13, 10)


def test_covered_area_is_uniform_over_the_scale():
    rng = random.Random(0)
    shares = [
        h * w / 300**2 for _, _, h, w in (random_box(300, 300, (0.2, 0.7), (3 / 4, 4 / 3), rng) for _ in range(3000))
    ]
    assert np.mean(shares) == pytest.approx(0.45, abs=0.01)
    assert min(shares) > 0.19
    assert max(shares) < 0.71


@pytest.mark.parametrize("size", [(64, 64), (200, 120), (32, 48)])
def test_resize_is_close_to_pillow(size):
    image_YXC = np.asarray(Image.fromarray(noise(12, 16)).resize((160, 120), Image.Resampling.BICUBIC))
    crop = Crop(10, 20, 90, 110, flip=False)
    view = CropConfig().cut(image_YXC.copy(), crop, size)
    pillow = Image.fromarray(image_YXC).crop((20, 10, 130, 100)).resize(size[::-1], Image.Resampling.BICUBIC)
    assert view.dtype == torch.uint8
    difference = np.abs(view.permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow))
    assert difference.max() <= 2
    assert difference.mean() < 0.05


def test_flip_comes_before_the_crop():
    """Flipping first and then cutting the drawn box, as the paper's transform does, gives the same pixels."""
    config, image_YXC = CropConfig(hflip=1.0), noise(80, 100)
    crop = config.draw(80, 100, random.Random(3))
    rng = random.Random(3)
    rng.random()
    top, left, h, w = random_box(80, 100, config.scale, config.ratio, rng)
    mirrored = np.ascontiguousarray(image_YXC[:, ::-1])
    expected = CropConfig().cut(mirrored, Crop(top, left, h, w, flip=False), (h, w))
    assert crop.flip
    assert torch.equal(config.cut(image_YXC, crop, (h, w)), expected)


@settings(max_examples=200)
@given(height=sides, width=sides, seed=st.integers())
def test_one_box_is_a_single_try_within_the_image(height, width, seed):
    rng = random.Random(seed)
    area, aspect = rng.uniform(0.08, 1) * height * width, math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    top, left, h, w = one_box(height, width, (0.08, 1.0), (3 / 4, 4 / 3), random.Random(seed))
    assert h == min(max(1, round(math.sqrt(area / aspect))), height)
    assert w == min(max(1, round(math.sqrt(area * aspect))), width)
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w


def test_crop_of_the_linear_probe():
    """Long images keep their full short side instead of being tried again."""
    config = CropConfig(kind="byol", scale=(0.08, 1.0))
    crops = [config.draw(50, 400, random.Random(seed)) for seed in range(300)]
    assert np.mean([crop.height == 50 for crop in crops]) > 0.5
    assert max(crop.width / crop.height for crop in crops) > 2
    assert {crop.flip for crop in crops} == {True, False}
    assert config.cut(noise(50, 400), crops[0], (32, 32)).shape == (3, 32, 32)


def test_both_sizes_show_the_same_crop():
    image_YXC = np.asarray(Image.fromarray(noise(6, 6)).resize((150, 150), Image.Resampling.BICUBIC)).copy()
    config = CropConfig()
    crop = config.draw(150, 150, random.Random(1))
    large, small = config.cut(image_YXC, crop, (96, 96)), config.cut(image_YXC, crop, (48, 48))
    again = tv.resize(large, [48, 48], tv.InterpolationMode.BICUBIC, antialias=True)
    assert (again.int() - small.int()).abs().float().mean() < 3


@settings(max_examples=100)
@given(height=sides, width=sides, size=st.tuples(st.integers(8, 64), st.integers(8, 64)), pct=st.floats(0.5, 1.0))
def test_center_crop_always_has_its_size(height, width, size, pct):
    config = CropConfig(kind="center", crop_pct=pct, hflip=0.0)
    view = config.cut(noise(height, width), config.draw(height, width, random.Random(0)), size)
    assert view.shape == (3, *size)


def test_center_crop_equals_the_usual_evaluation_transform():
    image = Image.fromarray(noise(90, 70))
    usual = tv.center_crop(tv.resize(image, 36, tv.InterpolationMode.BICUBIC), [32, 32])
    config = CropConfig(kind="center", crop_pct=32 / 36, hflip=0.0)
    view = config.cut(np.array(image), config.draw(90, 70, random.Random(0)), (32, 32))
    assert np.abs(view.permute(1, 2, 0).numpy().astype(int) - np.asarray(usual)).max() <= 1


def test_center_crop_can_be_mirrored():
    config, image_YXC = CropConfig(kind="center", hflip=0.5), noise(40, 40)
    crops = [config.draw(40, 40, random.Random(seed)) for seed in range(200)]
    assert 70 < sum(crop.flip for crop in crops) < 130
    plain, mirrored = (
        config.cut(image_YXC, next(c for c in crops if c.flip is flip), (32, 32)) for flip in (False, True)
    )
    assert torch.equal(plain, mirrored.flip(-1))


def test_color_jitter():
    image_YXC = noise(16, 16)
    assert CropConfig().jitter(image_YXC, random.Random(0)) is image_YXC
    changed = CropConfig(color_jitter=0.4).jitter(image_YXC, random.Random(0))
    assert changed.shape == image_YXC.shape
    assert np.abs(changed.astype(int) - image_YXC).mean() > 3
    assert (changed == CropConfig(color_jitter=0.4).jitter(image_YXC, random.Random(0))).all()


def test_normalise():
    image = torch.from_numpy(noise(5, 7)).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = tv.normalize(image.float() / 255, mean, std)
    torch.testing.assert_close(normalise(image, mean, std), expected, rtol=1e-5, atol=1e-6)
    assert normalise(image, mean, std, torch.bfloat16).dtype == torch.bfloat16


def test_impossible_ranges_are_errors():
    for wrong in ({"scale": (0.5, 0.2)}, {"scale": (0, 1)}, {"ratio": (2, 1)}, {"hflip": 2}, {"crop_pct": 0}):
        with pytest.raises(ValidationError):
            CropConfig(**wrong)
