"""Mixed soft targets against the official ones."""

import re

import pytest

from openeva.data.mixup import mixed_target
from parity.golden import cases


@pytest.mark.parametrize("case", cases("train_utils"), ids=str)
def test_mixed_targets(case):
    names = [name for name in case.tensors if "mixup_target" in name]
    assert names
    for name in names:
        share, smoothing = map(float, re.fullmatch(r".*_lam([\d.]+)_s([\d.]+)", name).groups())
        labels = case.tensors["in.labels"]
        case.close(mixed_target(labels, case.config["num_classes"], share=share, smoothing=smoothing), name)
