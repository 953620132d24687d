"""Accuracy and AUC of a logistic regression on frozen features.

train images -> features, standardised -> L2-regularised logistic regression -> held-out images

The strength of the penalty is chosen by cross-validation on the training labels, the same way for every kind of
feature.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from openeva.config import ComponentConfig
from openeva.evals.base import extract_features, once

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
    train_ND: NDArray[Any], label_N: NDArray[Any], *, folds: int = 4, max_iterations: int = 200
) -> Pipeline:
    """Standardisation and L2-regularised logistic regression (L-BFGS), its penalty chosen by cross-validation.

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
        l1_ratios=(0.0,), use_legacy_attributes=False,
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
