"""The task contract: which model, which loss, which metrics. One thin file per task.

A file in this folder holds one task: `class Config(ComponentConfig)` whose `build()` returns a `Task`. A task that must
know the data first (how many classes there are) derives it from `TaskConfig` instead.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from openeva.backbones.base import Backbone
from openeva.checkpoints.delta import TrainedPart
from openeva.config import ComponentConfig
from openeva.data.mixture import Mixture, Streams
from openeva.data.views import ViewSpec
from openeva.engine.optim import TowerLayout

Batch = dict[str, Any]
"""What the loader yields; see `data/loader.py` for the keys."""


class TaskConfig(ComponentConfig):
    """Base of the `Config` of a task that takes something from the data before it is built."""

    def fit_to(self, train: Mixture | Streams, val: Mixture | None) -> "TaskConfig":
        """The config with what the data decides filled in.

        Raises:
            ConfigError: The data does not suit the task.
        """
        return self


class Task(nn.Module):
    """A model with its loss.

    Attributes:
        config: What it was built from, nothing left open; stored beside the weights.
        trainable: Everything that is optimised, averaged, sharded and saved, and the only thing wrapped by DDP/FSDP.
            Frozen teachers and tokenizers sit beside it as other children.
        frozen: Parts of `trainable` that do not learn (`tune.py`); they stay in evaluation mode.
        trained_part: What checkpoints and exported models hold; None for all of `trainable`.
        joint_loss: True = a sample's loss depends on the others of the step, whose micro-batches are one batch.
    """

    config: Any
    trainable: nn.Module
    frozen: tuple[nn.Module, ...] = ()
    trained_part: TrainedPart | None = None
    joint_loss: bool = False

    def train(self, mode: bool = True) -> Any:  # not Self: the run-time checks of shapes do not take it
        """Switch to training behaviour, but for what is frozen."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    @property
    def backbone(self) -> Backbone:
        """The image encoder that learns."""
        raise NotImplementedError

    @property
    def towers(self) -> dict[str, TowerLayout]:
        """Parts of `trainable` that may have a learning rate of their own, by the names that recipes use."""
        return {}

    def view_spec(self, *, train: bool) -> ViewSpec:
        """What the loader should make of each training or held-out image."""
        raise NotImplementedError

    def prepare(self, images: Iterable[Batch], folder: Path, progress: Callable[[int], None] | None = None) -> None:
        """Look at the training images once before training, where the task must.

        Args:
            images: Each training sample once, cut as in training but never mirrored.
            folder: Where to keep what was found.
            progress: Called with the number of images done.
        """

    def check_batch(self, size: int) -> None:
        """Whether it can be trained with micro-batches of that many samples; called before training.

        Raises:
            ValueError: It cannot.
        """

    def speed_up_frozen(self, *, compile_forward: bool) -> None:
        """Make what is frozen faster; called once, on the device and after `prepare`, before training."""

    def blocks(self) -> list[nn.Module]:
        """Repeated layers: the units of sharding and of block-wise compilation."""
        return list(getattr(self.backbone, "blocks", []))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`(loss, scalars)` of one micro-batch; scalars are detached, for the log only."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Bring parameters back to where they may be; called after each optimizer step, on the fp32 values."""

    def evaluate(self, loader: Iterable[Batch]) -> dict[str, float]:
        """Held-out metrics of the task itself."""
        raise NotImplementedError

    def flops_per_sample(self) -> float:
        """FLOPs of one training sample: three forward passes of what learns and one of what is frozen."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this task must agree on to be continued (for example the teacher)."""
        return {}

    def forward_backward(
        self, micro_batches: Sequence[Batch], backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Accumulate the gradient of the mean loss over the micro-batches, or of their joint loss.

        Returns:
            That loss and scalars, detached.
        """
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches, start=1):
            with self._synchronise_gradients(number == len(micro_batches)):
                loss, scalars = self(batch)
                backward(loss / len(micro_batches))
            losses.append(loss.detach())
            for key, value in scalars.items():
                sums[key] = sums.get(key, 0.0) + value / len(micro_batches)
        return sum(losses[1:], losses[0]) / len(losses), sums

    def _synchronise_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Exchange gradients between processes only at the last micro-batch."""
        if isinstance(self.trainable, DistributedDataParallel) and not last:
            return self.trainable.no_sync()
        if isinstance(self.trainable, FSDPModule):
            self.trainable.set_requires_gradient_sync(last)
        return nullcontext()
