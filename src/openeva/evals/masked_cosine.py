"""How well hidden patches are predicted on held-out images, beside three predictions that need no learning.

Per image one seeded mask of the training kind; cosine between prediction and target at the hidden patches, averaged.
The baselines predict the mean of the image's visible target vectors, the position's mean over the training images,
and the target vector of another image at the same position. A student that does not beat them has learned nothing
about context.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from openeva.config import ComponentConfig
from openeva.data.views import normalise


class Config(ComponentConfig):
    """Cosine at hidden patches of held-out images, with baselines."""

    name: str = "masked_cosine"
    seed: int = 0
    baselines: bool = Field(True, description="also measure the three predictions that need no learning")

    def build(self) -> "MaskedCosine":
        """Make the evaluation."""
        return MaskedCosine(self)


class MaskedCosine:
    """See the module's text."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @torch.no_grad()
    def run(self, task: Any, loaders: Mapping[str, Iterable[dict[str, Any]]]) -> dict[str, float]:
        """`{"masked_cosine": ...}` and, with baselines, `visible_mean`, `position_mean` and `other_image` beside it."""
        device = next(task.parameters()).device
        rng = random.Random(self.config.seed)
        position_NV = _position_mean(task, loaders["train"], device) if self.config.baselines else None
        totals: dict[str, float] = {}
        count = 0
        for batch in _on_device(loaders["val"], device):
            target_BNV = task.targets(batch)
            mask_BN = draw_masks(task, len(target_BNV), rng).to(device)
            guesses = {"masked_cosine": predict_patches(task, batch, mask_BN)}
            if position_NV is not None:
                visible_BN1 = (~mask_BN)[:, :, None].float()
                mean_B1V = (target_BNV * visible_BN1).sum(1, keepdim=True) / visible_BN1.sum(1, keepdim=True)
                guesses["visible_mean"] = mean_B1V.expand_as(target_BNV)
                guesses["position_mean"] = position_NV.expand_as(target_BNV)
                guesses["other_image"] = target_BNV.roll(1, dims=0)
            for name, guess_BNV in guesses.items():
                cosine_BN = F.cosine_similarity(guess_BNV.float(), target_BNV, dim=-1)
                totals[name] = totals.get(name, 0.0) + cosine_BN[mask_BN].sum().item()
            count += int(mask_BN.sum())
        return {name: total / count for name, total in totals.items()}


def draw_masks(task: Any, num_images: int, rng: random.Random) -> Bool[Tensor, "B N"]:
    """Masks of the kind the task trains with."""
    return torch.from_numpy(np.stack([task.masking(rng).reshape(-1) for _ in range(num_images)]))


def predict_patches(task: Any, batch: dict[str, Any], mask_BN: Bool[Tensor, "B N"]) -> Float[Tensor, "B N V"]:
    """The student's prediction at every patch, hidden or not."""
    statistics = task.backbone.normalisation
    image_BCYX = normalise(batch["image"], statistics.mean, statistics.std)
    every_M = torch.arange(mask_BN.numel(), device=mask_BN.device)
    return task.student(image_BCYX, mask_BN, every_M).unflatten(0, mask_BN.shape)


def _on_device(loader: Iterable[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    for batch in loader:
        yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _position_mean(task: Any, loader: Iterable[dict[str, Any]], device: torch.device) -> Float[Tensor, "N V"]:
    total_NV, count = None, 0
    for batch in _on_device(loader, device):
        target_BNV = task.targets(batch)
        total_NV = target_BNV.sum(0) if total_NV is None else total_NV + target_BNV.sum(0)
        count += len(target_BNV)
    if total_NV is None:
        raise ValueError("masked_cosine needs training images for its position mean")
    return total_NV / count
