"""Masked pre-training: predict the target's vector at every hidden patch from the visible ones.

batch -> student view, hidden patches -> backbone -> linear head at hidden patches -> loss against the target of the
same crop

Paper: EVA section 2.1. Source: spec sections 1.3, 2.2, 2.3: the loss is a mean over all masked tokens of the batch
(not per image). MVP, EVA-L and others are this task with another target, masking or backbone.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from openeva.backbones.base import Backbone
from openeva.backbones.vit import model_path
from openeva.checkpoints.detect import prediction_width
from openeva.checkpoints.load import LoadReport, load_into, read_weights
from openeva.config import Backbone as BackboneField
from openeva.config import ComponentConfig
from openeva.config import Target as TargetField
from openeva.data.masking import AlternateMasking, Masking
from openeva.data.views import ViewSpec, normalise
from openeva.engine.distributed import sum_over_processes, unwrap
from openeva.engine.timing import section
from openeva.targets.base import Target
from openeva.tasks.base import Batch, Task


class Config(ComponentConfig):
    """Masked pre-training of any backbone that takes a mask, on any target."""

    name: str = "pretrain"
    backbone: BackboneField = Field(description="the student")
    target: TargetField = Field(description="what a masked patch should predict")
    masking: Masking = Field(description="which patches are hidden")
    init_from: str | None = Field(
        None, description="run, model folder or official MIM file whose weights to start from"
    )
    init_head: bool = Field(True, description="take over its prediction head too; false for another teacher")

    def build(self) -> "PretrainTask":
        """Make student and target.

        Raises:
            ValueError: The parts do not fit together (a backbone without a mask token, more masked patches than there
                are).
        """
        return PretrainTask(self)


class MimStudent(nn.Module):
    """The part that learns: backbone and linear prediction head."""

    def __init__(self, backbone: Backbone, predict_width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, predict_width)
        std = getattr(getattr(backbone, "config", None), "init_std", 0.02)
        nn.init.trunc_normal_(self.head.weight, std=std, a=-std, b=std)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        image_BCYX: Float[Tensor, "B C Y X"],
        mask_BN: Bool[Tensor, "B N"],
        index_M: Int[Tensor, "M"],
    ) -> Float[Tensor, "M V"]:
        """Predictions at the patches `index_M` (of the flattened `[B * N]`) of images whose `mask_BN` is hidden."""
        patches_BND = self.backbone(image_BCYX, mask_BN).patches
        return self.head(patches_BND.flatten(0, 1).index_select(0, index_M))


class PretrainTask(Task):
    """Student, target and loss of masked pre-training."""

    trainable: nn.Module

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        backbone: Backbone = config.backbone.build()
        if not hasattr(backbone, "mask_token"):
            raise ValueError(
                f"task.backbone: {config.backbone.name} has no mask token and cannot be pre-trained by this task"
            )
        self.grid = (backbone.image_size[0] // backbone.stride, backbone.image_size[1] // backbone.stride)
        self.masking = config.masking.build(self.grid)
        self.target: Target = config.target.build(self.grid)
        self.trainable = MimStudent(backbone, self.target.width)
        self.load_report: LoadReport | None = None
        if config.init_from is not None:
            self.load_report = self._start_from(config.init_from)
        self._image_size = backbone.image_size

    def _start_from(self, address: str) -> LoadReport:
        weights = read_weights(model_path(address))
        width = prediction_width(weights.state_dict)
        if self.config.init_head and width != self.target.width:
            raise ValueError(
                f"task.init_from {address} predicts {width} channels, but this run's target has {self.target.width};"
                " set task.init_head=false to start with a fresh prediction head"
            )
        if not self.config.init_head:
            for name in ("head.weight", "head.bias"):
                weights.state_dict.pop(name, None)
        return load_into(self.student, weights, fresh=() if self.config.init_head else ("head",), grid=self.grid)

    @property
    def student(self) -> MimStudent:
        """What learns, without the wrapper of data-parallel training."""
        return cast("MimStudent", unwrap(self.trainable))

    @property
    def backbone(self) -> Backbone:
        """The student's image encoder."""
        return self.student.backbone

    def view_spec(self, *, train: bool) -> ViewSpec:
        """What the loader should make of each image; held-out data get the alternating mask (spec section 2.4)."""
        masking = self.masking if train else AlternateMasking().build(self.grid)
        looked_up = train and getattr(self.config.target, "cache", False)  # then nobody looks at the target's view
        return ViewSpec(self._image_size, None if looked_up else self.target.view.image_size, masking)

    def prepare(self, images: Iterable[Batch], folder: Path, progress: Callable[[int], None] | None = None) -> None:
        """Let the target see the training images once, where it needs statistics or a cache of features."""
        target: Any = self.target
        if getattr(target, "needs_preparation", False):
            target.prepare(images, folder, progress)

    def speed_up_frozen(self, *, compile_forward: bool) -> None:
        """Let the target get faster."""
        self.target.speed_up(compile_forward=compile_forward)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss over the masked patches of a batch, and the mean cosine as a scalar for the log."""
        index_M, weight_M = batch["masked_index"], batch["masked_weight"]
        with section("teacher"):
            target_MV = self.targets(batch).flatten(0, 1).index_select(0, index_M)
        statistics = self.backbone.normalisation
        image_BCYX = normalise(batch["image"], statistics.mean, statistics.std)
        predicted_MV = self.trainable(image_BCYX, batch["mask"], index_M)
        loss = self.target.loss(predicted_MV, target_MV, weight_M)
        return loss, {}

    def targets(self, batch: Batch) -> Float[Tensor, "B N V"]:
        """Targets of all patches: looked up where they were cached, computed from the target's view otherwise."""
        target: Any = self.target
        if self.training and getattr(target, "cached", False):  # the cache holds the training images only
            return target.lookup(batch["index"], batch["flip"])
        view = self.target.view
        image_BCYX = batch["target_image"] if "target_image" in batch else batch["image"]
        return self.target(normalise(image_BCYX, view.normalisation.mean, view.normalisation.std))

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch]) -> dict[str, float]:
        """Held-out loss, a mean over all masked tokens of all images on all processes."""
        device = next(self.parameters()).device
        total, count = torch.zeros((), device=device), torch.zeros((), device=device)
        for host_batch in loader:
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in host_batch.items()}
            loss, _ = self(batch)
            tokens = batch["masked_weight"].sum()
            total, count = total + loss.float() * tokens, count + tokens
        return {"held_out_loss": (sum_over_processes(total) / sum_over_processes(count)).item()}

    def flops_per_sample(self) -> float:
        """Three forward passes of the student and its head (at masked patches), one of the teacher."""
        head = 2.0 * self.masking.max_masked * self.backbone.width * self.target.width
        return 3 * (self.backbone.flops() + head) + self.target.flops()

    def identity(self) -> dict[str, Any]:
        """A checkpoint continues only with the same target."""
        return {"target": self.target.identity, "target_width": self.target.width}
