"""Block-wise masks against the official generator: seeded masks exactly, and statistics."""

import random
import re

import numpy as np
import pytest
import torch
from scipy import ndimage

from openeva.data.masking import BlockMasking
from parity.golden import cases


def build(config):
    return BlockMasking(
        num_masked=config["num_masking_patches"],
        min_block=config["min_num_patches"],
        max_block=config["max_num_patches"],
        aspect=(config["min_aspect"], config.get("max_aspect", 1 / config["min_aspect"])),
    ).build(tuple(config["grid"]) if "grid" in config else (config["input_size"],) * 2)


@pytest.mark.parametrize("case", cases("blockwise_mask"), ids=str)
def test_seeded_masks_are_equal(case):
    for number, config in enumerate(case.config["generators"]):
        generator = build(config)
        masks = np.stack([generator(random.Random(seed)) for seed in case.config["seeds"]])
        expected = case.tensors[f"out.seeded_masks_{number}"].bool()
        assert torch.equal(torch.from_numpy(masks), expected)


@pytest.mark.parametrize("case", cases("blockwise_mask"), ids=str)
def test_statistics(case):
    for entry in case.json["statistics"]:
        generator, rng = build(entry["config"]), random.Random(0)
        masks = np.stack([generator(rng) for _ in range(2000)])
        tolerance = entry["suggested_tolerance"]
        counts = masks.sum((1, 2))
        assert abs(counts.mean() - entry["count"]["mean"]) < tolerance["mean_count"]
        assert counts.max() <= entry["count"]["max"]
        assert np.abs(masks.mean(0) - np.array(entry["cell_frequency"])).max() < tolerance["cell_frequency_abs"]
        components = np.mean([ndimage.label(mask)[1] for mask in masks])
        assert abs(components - entry["components"]["mean_per_mask"]) < tolerance["mean_components"]


@pytest.mark.parametrize("case", cases("eva02_block_masks"), ids=str)
def test_eva02_draws_the_same_masks(case):
    generator = build(case.config)
    seeded = {name: re.fullmatch(r"out\.mask(\d+)_seed(\d+)", name) for name in case.tensors}
    assert seeded
    assert all(seeded.values())
    for seed in {int(match[2]) for match in seeded.values()}:
        rng = random.Random(seed)
        for name in sorted((name for name, match in seeded.items() if int(match[2]) == seed), key=natural):
            assert torch.equal(torch.from_numpy(generator(rng)), case.tensors[name].bool()), name
    wanted = case.config["num_masking_patches"]
    stats, rng = case.json["stats"], random.Random(case.json["stats"]["seed"])
    counts = np.array([generator(rng).sum() for _ in range(stats["n"])])
    assert (counts.mean(), counts.min(), counts.max()) == pytest.approx((stats["mean"], stats["min"], stats["max"]))
    assert (counts == wanted).mean() == pytest.approx(stats[f"frac_exact{wanted}"])


def natural(name):
    return int(re.search(r"mask(\d+)", name)[1])
