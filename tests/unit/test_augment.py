"""RandAugment as timm 0.5.4 had it: what each operation does, how often, how strongly; chance from the sample alone."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from pydantic import ValidationError
from scipy import stats

from openeva.data.augment import _global_generators_from, apply_rand_augment, rand_augment
from openeva.data.loader import DataConfig, EvalLoader, TrainLoader
from openeva.data.views import CropConfig, ViewSpec

TEXT = "rand-m9-mstd0.5-inc1"
MEAN = (0.48145466, 0.4578275, 0.40821073)
FILL = (123, 117, 104)


def picture(height=40, width=56, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def affine(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def solarize_add(image, m):
    pixels = np.asarray(image).astype(int)
    return Image.fromarray(np.where(pixels < 128, np.minimum(pixels + int(11 * m), 255), pixels).astype(np.uint8))


def posterize(image, bits):
    """No bits are black, as older versions of Pillow had it."""
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def enhance(kind):
    return lambda image, m, sign: kind(image).enhance(max(0.1, 1 + sign * 0.09 * m))


OPERATIONS = {
    "AutoContrast": lambda image, m, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, m, sign: ImageOps.equalize(image),
    "Invert": lambda image, m, sign: ImageOps.invert(image),
    "Rotate": lambda image, m, sign: image.rotate(sign * 3 * m, Image.Resampling.BICUBIC, fillcolor=FILL),
    "PosterizeIncreasing": lambda image, m, sign: posterize(image, 4 - int(0.4 * m)),
    "SolarizeIncreasing": lambda image, m, sign: ImageOps.solarize(image, 256 - int(25.6 * m)),
    "SolarizeAdd": lambda image, m, sign: solarize_add(image, m),
    "ColorIncreasing": enhance(ImageEnhance.Color),
    "ContrastIncreasing": enhance(ImageEnhance.Contrast),
    "BrightnessIncreasing": enhance(ImageEnhance.Brightness),
    "SharpnessIncreasing": enhance(ImageEnhance.Sharpness),
    "ShearX": lambda image, m, sign: affine(image, (1, sign * 0.03 * m, 0, 0, 1, 0)),
    "ShearY": lambda image, m, sign: affine(image, (1, 0, 0, sign * 0.03 * m, 1, 0)),
    "TranslateXRel": lambda image, m, sign: affine(image, (1, 0, sign * 0.045 * m * image.width, 0, 1, 0)),
    "TranslateYRel": lambda image, m, sign: affine(image, (1, 0, 0, 0, 1, sign * 0.045 * m * image.height)),
}


def operations():
    return {operation.name: operation for operation in rand_augment(TEXT, MEAN).ops}


def test_there_are_fifteen_operations_of_which_two_are_drawn():
    assert set(operations()) == set(OPERATIONS)
    assert rand_augment(TEXT, MEAN).num_layers == 2
    assert rand_augment(TEXT, MEAN).choice_weights is None  # drawn with replacement


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [9.0, 8.3, 10.0])
def test_an_operation_changes_pixels_as_specified(name, magnitude, monkeypatch):
    """For both signs where there are two, up to the rounding of the arguments."""
    operation, image = operations()[name], picture()
    monkeypatch.setattr(operation, "prob", 1.0)
    monkeypatch.setattr(operation, "magnitude_std", 0)
    monkeypatch.setattr(operation, "magnitude", magnitude)
    found = set()
    for seed in range(12):
        random.seed(seed)
        actual = np.asarray(operation(image)).astype(int)
        distances = [np.abs(actual - np.asarray(OPERATIONS[name](image, magnitude, s))).max() for s in (1, -1)]
        assert min(distances) <= 1
        found.add(distances.index(min(distances)) if distances[0] != distances[1] else None)
    assert found in ({None}, {0, 1})


def test_how_often_and_how_strongly(monkeypatch):
    applied, magnitudes, count = Counter(), [], 4000
    for operation in rand_augment(TEXT, MEAN).ops:

        def level(magnitude, hparams, name=operation.name):
            magnitudes.append(magnitude)
            return (name,)

        def change(image, name, **_):
            applied[name] += 1
            return image

        monkeypatch.setattr(operation, "level_fn", level)
        monkeypatch.setattr(operation, "aug_fn", change)
    rng, image = random.Random(0), torch.zeros(3, 4, 4, dtype=torch.uint8)
    for _ in range(count):
        apply_rand_augment(image, TEXT, MEAN, rng)
    assert sum(applied.values()) / count == pytest.approx(2 * 0.5, abs=0.04)
    assert stats.chisquare([applied[name] for name in OPERATIONS]).pvalue > 0.001
    clamped = np.array(magnitudes) >= 10
    assert max(magnitudes) == 10
    assert clamped.mean() == pytest.approx(stats.norm.sf(2), abs=0.01)
    inner = [m for m in magnitudes if m < 10]
    assert stats.kstest(inner, stats.truncnorm(-np.inf, 2, 9, 0.5).cdf).pvalue > 0.001


@settings(max_examples=30)
@given(seed=st.integers(0, 2**63), height=st.integers(1, 50), width=st.integers(1, 50))
def test_any_size_keeps_its_shape(seed, height, width):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    changed = apply_rand_augment(image, TEXT, MEAN, random.Random(seed))
    assert changed.shape == image.shape
    assert changed.dtype == torch.uint8


def test_chance_comes_from_the_sample_alone():
    image = torch.from_numpy(np.asarray(picture()).copy()).permute(2, 0, 1)
    first = [apply_rand_augment(image, TEXT, MEAN, random.Random(seed)) for seed in range(30)]
    np.random.seed(2)
    random.seed(2)
    again = [apply_rand_augment(image, TEXT, MEAN, random.Random(seed)) for seed in range(30)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({a.numpy().tobytes() for a in first}) > 15


def test_the_global_generators_are_as_before_also_after_an_error():
    def draw_and_fail():
        raise ZeroDivisionError(random.random(), np.random.rand())

    python, numpy = random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(ZeroDivisionError), _global_generators_from(random.Random(0)):
        draw_and_fail()
    assert random.getstate() == python
    assert (np.random.get_state()[1] == numpy).all()


def test_training_batches_are_augmented_and_resume_at_the_same_pixels():
    data = DataConfig.model_validate({"train": [{"name": "scenes", "num_images": 40, "size": 32}]}).open()[0]
    crop = CropConfig(randaugment=TEXT)

    def batches(start, crop=crop, num_workers=0):
        loader = TrainLoader(data, ViewSpec((16, 16), mean=MEAN), crop, batch_size=8, num_workers=num_workers)
        steps = loader.batches(start)
        found = [next(steps)[0]["image"] for _ in range(3)]
        steps.close()
        return found

    whole = batches(0)
    assert torch.equal(batches(16)[0], whole[2])
    assert all(torch.equal(a, b) for a, b in zip(batches(0, num_workers=1), whole, strict=True))
    plain = batches(0, CropConfig())
    changed = [not torch.equal(a, b) for x, y in zip(plain, whole, strict=True) for a, b in zip(x, y, strict=True)]
    assert 0.5 < np.mean(changed) < 1  # two operations of probability one half; some change nothing


def test_what_moves_away_leaves_the_mean_colour_behind():
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    changed = [apply_rand_augment(white, TEXT, MEAN, random.Random(seed)) for seed in range(60)]
    corners = {tuple(c[:, y, x].tolist()) for c in changed for y in (0, -1) for x in (0, -1)}
    assert FILL in corners


@pytest.mark.parametrize("text", ["rand-m9-mst0.5", "augmix-m9", "rand-m", "rand-m9-inc2", "rand m9", "rand-p1.5"])
def test_what_is_no_randaugment_is_an_error(text):
    with pytest.raises(ValidationError, match=r"no RandAugment: write rand-m9-mstd0\.5-inc1"):
        CropConfig(randaugment=text)


def test_what_does_not_go_with_it_is_an_error():
    with pytest.raises(ValidationError, match="exclude each other"):
        CropConfig(randaugment=TEXT, color_jitter=0.4)
    data = DataConfig.model_validate({"train": [{"name": "scenes", "num_images": 4}]}).open()[0]
    with pytest.raises(ValueError, match="not what its target sees"):
        EvalLoader(data, ViewSpec((16, 16), (32, 32)), CropConfig(randaugment=TEXT), batch_size=2)
