"""Masked pre-training: predict the target's vector at every hidden patch from the visible ones.

batch -> student view, hidden patches -> student (backbone and prediction head, or decoder) -> predictions at hidden
patches -> loss against the target of the same crop

Paper: EVA section 2.1. Source: spec sections 1.3, 1.7, 2.2-2.4: the loss is a mean over all masked tokens of the batch
(not per image), minus the cosine for both kinds of student (the released code of EVA-L lacks the minus sign). MVP,
EVA-L and others are this task with another target, masking, decoder or backbone.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from openeva.backbones.base import Backbone
from openeva.checkpoints.detect import prediction_width
from openeva.checkpoints.load import LoadReport, check_unseen, load_into, read_weights
from openeva.checkpoints.native import model_path
from openeva.config import Backbone as BackboneField
from openeva.config import ComponentConfig
from openeva.config import Target as TargetField
from openeva.data.masking import AlternateMasking, Masking
from openeva.data.views import ViewSpec, normalise
from openeva.engine.distributed import sum_over_processes, unwrap
from openeva.engine.timing import section
from openeva.heads.mae_decoder import MaeDecoderConfig, MaeStudent
from openeva.heads.mim import MimStudent, NoDecoder
from openeva.layers.flops import training_passes
from openeva.targets.base import Target
from openeva.tasks.base import Batch, Task

Decoder = Annotated[NoDecoder | MaeDecoderConfig, Field(discriminator="name")]
"""Field type of a recipe: `decoder: {name: mae, width: 512, depth: 4}`."""


class Config(ComponentConfig):
    """Masked pre-training of any backbone that takes a mask, on any target."""

    name: str = "pretrain"
    backbone: BackboneField = Field(description="the student")
    target: TargetField = Field(description="what a masked patch should predict")
    masking: Masking = Field(description="which patches are hidden")
    decoder: Decoder = Field(
        NoDecoder(), description="none: hidden patches are mask tokens of the encoder; mae: it sees visible ones only"
    )
    init_from: str | None = Field(
        None, description="run, model folder or official MIM file whose weights to start from"
    )
    init_head: bool = Field(
        True, description="take over its prediction head or decoder too; false for another teacher or decoder"
    )

    @model_validator(mode="after")
    def _counts_are_equal(self) -> "Config":
        if getattr(self.backbone, "num_frames", None) is not None:
            raise ValueError("pre-training sees images: leave out task.backbone.num_frames")
        if isinstance(self.decoder, MaeDecoderConfig) and not self.masking.equal_counts:
            raise ValueError(
                f"decoder mae leaves hidden patches out, so that each image must have equally many; masking"
                f" {self.masking.name} does not ensure that: set masking={{name: random, ratio: 0.75}}, or"
                " decoder={name: none}"
            )
        return self

    def build(self) -> "PretrainTask":
        """Make student and target.

        Raises:
            ValueError: The parts do not fit together (a backbone without a mask token, more masked patches than there
                are).
        """
        return PretrainTask(self)


class PretrainTask(Task):
    """Student, target and loss of masked pre-training."""

    trainable: nn.Module

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        backbone: Backbone = config.backbone.build()
        self.grid = (backbone.image_size[0] // backbone.stride, backbone.image_size[1] // backbone.stride)
        self.masking = config.masking.build(self.grid)
        self.target: Target = config.target.build(self.grid)
        self.trainable = config.decoder.build(backbone, self.masking, self.target.width)
        self.load_report: LoadReport | None = None
        if config.init_from is not None:
            self.load_report = self._start_from(config.init_from)
        self._image_size = backbone.image_size

    def _start_from(self, address: str) -> LoadReport:
        weights = read_weights(model_path(address))
        check_unseen(self.config.backbone, weights, f"init_from {address}")
        part, width = self.student.prediction_part, prediction_width(weights.state_dict)
        if not self.config.init_head:
            for name in [name for name in weights.state_dict if name.startswith(f"{part}.")]:
                del weights.state_dict[name]
            fresh = [part, "backbone.mask_token"]  # the backbone of a student with a decoder has no mask token
        elif part not in weights.layout.parts:
            raise ValueError(
                f"task.init_from {address} has no {part} (only {' and '.join(weights.layout.parts)}), but this run's"
                f" task.decoder is {self.config.decoder.name}; set task.init_head=false to start with a fresh one"
            )
        elif width != self.target.width:
            raise ValueError(
                f"task.init_from {address} predicts {width} channels, but this run's target has {self.target.width};"
                " set task.init_head=false to start with a fresh prediction head"
            )
        else:
            fresh = ["decoder.pos_embed"]  # a fixed table; where the file's is of another grid, the model has its own
        return load_into(self.student, weights, fresh=fresh, grid=self.grid)

    @property
    def student(self) -> MimStudent | MaeStudent:
        """What learns, without the wrapper of data-parallel training."""
        return cast("MimStudent | MaeStudent", unwrap(self.trainable))

    @property
    def backbone(self) -> Backbone:
        """The student's image encoder."""
        return self.student.backbone

    def blocks(self) -> list[nn.Module]:
        """The blocks of the backbone, and those of a decoder."""
        return self.student.blocks()

    def view_spec(self, *, train: bool) -> ViewSpec:
        """What the loader should make of each image.

        Held-out images get the alternating mask where the encoder sees all patches, and masks as in training where it
        sees the visible ones only (spec section 2.4); each image always the same one.
        """
        alternate = not train and isinstance(self.config.decoder, NoDecoder)
        masking = AlternateMasking().build(self.grid) if alternate else self.masking
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
        """Three forward passes of what learns of the student (predicting at masked patches), one of the teacher."""
        frozen = (3 - training_passes(self.backbone)) * self.student.encoder_flops()
        return 3 * self.student.flops(self.masking.max_masked) - frozen + self.target.flops()

    def identity(self) -> dict[str, Any]:
        """A checkpoint continues only with the same target."""
        return {"target": self.target.identity, "target_width": self.target.width}
