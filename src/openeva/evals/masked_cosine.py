"""How well hidden patches are predicted on held-out images, beside three predictions that need no learning.

Per image one mask of the training kind, the same whatever the batch or process; cosine between prediction and target
at the hidden patches, averaged over all of them.
The baselines predict the mean of the image's visible target vectors, the position's mean over the training images,
and the target vector of a training image at the same position. A student that does not beat them has learned nothing
about context.
"""

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from openeva.config import ComponentConfig
from openeva.data.sampler import seed_of
from openeva.data.views import normalise
from openeva.engine.distributed import sum_over_processes
from openeva.engine.loop import to_device

NAMES = ("masked_cosine", "visible_mean", "position_mean", "other_image")
NUM_OTHERS = 64
"""Training images, one of each batch, that stand for "another image": neighbours in a data set are often alike."""


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
        self.needs = frozenset({"targets", "train"} if config.baselines else {"targets"})

    @torch.no_grad()
    def run(self, task: Any, loaders: Mapping[str, Iterable[dict[str, Any]]]) -> dict[str, float]:
        """`{"masked_cosine": ...}` and, with baselines, `visible_mean`, `position_mean` and `other_image` beside it."""
        device = next(task.parameters()).device
        known = _look_at_training_images(task, loaders["train"], device) if self.config.baselines else None
        total_K, count_K = (torch.zeros(len(NAMES), dtype=torch.float64) for _ in range(2))
        for host_batch in loaders["val"]:
            batch = to_device(host_batch, device)
            target_BNV = task.targets(batch)
            mask_BN = masks_of(task, host_batch["index"], self.config.seed).to(device)
            guesses = [predict_patches(task, batch, mask_BN)]
            if known is not None:
                position_NV, others_KNV = known
                chosen_B = [seed_of(self.config.seed, 1, i) % len(others_KNV) for i in host_batch["index"].tolist()]
                guesses += [_visible_mean(target_BNV, mask_BN), position_NV.expand_as(target_BNV), others_KNV[chosen_B]]
            for number, guess_BNV in enumerate(guesses):
                cosine_BN = F.cosine_similarity(guess_BNV.float(), target_BNV, dim=-1)
                total_K[number] += cosine_BN[mask_BN].sum().item()
                count_K[number] += mask_BN.sum().item()
        totals, counts = sum_over_processes(total_K).tolist(), sum_over_processes(count_K).tolist()
        return {name: total / count for name, total, count in zip(NAMES, totals, counts, strict=True) if count}


def masks_of(task: Any, index_B: Int[Tensor, "B"], seed: int) -> Bool[Tensor, "B N"]:
    """One mask of the kind the task trains with for each sample, by its number alone."""
    masks = [task.masking(random.Random(seed_of(seed, index))).reshape(-1) for index in index_B.tolist()]
    return torch.from_numpy(np.stack(masks))


def predict_patches(task: Any, batch: dict[str, Any], mask_BN: Bool[Tensor, "B N"]) -> Float[Tensor, "B N V"]:
    """The student's prediction at every patch, hidden or not."""
    statistics = task.backbone.normalisation
    image_BCYX = normalise(batch["image"], statistics.mean, statistics.std)
    every_M = torch.arange(mask_BN.numel(), device=mask_BN.device)
    return task.student(image_BCYX, mask_BN, every_M).unflatten(0, mask_BN.shape)


def _visible_mean(target_BNV: Float[Tensor, "B N V"], mask_BN: Bool[Tensor, "B N"]) -> Float[Tensor, "B N V"]:
    visible_BN1 = (~mask_BN)[:, :, None].float()
    mean_B1V = (target_BNV * visible_BN1).sum(1, keepdim=True) / visible_BN1.sum(1, keepdim=True)
    return mean_B1V.expand_as(target_BNV)


def _look_at_training_images(
    task: Any, loader: Iterable[dict[str, Any]], device: torch.device
) -> tuple[Float[Tensor, "N V"], Float[Tensor, "K N V"]]:
    """The mean target of each position, and the targets of some images from all over the data (one of each batch)."""
    total_NV = torch.zeros(task.grid[0] * task.grid[1], task.target.width, device=device)
    count = torch.zeros((), device=device)
    some: list[Tensor] = []
    for host_batch in loader:
        target_BNV = task.targets(to_device(host_batch, device))
        total_NV += target_BNV.sum(0)
        count += len(target_BNV)
        if len(some) < NUM_OTHERS:
            some.append(target_BNV[0])
    if not some:  # a process whose share of the training images is empty
        some.append(torch.zeros_like(total_NV))
    return sum_over_processes(total_NV) / sum_over_processes(count), torch.stack(some)
