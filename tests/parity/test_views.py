"""Crops against the official transforms: the boxes of seeded random crops exactly, evaluation pixels within a level."""

import random

import pytest
import torch

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
