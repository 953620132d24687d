"""A classifier that starts as a logistic regression: the same answers, kept in a file, fitted anew when it must be."""

import numpy as np
import pytest
import torch
from torch import nn

from openeva.evals.linear_probe import StoredProbe, as_linear, fit_logistic


def blobs(labels: list[int], per_class: int = 12, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    label_N = torch.tensor(labels).repeat_interleave(per_class)
    centre_VD = 2 * torch.randn(max(labels) + 1, width, generator=generator)
    return centre_VD[label_N] + torch.randn(len(label_N), width, generator=generator) * 3 + 7, label_N


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2]])
def test_the_linear_layer_gives_the_probabilities_of_the_regression(labels: list[int]) -> None:
    train_ND, label_N = blobs(labels)
    model = fit_logistic(train_ND.numpy(), label_N.numpy())
    weight_VD, bias_V = as_linear(model)
    logits_NV = train_ND.double() @ torch.from_numpy(weight_VD).T.double() + torch.from_numpy(bias_V).double()
    np.testing.assert_allclose(logits_NV.softmax(1).numpy(), model.predict_proba(train_ND.numpy()), atol=1e-6)


def test_a_stored_probe_becomes_the_classifier_and_rules_out_classes_without_images(tmp_path) -> None:
    train_ND, label_N = blobs([0, 2])
    stored, linear = StoredProbe(tmp_path / "target" / "probe.safetensors", start="a"), nn.Linear(5, 4)
    assert not stored.is_there()
    stored.fit(train_ND, label_N, balanced=False)
    stored.copy_into(linear)
    share_NV = linear(train_ND).softmax(1)
    expected = fit_logistic(train_ND.numpy(), label_N.numpy()).predict_proba(train_ND.numpy())
    np.testing.assert_allclose(share_NV[:, [0, 2]].detach().numpy(), expected, atol=1e-4)
    assert share_NV[:, [1, 3]].max() < 1e-5


def test_what_was_fitted_from_something_else_is_not_there(tmp_path) -> None:
    file = tmp_path / "probe.safetensors"
    StoredProbe(file, start="a").fit(*blobs([0, 1]), balanced=False)
    assert StoredProbe(file, start="a").is_there()
    assert not StoredProbe(file, start="b").is_there()


def test_balance_moves_the_border_towards_the_larger_class(tmp_path) -> None:
    train_ND, label_N = blobs([0, 1], per_class=40)
    few = torch.cat([torch.arange(40), torch.arange(40, 46)])  # six images of class 1
    found = {}
    for balanced in (False, True):
        stored, linear = StoredProbe(tmp_path / f"{balanced}.safetensors"), nn.Linear(5, 2)
        stored.fit(train_ND[few], label_N[few], balanced=balanced)
        stored.copy_into(linear)
        found[balanced] = linear(train_ND).softmax(1)[:, 1].mean().item()
    assert found[True] > found[False] + 0.1


def test_one_class_or_one_image_of_a_class_is_refused(tmp_path) -> None:
    stored = StoredProbe(tmp_path / "probe.safetensors")
    train_ND, label_N = blobs([0, 1])
    with pytest.raises(ValueError, match="at least 2 training samples each"):
        stored.fit(train_ND[:13], label_N[:13], balanced=False)
    with pytest.raises(ValueError, match="two classes or more"):
        stored.fit(train_ND[:12], label_N[:12], balanced=False)
    assert not stored.is_there()
