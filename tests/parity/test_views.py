"""Crops against the official transforms: the boxes of seeded random crops exactly, evaluation pixels within a level."""

import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

from openeva.data.decode import to_rgb
from openeva.data.views import CropConfig, normalise, random_box
from parity.golden import cases


@pytest.mark.parametrize("case", cases("eval_transform"), ids=str)
def test_random_crop_boxes(case):
    height, width = case.config["image_hw"]
    default = CropConfig()
    boxes = [
        random_box(height, width, default.scale, default.ratio, random.Random(seed))
        for seed in case.config["rrc_seeds"]
    ]
    order = [(top, left, h, w) for top, left, h, w in boxes]
    assert torch.equal(torch.tensor(order), case.tensors["out.rrc_params_seeded"])


@pytest.mark.parametrize("case", cases("eval_transform"), ids=str)
def test_evaluation_pixels(case):
    image_YXC = case.tensors["in.image_hwc_uint8"].numpy()
    mean, std = tuple(case.config["mean"]), tuple(case.config["std"])
    for entry in case.config["cases"]:
        crop = CropConfig(kind="center", hflip=0.0, crop_pct=entry["effective_crop_pct"])
        size = (entry["input_size"], entry["input_size"])
        view_CYX = crop.cut(image_YXC, crop.draw(*image_YXC.shape[:2], random.Random(0)), size)
        view_CYX = normalise(view_CYX[None], mean, std)[0]
        stride = 1 if entry["stored"] == "full" else int("".join(filter(str.isdigit, entry["stored"])))
        expected = case.tensors[f"out.{entry['key']}"]
        torch.testing.assert_close(
            view_CYX[:, ::stride, ::stride], expected, rtol=0, atol=case.json["tolerance"]["atol"]
        )


@pytest.mark.parametrize("case", cases("eval_transform"), ids=str)
def test_fixed_evaluation_of_two_robustness_sets(case):
    """ImageNet-V2 and ObjectNet: always 336 pixels, bilinear, nothing cut off the shorter side (spec section 7)."""
    image_YXC = case.tensors["in.image_hwc_uint8"].numpy()
    crop = CropConfig(kind="center", hflip=0.0, crop_pct=1.0, interpolation="bilinear")
    view_CYX = crop.cut(image_YXC, crop.draw(*image_YXC.shape[:2], random.Random(0)), (336, 336))
    view_CYX = normalise(view_CYX[None], tuple(case.config["mean"]), tuple(case.config["std"]))[0]
    expected = case.tensors["out.robustness_v2_objectnet"]
    stride = 336 // expected.shape[-1]
    torch.testing.assert_close(view_CYX[:, ::stride, ::stride], expected, rtol=0, atol=case.json["tolerance"]["atol"])


def clip_view(image: Image.Image, case) -> torch.Tensor:
    """An image as our loader cuts it for a CLIP, with the official resampling."""
    config, crop = case.config, CropConfig(kind="center", hflip=0.0, crop_pct=1.0, resizer="pillow")
    image_YXC = to_rgb(image)
    view_CYX = crop.cut(image_YXC, crop.draw(*image_YXC.shape[:2], random.Random(0)), (config["size"], config["size"]))
    return normalise(view_CYX[None], tuple(config["mean"]), tuple(config["std"]))[0]


def clip_images(case) -> dict[str, Image.Image]:
    """The case's images by name; `gray0` is a channel of an image, `rgba0` an image with transparency."""
    pixels = {n.split("_")[0]: v.numpy() for n, v in case.prefix("in.").items() if n.endswith("_hwc_u8")}
    images = {name: Image.fromarray(value) for name, value in pixels.items()}
    grey = {n.replace("image", "gray"): Image.fromarray(v[..., 0].copy()) for n, v in pixels.items()}
    alphas = {n.split("_")[0]: v.numpy() for n, v in case.prefix("in.").items() if n.endswith("_alpha_u8")}
    rgba = {n: np.dstack([pixels[n.replace("rgba", "image")], alpha]) for n, alpha in alphas.items()}
    return {**images, **grey, **{name: Image.fromarray(value) for name, value in rgba.items()}}


def compared(case) -> list[tuple[str, str, int, torch.Tensor]]:
    """Each expected output: (image, what of it, every how many pixels, values)."""
    found = []
    for name, value in case.prefix("out.").items():
        match = re.fullmatch(r"(pixels|gray|rgba)(\d+)(?:_(?:every(\d+)th|(mean)))?", name)
        assert match, f"{case}: {name} is an output that this test does not know"
        kind, number, stride, mean = match.groups()
        image = f"{'image' if kind == 'pixels' else kind}{number}"
        found.append((image, mean or "pixels", int(stride or 1), value))
    return found


@pytest.mark.parametrize("case", cases("clip_preprocess"), ids=str)
def test_clip_preprocessing_to_the_last_bit(case):
    images, atol = clip_images(case), case.json["tolerance"]["atol"]
    for name, what, stride, expected in compared(case):
        if name.startswith("rgba"):
            continue
        view_CYX = clip_view(images[name], case)
        found = view_CYX.mean((1, 2)) if what == "mean" else view_CYX[:, ::stride, ::stride]
        torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda text, n=name: f"{case} {n}: {text}")


@pytest.mark.parametrize("case", cases("clip_preprocess"), ids=str)
def test_transparent_pixels_are_the_official_ones_on_white(case):
    """Officially transparency is dropped and shows whatever colour lies below; ours is the same picture on white."""
    images, config = clip_images(case), case.config
    transparent = [(image, stride, value) for image, _, stride, value in compared(case) if image.startswith("rgba")]
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    for name, stride, official_CYX in transparent:
        alpha = images[name].getchannel("A").convert("RGB")
        share_CYX = (clip_view(alpha, case)[:, ::stride, ::stride] * std + mean).clamp(0, 1)
        on_white_CYX = (official_CYX * std + mean) * share_CYX + (1 - share_CYX)  # 0 to 1
        ours_CYX = clip_view(images[name], case)[:, ::stride, ::stride] * std + mean
        difference = (ours_CYX - on_white_CYX).abs() * 255
        assert difference.mean() < 1, name  # both round to bytes, at different places
        assert difference.quantile(0.99) < 4, name
