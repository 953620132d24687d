"""k-nearest-neighbour accuracy of frozen features: no training, so a quick look at their quality.

train images -> features, normalised -> cosine to each held-out image -> vote of the k nearest, weighted by
exp(cosine / T)

Source: the usual protocol of DINO (arXiv 2104.14294, section 4.1): k = 20, temperature 0.07.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from openeva.config import ComponentConfig
from openeva.evals.base import extract_features


class Config(ComponentConfig):
    """k-nearest-neighbour accuracy."""

    name: str = "knn"
    k: int = Field(20, gt=0)
    temperature: float = Field(0.07, gt=0)

    def build(self) -> "Knn":
        """Make the evaluation."""
        return Knn(self)


class Knn:
    """See the module's text."""

    needs = frozenset({"train", "labels"})

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, task: Any, loaders: Mapping[str, Iterable[dict[str, Any]]]) -> dict[str, float]:
        """`{"knn_accuracy": ...}` on the held-out images."""
        train, val = extract_features(task.backbone, loaders["train"]), extract_features(task.backbone, loaders["val"])
        with torch.autocast("cpu", enabled=False):  # the features may come from one; neighbours are told apart in fp32
            scores_BC = knn_scores(
                train.pooled, train.labels, val.pooled, k=self.config.k, temperature=self.config.temperature
            )
        return {"knn_accuracy": (scores_BC.argmax(1) == val.labels).float().mean().item()}


def knn_scores(
    train_ND: Float[Tensor, "N D"],
    label_N: Int[Tensor, "N"],
    query_BD: Float[Tensor, "B D"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Float[Tensor, "B C"]:
    """Class shares among the k nearest training images, weighted by similarity; rows sum to 1."""
    num_classes = int(label_N.max()) + 1
    train_ND = F.normalize(train_ND, dim=1)
    parts = []
    for part_BD in F.normalize(query_BD, dim=1).split(chunk):
        cosine_BK, index_BK = (part_BD @ train_ND.T).topk(min(k, len(train_ND)), dim=1)
        weight_BK = (cosine_BK / temperature).softmax(dim=1)
        scores_BC = torch.zeros(len(part_BD), num_classes, device=part_BD.device)
        parts.append(scores_BC.scatter_add_(1, label_N[index_BK], weight_BK))
    return torch.cat(parts)
