"""Accuracy and AUC of a logistic regression on frozen features.

train images -> features, standardised -> L2-regularised logistic regression (L-BFGS) -> held-out images
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from openeva.config import ComponentConfig
from openeva.evals.base import extract_features


class Config(ComponentConfig):
    """Logistic regression on frozen features."""

    name: str = "linear_probe"
    regularisation: float = Field(1.0, gt=0, description="weight of the L2 penalty on standardised features, times 1 / 100")
    max_iterations: int = Field(300, gt=0)

    def build(self) -> "LinearProbe":
        """Make the evaluation."""
        return LinearProbe(self)


class LinearProbe:
    """See the module's text."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, task: Any, loaders: dict[str, Iterable[dict[str, Any]]]) -> dict[str, float]:
        """`{"probe_accuracy": ..., "probe_auc": ...}` on the held-out images (AUC with two classes only)."""
        train, val = extract_features(task.backbone, loaders["train"]), extract_features(task.backbone, loaders["val"])
        return probe(
            train.pooled.numpy(), train.labels.numpy(), val.pooled.numpy(), val.labels.numpy(),
            regularisation=self.config.regularisation, max_iterations=self.config.max_iterations,
        )  # fmt: skip


def probe(
    train_ND: NDArray[Any],
    label_N: NDArray[Any],
    query_BD: NDArray[Any],
    answer_B: NDArray[Any],
    *,
    regularisation: float = 1.0,
    max_iterations: int = 300,
) -> dict[str, float]:
    """Fit on the training features and score the held-out ones.

    Raises:
        ValueError: The training labels have fewer than two classes.
    """
    if len(np.unique(label_N)) < 2:
        raise ValueError("a linear probe needs at least two classes among the training labels")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01 / regularisation, max_iter=max_iterations))
    model.fit(train_ND, label_N)
    metrics = {"probe_accuracy": float((model.predict(query_BD) == answer_B).mean())}
    if len(np.unique(answer_B)) == 2 and len(model.classes_) == 2:
        metrics["probe_auc"] = float(roc_auc_score(answer_B, model.predict_proba(query_BD)[:, 1]))
    return metrics
