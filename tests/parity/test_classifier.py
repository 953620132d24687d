"""Classifiers of EVA-01 against the official code: every pooling, relative position and head."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from openeva.backbones.vit import Config
from openeva.checkpoints.detect import infer_vit_config
from openeva.checkpoints.load import load_into
from openeva.checkpoints.official import from_official, to_official
from openeva.heads.classifier import ImageClassifier
from parity.golden import Case, cases
from parity.official_config import vit_config


def config_of(official: dict[str, Any]) -> Config:
    return vit_config(
        official,
        qkv_bias="qv" if official["qkv_bias"] == "q_and_v_only" else "full",
        final_norm=not official["use_mean_pooling"],
        patch_grad_scale=0.0,
    )


def classifier_of(case: Case) -> ImageClassifier:
    official, weights = case.config, case.prefix("sd.")
    model = ImageClassifier(
        config_of(official).build(),
        official["num_classes"],
        pooling="mean" if official["use_mean_pooling"] else "cls",
        batch_norm="head.0.running_mean" in weights,
    )
    report = load_into(model, from_official(weights))
    assert not report.fresh
    assert not report.resized
    return model.eval()


@pytest.mark.parametrize("case", cases("classifier"), ids=str)
def test_classifier(case: Case) -> None:
    model = classifier_of(case)
    image_BCYX = case.tensors["in.image"]
    case.close(model(image_BCYX), "out.logits")
    case.close(model.pool(image_BCYX), "out.features")
    case.close(model.patches(image_BCYX), "out.patch_tokens")
    kept = {name: tensor for name, tensor in case.prefix("sd.").items() if not name.endswith("_index")}
    back = to_official(model.state_dict())
    assert set(back) == set(kept)
    assert all(torch.equal(back[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("case", cases("classifier"), ids=str)
def test_the_architecture_is_read_off_the_file(case: Case) -> None:
    expected = config_of(case.config)
    weights = from_official(case.prefix("sd."))
    inferred = Config(**infer_vit_config(weights, num_heads=expected.num_heads))
    unknown = {"layer_scale", "patch_grad_scale"}  # initial values and settings of training
    assert inferred.model_dump(exclude=unknown) == expected.model_dump(exclude=unknown)


TRAINED = [case for case in cases("classifier") if not isinstance(case, Case) or "out.train_logits" in case.tensors]


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_training_step_of_a_linear_probe(case: Case) -> None:
    """Batch statistics in the forward pass, running ones afterwards; only the head has gradients."""
    model = classifier_of(case)
    model.backbone.requires_grad_(False)
    model.train()
    logits_BV = model(case.tensors["in.image"])
    loss = F.cross_entropy(logits_BV, case.tensors["in.label"])
    loss.backward()
    case.close(logits_BV, "out.train_logits")
    case.close(loss, "out.train_loss")
    gradients = to_official({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients) == set(case.prefix("out.grad."))
    for name, gradient in gradients.items():
        case.close(gradient, f"out.grad.{name}")
    case.close(model.classifier[0].running_mean, "out.running_mean_after")
    case.close(model.classifier[0].running_var, "out.running_var_after")
