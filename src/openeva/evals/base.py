"""The evaluation contract: `run(task, loaders) -> {metric: value}`, during training or after it.

A file in this folder holds one evaluation: `class Config(ComponentConfig)` whose `build()` returns an `Evaluation`.
"""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Evaluation(Protocol):
    """Measures a task's model on data."""

    def run(self, task: nn.Module, loaders: dict[str, Iterable[dict[str, Any]]]) -> dict[str, float]:
        """Metrics by name.

        Args:
            task: The task in eval mode; `task.backbone` is its image encoder.
            loaders: `"train"` (evaluation transform, in order) and `"val"`; batches as in `data/loader.py`.
        """
        ...
