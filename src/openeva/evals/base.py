"""The evaluation contract: `run(task, loaders) -> {metric: value}`, during training or after it.

A file in this folder holds one evaluation: `class Config(ComponentConfig)` whose `build()` returns an `Evaluation`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from openeva.backbones.base import Backbone
from openeva.data.views import normalise


@runtime_checkable
class Evaluation(Protocol):
    """Measures a task's model on data."""

    def run(self, task: Any, loaders: Mapping[str, Iterable[dict[str, Any]]]) -> dict[str, float]:
        """Metrics by name.

        Args:
            task: The task in eval mode; `task.backbone` is its image encoder.
            loaders: `"train"` (evaluation transform, in order) and `"val"`; batches as in `data/loader.py`.
        """
        ...


class LabelledFeatures(NamedTuple):
    """Pooled features of a data set with labels, on the CPU."""

    pooled: Float[Tensor, "B D"]
    labels: Int[Tensor, "B"]


@torch.no_grad()
def extract_features(backbone: Backbone, loader: Iterable[dict[str, Any]]) -> LabelledFeatures:
    """Pooled features of every image of a loader, gathered from all processes.

    Raises:
        ValueError: Images without labels.
    """
    device = next(backbone.parameters()).device
    pooled, labels = [], []
    for batch in loader:
        image_BCYX = normalise(batch["image"].to(device), backbone.normalisation.mean, backbone.normalisation.std)
        pooled.append(backbone(image_BCYX).pooled.float().cpu())
        labels.append(batch["label"].cpu())
    features = LabelledFeatures(torch.cat(pooled), torch.cat(labels))
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, features)
        features = LabelledFeatures(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
    if (features.labels < 0).any():
        raise ValueError("this evaluation needs labels, but the data has none; remove it from `evals`, or give labels")
    return features
