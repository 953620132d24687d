"""Accuracy and AUC of a logistic regression on frozen features.

train images -> features, standardised -> L2-regularised logistic regression -> held-out images

The strength of the penalty is chosen by cross-validation on the training labels, the same way for every kind of
feature.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from openeva.checkpoints.files import write_atomically
from openeva.config import ComponentConfig
from openeva.data.mixture import Mixture, Streams, some_of
from openeva.evals.base import extract_features, once

UNSEEN = -20.0
"""Logit of a class without training images."""
SMALL_PRODUCT = 1e9
"""Multiply-adds of one matrix product (samples x features x classes) up to which several threads lose: a fit is
thousands of them, and threads that meet after each wait for the one that another process keeps from a core. Two busy
cores, 2,100 x 768, two classes: 0.4 s with one thread, 9 s with two."""


class Config(ComponentConfig):
    """Logistic regression on frozen features."""

    name: str = "linear_probe"
    folds: int = Field(4, gt=1, description="of the cross-validation that chooses the penalty")
    max_iterations: int = Field(200, gt=0)

    def build(self) -> "LinearProbe":
        """Make the evaluation."""
        return LinearProbe(self)


class LinearProbe:
    """See the module's text."""

    needs = frozenset({"train", "labels"})

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, task: Any, loaders: Mapping[str, Iterable[dict[str, Any]]]) -> dict[str, float]:
        """`{"probe_accuracy": ..., "probe_auc": ...}` on the held-out images (AUC with two classes only)."""
        train, val = extract_features(task.backbone, loaders["train"]), extract_features(task.backbone, loaders["val"])
        arrays = (train.pooled.numpy(), train.labels.numpy(), val.pooled.numpy(), val.labels.numpy())
        config = self.config
        return once(lambda: probe(*arrays, folds=config.folds, max_iterations=config.max_iterations))


def probe(
    train_ND: NDArray[Any],
    label_N: NDArray[Any],
    query_BD: NDArray[Any],
    answer_B: NDArray[Any],
    *,
    folds: int = 4,
    max_iterations: int = 200,
) -> dict[str, float]:
    """Fit on the training features and score the held-out ones.

    Raises:
        ValueError: As `fit_logistic`.
    """
    model = fit_logistic(train_ND, label_N, folds=folds, max_iterations=max_iterations)
    metrics = {"probe_accuracy": float((model.predict(query_BD) == answer_B).mean())}
    if len(np.unique(label_N)) == len(np.unique(answer_B)) == 2:
        metrics["probe_auc"] = float(roc_auc_score(answer_B, model.predict_proba(query_BD)[:, 1]))
    return metrics


def fit_logistic(
    train_ND: NDArray[Any], label_N: NDArray[Any], *, folds: int = 4, max_iterations: int = 200, balanced: bool = False
) -> Pipeline:
    """Standardisation and L2-regularised logistic regression (L-BFGS), its penalty chosen by cross-validation.

    Args:
        train_ND: Features.
        label_N: Their classes.
        folds: Of the cross-validation.
        max_iterations: Of each fit.
        balanced: A class with few samples counts as much as one with many.

    Raises:
        ValueError: The training labels have fewer than two classes, or a class has fewer samples than there are folds.
    """
    classes, counts = np.unique(label_N, return_counts=True)
    if len(classes) < 2 or counts.min() < folds:
        raise ValueError(
            f"a linear probe needs two classes or more with at least {folds} training samples each; found"
            f" {dict(zip(classes.tolist(), counts.tolist(), strict=True))}"
        )
    regression = LogisticRegressionCV(
        Cs=np.logspace(-5, 0, 6), cv=StratifiedKFold(folds, shuffle=True, random_state=0),
        scoring="roc_auc" if len(classes) == 2 else "accuracy", max_iter=max_iterations,
        l1_ratios=(0.0,), use_legacy_attributes=False, class_weight="balanced" if balanced else None,
    )  # fmt: skip
    model = make_pipeline(StandardScaler(), regression)
    small = train_ND.size * len(classes) <= SMALL_PRODUCT
    with warnings.catch_warnings(), threadpool_limits(1 if small else None):
        warnings.simplefilter("ignore", ConvergenceWarning)  # weak penalties need not converge to be compared
        model.fit(train_ND, label_N)
    return model


def as_linear(model: Pipeline) -> tuple[NDArray[Any], NDArray[Any]]:
    """`(weight [V, D], bias [V])` of a linear layer whose softmax gives the probabilities of `fit_logistic`'s model."""
    scaler, regression = model.steps[0][1], model.steps[1][1]
    weight_VD, bias_V = regression.coef_ / scaler.scale_, regression.intercept_
    if len(weight_VD) == 1:  # two classes share one row: its half for one, and against the other
        weight_VD, bias_V = np.concatenate([-weight_VD, weight_VD]) / 2, np.concatenate([-bias_V, bias_V]) / 2
    return weight_VD, bias_V - weight_VD @ scaler.mean_


def probe_problems(train: Mixture | Streams) -> list[str]:
    """Why no classifier can start as a probe of these images, in words for the user; nothing where one can."""
    without = "set task.probe_first=false"
    if isinstance(train, Streams):
        return [f"task.probe_first looks at all training images first, which streams do not allow; {without}"]
    if not all(source.num_classes for source in train.sources):
        return []  # said by others
    alone = np.flatnonzero(np.bincount(train.labels()) == 1).tolist()
    if not alone:
        return []
    return [
        "task.probe_first chooses its penalty by cross-validation, for which a class needs two training images;"
        f" {some_of([train.class_names[label] for label in alone])}: only one; {without}, or add images"
    ]


class StoredProbe:
    """A logistic regression in a file, for a classifier to start from.

    Args:
        file: Where it is kept.
        **depends_on: JSON values; one that was fitted with others is fitted anew.
    """

    def __init__(self, file: Path, **depends_on: Any) -> None:
        self._file = file
        self._key = {"depends_on": json.dumps(depends_on, sort_keys=True)}

    def is_there(self) -> bool:
        """Whether it has been fitted before."""
        if not self._file.is_file():
            return False
        with safe_open(self._file, "pt") as content:
            return bool(content.metadata() == self._key)

    def fit(self, train_ND: Tensor, label_N: Tensor, *, balanced: bool) -> None:
        """Fit and store.

        Raises:
            ValueError: A class has fewer than two images, or there is only one class.
        """
        classes, counts = np.unique(label_N.numpy(), return_counts=True)
        folds = int(np.clip(counts.min(), 2, 4))
        model = fit_logistic(train_ND.numpy(), label_N.numpy(), folds=folds, balanced=balanced)
        weight_VD, bias_V = (torch.from_numpy(part).float().contiguous() for part in as_linear(model))
        tensors = {"weight": weight_VD, "bias": bias_V, "classes": torch.from_numpy(classes)}
        write_atomically(self._file, lambda path: save_file(tensors, path, metadata=self._key))

    @torch.no_grad()
    def copy_into(self, linear: nn.Linear) -> None:
        """Make it the classifier; classes without training images are all but ruled out."""
        tensors = load_file(self._file)
        linear.weight.zero_()
        linear.bias.fill_(UNSEEN)
        linear.weight[tensors["classes"]] = tensors["weight"].to(linear.weight)
        linear.bias[tensors["classes"]] = tensors["bias"].to(linear.bias)
