"""The evaluation contract: `run(task, loaders) -> {metric: value}`, during training or after it.

A file in this folder holds one evaluation: `class Config(ComponentConfig)` whose `build()` returns an `Evaluation`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from openeva.backbones.base import Backbone
from openeva.data.views import normalise


@runtime_checkable
class Evaluation(Protocol):
    """Measures a task's model on data.

    It may say what it cannot do without, as an attribute `needs` (see `needs_of`).
    """

    def run(self, task: Any, loaders: Mapping[str, Iterable[dict[str, Any]]]) -> dict[str, float]:
        """Metrics by name.

        Args:
            task: The task in eval mode; `task.backbone` is its image encoder.
            loaders: `"train"` (evaluation transform, in order) and `"val"`; batches as in `data/loader.py`.
        """
        ...


def needs_of(evaluation: Evaluation) -> frozenset[str]:
    """What the data must have: "labels", "train" (training images that can be read by number)."""
    return frozenset(getattr(evaluation, "needs", ()))


class LabelledFeatures(NamedTuple):
    """Pooled features of a data set with labels, on the CPU."""

    pooled: Float[Tensor, "B D"]
    labels: Int[Tensor, "B"]


_found: ContextVar[dict[tuple[int, int], LabelledFeatures] | None] = ContextVar("_found", default=None)


@contextmanager
def shared_features() -> Iterator[None]:
    """Within this context the weights do not change: features are extracted once, for all evaluations that ask."""
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def extract_features(backbone: Backbone, loader: Iterable[dict[str, Any]]) -> LabelledFeatures:
    """Pooled features of every image of a loader, gathered from all processes (collective).

    Raises:
        ValueError: Images without labels; nothing after the first batch of them is looked at.
    """
    found = _found.get()
    key = (id(backbone), id(loader))
    if found is None:
        return _extract(backbone, loader)
    if key not in found:
        found[key] = _extract(backbone, loader)
    return found[key]


@torch.no_grad()
def _extract(backbone: Backbone, loader: Iterable[dict[str, Any]]) -> LabelledFeatures:
    weight = next(backbone.parameters())
    pooled, labels = [torch.empty(0, backbone.width)], [torch.empty(0, dtype=torch.int64)]  # there may be no images
    for batch in loader:
        labels.append(batch["label"].cpu())
        if (batch["label"] < 0).any():
            break  # all processes will see it below
        # weights that are gathered in reduced precision (FSDP) take no other input outside autocast
        image_BCYX = normalise(
            batch["image"].to(weight.device), backbone.normalisation.mean, backbone.normalisation.std, weight.dtype
        )
        pooled.append(backbone(image_BCYX).pooled.float().cpu())
    features = LabelledFeatures(torch.cat(pooled), torch.cat(labels))
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, features)
        features = LabelledFeatures(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
    if (features.labels < 0).any():
        raise ValueError(
            "this evaluation needs labels, but the data has none; remove it from `evals`, or give labels (such as"
            " `labels: true` of image_folder: one folder per class)"
        )
    return features


Result = TypeVar("Result")


def once(compute: Callable[[], Result]) -> Result:
    """What `compute` gives on the first process, on all of them; so does a `ValueError` (collective)."""
    if not dist.is_initialized():
        return compute()
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [compute()]
        except ValueError as error:
            box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], ValueError):
        raise box[0]
    result: Result = box[0]
    return result
