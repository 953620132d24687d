"""Losses of pairs against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openeva.losses.contrastive import info_nce, sigmoid_loss


def features(num_pairs: int = 6, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(2, num_pairs, width, generator=generator, dtype=torch.float64)
    image_BE, text_BE = F.normalize(made, dim=-1).unbind(0)
    return [x.detach().clone().requires_grad_() for x in (image_BE, text_BE, torch.tensor([7.0]).double())]


def assert_same(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected)
    for one, other in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_info_nce_is_cross_entropy_over_rows_and_columns_of_the_whole_matrix(smoothing: float) -> None:
    image_BE, text_BE, scale_1 = inputs = features()
    logits_BB, label_B = scale_1 * image_BE @ text_BE.T, torch.arange(6)
    expected = sum(F.cross_entropy(x, label_B, label_smoothing=smoothing) for x in (logits_BB, logits_BB.T)) / 2
    contrast = info_nce(image_BE, text_BE, scale_1, smoothing=smoothing)
    assert_same(contrast.loss, expected, inputs)
    accuracies = contrast.accuracies()
    assert accuracies["accuracy_i2t"] == (logits_BB.argmax(1) == label_B).float().mean()
    assert accuracies["accuracy_t2i"] == (logits_BB.argmax(0) == label_B).float().mean()
    assert not any(value.requires_grad for value in accuracies.values())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_compared_with_others_are_rows_of_the_whole(smoothing: float) -> None:
    image_BE, text_BE, scale_1 = features()
    whole = info_nce(image_BE, text_BE, scale_1, smoothing=smoothing).loss
    parts = [
        info_nce(image_BE[rows], text_BE[rows], scale_1, smoothing=smoothing, others=(image_BE, text_BE)).loss
        for rows in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_the_sigmoid_loss_asks_each_image_with_each_text() -> None:
    image_BE, text_BE, scale_1 = features()
    bias_1 = torch.tensor([-3.0]).double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(6):
        for column in range(6):
            logit = (scale_1 * image_BE[row] @ text_BE[column] + bias_1)[0]
            expected = expected - F.logsigmoid(logit if row == column else -logit) / 6
    contrast = sigmoid_loss(image_BE, text_BE, scale_1, bias_1)
    assert_same(contrast.loss, expected, [image_BE, text_BE, scale_1, bias_1])
    halves = [
        sigmoid_loss(image_BE[rows], text_BE[rows], scale_1, bias_1, others=(image_BE, text_BE)).loss
        for rows in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(halves) / 2, expected)


def test_logits_are_full_precision_under_autocast() -> None:
    """At a scale of 100, bf16 would round logits to halves."""
    image_BE, text_BE, _ = (x.float() for x in features())
    scale_1 = torch.tensor([100.0])
    expected = info_nce(image_BE, text_BE, scale_1).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(image_BE, text_BE, scale_1).loss, expected)
